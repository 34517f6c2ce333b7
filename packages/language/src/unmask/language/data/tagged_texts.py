"""The data kind ``tagged_texts``: blocks of tokens with the word class of each, and a curriculum over the blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from unmask.core.data.carriers import cache_dir
from unmask.core.data.kinds import SourceError
from unmask.core.data.stored import stored
from unmask.core.domain import Split
from unmask.core.errors import Problem
from unmask.core.training.pacing import Pacing
from unmask.language.data import corpus, texts
from unmask.language.data.corpus import Corpus, for_networks, kept, open_corpus
from unmask.language.data.difficulty import ORDERS, easiest, source_scores, unigram_perplexities
from unmask.language.data.documents import RECORDS, Document, Unit
from unmask.language.data.sources import Files
from unmask.language.data.texts import Texts, Wrap, wrapping
from unmask.language.data.token_store import chunks
from unmask.language.data.vocabulary import Tokenizer, Vocabulary, known
from unmask.language.data.word_classes import UNKNOWN, Span, aligned, by_rules, untagged

__all__ = [
    "Curriculum", "Settings", "TaggedBatch", "TaggedTexts", "collate", "for_networks", "keep", "kept", "open_split",
    "preprocess", "resolve",
]  # fmt: skip

_AT_ONCE = 512  # documents tagged together


@dataclass(frozen=True)
class Curriculum:
    """Which blocks training may draw: the easiest share, which grows.

    Args:
        scores: what makes a block hard: the perplexity of its tokens under their frequencies (``unigram``); the source
            it begins in, by CLIMB's levels of BabyLM's ten sources; or a level for every file, by its name without
            suffix.
        pacing: the share of the blocks that is open.
    """

    scores: Literal["unigram", "spoken_first", "grammatical_first"] | dict[str, float] = "unigram"
    pacing: Pacing = Pacing()


@dataclass(frozen=True)
class Settings:
    """Which text with which word classes, and how it becomes blocks of tokens.

    Args:
        source: a folder of .txt, .jsonl or .parquet files, one such file, or the name of a set.
        tags: word classes that are given (plain text of ``word__<label>__TAG`` items, records with a field of them), or
            told by simple rules for English.
        tokenizer: a directory or hub id with a tokenizer; null takes that of the network ``model``, where there is one,
            else trains one on the training split.
        vocabulary_size: token ids of a tokenizer that is trained here.
        length: tokens that the model sees at once.
        unit: of plain text files, what is one document: the file, or every line.
        text_field: the field of .jsonl and .parquet records with the text.
        tagged_field: the field of records with the same words as ``word__<label>__TAG`` items.
        wrap: what goes around each document: both special tokens, only the one that ends it, or nothing.
        curriculum: which blocks training draws, and when; null draws epochs of all.
        val_share: share of the documents set aside for validation, and again for test, where the data give no splits.
        vocabulary: filled in from the tokenizer.
    """

    source: str = "mobydick"
    tags: Literal["given", "rules"] = "given"
    tokenizer: str | None = None
    vocabulary_size: Annotated[int, Field(ge=261)] = 8192
    length: Annotated[int, Field(ge=8)] = 128
    unit: Unit = "file"
    text_field: str = "text"
    tagged_field: str = "tagged_text"
    wrap: Wrap = "both"
    curriculum: Curriculum | None = None
    val_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    vocabulary: Vocabulary | None = None

    free_to_change: ClassVar[frozenset[str]] = frozenset({"source", "tokenizer"})
    filled_in: ClassVar[frozenset[str]] = frozenset({"vocabulary", "tokenizer"})


@dataclass(frozen=True)
class TaggedSample(texts.Sample):
    """One block, and the word class of each token."""

    tags: np.ndarray


@dataclass(frozen=True)
class TaggedBatch:
    """Blocks of tokens with word classes.

    Args:
        tokens: ids.
        ids: of the blocks.
        labels: the file that each block begins in, as an index of the split's `classes`.
        tags: the class of the word that each token is of, as an index of `unmask.language.data.word_classes.CLASSES`.
        valid: False = padding; None in blocks, which have none.
    """

    tokens: Int[Tensor, "batch length"]
    ids: Int[Tensor, "batch"]
    labels: Int[Tensor, "batch"]
    tags: Int[Tensor, "batch length"]
    valid: Bool[Tensor, "batch length"] | None = None


@dataclass(frozen=True)
class Tags:
    """The class of every token of a token store, on disk.

    Args:
        folder: ``tags.bin``.
    """

    folder: Path

    @cached_property
    def values(self) -> np.ndarray:
        """One byte for each token, mapped from the disk."""
        return np.memmap(self.folder / "tags.bin", dtype=np.uint8, mode="r")

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}  # a worker maps the file again


class TaggedTexts(Texts):
    """One split of texts as blocks with word classes; see `Texts`.

    Args:
        every: all documents.
        documents: indices of those of this split.
        tags: of all their tokens.
        width: tokens of a block.
        curriculum: which blocks may be drawn when; None draws epochs of all.
    """

    def __init__(
        self, every: Corpus, documents: np.ndarray, tags: Tags, width: int, curriculum: Curriculum | None = None
    ) -> None:
        super().__init__(every.store, documents, width, every.problems, every.files.left)
        self._tags, self._pacing, self.scores = tags, None, None
        if curriculum is not None and len(self):
            self._pacing, self.scores = curriculum.pacing, self._scored(curriculum)

    def __getitem__(self, item: tuple[int, int]) -> TaggedSample:
        plain = super().__getitem__(item)
        tags = self.read(int(self._starts[item[0]]), self._width, self._tags.values)
        return TaggedSample(plain.tokens, plain.id, plain.label, tags)

    def _scored(self, curriculum: Curriculum) -> Float[Tensor, "blocks"]:
        if curriculum.scores == "unigram":
            return unigram_perplexities(_Blocks(self), int(self._store.tokens.max()) + 1)
        levels = ORDERS[curriculum.scores] if isinstance(curriculum.scores, str) else curriculum.scores
        return source_scores(self.labels, self.classes, levels)

    @property
    def admitted(self) -> Any:
        """From the share of the run that is done to the blocks that may be drawn; None without a curriculum."""
        return None if self.scores is None else self._admitted

    def _admitted(self, progress: float) -> Bool[Tensor, "blocks"]:
        assert self.scores is not None and self._pacing is not None
        return easiest(self.scores, self._pacing(progress))

    def view(self, rows: Tensor | slice = slice(None), *, seed: int = 0, augment: bool = False) -> TaggedTexts:
        """Some blocks of this split."""
        chosen = super().view(rows)
        assert isinstance(chosen, TaggedTexts)
        chosen.scores = None if self.scores is None else self.scores[rows]
        return chosen


class _Blocks(Sequence[np.ndarray]):
    """The ids of a split's blocks, read one after another."""

    def __init__(self, split: Texts) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: Any) -> Any:
        if index >= len(self.split):
            raise IndexError(index)
        return self.split[index, 0].tokens


