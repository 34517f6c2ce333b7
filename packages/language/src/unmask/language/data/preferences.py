"""The data kind ``preferences``: a prompt, the response that is preferred, and one that is not.

Records (.jsonl, .parquet) have ``prompt``, ``chosen`` and ``rejected``, each a text, or each a list of messages with
``role`` and ``content``, which the tokenizer's chat template writes as text. Of plain text, the set ``mobydick``
included, *synthetic* pairs are made (`unmask.language.data.pairs.made_pairs`): they are there to try things out.

A text begins with the token that begins a document, where the tokenizer has one, and a response ends with the one that
ends it; a chat template brings its own. Prompt and responses are encoded apart, so that the three share no token.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from pydantic import Field
from torch import Tensor

from unmask.core.data.kinds import SourceError
from unmask.core.data.splits import assign
from unmask.core.domain import Split
from unmask.core.errors import Problem
from unmask.core.randomness import stable_id
from unmask.language.data import corpus
from unmask.language.data.corpus import Corpus, encoded, for_networks, kept, open_corpus
from unmask.language.data.documents import RECORDS, Document
from unmask.language.data.pairs import FIELDS, NO_TEMPLATE, are_conversations, read_pairs
from unmask.language.data.sources import Files, find_files
from unmask.language.data.vocabulary import Tokenizer, TokenizerError, Vocabulary, known

__all__ = [
    "PreferenceBatch", "Preferences", "Settings", "collate", "for_networks", "keep", "kept", "open_split",
    "preprocess", "resolve",
]  # fmt: skip

_SAME = "chosen and rejected are the same as far as data.length shows them"


@dataclass(frozen=True)
class Settings:
    """Which pairs, and how long.

    Args:
        source: a folder of .jsonl or .parquet files, one such file, or the name of a set; plain text gives synthetic
            pairs.
        tokenizer: a directory or hub id with a tokenizer; null takes that of the network ``model``, where there is one,
            else trains one on the training split.
        vocabulary_size: token ids of a tokenizer that is trained here.
        length: tokens of prompt and response together; longer responses lose their end.
        prompt_length: tokens of the prompt; longer ones lose their beginning, but not the token that begins a document.
        val_share: share of the pairs set aside for validation, and again for test, where the data give no splits; pairs
            with the same prompt stay together.
        vocabulary: filled in from the tokenizer.
    """

    source: str = "mobydick"
    tokenizer: str | None = None
    vocabulary_size: Annotated[int, Field(ge=261)] = 4096
    length: Annotated[int, Field(ge=8)] = 2048
    prompt_length: Annotated[int, Field(ge=1)] = 1024
    val_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    vocabulary: Vocabulary | None = None

    free_to_change: ClassVar[frozenset[str]] = frozenset({"source", "tokenizer"})
    filled_in: ClassVar[frozenset[str]] = frozenset({"vocabulary", "tokenizer"})

    def __post_init__(self) -> None:
        if self.prompt_length >= self.length:
            raise ValueError(
                f"prompt_length: {self.prompt_length} leaves no room for a response in data.length={self.length}"
            )


@dataclass(frozen=True)
class Sample:
    """One pair: ids of the prompt and of both responses, cut to their lengths."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    id: int


@dataclass(frozen=True)
class PreferenceBatch:
    """Pairs, padded on the right with 0: a causal model's real tokens never see what follows them.

    Args:
        tokens: ids of a prompt with its chosen (0) and its rejected (1) response.
        prompts: tokens of each prompt.
        lengths: tokens of each row, padding left out.
        ids: of the pairs.
    """

    tokens: Int[Tensor, "pairs 2 length"]
    prompts: Int[Tensor, "pairs"]
    lengths: Int[Tensor, "pairs 2"]
    ids: Int[Tensor, "pairs"]

    @property
    def response(self) -> Bool[Tensor, "pairs 2 length"]:
        """True = a token of a response."""
        at = torch.arange(self.tokens.shape[2], device=self.tokens.device)
        return (at >= self.prompts[:, None, None]) & (at < self.lengths[:, :, None])


