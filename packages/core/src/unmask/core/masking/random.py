"""Uniform masking: an exact count, or a Bernoulli mask."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from unmask.core.mask import Mask, check_count
from unmask.core.randomness import Key

Rounding = Literal["floor_keep", "floor_hide", "ceil_hide", "round"]


@runtime_checkable
class Masking(Protocol):
    """Anything that draws a mask for a batch of token grids; grids are flattened row-major."""

    def __call__(self, key: Key, grid: tuple[int, ...]) -> Mask: ...


def check_ratio(ratio: float) -> None:
    """Raise ValueError unless 0 < ratio < 1."""
    if not 0 < ratio < 1:
        raise ValueError(f"mask ratio {ratio} is not between 0 and 1 (exclusive): it is the share of tokens to hide")


def hidden_count(tokens: int, ratio: float, rounding: Rounding) -> int:
    """The number of `tokens` that a ratio hides.

    ``floor_keep`` keeps ``int(tokens * (1 - ratio))`` (MAE's expression, float product included: 0.9 of 100 keeps 9),
    ``floor_hide`` hides ``int(tokens * ratio)`` (CroCo, VideoMAE), ``ceil_hide`` hides ``ceil(tokens * ratio)``
    (SimMIM), ``round`` hides the nearest integer (halves to even).
    """
    if rounding == "floor_keep":
        return tokens - int(tokens * (1 - ratio))
    if rounding == "floor_hide":
        return int(tokens * ratio)
    return math.ceil(tokens * ratio) if rounding == "ceil_hide" else round(tokens * ratio)


@dataclass(frozen=True)
class RandomMasking:
    """Hide an exact share of the tokens, uniformly and independently per sample.

    Sources: MAE (arXiv 2111.06377, section 3) with ``floor_keep`` and unit 1; SimMIM (arXiv 2111.09886, section 3.2)
    with ``ceil_hide`` and a unit of several tokens.

    Args:
        ratio: share of units to hide, in (0, 1).
        rounding: how the share becomes a count; see `hidden_count`.
        unit: side, in tokens, of the squares (cubes, runs) that are hidden as a whole. Must divide the grid.
    """

    ratio: float = 0.75
    rounding: Rounding = "floor_keep"
    unit: int = 1

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        if self.unit < 1:
            raise ValueError(f"mask unit {self.unit} must be at least 1 token")

    def __call__(self, key: Key, grid: tuple[int, ...], valid: Bool[Tensor, "batch tokens"] | None = None) -> Mask:
        """Draw a mask.

        Args:
            key: the samples' key.
            grid: tokens along each axis.
            valid: False = padding; counts then follow from each sample's own number of tokens, at least one of which
                stays visible, and the mask is ragged.

        Raises:
            ValueError: the unit does not divide the grid, or the ratio hides nothing or everything.
        """
        if valid is not None:
            return self._padded(key, valid)
        units = units_of(grid, self.unit)
        count = math.prod(units)
        num_visible = count - hidden_count(count, self.ratio, self.rounding)
        check_count(num_visible, count)
        # The lowest of `count` random numbers: a uniform subset without the cost of a whole permutation.
        visible = key.bits(count).topk(num_visible, dim=1, largest=False, sorted=False).indices
        if self.unit > 1:
            visible = unit_members(grid, self.unit, visible.device)[visible].flatten(1)
        return Mask.from_visible(visible, math.prod(grid))

    def _padded(self, key: Key, valid: Tensor) -> Mask:
        if self.unit != 1:
            raise ValueError(f"a mask unit of {self.unit} tokens cannot be combined with padding")
        tokens = valid.sum(1, dtype=torch.float64)
        if self.rounding == "floor_keep":
            num_visible = (tokens * (1 - self.ratio)).floor()
        else:
            to_integer = {"floor_hide": torch.floor, "ceil_hide": torch.ceil, "round": torch.round}[self.rounding]
            num_visible = tokens - to_integer(tokens * self.ratio)
        num_visible = torch.minimum(num_visible.clamp(min=1), tokens)  # even the shortest sample keeps a token
        bits = key.bits(valid.shape[1]).masked_fill(~valid, torch.iinfo(torch.int64).max)
        order = bits.argsort(dim=1)
        slot = torch.arange(valid.shape[1], device=valid.device)
        late = (slot >= num_visible[:, None]).expand_as(order)
        hidden = torch.empty_like(valid).scatter_(1, order, late) & valid
        return Mask(hidden, order, None, valid)


@dataclass(frozen=True)
class BernoulliMasking:
    """Sample a Bernoulli mask: counts differ from sample to sample (a ragged mask).

    Args:
        ratio: the probability of hiding a token, in (0, 1).
    """

    ratio: float = 0.5

    def __post_init__(self) -> None:
        check_ratio(self.ratio)

    def __call__(self, key: Key, grid: tuple[int, ...], valid: Bool[Tensor, "batch tokens"] | None = None) -> Mask:
        """Draw a mask; see `RandomMasking.__call__`."""
        return Mask.from_hidden(key.uniform(math.prod(grid)) < self.ratio, valid)


def units_of(grid: tuple[int, ...], unit: int) -> tuple[int, ...]:
    """The grid counted in units.

    Raises:
        ValueError: the unit does not divide the grid.
    """
    if any(n % unit for n in grid):
        fit = [u for u in range(1, min(grid) + 1) if all(n % u == 0 for n in grid)]
        raise ValueError(
            f"a mask unit of {unit} tokens does not divide the token grid {' x '.join(map(str, grid))}; units of "
            f"{', '.join(map(str, fit))} do"
        )
    return tuple(n // unit for n in grid)


def unit_members(grid: tuple[int, ...], unit: int, device: torch.device) -> Int[Tensor, "units tokens_per_unit"]:
    """The positions of the tokens in each unit, units and tokens row-major."""
    position = torch.arange(math.prod(grid), device=device)
    split = [size for n in grid for size in (n // unit, unit)]
    axes = [*range(0, 2 * len(grid), 2), *range(1, 2 * len(grid), 2)]
    return position.view(split).permute(axes).reshape(-1, unit ** len(grid))