def _reader(settings: Settings) -> corpus.Read:
    """The documents of a file as plain text, with their words' classes among their fields."""

    def read(files: Files, index: int) -> Iterator[Document | Problem]:
        plain = not files.names[index].endswith(RECORDS)
        for item in files.documents(index, unit=settings.unit, text_field=settings.text_field):
            yield item if isinstance(item, Problem) else _tagged(item, plain, settings)

    return read


def _tagged(document: Document, plain: bool, settings: Settings) -> Document | Problem:
    text, given = document.parts[0], document.fields.get(settings.tagged_field)
    if settings.tags == "rules":
        return Document(document.name, (text,), {"spans": list(by_rules(text))})
    if not plain and not isinstance(given, str):
        there = ", ".join(map(str, document.fields)) or "none"
        reason = f"no tagged words in the field {settings.tagged_field!r} (there: {there}); set data.tagged_field, or"
        return Problem(document.name, f"{reason} data.tags=rules for classes by simple rules")
    try:
        text, spans = untagged(text) if plain else (text, aligned(text, str(given)))
    except ValueError as error:
        return Problem(document.name, f"{error}; expected word__<label>__TAG, or set data.tags=rules")
    return Document(document.name, (text,), {"spans": spans})


def _identity(settings: Settings) -> list[Any]:
    return ["tagged_texts", settings.tags, settings.unit, settings.text_field, settings.tagged_field]


