"""The data kind ``chats``: a prompt and the answer to it, for supervised fine-tuning."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from pydantic import Field
from torch import Tensor

from unmask.core.data.kinds import SourceError
from unmask.core.domain import Split
from unmask.core.errors import Problem
from unmask.language.data import corpus
from unmask.language.data.corpus import Corpus, encoded, for_networks, kept, open_corpus
from unmask.language.data.documents import RECORDS, Document
from unmask.language.data.sources import Files
from unmask.language.data.token_store import numbered
from unmask.language.data.vocabulary import Tokenizer, Vocabulary, known

__all__ = [
    "ChatBatch", "Chats", "Settings", "collate", "for_networks", "keep", "kept", "open_split",
    "preprocess", "resolve",
]  # fmt: skip

_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_ROLES = {"system": "", "user": "User: ", "assistant": "Assistant: "}


@dataclass(frozen=True)
class Settings:
    """Which chats, and how long.

    Records (.jsonl, .parquet) have a prompt and an answer, or ``messages``, a list of ``role`` and ``content``: then
    every turn of the assistant is one sample, and what came before it is its prompt. Plain text (the set ``mobydick``)
    is cut into passages whose first sentence is the prompt and whose next ones are the answer.

    Args:
        source: a folder of .jsonl or .parquet files, one such file, or the name of a set.
        tokenizer: a directory or hub id with a tokenizer; null takes that of the network ``model``, where there is one,
            else trains one on the training split.
        vocabulary_size: token ids of a tokenizer that is trained here.
        length: tokens of prompt and answer together; longer answers are cut.
        prompt_field: the field of records with the prompt.
        answer_field: the field of records with the answer.
        history: of ``messages``, put earlier turns into the prompt; false makes every turn a sample by itself.
        val_share: share of the samples set aside for validation, and again for test, where the data give no splits.
        vocabulary: filled in from the tokenizer.
    """

    source: str = "mobydick"
    tokenizer: str | None = None
    vocabulary_size: Annotated[int, Field(ge=261)] = 4096
    length: Annotated[int, Field(ge=8)] = 512
    prompt_field: str = "prompt"
    answer_field: str = "answer"
    history: bool = True
    val_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    vocabulary: Vocabulary | None = None

    free_to_change: ClassVar[frozenset[str]] = frozenset({"source", "tokenizer"})
    filled_in: ClassVar[frozenset[str]] = frozenset({"vocabulary", "tokenizer"})


@dataclass(frozen=True)
class Sample:
    """One prompt with its answer, cut to the length.

    Args:
        tokens: ids of both, and the one that ends the answer where it was not cut.
        prompt: how many of them are the prompt.
        answer: tokens of the answer before it was cut.
        id: of the sample.
    """

    tokens: np.ndarray
    prompt: int
    answer: int
    id: int


@dataclass(frozen=True)
class ChatBatch:
    """Prompts with their answers, padded on the right.

    Args:
        tokens: ids.
        ids: of the samples.
        prompts: tokens of each prompt.
        lengths: tokens of each row, padding left out.
        answers: tokens of each answer before it was cut, without the one that ends it.
    """

    tokens: Int[Tensor, "batch length"]
    ids: Int[Tensor, "batch"]
    prompts: Int[Tensor, "batch"]
    lengths: Int[Tensor, "batch"]
    answers: Int[Tensor, "batch"]

    @property
    def valid(self) -> Bool[Tensor, "batch length"]:
        """False = padding."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.lengths[:, None]


class Chats:
    """One split: ``dataset[index, visit]`` is a prompt with its answer; nothing about it is random.

    Args:
        every: all samples.
        chosen: indices of those of this split.
        settings: the data settings.
    """

    def __init__(self, every: Corpus, chosen: np.ndarray, settings: Settings, vocabulary: Vocabulary) -> None:
        self._every, self._settings, self._vocabulary = every, settings, vocabulary
        sizes = every.store.lengths()[chosen] + [int(vocabulary.bos is not None), 0]
        fits = sizes[:, 0] < settings.length - 1  # a token of the answer at least, and the one before it
        self._chosen, sizes = chosen[fits], sizes[fits]
        self.ids = every.store.ids[torch.from_numpy(self._chosen)]
        self.lengths = torch.from_numpy(np.minimum(sizes.sum(1) + 1, settings.length))
        self._cut = int((sizes.sum(1) + 1 > settings.length).sum())
        reason = f"the prompt fills data.length={settings.length}: raise it"
        self.problems = [*every.problems, *(Problem(every.store.name(int(i)), reason) for i in chosen[~fits])]

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        document, v = int(self._chosen[item[0]]), self._vocabulary
        before = [] if v.bos is None else [v.bos]
        prompt = np.concatenate([np.asarray(before, np.int64), self._every.store.part(document, 0)])
        answer = self._every.store.part(document, 1)
        tokens = np.concatenate([prompt, answer, [v.eos]])[: self._settings.length]
        return Sample(tokens, len(prompt), len(answer), int(self.ids[item[0]]))

    def name_of(self, sample_id: int) -> str:
        """The record that a sample comes from."""
        return self._every.store.name(int(self._chosen[int((self.ids == sample_id).nonzero()[0])]))

    def notes(self, batch_size: int) -> list[str]:
        """What to say before training on this split."""
        said = (
            [f"{self._cut} of {len(self)} answers are cut at data.length={self._settings.length}"] if self._cut else []
        )
        return said + (
            [f"other files there, which hold no text: {self._every.files.left}"] if self._every.files.left else []
        )

    def view(self, rows: Tensor | slice = slice(None), *, seed: int = 0, augment: bool = False) -> Chats:
        """Some samples of this split."""
        chosen, index = copy.copy(self), torch.arange(len(self))[rows]
        chosen.ids, chosen.lengths, chosen._chosen = self.ids[index], self.lengths[index], self._chosen[index.numpy()]
        return chosen


