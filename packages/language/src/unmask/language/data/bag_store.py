"""Documents as bags of words on disk, beside their tokens: what word sets are drawn from, memory-mapped by workers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from unmask.core.data.carriers import cache_dir
from unmask.core.data.stored import stored
from unmask.language.data.document_model import DocumentModel
from unmask.language.data.token_store import chunks
from unmask.language.data.vocabulary import Tokenizer
from unmask.language.data.word_sets import Bag
from unmask.language.data.words import WordReader

_AT_ONCE = 4096  # words encoded together


@dataclass(frozen=True)
class BagStore:
    """The known words of every document, and the pieces that words are written with.

    Args:
        folder: ``words.bin`` and ``counts.bin`` with ``offsets.npy``, ``lengths.npy``, and ``pieces.npy`` with
            ``piece_offsets.npy``.
    """

    folder: Path

    @cached_property
    def _arrays(self) -> dict[str, Any]:
        names = ("offsets", "lengths", "pieces", "piece_offsets")
        loaded: dict[str, Any] = {name: np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in names}
        for name in ("words", "counts"):
            file = self.folder / f"{name}.bin"
            empty = file.stat().st_size == 0  # which cannot be mapped
            loaded[name] = np.zeros(0, np.int32) if empty else np.memmap(file, dtype=np.int32, mode="r")
        return loaded

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}  # a worker maps the files again

    def __len__(self) -> int:
        return len(self._arrays["lengths"])

    def __getitem__(self, document: int) -> Bag:
        """The bag of a document."""
        start, end = self._arrays["offsets"][document : document + 2]
        words, counts = (self._arrays[name][start:end].astype(np.int64) for name in ("words", "counts"))
        return Bag(words, counts, int(self._arrays["lengths"][document]))

    def pieces(self, surfaces: Int[np.ndarray, "n"]) -> Int[np.ndarray, "pieces"]:
        """The token ids of words, one after another, by the numbers of their forms."""
        offsets, pieces = self._arrays["piece_offsets"], self._arrays["pieces"]
        return np.concatenate([pieces[offsets[i] : offsets[i + 1]] for i in surfaces.tolist()]).astype(np.int64)


def store_bags(
    texts: Iterable[str], model: DocumentModel, reader: WordReader, tokenizer: Tokenizer, identity: Any
) -> BagStore:
    """Count the words of documents into the cache, unless that was done before.

    Args:
        texts: of every document, in the order of the token store.
        model: which words are known.
        reader: text to words.
        tokenizer: writes words as pieces.
        identity: what the documents depend on, as JSON holds it.
    """
    key = json.dumps([identity, model.digest, reader.digest, tokenizer.vocabulary.digest])
    folder = cache_dir() / "bags" / hashlib.blake2b(key.encode(), digest_size=16).hexdigest()

    def build(ready: Path) -> dict[str, Any]:
        _write_bags(ready, texts, model, reader)
        _write_pieces(ready, model.surfaces, tokenizer)
        return {}

    stored(folder, build)
    return BagStore(folder)


def _write_bags(folder: Path, texts: Iterable[str], model: DocumentModel, reader: WordReader) -> None:
    sizes, lengths = [0], []
    with (folder / "words.bin").open("wb") as words, (folder / "counts.bin").open("wb") as counts:
        for text in texts:
            found = reader.words(text)
            numbers, times = model.counts(map(reader.unit, found))
            numbers.astype(np.int32).tofile(words)
            times.astype(np.int32).tofile(counts)
            sizes.append(len(numbers))
            lengths.append(len(found))
    np.save(folder / "offsets.npy", np.cumsum(sizes, dtype=np.int64))
    np.save(folder / "lengths.npy", np.array(lengths, np.int64))


def _write_pieces(folder: Path, surfaces: list[str], tokenizer: Tokenizer) -> None:
    """Each word as it is written within a text: after a space."""
    rows = [row for chunk in chunks(surfaces, _AT_ONCE) for row in tokenizer.encode([f" {word}" for word in chunk])]
    np.save(folder / "piece_offsets.npy", np.cumsum([0, *map(len, rows)], dtype=np.int64))
    np.save(folder / "pieces.npy", np.array([piece for row in rows for piece in row], np.int32))
