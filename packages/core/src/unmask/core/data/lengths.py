"""Samples of different lengths: long ones cut into parts, and batches of about the same length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Parts:
    """The parts that samples were cut into, sample after sample; a short one is a single part.

    Args:
        sample: the sample of each part, as an index.
        number: of a part within its sample, from 0.
        starts: where each part begins in its sample.
        stops: where it ends.
    """

    sample: Int[Tensor, "parts"]
    number: Int[Tensor, "parts"]
    starts: Int[Tensor, "parts"]
    stops: Int[Tensor, "parts"]


def cut_lengths(lengths: Int[Tensor, "n"], shortest: int, longest: int, step: int = 1) -> Parts:
    """Cut samples longer than `longest` into as few parts of at most that length as cover them.

    The parts of a sample have about the same length, so that there is no short rest. Only where even parts would be
    shorter than `shortest` (which takes a minimum of about half the maximum or more) are all `longest` long, and the
    rest at the end is left out.

    Args:
        lengths: of the samples.
        shortest: no part of a long sample is shorter.
        longest: no part is longer; at least `shortest` and `step`.
        step: even parts begin at multiples of this.
    """
    long = lengths > longest
    steps, most = _steps(lengths, step), longest // step
    count = torch.where(long, (steps + most - 1) // most, 1)
    least = (steps // count * step).minimum(lengths - steps * (count - 1) // count * step)
    even = ~long | (least >= shortest)
    count = torch.where(even, count, lengths // longest)

    sample = torch.arange(len(lengths)).repeat_interleave(count)
    number = torch.arange(len(sample)) - (count.cumsum(0) - count)[sample]
    lengths, even, count = lengths[sample], even[sample], count[sample]

    def edge(number: Int[Tensor, "parts"]) -> Int[Tensor, "parts"]:
        share = _steps(lengths, step) * number // count * step
        return torch.where(even, share, number * longest).minimum(lengths)

    return Parts(sample, number, edge(number), edge(number + 1))


def _steps(lengths: Int[Tensor, "n"], step: int) -> Int[Tensor, "n"]:
    """How many steps cover each length."""
    return (lengths + step - 1) // step


def by_length(lengths: Int[Tensor, "n"], most: int) -> Iterator[list[int]]:
    """Indices in batches of about the same length, the longest first; with padding, a batch holds at most `most`.

    A sample that is longer is alone. Where padding does not change features, this is for speed and memory only.
    """
    order = lengths.argsort(descending=True, stable=True).tolist()
    while order:
        size = max(1, most // max(int(lengths[order[0]]), 1))
        yield order[:size]
        order = order[size:]
