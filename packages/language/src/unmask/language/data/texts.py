"""The data kind ``texts``: documents as token ids, packed into blocks of one length."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from pydantic import Field
from torch import Tensor

from unmask.core.data.kinds import SourceError
from unmask.core.domain import Split
from unmask.core.errors import Problem
from unmask.core.randomness import stable_id
from unmask.language.data import corpus
from unmask.language.data.corpus import Read, encoded, for_networks, kept, open_corpus
from unmask.language.data.documents import Unit
from unmask.language.data.token_store import TokenStore
from unmask.language.data.vocabulary import Tokenizer, Vocabulary, known

__all__ = [
    "Settings", "TextBatch", "Texts", "Wrap", "collate", "for_networks", "keep", "kept", "open_split",
    "preprocess", "resolve", "wrapping",
]  # fmt: skip

Wrap = Literal["both", "end", "none"]  # special tokens around a document


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
    wrap: Wrap = "both"
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
        valid: False = padding; None in blocks, which have none.
    """

    tokens: Int[Tensor, "batch length"]
    ids: Int[Tensor, "batch"]
    labels: Int[Tensor, "batch"]
    valid: Bool[Tensor, "batch length"] | None = None


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

    def read(self, start: int, length: int, values: np.ndarray | None = None) -> np.ndarray:
        """`length` ids of the split's documents from `start` on, or of other `values` that the store's tokens have."""
        values = self._store.tokens if values is None else values
        pieces, document = [], int(np.searchsorted(self._ends, start, side="right"))
        while length:
            first, end = (
                self._store.offsets[self._documents[document]],
                self._store.offsets[self._documents[document] + 1],
            )
            skip = start - int(self._ends[document] - (end - first))
            piece = values[first + skip : min(first + skip + length, end)]
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


def _documents(settings: Settings) -> Read:
    return lambda files, i: files.documents(i, unit=settings.unit, text_field=settings.text_field)


def resolve(settings: Settings) -> Settings:
    """The settings with the tokenizer's ids filled in; a tokenizer is trained where none is given."""
    return corpus.resolve(settings, _documents(settings), [settings.unit, settings.text_field])


def keep(settings: Settings, folder: Path) -> None:
    """Write the tokenizer into a run directory."""
    tokenizer_of(settings).save(folder / "tokenizer")


def tokenizer_of(settings: Settings) -> Tokenizer:
    """The tokenizer that the settings name, or the one trained on the training split."""
    return corpus.tokenizer_of(settings, _documents(settings), [settings.unit, settings.text_field])


def open_split(settings: Settings, split: Split, *, seed: int = 0, augment: bool = False) -> Texts:
    """The blocks of one split.

    Raises:
        UnmaskError: there are none, or no tokenizer.
    """
    tokenizer, identity = tokenizer_of(settings), [settings.unit, settings.text_field]
    every = open_corpus(
        settings, tokenizer, _documents(settings), identity, wrapping(settings.wrap, tokenizer.vocabulary)
    )
    chosen, width = every.members(split), settings.length + settings.next_token
    texts = Texts(every.store, chosen, width, every.problems, every.files.left)
    if not len(texts):
        share = "" if split == "train" else ", or a larger data.val_share"
        raise SourceError(
            f"{settings.source} has no {split} text: its {len(chosen)} documents of {len(every.store)} fill no block "
            f"of {width} tokens. Give more text, a smaller data.length{share}"
        )
    return texts


def wrapping(wrap: Wrap, vocabulary: Vocabulary) -> tuple[list[int], list[int]]:
    """The ids that go before and after every document."""
    before = [vocabulary.bos] if vocabulary.bos is not None and wrap == "both" else []
    return before, [] if wrap == "none" else [vocabulary.eos]


def preprocess(samples: str | Sequence[str], settings: Settings) -> TextBatch:
    """One text or several as a batch, each with special tokens around it as a document has them."""
    tokens, ids, valid = encoded(samples, settings, wrapping(settings.wrap, known(settings.vocabulary)))
    return TextBatch(tokens, ids, torch.zeros(len(ids), dtype=torch.int64), valid)


def collate(samples: Sequence[Sample]) -> TextBatch:
    """Blocks as a batch."""
    tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples]))
    ids, labels = (torch.tensor([getattr(sample, name) for sample in samples]) for name in ("id", "label"))
    return TextBatch(tokens, ids, labels)
