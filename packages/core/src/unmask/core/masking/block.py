"""Block-wise masking: BEiT (Bao et al., ICLR 2022, arXiv 2106.08254, Algorithm 1; official code microsoft/unilm).

Rectangles of random area and aspect are hidden one after another until a target count is reached. The printed algorithm
exceeds that count and leaves the last, small blocks undefined; the released code settles both, and this file follows
it: a rectangle is accepted only if it hides something new and the count is not exceeded, ten rejections in a row end
the search, sides are strictly shorter than the grid's, and the aspect is uniform on a logarithmic scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Num
from torch import Tensor

from unmask.core.mask import Mask, check_count
from unmask.core.masking.random import check_ratio, hidden_count
from unmask.core.randomness import Key

_PER_ROUND = 5  # rectangles tried at once; two rounds without a legal one are the ten rejections


@dataclass(frozen=True)
class BlockMasking:
    """Hide rectangles until a share of the tokens is reached.

    Args:
        ratio: the share to reach, in (0, 1); the target is the nearest count.
        exact: False is the published rule, whose count varies from sample to sample and is at most the target (a ragged
            mask). True tops the same mask up to exactly the target: visible tokens that touch a hidden one are hidden
            in random order, then any others, so that blocks grow at their border.
        min_block: tokens of the smallest rectangle, before rounding and overlap.
        max_block: tokens of the largest, or None for as many as are still to be hidden.
        min_aspect: height over width lies in [min_aspect, 1 / min_aspect]; in (0, 1].
    """

    ratio: float = 0.4
    exact: bool = False
    min_block: int = 16
    max_block: int | None = None
    min_aspect: float = 0.3

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        if self.min_block < 1 or (self.max_block is not None and self.max_block < self.min_block):
            raise ValueError(f"blocks need 1 <= min_block <= max_block; got {self.min_block} and {self.max_block}")
        if not 0 < self.min_aspect <= 1:
            raise ValueError(f"min_aspect {self.min_aspect} is not in (0, 1]")

    def __call__(self, key: Key, grid: tuple[int, ...]) -> Mask:
        """Draw a mask. Costs one host sync per round of rectangles: whether any sample still needs one is data.

        Raises:
            ValueError: the grid is not two-dimensional, or the ratio hides nothing or everything.
        """
        if len(grid) != 2:
            raise ValueError(f"block masking needs a 2-d token grid; got {' x '.join(map(str, grid))}")
        tokens = math.prod(grid)
        target = hidden_count(tokens, self.ratio, "round")
        check_count(tokens - target, tokens)
        key = key.stream("blocks")
        hidden = self._search(key, grid, target)
        if not self.exact:
            return Mask.from_hidden(hidden.flatten(1))
        return Mask.from_scores(_growth(hidden).flatten(1) + key.stream("top up").uniform(tokens), tokens - target)

    def _search(self, key: Key, grid: tuple[int, ...], target: int) -> Bool[Tensor, "batch height width"]:
        """In each round, every sample that is not done tries five rectangles and hides the first acceptable one.

        Everything is float32, in which these small integers are exact and products are fast.
        """
        hidden = torch.zeros(len(key.state), *grid, device=key.state.device)
        now, seeking = hidden, torch.arange(len(hidden), device=hidden.device)
        room, refused = torch.full_like(hidden[:, 0, 0], target), torch.zeros_like(seeking, dtype=torch.bool)
        attempt = 0
        while len(seeking):  # ends: in two rounds a sample hides at least one token more, or is done
            limit = room if self.max_block is None else room.clamp(max=self.max_block)
            rows, columns = self._propose(Key(key.state[seeking]).stream(attempt), limit, grid)
            new = rows.sum(2) * columns.sum(2) - (torch.bmm(rows, now) * columns).sum(2)
            good = (new > 0) & (new <= limit[:, None])
            first, hit = (torch.arange(len(seeking), device=now.device), good.to(torch.uint8).argmax(1)), good.any(1)
            row = rows[first] * hit[:, None]
            now = torch.maximum(now, row[:, :, None] * columns[first][:, None, :])
            room = room - new[first] * hit
            go_on = (room > 0) & (hit | ~refused)
            done, left = (~go_on).nonzero()[:, 0], go_on.nonzero()[:, 0]
            hidden[seeking[done]] = now[done]
            seeking, now, room, refused, attempt = seeking[left], now[left], room[left], ~hit[left], attempt + 1
        return hidden > 0

    def _propose(
        self, key: Key, limit: Float[Tensor, "seeking"], grid: tuple[int, ...]
    ) -> tuple[Float[Tensor, "seeking tries height"], Float[Tensor, "seeking tries width"]]:
        """Five rectangles per sample, as the rows and columns they cover: 1.0 or 0.0; no rows where it is too large.

        One 64-bit draw makes one rectangle: 16 bits each for area, aspect, row and column.
        """
        shifts = torch.arange(0, 64, 16, device=limit.device)
        area, aspect, row, column = (((key.bits(_PER_ROUND)[..., None] >> shifts) & 0xFFFF) / 2.0**16).unbind(-1)
        area = self.min_block + area * (limit[:, None] - self.min_block)
        aspect = torch.exp(math.log(self.min_aspect) * (1 - 2 * aspect))
        height, width = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        fits = (height < grid[0]) & (width < grid[1])
        return _lines(height * fits, row, grid[0]), _lines(width, column, grid[1])


def _lines(length: Float[Tensor, "*lead"], offset: Float[Tensor, "*lead"], n: int) -> Float[Tensor, "*lead {n}"]:
    """Which of `n` rows or columns a side covers, as 1.0 or 0.0; `offset` is its start as a share, in [0, 1)."""
    return covered((offset * (n - length + 1)).floor(), length, n).float()


def covered(start: Num[Tensor, "*lead"], length: Num[Tensor, "*lead"], n: int) -> Bool[Tensor, "*lead {n}"]:
    """Which of `n` rows or columns a side covers, given its first one and its length."""
    line = torch.arange(n, device=length.device)
    return (line >= start[..., None]) & (line < (start + length)[..., None])


def _growth(hidden: Bool[Tensor, "batch height width"]) -> Float[Tensor, "batch height width"]:
    """2 where hidden, 1 where a 4-neighbour is hidden, else 0."""
    wide = F.pad(hidden, (1, 1, 1, 1))
    beside = wide[:, :-2, 1:-1] | wide[:, 2:, 1:-1] | wide[:, 1:-1, :-2] | wide[:, 1:-1, 2:]
    return torch.where(hidden, 2.0, beside.float())
