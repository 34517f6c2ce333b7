"""Tube masking: one spatial mask for every step of the first axis (VideoMAE, arXiv 2203.12602, section 3.3).

A position is hidden at all times or at none, so that it cannot be copied from a neighbouring frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from unmask.core.mask import Mask, check_count
from unmask.core.masking.random import Rounding, check_ratio, hidden_count
from unmask.core.randomness import Key


@dataclass(frozen=True)
class TubeMasking:
    """Hide an exact share of the positions, uniformly per sample, at every step of the first axis.

    Args:
        ratio: share of positions to hide, in (0, 1).
        rounding: how the share becomes a count of positions: ``floor_hide`` is VideoMAE's (176 of 196 at 0.9),
            ``floor_keep`` V-JEPA's (177); see `unmask.core.masking.random.hidden_count`.
    """

    ratio: float = 0.9
    rounding: Rounding = "floor_hide"

    def __post_init__(self) -> None:
        check_ratio(self.ratio)

    def __call__(self, key: Key, grid: tuple[int, ...]) -> Mask:
        """Draw a mask.

        Raises:
            ValueError: the grid has a single axis, or the ratio hides nothing or everything.
        """
        if len(grid) < 2:
            raise ValueError(f"tubes need a grid of at least two axes, the first of them time; got {grid}")
        steps, positions = grid[0], math.prod(grid[1:])
        keep = positions - hidden_count(positions, self.ratio, self.rounding)
        check_count(keep, positions)
        visible = key.bits(positions).topk(keep, dim=1, largest=False, sorted=False).indices
        step = torch.arange(steps, device=visible.device)[:, None] * positions
        return Mask.from_visible((step + visible[:, None]).flatten(1), steps * positions)
