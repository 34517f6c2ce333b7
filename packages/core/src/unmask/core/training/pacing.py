"""How fast a curriculum opens: the share of it that is open, as a function of the share of the run that is done.

The functions are those of "When Do Curricula Work?" (Wu, Dyer and Neyshabur, ICLR 2021) as CLIMB (arXiv 2311.08886) has
them: each rises from `lowest` at `begin` to `highest` at `end`, and stays there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

Share = Annotated[float, Field(ge=0, le=1)]
PacingShape = Literal["linear", "quad", "root", "step", "exp", "log"]
_STEEP = 10.0
_SHAPES: dict[PacingShape, Callable[[float], float]] = {  # from [0, 1) on the way to the height above `lowest`
    "linear": lambda x: x,
    "quad": lambda x: x**2,
    "root": lambda x: x**0.5,
    "step": lambda x: 0.0,
    "exp": lambda x: math.expm1(_STEEP * x) / math.expm1(_STEEP),
    "log": lambda x: 1.0 + math.log(x + math.exp(-_STEEP)) / _STEEP,
}


@dataclass(frozen=True)
class Pacing:
    """A curriculum's pace. Call it with the share of the run that is done; it gives the share that is open.

    Args:
        shape: of the rise; ``step`` jumps at `end`, and ``log`` is at 0.79 of the way after a tenth of it.
        begin: share of the run, in [0, 1], before which `lowest` is open.
        end: share of the run, in [0, 1], from which `highest` is open.
        lowest: share open at first, in [0, 1].
        highest: share open at the end, in [0, 1].
    """

    shape: PacingShape = "linear"
    begin: Share = 0.0625
    end: Share = 0.875
    lowest: Share = 0.1
    highest: Share = 1.0

    def __post_init__(self) -> None:
        if self.end < self.begin or self.highest < self.lowest:
            raise ValueError(f"a pacing rises: begin={self.begin} to end={self.end}, {self.lowest} to {self.highest}")

    def __call__(self, progress: float) -> float:
        """The open share, in [0, 1]."""
        if progress < self.begin:
            return self.lowest
        if progress >= self.end:
            return self.highest
        done = (progress - self.begin) / (self.end - self.begin)
        return min(self.highest, self.lowest + (self.highest - self.lowest) * max(0.0, _SHAPES[self.shape](done)))
