"""The data kind ``lines``: letters of one line as ids."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from jaxtyping import Bool, Int
from pydantic import Field
from torch import Tensor

from unmask.core.data.splits import SPLITS, assign
from unmask.core.domain import Split
from unmask.core.errors import Problem, UnmaskError
from unmask.core.randomness import stable_id
from unmask.letters.data.decode import NAMES, PADDING, ids_of, read_lines


@dataclass(frozen=True)
class Settings:
    """Which lines, and how long.

    Args:
        source: a folder of .txt files, or ``names``.
        length: letters given to the model; longer lines are cut.
        val_share: share of the lines set aside for validation, and again for test.
    """

    source: str = NAMES
    length: Annotated[int, Field(ge=2)] = 16
    val_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.2

    free_to_change: ClassVar[frozenset[str]] = frozenset({"source"})
    filled_in: ClassVar[frozenset[str]] = frozenset()


@dataclass(frozen=True)
class LineBatch:
    """Ids of letters, and of samples; classes."""

    letters: Int[Tensor, "batch length"]
    ids: Int[Tensor, "batch"]
    labels: Int[Tensor, "batch"]

    @property
    def valid(self) -> Bool[Tensor, "batch length"]:
        """False = padding."""
        return self.letters != PADDING


Sample = tuple[list[int], int, int]


class Lines:
    """One split: ``dataset[index, visit]`` is a line's letters, id and class."""

    problems: Sequence[Problem] = ()

    def __init__(self, settings: Settings, split: Split) -> None:
        lines = read_lines(settings.source)
        self.classes = sorted({label for _, _, label in lines})
        ids = torch.tensor([stable_id(name) for name, _, _ in lines])
        labels = torch.tensor([self.classes.index(label) for _, _, label in lines])
        codes = assign(ids, labels, None, settings.val_share, settings.val_share)
        chosen = torch.ones_like(codes, dtype=torch.bool) if split == "all" else codes == SPLITS[split]
        if not chosen.any():
            raise UnmaskError(f"{settings.source} has no {split} lines; add some, or raise data.val_share")
        self.ids, self.labels, self.length = ids[chosen], labels[chosen], settings.length
        self.lines = [lines[i] for i in chosen.nonzero()[:, 0].tolist()]
        self._names = {int(i): name for i, (name, _, _) in zip(self.ids, self.lines, strict=True)}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        index, _ = item
        return ids_of(self.lines[index][1], self.length), int(self.ids[index]), int(self.labels[index])

    def name_of(self, sample_id: int) -> str:
        return self._names[sample_id]

    def view(self, rows: Tensor | slice = slice(None), *, seed: int = 0, augment: bool = False) -> Lines:
        """Some lines of this split; nothing about them is random."""
        chosen, index = copy.copy(self), torch.arange(len(self))[rows]
        chosen.ids, chosen.labels = self.ids[index], self.labels[index]
        chosen.lines = [self.lines[i] for i in index.tolist()]
        return chosen


def resolve(settings: Settings) -> Settings:
    """The same settings; a folder's path is made whole."""
    if settings.source == NAMES:
        return settings
    return Settings(str(Path(settings.source).expanduser().resolve()), settings.length, settings.val_share)


def open_split(settings: Settings, split: Split, *, seed: int = 0, augment: bool = False) -> Lines:
    """The lines of one split; nothing about them is random."""
    return Lines(settings, split)


def preprocess(texts: Sequence[str], settings: Settings) -> LineBatch:
    """Several lines as a batch without classes: what a trained encoder is given."""
    return collate([(ids_of(text, settings.length), stable_id(text), -1) for text in texts])


def collate(samples: Sequence[Sample]) -> LineBatch:
    """Samples as a batch."""
    letters, ids, labels = zip(*samples, strict=True)
    return LineBatch(torch.tensor(letters), torch.tensor(ids), torch.tensor(labels))