class Preferences:
    """One split: ``dataset[index, visit]`` is a pair; nothing about it is random.

    Args:
        every: all pairs.
        chosen: indices of those of this split.
        settings: the data settings.
        around: ids that a prompt begins with, and that a response ends with.
    """

    def __init__(
        self, every: Corpus, chosen: np.ndarray, settings: Settings, around: tuple[Sequence[int], Sequence[int]]
    ) -> None:
        self._every, self._settings, self._rows = every, settings, chosen
        self._before, self._after = (np.asarray(ids, np.int64) for ids in around)
        same = np.array([self._is_same(i) for i in range(len(chosen))], dtype=bool)
        problems = [Problem(every.store.name(int(row)), _SAME) for row in chosen[same]]
        self._rows = chosen[~same]
        self.problems = [*every.problems, *problems]
        self.ids = every.store.ids[torch.from_numpy(self._rows)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        prompt, *responses = (self._every.store.part(int(self._rows[item[0]]), part) for part in range(len(FIELDS)))
        kept = prompt[max(0, len(prompt) + len(self._before) - self._settings.prompt_length) :]
        prompt = np.concatenate([self._before, kept])[: self._settings.prompt_length]
        room = self._settings.length - len(prompt)
        chosen, rejected = (np.concatenate([response, self._after])[:room] for response in responses)
        return Sample(prompt, chosen, rejected, int(self.ids[item[0]]))

    def _is_same(self, index: int) -> bool:
        """Whether both responses are equal where they are not cut."""
        chosen, rejected = (self._every.store.part(int(self._rows[index]), part) for part in (1, 2))
        room = self._settings.length - min(int(self._sizes[index, 0]), self._settings.prompt_length)
        return bool(np.array_equal(chosen[:room], rejected[:room]))

    @property
    def _sizes(self) -> Int[np.ndarray, "pairs 3"]:
        """Tokens of prompt and responses before they are cut."""
        return self._every.store.lengths()[self._rows] + [len(self._before), len(self._after), len(self._after)]

    @cached_property
    def lengths(self) -> Int[Tensor, "pairs"]:
        """Tokens of the longer row of each pair."""
        sizes = self._sizes
        whole = np.minimum(sizes[:, 0], self._settings.prompt_length) + sizes[:, 1:].max(1)
        return torch.from_numpy(np.minimum(whole, self._settings.length))

    def name_of(self, sample_id: int) -> str:
        """The record that a pair comes from."""
        return self._every.store.name(int(self._rows[int((self.ids == sample_id).nonzero()[0])]))

    def notes(self, batch_size: int) -> list[str]:
        """What to say before training on this split."""
        sizes, limit = self._sizes, self._settings
        prompts = int((sizes[:, 0] > limit.prompt_length).sum())
        whole = np.minimum(sizes[:, :1], limit.prompt_length) + sizes[:, 1:]
        responses = int((whole > limit.length).sum())
        said = [f"{prompts} of {len(self)} prompts lose their beginning at data.prompt_length={limit.prompt_length}"]
        said += [f"{responses} of {2 * len(self)} responses lose their end at data.length={limit.length}"]
        said = [text for text, count in zip(said, (prompts, responses), strict=True) if count]
        if not all(name.endswith(RECORDS) for name in self._every.files.names):
            said.append("pairs of plain text are synthetic: the rejected response has the chosen one's words, shuffled")
        return said + (
            [f"other files there, which hold no pairs: {self._every.files.left}"] if self._every.files.left else []
        )

    def view(self, rows: Tensor | slice = slice(None), *, seed: int = 0, augment: bool = False) -> Preferences:
        """Some pairs of this split."""
        chosen, index = copy.copy(self), torch.arange(len(self))[rows]
        chosen.__dict__.pop("lengths", None)
        chosen.ids, chosen._rows = self.ids[index], self._rows[index.numpy()]
        return chosen


class _TemplateTokenizer(Tokenizer):
    """Encodes what a chat template wrote: special tokens in it are special."""

    def encode(self, texts: list[str]) -> list[list[int]]:
        self.backend.encode_special_tokens = False
        try:
            return super().encode(texts)
        finally:
            self.backend.encode_special_tokens = True


def _read_texts(files: Files, index: int) -> Iterator[Document | Problem]:
    return read_pairs(files, index)


def resolve(settings: Settings) -> Settings:
    """The settings with the tokenizer's ids filled in; a tokenizer is trained where none is given."""
    _check_template(settings)
    return corpus.resolve(settings, _read_texts, "preferences")


def keep(settings: Settings, folder: Path) -> None:
    """Write the tokenizer into a run directory."""
    tokenizer_of(settings).save(folder / "tokenizer")


def tokenizer_of(settings: Settings) -> Tokenizer:
    """The tokenizer that the settings name, or one trained on the training split and kept in the cache."""
    _check_template(settings)
    return corpus.tokenizer_of(settings, _read_texts, "preferences")


def _check_template(settings: Settings) -> None:
    """Raise a TokenizerError for conversations without a tokenizer: one that is trained here has no chat template."""
    if settings.tokenizer is None and are_conversations(find_files(settings.source)):
        raise TokenizerError(NO_TEMPLATE)


def open_split(settings: Settings, split: Split, *, seed: int = 0, augment: bool = False) -> Preferences:
    """The pairs of one split.

    Raises:
        UnmaskError: there are none, no tokenizer, or conversations and a tokenizer without a chat template.
    """
    tokenizer = tokenizer_of(settings)
    chats = are_conversations(find_files(settings.source))
    every = _conversations(settings, tokenizer) if chats else open_corpus(settings, tokenizer, _read_texts, "pairs")
    every = _grouped(every, settings)
    v = tokenizer.vocabulary
    around: tuple[list[int], list[int]] = ([], []) if chats else ([] if v.bos is None else [v.bos], [v.eos])
    pairs = Preferences(every, every.members(split), settings, around)
    if not len(pairs):
        raise SourceError(
            f"{settings.source} has no {split} pairs among its {len(every.store)}: give more, or a larger "
            "data.val_share"
        )
    return pairs


def _conversations(settings: Settings, tokenizer: Tokenizer) -> Corpus:
    template = _TemplateTokenizer(tokenizer.fast, settings.source)

    def read(files: Files, index: int) -> Iterator[Document | Problem]:
        return read_pairs(files, index, template)

    return open_corpus(settings, template, read, ["conversations", str(getattr(tokenizer.fast, "chat_template", ""))])


def _grouped(every: Corpus, settings: Settings) -> Corpus:
    """The corpus with pairs of one prompt in one split: what is held out is then no prompt that was trained on."""
    store = every.store
    prompts = torch.tensor([stable_id(store.part(i).tobytes().hex()) for i in range(len(store))])
    given = None if every.files.given is None else [every.files.given[i] for i in store.files.tolist()]
    codes = assign(store.ids, None, given, settings.val_share, settings.val_share, groups=prompts)
    return replace(every, codes=codes)


def preprocess(samples: str | Sequence[str], settings: Settings) -> PreferenceBatch:
    """One text or several as a batch: a prompt each, without responses."""
    bos = known(settings.vocabulary).bos
    tokens, ids, valid = encoded(samples, settings, ([] if bos is None else [bos], []))
    lengths = valid.sum(1)
    return PreferenceBatch(torch.stack([tokens, tokens], 1), lengths, torch.stack([lengths, lengths], 1), ids)


def collate(samples: Sequence[Sample]) -> PreferenceBatch:
    """Pairs as a batch, padded to its longest row."""
    rows = [[np.concatenate([s.prompt, response]) for response in (s.chosen, s.rejected)] for s in samples]
    lengths = torch.tensor([[len(row) for row in pair] for pair in rows])
    tokens = torch.zeros(len(samples), 2, int(lengths.max()), dtype=torch.int64)
    for i, pair in enumerate(rows):
        for j, row in enumerate(pair):
            tokens[i, j, : len(row)] = torch.from_numpy(row)
    prompts, ids = (torch.tensor(values) for values in zip(*((len(s.prompt), s.id) for s in samples), strict=True))
    return PreferenceBatch(tokens, prompts, lengths, ids)
