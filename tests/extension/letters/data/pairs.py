"""The data kind ``pairs``: each line with another of its class, drawn anew at each visit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Bool, Int
from torch import Tensor

from unmask.core.domain import Split
from unmask.core.randomness import SampleKey
from unmask.letters.data import lines
from unmask.letters.data.decode import PADDING
from unmask.letters.data.lines import LineBatch, Lines, Settings, preprocess, resolve

__all__ = ["PairBatch", "Pairs", "Settings", "collate", "open_split", "preprocess", "resolve"]

Pair = tuple[lines.Sample, lines.Sample]


@dataclass(frozen=True)
class PairBatch(LineBatch):
    """Lines, and the letters of the line beside each."""

    beside: Int[Tensor, "batch length"]

    @property
    def beside_valid(self) -> Bool[Tensor, "batch length"]:
        """False = padding."""
        return self.beside != PADDING


class Pairs(Lines):
    """One split: ``dataset[index, visit]`` is a line and another one of its class."""

    def __init__(self, settings: Settings, split: Split, seed: int) -> None:
        super().__init__(settings, split)
        self.seed = seed

    def __getitem__(self, item: tuple[int, int]) -> Pair:  # type: ignore[override]
        index, visit = item
        others = ((self.labels == self.labels[index]) & (self.ids != self.ids[index])).nonzero()[:, 0].tolist()
        (draw,) = SampleKey.of(self.seed, int(self.ids[index]), visit).stream("pair").uniform(1)
        other = others[int(draw * len(others))] if others else index
        return super().__getitem__(item), super().__getitem__((other, visit))


def open_split(settings: Settings, split: Split, *, seed: int = 0, augment: bool = False) -> Pairs:
    """The lines of one split, in pairs; without `augment` a line's partner is the same at every visit."""
    return Pairs(settings, split, seed)


def collate(samples: Sequence[Pair]) -> PairBatch:
    """Samples as a batch."""
    first, second = (lines.collate(side) for side in zip(*samples, strict=True))
    return PairBatch(first.letters, first.ids, first.labels, second.letters)