def _reader(settings: Settings) -> corpus.Read:
    def read(files: Files, index: int) -> Iterator[Document | Problem]:
        plain = not files.names[index].endswith(RECORDS)
        for item in files.documents(index, piece=500, text_field=None):
            if isinstance(item, Problem):
                yield item
                continue
            for turn, found in enumerate(_passage(item) if plain else _turns(item, settings)):
                yield found if isinstance(found, Problem) else Document(numbered(item.name, turn), found)

    return read


def _passage(document: Document) -> Iterator[tuple[str, str]]:
    """The first sentence of a passage as a prompt, and the next ones as the answer."""
    first, *rest = _SENTENCE.split(" ".join(document.parts[0].split()), maxsplit=1)
    if rest:
        yield first, " " + rest[0]


def _turns(document: Document, settings: Settings) -> Iterator[tuple[str, str] | Problem]:
    fields = document.fields
    if "messages" in fields:
        yield from _answers(document.name, fields["messages"], settings.history)
        return
    parts = [fields.get(name) for name in (settings.prompt_field, settings.answer_field)]
    if not all(isinstance(part, str) and part.strip() for part in parts):
        there = ", ".join(map(str, fields)) or "none"
        wanted = f"{settings.prompt_field!r} and {settings.answer_field!r}"
        yield Problem(
            document.name,
            f"no text in the fields {wanted} (there: {there}); set data.prompt_field and data.answer_field",
        )
        return
    yield str(parts[0]), str(parts[1])


def _answers(name: str, messages: Any, history: bool) -> Iterator[tuple[str, str] | Problem]:
    """Every turn of the assistant with what came before it."""
    before = ""
    well_formed = isinstance(messages, list) and all(
        isinstance(m, Mapping) and m.get("role") in _ROLES and isinstance(m.get("content"), str) for m in messages
    )
    if not well_formed or not any(m["role"] == "assistant" for m in messages):
        yield Problem(
            name, "messages: expected a list of role (system, user, assistant) and content, one an assistant's"
        )
        return
    for message in messages:
        if message["role"] == "assistant":
            yield before + _ROLES["assistant"], message["content"]
            before = f"{before}{_ROLES['assistant']}{message['content']}\n" if history else ""
        else:
            before += f"{_ROLES[message['role']]}{message['content']}\n"


def _identity(settings: Settings) -> list[Any]:
    return ["chats", settings.prompt_field, settings.answer_field, settings.history]


def resolve(settings: Settings) -> Settings:
    """The settings with the tokenizer's ids filled in; a tokenizer is trained where none is given."""
    return corpus.resolve(settings, _reader(settings), _identity(settings))


def keep(settings: Settings, folder: Path) -> None:
    """Write the tokenizer into a run directory."""
    _tokenizer_of(settings).save(folder / "tokenizer")


def _tokenizer_of(settings: Settings) -> Tokenizer:
    return corpus.tokenizer_of(settings, _reader(settings), _identity(settings))


def open_split(settings: Settings, split: Split, *, seed: int = 0, augment: bool = False) -> Chats:
    """The samples of one split.

    Raises:
        UnmaskError: there are none, or no tokenizer.
    """
    tokenizer = _tokenizer_of(settings)
    every = open_corpus(settings, tokenizer, _reader(settings), _identity(settings))
    chats = Chats(every, every.members(split), settings, tokenizer.vocabulary)
    if not len(chats):
        raise SourceError(
            f"{settings.source} has no {split} samples among its {len(every.store)}. Give more, a larger data.length, "
            "or a larger data.val_share"
        )
    return chats


def preprocess(samples: str | Sequence[str], settings: Settings) -> ChatBatch:
    """One text or several as a batch: a prompt each, without an answer."""
    bos = known(settings.vocabulary).bos
    tokens, ids, valid = encoded(samples, settings, ([] if bos is None else [bos], []))
    return ChatBatch(tokens, ids, valid.sum(1), valid.sum(1), torch.zeros_like(ids))


def collate(samples: Sequence[Sample]) -> ChatBatch:
    """Samples as a batch, padded to the longest with 0."""
    longest = max(len(sample.tokens) for sample in samples)
    tokens = torch.zeros(len(samples), longest, dtype=torch.int64)
    for row, sample in zip(tokens, samples, strict=True):
        row[: len(sample.tokens)] = torch.from_numpy(sample.tokens)
    numbers = [(s.id, s.prompt, len(s.tokens), s.answer) for s in samples]
    return ChatBatch(tokens, *(torch.tensor(column) for column in zip(*numbers, strict=True)))
