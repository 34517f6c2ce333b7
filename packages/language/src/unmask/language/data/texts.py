"""The data kind ``texts``: documents as token ids, packed into blocks of one length."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from unmask.core.data.carriers import cache_dir
from unmask.core.data.kinds import SourceError
from unmask.core.data.sources import absolute
from unmask.core.data.splits import SPLITS, assign
from unmask.core.data.stored import stored
from unmask.core.domain import Split
from unmask.core.errors import Problem
from unmask.core.randomness import stable_id
from unmask.language.data.documents import Document, Unit
from unmask.language.data.embedded.sets import names
from unmask.language.data.sources import Files, find_files
from unmask.language.data.token_store import TokenStore, store_tokens
from unmask.language.data.vocabulary import Tokenizer, TokenizerError, Vocabulary, open_tokenizer, train_tokenizer


@dataclass(frozen=True)
class Settings:
    """Which text, and how it becomes blocks of tokens.

    Args:
        source: a folder of .txt, .jsonl or .parquet files, one such file, or the name of a set.
        tokenizer: a directory or hub id with a tokenizer; null takes that of the network ``model``, where there is one,
            else trains one on the training split.
        vocabulary_size: token ids of a tokenizer that is trained here.
        length: tokens that the model sees at once.
        next_token: blocks hold one token more, which is only ever predicted: for causal language models.
        unit: of plain text files, what is one document: the file, or every line.
        text_field: the field of .jsonl and .parquet records with the text.
        wrap: what goes around each document: both special tokens, only the one that ends it, or nothing.
        val_share: share of the documents set aside for validation, and again for test, where the data give no splits.
        vocabulary: filled in from the tokenizer.
    """

    source: str = "mobydick"
    tokenizer: str | None = None
    vocabulary_size: Annotated[int, Field(ge=261)] = 4096
    length: Annotated[int, Field(ge=8)] = 128
    next_token: bool = True
    unit: Unit = "file"
    text_field: str = "text"
    wrap: Literal["both", "end", "none"] = "both"
    val_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    vocabulary: Vocabulary | None = None

    free_to_change: ClassVar[frozenset[str]] = frozenset({"source", "tokenizer"})
    filled_in: ClassVar[frozenset[str]] = frozenset({"vocabulary", "tokenizer"})


@dataclass(frozen=True)
class Sample:
    """One block."""

    tokens: np.ndarray
    id: int
    label: int


@dataclass(frozen=True)
class TextBatch:
    """Blocks of tokens.

    Args:
        tokens: ids; one more than the model sees with ``data.next_token``.
        ids: of the blocks, from the document and the position where each begins.
        labels: the file that each block begins in, as an index of the split's `classes`.
    """

    tokens: Int[Tensor, "batch length"]
    ids: Int[Tensor, "batch"]
    labels: Int[Tensor, "batch"]


class Texts:
    """One split: ``dataset[index, visit]`` is a block; nothing about it is random.

    The split's documents stand one after another, and a block begins where the one before it ended, so that it may hold
    the end of one document and the beginning of the next; what is left at the end is dropped.

    Args:
        store: all documents.
        documents: indices of those of this split.
        width: tokens of a block.
        problems: files and documents that were left out.
        left: other files there.
    """

    def __init__(
        self, store: TokenStore, documents: np.ndarray, width: int, problems: Sequence[Problem] = (), left: str = ""
    ) -> None:
        self._store, self._documents, self._width, self.problems, self._left = store, documents, width, problems, left
        lengths = store.offsets[documents + 1] - store.offsets[documents]
        self._ends = np.cumsum(lengths)
        blocks = int(self._ends[-1]) // width if len(documents) else 0
        self._starts = np.arange(blocks, dtype=np.int64) * width
        at = np.searchsorted(self._ends, self._starts, side="right")  # the document that each block begins in
        within = self._starts - (self._ends[at] - lengths[at])
        owners = store.ids[torch.from_numpy(documents[at])].tolist()
        self.ids = torch.tensor([(owner ^ stable_id(f"at {w}")) for owner, w in zip(owners, within, strict=True)])
        self.ids = self.ids.to(torch.int64)
        files = store.files[documents[at]]
        self.classes = [Path(name).stem for name in store.about["files"]]
        self.labels = torch.from_numpy(files.astype(np.int64))
        self._at = at

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        index, _ = item
        tokens = self.read(int(self._starts[index]), self._width)
        return Sample(tokens, int(self.ids[index]), int(self.labels[index]))

    @property
    def tokens(self) -> int:
        """Tokens of the whole split."""
        return int(self._ends[-1])

    def read(self, start: int, length: int) -> np.ndarray:
        """`length` ids of the split's documents, from `start` on."""
        pieces, document = [], int(np.searchsorted(self._ends, start, side="right"))
        while length:
            first, end = (
                self._store.offsets[self._documents[document]],
                self._store.offsets[self._documents[document] + 1],
            )
            skip = start - int(self._ends[document] - (end - first))
            piece = self._store.tokens[first + skip : min(first + skip + length, end)]
            pieces.append(piece.astype(np.int64))
            start, length, document = start + len(piece), length - len(piece), document + 1
        return np.concatenate(pieces)

    def name_of(self, sample_id: int) -> str:
        """The document and token that a block begins at."""
        index = int((self.ids == sample_id).nonzero()[0])
        document = self._documents[self._at[index]]
        within = self._starts[index] - (self._ends[self._at[index]] - self._length(document))
        return f"{self._store.name(int(document))}@{int(within)}"

    def _length(self, document: int) -> int:
        return int(self._store.offsets[document + 1] - self._store.offsets[document])

    def notes(self, batch_size: int) -> list[str]:
        """What to say before training on this split."""
        dropped = self.tokens - len(self) * self._width
        said = [f"{len(self._documents):,} documents, {self.tokens:,} tokens: {len(self):,} blocks of {self._width}"]
        said += [f"the last {dropped} tokens fill no block and are dropped"] if dropped else []
        return said + ([f"other files there, which hold no text: {self._left}"] if self._left else [])

    def view(self, rows: Tensor | slice = slice(None), *, seed: int = 0, augment: bool = False) -> Texts:
        """Some blocks of this split."""
        chosen, index = copy.copy(self), torch.arange(len(self))[rows].numpy()
        chosen.ids, chosen.labels = self.ids[index], self.labels[index]
        chosen._starts, chosen._at = self._starts[index], self._at[index]
        return chosen


