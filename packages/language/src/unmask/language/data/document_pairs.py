"""The data kind ``documents``: each with two sets of words, of which the first is the more representative of it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from pydantic import Field
from torch import Tensor

from unmask.core.data.carriers import cache_dir
from unmask.core.data.kinds import SourceError
from unmask.core.data.stored import stored
from unmask.core.domain import Split
from unmask.core.errors import Problem
from unmask.core.randomness import SampleKey, stable_id
from unmask.language.data import corpus
from unmask.language.data.bag_store import BagStore, store_bags
from unmask.language.data.corpus import Corpus, encoded, for_networks, kept, open_corpus
from unmask.language.data.document_model import DocumentModel, DocumentModelError, fit
from unmask.language.data.documents import Document, Unit
from unmask.language.data.sources import Files, find_files
from unmask.language.data.vocabulary import Tokenizer, Vocabulary, begins_word, known
from unmask.language.data.word_sets import WordSets, WordSetSampler, WordSettings
from unmask.language.data.words import WordReader, word_reader

__all__ = [
    "DocumentPairs", "PairBatch", "Settings", "collate", "for_networks", "keep", "kept", "open_split", "preprocess",
    "resolve",
]  # fmt: skip
SHORT, _USED = 100, 0.2  # tokens of a short document, and the share of those that is used, as released


@dataclass(frozen=True)
class Settings:
    """Which documents, and how they become pairs.

    Args:
        source: a folder of .jsonl, .parquet or .txt files, one such file, or the name of a set. Of a folder in the
            layout of BEIR only ``corpus.jsonl`` is read.
        tokenizer: a directory or hub id with a tokenizer; null takes that of the network ``model``, where there is one,
            else trains one on the training split.
        vocabulary_size: token ids of a tokenizer that is trained here.
        length: tokens that the model sees at once: of a word set, a document and three special tokens. A document that
            is longer is cut.
        pairs: pairs of each document in an epoch.
        thin_short: of documents under 100 tokens use a fifth, as released.
        unit: of plain text files, what is one document: the file, or every line.
        piece: characters of plain text; a file that is longer is cut at blank lines into documents about as long.
        title_field: the field of .jsonl and .parquet records with the title, where they have one; plain text has none.
        text_field: the field with the text.
        words: what counts as a word, and how word sets are drawn.
        val_share: share of the documents set aside for validation, and again for test, where the data give no splits.
        vocabulary: filled in from the tokenizer.
        counted: digest of the words of the training split; filled in.
    """

    source: str = "mobydick"
    tokenizer: str | None = None
    vocabulary_size: Annotated[int, Field(ge=261)] = 4096
    length: Annotated[int, Field(ge=32)] = 512
    pairs: Annotated[int, Field(ge=1)] = 1
    thin_short: bool = True
    unit: Unit = "file"
    piece: Annotated[int, Field(ge=100)] = 4000
    title_field: str = "title"
    text_field: str = "text"
    words: WordSettings = field(default_factory=WordSettings)
    val_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    vocabulary: Vocabulary | None = None
    counted: str | None = None

    free_to_change: ClassVar[frozenset[str]] = frozenset({"source", "tokenizer"})
    filled_in: ClassVar[frozenset[str]] = frozenset({"vocabulary", "tokenizer", "counted"})


# ---- samples -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """``[CLS] words [SEP] document [SEP]``.

    Args:
        tokens: ids.
        types: 0 in the first part, 1 from the document on.
        groups: which of the document's words a piece belongs to, from 0 on; -1 outside of the document.
    """

    tokens: Int[np.ndarray, "length"]
    types: Int[np.ndarray, "length"]
    groups: Int[np.ndarray, "length"]


@dataclass(frozen=True)
class Sample:
    """A document under its two word sets: the positive row, and the negative one."""

    rows: tuple[Row, Row]
    sets: WordSets
    id: int
    pad: int


@dataclass(frozen=True)
class PairBatch:
    """Documents, each as two rows: flattened, row 2i is the positive of row 2i + 1, and no shuffling can part them.

    Args:
        tokens: ids; first the row with the more representative word set.
        types: 0 in ``[CLS] words [SEP]``, 1 in the document.
        valid: False = padding.
        groups: which of the document's words a piece belongs to, from 0 on; -1 elsewhere.
        ids: of the pairs.
    """

    tokens: Int[Tensor, "batch 2 length"]
    types: Int[Tensor, "batch 2 length"]
    valid: Bool[Tensor, "batch 2 length"]
    groups: Int[Tensor, "batch 2 length"]
    ids: Int[Tensor, "batch"]


def build_row(
    words: Int[np.ndarray, "written"],
    document: Int[np.ndarray, "pieces"],
    length: int,
    vocabulary: Vocabulary,
    begins: Bool[np.ndarray, "vocabulary"],
) -> Row:
    """One row. The words are kept whole, and the document is cut to what is left of `length`.

    Args:
        words: the pieces of a word set.
        document: the pieces of a document, of which `length` are enough.
        length: tokens at most; word sets that leave no room for a document are cut to it.
        vocabulary: has the special ids.
        begins: which ids begin a word.
    """
    first = [] if vocabulary.bos is None else [vocabulary.bos]
    words = words[: length - len(first) - 3]
    document = document[: length - len(first) - len(words) - 2]
    head = np.concatenate([first, words, [vocabulary.eos]]).astype(np.int64)
    starts = begins[document]
    starts[:1] = True
    groups = np.concatenate([np.full(len(head), -1), np.cumsum(starts) - 1, [-1]])
    types = np.repeat([0, 1], [len(head), len(document) + 1])
    return Row(np.concatenate([head, document, [vocabulary.eos]]), types, groups)


class DocumentPairs:
    """One split: ``dataset[index, visit]`` is a document with a pair that follows from seed, document and visit.

    Args:
        corpus: all documents, as tokens.
        bags: and as words.
        sampler: draws the pairs.
        begins: which ids begin a word.
        members: indices of the documents of this split.
        settings: of this data kind.
        seed: of the pairs, and of which short documents are used.
    """

    def __init__(
        self,
        corpus: Corpus,
        bags: BagStore,
        sampler: WordSetSampler,
        begins: np.ndarray,
        members: np.ndarray,
        settings: Settings,
        seed: int,
    ) -> None:
        self._corpus, self._bags, self._sampler, self._begins = corpus, bags, sampler, begins
        self.settings, self.seed = settings, seed
        self.documents = len(members)
        owners = corpus.store.ids[torch.from_numpy(members)].tolist()
        if settings.thin_short:
            lengths = corpus.store.lengths()[members, 0].tolist()
            used = [n >= SHORT or _chosen(seed, owner) for n, owner in zip(lengths, owners, strict=True)]
            members, owners = members[used], [owner for owner, use in zip(owners, used, strict=True) if use]
        self.left_out = self.documents - len(members)
        self._members = np.repeat(members, settings.pairs)
        codes = [stable_id(f"pair {i}") if i else 0 for i in range(settings.pairs)]
        self.ids = torch.tensor([owner ^ code for owner in owners for code in codes], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        index, visit = item
        document, sample_id = int(self._members[index]), int(self.ids[index])
        key = SampleKey.of(self.seed, sample_id, visit).stream("word sets")
        sets = self._sampler.pair(self._bags[document], key)
        vocabulary = self._vocabulary
        body = self._corpus.store.part(document)[: self.settings.length]
        rows = []
        for number, words in enumerate((sets.positive, sets.negative)):
            pieces = self._bags.pieces(self._sampler.surfaces(words, key.stream(number)))
            rows.append(build_row(pieces, body, self.settings.length, vocabulary, self._begins))
        return Sample((rows[0], rows[1]), sets, sample_id, vocabulary.pad)

    @property
    def _vocabulary(self) -> Vocabulary:
        assert self.settings.vocabulary is not None
        return self.settings.vocabulary

    @property
    def lengths(self) -> Int[Tensor, "pairs"]:
        """Tokens of each document as the model sees it, word sets apart."""
        tokens = self._corpus.store.lengths()[self._members, 0]
        return torch.from_numpy(np.minimum(tokens, self.settings.length))

    @property
    def problems(self) -> Sequence[Problem]:
        """Files and documents that were left out."""
        return self._corpus.problems

    def name_of(self, sample_id: int) -> str:
        """The document of a pair."""
        index = int((self.ids == sample_id).nonzero()[0])
        return self._corpus.store.name(int(self._members[index]))

    def notes(self, batch_size: int) -> list[str]:
        """What to say before training on this split."""
        model, left = self._sampler.model, self._corpus.files.left
        said = [f"{self.documents:,} documents, {len(model.words):,} words known; mu = {self._sampler.mu:.1f}"]
        said += [f"{self.left_out:,} of them have under {SHORT} tokens and are left out"] if self.left_out else []
        return said + ([f"other files there, which hold no text: {left}"] if left else [])

    def view(self, rows: Tensor | slice = slice(None), *, seed: int = 0, augment: bool = False) -> DocumentPairs:
        """Some pairs of this split."""
        chosen, index = copy.copy(self), torch.arange(len(self))[rows]
        chosen.ids, chosen._members, chosen.seed = self.ids[index], self._members[index.numpy()], seed
        return chosen


def _chosen(seed: int, document: int) -> bool:
    """Whether a short document is used: the same in every epoch."""
    return SampleKey.of(seed, document).stream("short documents").uniform(1)[0] < _USED


def collate(samples: Sequence[Sample]) -> PairBatch:
    """Pairs as a batch, padded to the longest row."""
    padded = pad_rows([sample.rows for sample in samples], samples[0].pad)
    return PairBatch(**padded, ids=torch.tensor([sample.id for sample in samples], dtype=torch.int64))


def preprocess(samples: str | Sequence[str], settings: Settings) -> PairBatch:
    """One text or several as a batch: each stands in both rows, by itself, with special tokens around it."""
    vocabulary = known(settings.vocabulary)
    tokens, ids, valid = encoded(samples, settings, ([] if (b := vocabulary.bos) is None else [b], [vocabulary.eos]))
    both, seen = (part[:, None].repeat(1, 2, 1) for part in (tokens, valid))
    return PairBatch(both, torch.zeros_like(both), seen, torch.full_like(both, -1), ids)


def pad_rows(samples: Sequence[Sequence[Row]], pad: int) -> dict[str, Tensor]:
    """Rows, the same number of each sample, as tensors [samples, rows, length] by the names of `PairBatch`."""
    width, count = max(len(row.tokens) for rows in samples for row in rows), len(samples[0])
    fill = {"tokens": pad, "types": 0, "groups": -1}
    padded = {name: torch.full((len(samples), count, width), value) for name, value in fill.items()}
    padded["valid"] = torch.zeros(len(samples), count, width, dtype=torch.bool)
    for i, rows in enumerate(samples):
        for j, row in enumerate(rows):
            padded["valid"][i, j, : len(row.tokens)] = True
            for name in fill:
                padded[name][i, j, : len(row.tokens)] = torch.from_numpy(getattr(row, name))
    return padded


# ---- where they come from ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reader:
    """The documents of a source as the settings say: title and text as one."""

    settings: Settings

    def __call__(self, files: Files, index: int) -> Iterator[Document | Problem]:
        name, s = files.names[index], self.settings
        if Path(name).name != "corpus.jsonl" and any(Path(other).name == "corpus.jsonl" for other in files.names):
            return  # the queries of a collection in BEIR's layout
        for found in files.documents(index, unit=s.unit, piece=s.piece, text_field=s.text_field):
            yield found if isinstance(found, Problem) else replace(found, parts=(self._titled(found),))

    def _titled(self, document: Document) -> str:
        title, text = document.fields.get(self.settings.title_field), document.parts[0]
        return f"{title.strip()}. {text}" if isinstance(title, str) and title.strip() else text

    @property
    def identity(self) -> list[Any]:
        """What the documents depend on beside the files."""
        return [self.settings.unit, self.settings.piece, self.settings.title_field, self.settings.text_field]

    def titled(self, files: Files) -> Iterator[tuple[str, str, str]]:
        """The name, title and text of every document, in the order of the token store."""
        whole = replace(self.settings, title_field="")
        for index in range(len(files.names)):
            for found in _Reader(whole)(files, index):
                if isinstance(found, Document):
                    title = found.fields.get(self.settings.title_field)
                    yield found.name, title.strip() if isinstance(title, str) else "", found.parts[0]

    def texts(self, files: Files) -> Iterable[str]:
        """Every document, in the order of the token store."""
        found = (document for index in range(len(files.names)) for document in self(files, index))
        return (document.parts[0] for document in found if isinstance(document, Document))


def resolve(settings: Settings) -> Settings:
    """The settings with the tokenizer's ids and the digest of the counted words; both are made where there is none.

    Raises:
        UnmaskError: no tokenizer or no words, or others than those that the run was started with.
    """
    reader = _Reader(settings)
    settings = corpus.resolve(settings, reader, reader.identity)
    digest = document_model(settings).digest
    if settings.counted not in (None, digest):
        raise DocumentModelError(
            f"{settings.source}: the words of the training split are not those that the run was started with (digest "
            f"{settings.counted} then, {digest} now); give the same documents"
        )
    return replace(settings, counted=digest)


def keep(settings: Settings, folder: Path) -> None:
    """Write the tokenizer and the counted words into a run directory."""
    tokenizer_of(settings).save(folder / "tokenizer")
    document_model(settings).save(folder / "document_model")


def tokenizer_of(settings: Settings) -> Tokenizer:
    """The tokenizer that the settings name, or the one trained on the training split."""
    reader = _Reader(settings)
    return corpus.tokenizer_of(settings, reader, reader.identity)


def document_model(settings: Settings) -> DocumentModel:
    """The words of the training split, counted once and kept in the cache."""
    reader, files, words = _Reader(settings), find_files(settings.source), _word_reader(settings)
    parts = [files.identity, reader.identity, settings.val_share, words.digest, settings.words.least]
    folder = cache_dir() / "document_models" / f"{stable_id(repr(parts)):016x}"

    def build(ready: Path) -> dict[str, Any]:
        fit(corpus.training_texts(files, reader, settings), words, settings.words.least).save(ready)
        return {"source": settings.source}

    stored(folder, build)
    return _opened(folder)


@lru_cache(maxsize=2)
def _opened(folder: Path) -> DocumentModel:
    return DocumentModel.open(folder)


def _word_reader(settings: Settings) -> WordReader:
    return word_reader(settings.words.stop_words, settings.words.stem)


def open_split(settings: Settings, split: Split, *, seed: int = 0, augment: bool = False) -> DocumentPairs:
    """The pairs of one split.

    Raises:
        UnmaskError: there are none, or no tokenizer, or no words.
    """
    tokenizer, reader, model = tokenizer_of(settings), _Reader(settings), document_model(settings)
    every = open_corpus(settings, tokenizer, reader, reader.identity)
    identity = [every.files.identity, reader.identity]
    bags = store_bags(reader.texts(every.files), model, _word_reader(settings), tokenizer, identity)
    sampler = WordSetSampler(model, settings.words)
    members = every.members(split)
    filled = replace(settings, vocabulary=tokenizer.vocabulary)
    pairs = DocumentPairs(every, bags, sampler, begins_word(tokenizer), members, filled, seed)
    if not len(pairs):
        raise SourceError(
            f"{settings.source} has no {split} documents: {len(members)} of its {len(every.store)}, "
            f"{pairs.left_out} of them left out as too short. Give more, or a larger data.val_share, or set "
            "data.thin_short=false"
        )
    return pairs


def titled_documents(settings: Settings, split: Split, tokenizer: Tokenizer) -> Iterator[tuple[str, str, str]]:
    """The name, title (empty where there is none) and text of each document of one split."""
    reader = _Reader(settings)
    every = open_corpus(settings, tokenizer, reader, reader.identity)
    members = set(every.members(split).tolist())
    return (found for index, found in enumerate(reader.titled(every.files)) if index in members)
