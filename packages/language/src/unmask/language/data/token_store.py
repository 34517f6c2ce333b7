"""A corpus as token ids on disk: encoded once, in bounded memory, and memory-mapped by every worker from then on."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from unmask.core.data.carriers import cache_dir
from unmask.core.data.stored import stored
from unmask.core.errors import Problem
from unmask.core.progress import progress_bar
from unmask.core.randomness import stable_id
from unmask.language.data.documents import Document
from unmask.language.data.vocabulary import Tokenizer

T = TypeVar("T")
_AT_ONCE = 512  # documents encoded together
_TURN = 10**9  # a document's number is its record's, and this much more for every turn of a chat after the first


@dataclass(frozen=True)
class TokenStore:
    """Documents one after another as ids, each the same number of parts.

    Args:
        folder: ``tokens.bin``, ``offsets.npy``, ``files.npy``, ``numbers.npy``, ``ids.npy`` and ``about.json``.
    """

    folder: Path

    @cached_property
    def about(self) -> dict[str, Any]:
        """``files`` (their names), ``parts``, ``dtype``, ``problems``: names and reasons of what was left out."""
        return json.loads((self.folder / "about.json").read_text(encoding="utf-8"))

    @cached_property
    def tokens(self) -> np.ndarray:
        """Every id, mapped from the disk."""
        return np.memmap(self.folder / "tokens.bin", dtype=self.about["dtype"], mode="r")

    @cached_property
    def offsets(self) -> np.ndarray:
        """The first id of each part of each document, and the end of the last."""
        return np.load(self.folder / "offsets.npy")

    @cached_property
    def files(self) -> np.ndarray:
        """The file of each document, as an index of ``about["files"]``."""
        return np.load(self.folder / "files.npy")

    @cached_property
    def ids(self) -> Int[Tensor, "documents"]:
        """A stable id of each document, from its name."""
        return torch.from_numpy(np.load(self.folder / "ids.npy"))

    def __len__(self) -> int:
        return len(self.files)

    def part(self, document: int, part: int = 0) -> np.ndarray:
        """The ids of one part of a document."""
        start, end = self.offsets[document * self.about["parts"] + part :][:2]
        return self.tokens[start:end].astype(np.int64)

    def lengths(self) -> Int[np.ndarray, "documents parts"]:
        """Tokens in each part of each document."""
        return np.diff(self.offsets).reshape(-1, self.about["parts"])

    def name(self, document: int) -> str:
        """A document's name: its file, its number there and, of a record of several, which of them."""
        turn, number = divmod(int(np.load(self.folder / "numbers.npy", mmap_mode="r")[document]), _TURN)
        return f"{self.about['files'][self.files[document]]}:{number}" + (f", turn {turn + 1}" if turn else "")

    @property
    def problems(self) -> list[Problem]:
        """Documents and files that were left out."""
        return [Problem(*item) for item in self.about["problems"]]

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}  # a worker maps the files again


def store_tokens(
    files: Sequence[tuple[str, Iterable[Document | Problem]]],
    tokenizer: Tokenizer,
    identity: Any,
    wrap: tuple[Sequence[int], Sequence[int]] = ((), ()),
) -> TokenStore:
    """Encode documents into the cache, unless that was done before.

    Args:
        files: names, and the documents of each.
        tokenizer: encodes.
        identity: what the documents depend on (paths, sizes, times of change, settings), as JSON holds it.
        wrap: ids that go before and after every part.
    """
    key = json.dumps([identity, tokenizer.vocabulary.digest, [list(part) for part in wrap]], sort_keys=True)
    folder = cache_dir() / "tokens" / hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    stored(folder, lambda ready: _encode(ready, files, tokenizer, wrap))
    return TokenStore(folder)


def _encode(
    folder: Path,
    files: Sequence[tuple[str, Iterable[Document | Problem]]],
    tokenizer: Tokenizer,
    wrap: tuple[Sequence[int], Sequence[int]],
) -> dict[str, Any]:
    dtype = np.dtype(np.uint16 if tokenizer.vocabulary.size <= 1 << 16 else np.uint32)
    before, after = (np.asarray(part, dtype) for part in wrap)
    lengths, owners, numbers, ids, problems = [0], [], [], [], []
    bar = progress_bar(f"tokenizing {len(files)} files", len(files))
    with (folder / "tokens.bin").open("wb") as out, bar as advance:
        for index, (_, documents) in enumerate(files):
            for chunk in chunks(documents, _AT_ONCE):
                problems += [list(item) for item in chunk if isinstance(item, Problem)]
                good = [item for item in chunk if isinstance(item, Document)]
                for encoded in tokenizer.encode([text for document in good for text in document.parts]):
                    row = np.concatenate([before, np.asarray(encoded, dtype), after])
                    row.tofile(out)
                    lengths.append(len(row))
                for document in good:
                    owners.append(index)
                    numbers.append(int(document.name.rpartition(":")[2]))
                    ids.append(stable_id(document.name))
            advance(1)
    np.save(folder / "offsets.npy", np.cumsum(lengths, dtype=np.int64))
    for name, values, kind in (("files", owners, np.int32), ("numbers", numbers, np.int64), ("ids", ids, np.int64)):
        np.save(folder / f"{name}.npy", np.asarray(values, kind))
    parts = (len(lengths) - 1) // max(1, len(ids))
    return {"files": [name for name, _ in files], "parts": parts, "dtype": dtype.name, "problems": problems}


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """`items` in lists of `size`; the last may be shorter."""
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def numbered(name: str, turn: int) -> str:
    """The name of one of the documents of a record: ``chats.jsonl:17`` becomes another for every turn."""
    file, _, number = name.rpartition(":")
    return f"{file}:{int(number) + turn * _TURN}"