def resolve(settings: Settings) -> Settings:
    """The settings with the tokenizer's ids filled in; a tokenizer is trained where none is given."""
    settings = absolute(settings, tuple(names()))
    tokenizer = tokenizer_of(settings)
    if settings.vocabulary is not None and settings.vocabulary != tokenizer.vocabulary:
        raise TokenizerError(
            f"the tokenizer is not the one that the run was started with (digest {settings.vocabulary.digest} then, "
            f"{tokenizer.vocabulary.digest} now). Give that one with --set data.tokenizer=DIR: RUN/tokenizer is a copy"
        )
    return replace(settings, vocabulary=tokenizer.vocabulary)


def for_networks(settings: Settings, networks: dict[str, str]) -> Settings:
    """The tokenizer of the language model that a method is given, where the recipe names no other."""
    if settings.tokenizer is not None or "model" not in networks:
        return settings
    return replace(settings, tokenizer=networks["model"])


def keep(settings: Settings, folder: Path) -> None:
    """Write the tokenizer into a run directory."""
    tokenizer_of(settings).save(folder / "tokenizer")


def tokenizer_of(settings: Settings) -> Tokenizer:
    """The tokenizer that the settings name, or one trained on the training split and kept in the cache."""
    if settings.tokenizer is not None:
        return open_tokenizer(settings.tokenizer)
    files = find_files(settings.source)
    key = stable_id(
        repr([files.identity, settings.vocabulary_size, settings.unit, settings.text_field, settings.val_share])
    )
    folder = cache_dir() / "tokenizers" / f"{key:016x}"

    def train(ready: Path) -> dict[str, Any]:
        train_tokenizer(_training_texts(files, settings), settings.vocabulary_size, ready)
        return {"source": settings.source}

    stored(folder, train)
    return open_tokenizer(str(folder))


def _training_texts(files: Files, settings: Settings) -> Iterable[str]:
    """The texts of the training split: found as `open_split` finds them, before there are tokens."""
    every = range(len(files.names))
    named = [(i, stable_id(d.name)) for i in every for d in _documents(files, i, settings) if isinstance(d, Document)]
    codes = iter(_codes(torch.tensor([key for _, key in named]), [i for i, _ in named], files, settings).tolist())
    for index in every:
        for document in _documents(files, index, settings):
            if isinstance(document, Document) and next(codes) == SPLITS["train"]:
                yield document.text


def _codes(ids: Tensor, owners: Iterable[int], files: Files, settings: Settings) -> Tensor:
    """The split of every document, from its id and its file."""
    given = None if files.given is None else [files.given[i] for i in owners]
    return assign(ids, None, given, settings.val_share, settings.val_share)


def _documents(files: Files, index: int, settings: Settings) -> Iterable[Document | Problem]:
    return files.documents(index, unit=settings.unit, text_field=settings.text_field)


def open_split(settings: Settings, split: Split, *, seed: int = 0, augment: bool = False) -> Texts:
    """The blocks of one split.

    Raises:
        UnmaskError: there are none, or no tokenizer.
    """
    files, tokenizer = find_files(settings.source), tokenizer_of(settings)
    v = tokenizer.vocabulary
    before, after = (
        [] if v.bos is None or settings.wrap != "both" else [v.bos],
        [] if settings.wrap == "none" else [v.eos],
    )
    documents = [(name, _documents(files, i, settings)) for i, name in enumerate(files.names)]
    identity = [files.identity, settings.unit, settings.text_field]
    store = store_tokens(documents, tokenizer, identity, (before, after))
    problems = [*files.problems, *store.problems]
    if not len(store):
        first = f": {problems[0].name}: {problems[0].reason}" if problems else ""
        raise SourceError(f"{settings.source}: there is no text in its {len(files.names)} files{first}")
    codes = _codes(store.ids, store.files.tolist(), files, settings)
    chosen = np.arange(len(store)) if split == "all" else (codes == SPLITS[split]).nonzero()[:, 0].numpy()
    width = settings.length + settings.next_token
    texts = Texts(store, chosen, width, problems, files.left)
    if not len(texts):
        raise SourceError(
            f"{settings.source} has no {split} text: its {len(chosen)} documents of {len(store)} fill no block of "
            f"{width} tokens. Give more text, a smaller data.length, or a larger data.val_share"
        )
    return texts


def collate(samples: Sequence[Sample]) -> TextBatch:
    """Blocks as a batch."""
    tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples]))
    ids, labels = (torch.tensor([getattr(sample, name) for sample in samples]) for name in ("id", "label"))
    return TextBatch(tokens, ids, labels)