def resolve(settings: Settings) -> Settings:
    """The settings with the tokenizer's ids filled in; a tokenizer is trained where none is given."""
    return corpus.resolve(settings, _reader(settings), _identity(settings))


def keep(settings: Settings, folder: Path) -> None:
    """Write the tokenizer into a run directory."""
    _tokenizer_of(settings).save(folder / "tokenizer")


def _tokenizer_of(settings: Settings) -> Tokenizer:
    return corpus.tokenizer_of(settings, _reader(settings), _identity(settings))


def open_split(settings: Settings, split: Split, *, seed: int = 0, augment: bool = False) -> TaggedTexts:
    """The blocks of one split; only the training split has the curriculum.

    Raises:
        UnmaskError: there are none, no tokenizer, or a file without a level.
    """
    tokenizer, read = _tokenizer_of(settings), _reader(settings)
    wrap = wrapping(settings.wrap, tokenizer.vocabulary)
    every = open_corpus(settings, tokenizer, read, _identity(settings), wrap)
    tags = _store_tags(every, tokenizer, read, (len(wrap[0]), len(wrap[1])))
    chosen = every.members(split)
    blocks = TaggedTexts(every, chosen, tags, settings.length, settings.curriculum if split == "train" else None)
    if not len(blocks):
        raise SourceError(
            f"{settings.source} has no {split} text: its {len(chosen)} documents of {len(every.store)} fill no block "
            f"of {settings.length} tokens. Give more text, a smaller data.length, or a larger data.val_share"
        )
    return blocks


def _store_tags(every: Corpus, tokenizer: Tokenizer, read: corpus.Read, around: tuple[int, int]) -> Tags:
    """The classes of a corpus's tokens in the cache, unless they are there already."""
    folder = cache_dir() / "tags" / every.store.folder.name

    def write(ready: Path) -> dict[str, Any]:
        with (ready / "tags.bin").open("wb") as out:
            for index in range(len(every.files.names)):
                documents = (item for item in read(every.files, index) if isinstance(item, Document))
                for chunk in chunks(documents, _AT_ONCE):
                    for tags in token_tags(chunk, tokenizer):
                        np.pad(tags, around, constant_values=UNKNOWN).tofile(out)
        return {"tokens": len(every.store.tokens)}

    stored(folder, write)
    return Tags(folder)


def token_tags(documents: Sequence[Document], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The class of each token: that of the word which its last character is of, X where that is in no word."""
    encodings = tokenizer.backend.encode_batch([d.parts[0] for d in documents], add_special_tokens=False)
    for document, encoding in zip(documents, encodings, strict=True):
        characters = np.full(len(document.parts[0]) + 1, UNKNOWN, np.uint8)
        spans: list[Span] = document.fields["spans"]
        for start, end, number in spans:
            characters[start:end] = number
        ends = np.asarray([end for _, end in encoding.offsets], np.int64)
        yield characters[ends - 1]  # a token of no characters takes the last entry, X


def preprocess(samples: str | Sequence[str], settings: Settings) -> TaggedBatch:
    """One text or several as a batch, each with special tokens around it as a document has them, all of class X."""
    tokens, ids, valid = corpus.encoded(samples, settings, wrapping(settings.wrap, known(settings.vocabulary)))
    return TaggedBatch(tokens, ids, torch.zeros_like(ids), torch.full_like(tokens, UNKNOWN), valid)


def collate(samples: Sequence[TaggedSample]) -> TaggedBatch:
    """Blocks as a batch."""
    plain = texts.collate(samples)
    tags = torch.from_numpy(np.stack([sample.tags for sample in samples]))
    return TaggedBatch(plain.tokens, plain.ids, plain.labels, tags)
