"""What every data kind of language does with its documents: a tokenizer, a token store, and splits by document."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Int, Int8
from torch import Tensor

from unmask.core.data.carriers import cache_dir
from unmask.core.data.kinds import SourceError
from unmask.core.data.sources import absolute
from unmask.core.data.splits import SPLITS, assign
from unmask.core.data.stored import stored
from unmask.core.domain import Split
from unmask.core.errors import Problem, UnmaskError
from unmask.core.randomness import stable_id
from unmask.language.data.documents import Document
from unmask.language.data.embedded.sets import names
from unmask.language.data.sources import Files, find_files
from unmask.language.data.token_store import TokenStore, store_tokens
from unmask.language.data.vocabulary import Tokenizer, TokenizerError, Vocabulary, open_tokenizer, train_tokenizer

Rows = tuple[Int[Tensor, "batch length"], Int[Tensor, "batch"], Bool[Tensor, "batch length"]]
Read = Callable[[Files, int], Iterable[Document | Problem]]  # the documents of one file


class CorpusSettings(Protocol):
    """What the settings of every data kind of language have; see `unmask.language.data.texts.Settings`."""

    @property
    def source(self) -> str: ...
    @property
    def tokenizer(self) -> str | None: ...
    @property
    def vocabulary_size(self) -> int: ...
    @property
    def val_share(self) -> float: ...
    @property
    def length(self) -> int: ...
    @property
    def vocabulary(self) -> Vocabulary | None: ...


S = TypeVar("S", bound=CorpusSettings)


@dataclass(frozen=True)
class Corpus:
    """All documents of a source, as ids.

    Args:
        files: where they are.
        store: the ids.
        codes: the split of each document (see `unmask.core.data.splits`).
    """

    files: Files
    store: TokenStore
    codes: Int8[Tensor, "documents"]

    @property
    def problems(self) -> list[Problem]:
        """Files and documents that were left out."""
        return [*self.files.problems, *self.store.problems]

    def members(self, split: Split) -> np.ndarray:
        """Indices of the documents of one split."""
        if split == "all":
            return np.arange(len(self.store))
        return (self.codes == SPLITS[split]).nonzero()[:, 0].numpy()


def open_corpus(
    settings: CorpusSettings,
    tokenizer: Tokenizer,
    read: Read,
    identity: Any,
    wrap: tuple[Sequence[int], Sequence[int]] = ((), ()),
) -> Corpus:
    """Encode the documents of a source, or find them encoded in the cache.

    Args:
        settings: of the data kind.
        tokenizer: encodes.
        read: the documents of one file.
        identity: what `read` depends on beside the file, as JSON holds it.
        wrap: ids that go before and after every part of a document.

    Raises:
        SourceError: there is nothing, or nothing that can be used.
    """
    files = find_files(settings.source)
    documents = [(name, read(files, i)) for i, name in enumerate(files.names)]
    store = store_tokens(documents, tokenizer, [files.identity, identity], wrap)
    if not len(store):
        raise _nothing(settings.source, files, store.problems)
    return Corpus(files, store, _codes(store.ids, store.files.tolist(), files, settings))


def _nothing(source: str, files: Files, problems: Sequence[Problem]) -> SourceError:
    problems = [*files.problems, *problems]
    first = f": {problems[0].name}: {problems[0].reason}" if problems else ""
    return SourceError(f"{source}: nothing in its {len(files.names)} files can be used{first}")


def _codes(ids: Tensor, owners: Iterable[int], files: Files, settings: CorpusSettings) -> Int8[Tensor, "documents"]:
    given = None if files.given is None else [files.given[i] for i in owners]
    return assign(ids, None, given, settings.val_share, settings.val_share)


def resolve(settings: S, read: Read, identity: Any) -> S:
    """The settings with an absolute source and the tokenizer's ids; a tokenizer is trained where none is given.

    Raises:
        TokenizerError: there is none, or another than the settings were filled in with before.
    """
    settings = absolute(settings, tuple(names()))
    vocabulary = tokenizer_of(settings, read, identity).vocabulary
    if settings.vocabulary is not None and settings.vocabulary != vocabulary:
        raise TokenizerError(
            f"the tokenizer is not the one that the run was started with (digest {settings.vocabulary.digest} then, "
            f"{vocabulary.digest} now). Give that one with --set data.tokenizer=DIR: RUN/tokenizer is a copy"
        )
    return replace(settings, vocabulary=vocabulary)  # type: ignore[type-var]


def for_networks(settings: S, networks: dict[str, str]) -> S:
    """The tokenizer of the language model that a method is given, where the recipe names no other."""
    if settings.tokenizer is not None or "model" not in networks:
        return settings
    return replace(settings, tokenizer=networks["model"])  # type: ignore[type-var]


def kept(settings: S, folder: Path) -> S:
    """The settings of a loaded run, with its own copy of the tokenizer."""
    tokenizer = folder / "tokenizer"
    return replace(settings, tokenizer=str(tokenizer)) if tokenizer.is_dir() else settings  # type: ignore[type-var]


def encoded(samples: str | Sequence[str], settings: CorpusSettings, wrap: tuple[Sequence[int], Sequence[int]]) -> Rows:
    """Texts that a user gives, as rows of ids, padded on the right.

    Returns:
        Ids, ids of the rows, and False where there is padding.

    Raises:
        UnmaskError: no text, or one longer than the model takes.
    """
    texts = [samples] if isinstance(samples, str) else list(samples)
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UnmaskError("expected texts: a string, or several that are not empty")
    if settings.tokenizer is None:
        raise UnmaskError("the run has no tokenizer beside it (RUN/tokenizer); name one in its recipe, data.tokenizer")
    rows = [[*wrap[0], *ids, *wrap[1]] for ids in open_tokenizer(settings.tokenizer).encode(texts)]
    longest = max(map(len, rows))
    if longest > settings.length:
        raise UnmaskError(f"a text of {longest} tokens; this run's model takes {settings.length}: cut it before")
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    valid = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], valid[i, : len(row)] = torch.tensor(row), True
    return tokens, torch.tensor([stable_id(text) for text in texts]), valid


def tokenizer_of(settings: CorpusSettings, read: Read, identity: Any) -> Tokenizer:
    """The tokenizer that the settings name, or one trained on the training split and kept in the cache."""
    if settings.tokenizer is not None:
        return open_tokenizer(settings.tokenizer)
    files = find_files(settings.source)
    key = stable_id(repr([files.identity, identity, settings.vocabulary_size, settings.val_share]))
    folder = cache_dir() / "tokenizers" / f"{key:016x}"

    def train(ready: Path) -> dict[str, Any]:
        train_tokenizer(training_texts(files, read, settings), settings.vocabulary_size, ready)
        return {"source": settings.source}

    stored(folder, train)
    return open_tokenizer(str(folder))


def training_texts(files: Files, read: Read, settings: CorpusSettings) -> Iterable[str]:
    """The texts of the training split: found as `open_corpus` finds it, before there are tokens."""
    every = range(len(files.names))
    found = [(i, item) for i in every for item in _named(read(files, i))]
    named = [(i, key) for i, key in found if isinstance(key, int)]
    if not named:
        raise _nothing(settings.source, files, [item for _, item in found if isinstance(item, Problem)])
    ids = torch.tensor([key for _, key in named])
    codes = iter(_codes(ids, [i for i, _ in named], files, settings).tolist())
    for index in every:
        for document in read(files, index):
            if isinstance(document, Document) and next(codes) == SPLITS["train"]:
                yield from document.parts


def _named(items: Iterable[Document | Problem]) -> Iterable[int | Problem]:
    """The ids of documents, whose texts are let go, and what is wrong with the others."""
    return (stable_id(item.name) if isinstance(item, Document) else item for item in items)
