"""Sets of different sizes concatenated: where each starts, which rows are whose, and reductions over each.

`offsets` is the row at which each set starts, and the number of rows at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rows_of(offsets: Int[Tensor, "sets_plus_1"], total: int) -> Int[Tensor, "total"]:
    """The set that each of `total` concatenated rows belongs to."""
    sets = torch.arange(len(offsets) - 1, device=offsets.device)
    return sets.repeat_interleave(offsets.diff(), output_size=total)


def take_ragged(
    offsets: Int[Tensor, "sets_plus_1"], chosen: Sequence[int]
) -> tuple[Int[Tensor, "rows"], Int[Tensor, "chosen_plus_1"]]:
    """The rows of the chosen sets, one set after another, and the offsets of these. A set may be chosen several times.

    The host waits for `offsets`.
    """
    bounds = offsets.tolist()
    parts = [torch.arange(bounds[i], bounds[i + 1], device=offsets.device) for i in chosen]
    lengths = torch.tensor([0, *(len(part) for part in parts)], device=offsets.device)
    return torch.cat(parts), lengths.cumsum(0)


def run_offsets(ascending: Int[Tensor, "n"]) -> Int[Tensor, "runs_plus_1"]:
    """The offsets of runs of equal values."""
    change = torch.ones(len(ascending) + 1, dtype=torch.bool, device=ascending.device)
    torch.ne(ascending[1:], ascending[:-1], out=change[1:-1])
    return change.nonzero()[:, 0]


def segment_mean(x: Float[Tensor, "rows d"], offsets: Int[Tensor, "sets_plus_1"]) -> Float[Tensor, "sets d"]:
    """Mean of each set's rows, 0 for an empty one; that `offsets` ends with ``len(x)`` is not checked."""
    return _reduced(x, "mean", offsets)


def segment_sum(x: Float[Tensor, "rows d"], offsets: Int[Tensor, "sets_plus_1"]) -> Float[Tensor, "sets d"]:
    """Sum of each set's rows, 0 for an empty one; that `offsets` ends with ``len(x)`` is not checked."""
    return _reduced(x, "sum", offsets)


def segment_max(x: Float[Tensor, "rows d"], offsets: Int[Tensor, "sets_plus_1"]) -> Float[Tensor, "sets d"]:
    """Largest value of each set and column, 0 for an empty set; equal ones share the gradient.

    That `offsets` ends with ``len(x)`` is not checked.
    """
    return _reduced(x, "max", offsets)


def _reduced(x: Tensor, how: str, offsets: Tensor) -> Tensor:
    # Deterministic on every device, forward and backward, which scatter_reduce is not. `unsafe` skips a check that
    # would make the host wait.
    reduced = torch.segment_reduce(x, how, offsets=offsets, axis=0, unsafe=True)
    return reduced.masked_fill((offsets.diff() == 0)[:, None], 0)


def unravel(numbers: Int[Tensor, "n"], shape: Sequence[int]) -> Int[Tensor, "n axes_plus_1"]:
    """The coordinates (set, *cell) of cells that are numbered row-major, set after set, in grids of one `shape`."""
    columns = []
    for size in reversed(shape):
        columns.append(numbers % size)
        numbers = numbers // size
    return torch.stack([numbers, *reversed(columns)], dim=1)
