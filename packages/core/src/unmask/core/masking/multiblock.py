"""Multi-block masking: a context and target blocks, as latent prediction takes them.

`MultiBlockMasking` is I-JEPA's (arXiv 2301.08243; official code facebookresearch/ijepa), on two axes;
`SpaceTimeBlockMasking` is V-JEPA's (arXiv 2404.08471; official code facebookresearch/jepa), on time, rows and columns.

**Two rules.** As published (``per_batch=True``) block sizes are drawn once for a whole batch, and every index list is
cut to the shortest of its kind in the batch, first indices in raster order kept. A sample's context then depends on the
samples beside it: I-JEPA's is 42 % of a 14 x 14 grid in a batch of 1, 27 % in a batch of 64, and what is lost is at the
bottom. By default every sample draws its own sizes and nothing is cut: sizes and positions of the blocks have the
published distribution, a sample's split depends on its key alone, and sets are ragged (padded).

**Redraws.** A sample whose blocks leave at most `min_keep` tokens of context draws all its blocks again. I-JEPA's
released code keeps the targets, redraws the context alone, and after 20 rejections lets the context overlap a target;
with the published settings neither was seen in 2,560 samples. Here context and targets are always disjoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmask.core.mask import Indices, Split
from unmask.core.masking.block import covered
from unmask.core.randomness import Key

Range = tuple[float, float]
Draw = Callable[[Key, Key | None, tuple[int, ...]], tuple[Tensor, Tensor]]

_MOST_DRAWS = 200  # of one sample, before the settings are called impossible


@dataclass(frozen=True)
class MultiBlockMasking:
    """I-JEPA: target blocks, which may overlap each other, and one large context block with the targets cut out.

    Args:
        targets: how many target blocks.
        target_scale: a target's share of the grid, drawn uniformly from this range.
        target_aspect: a target's height over its width, from this range.
        context_scale: the context block's share of the grid, before targets are cut out; it is square.
        min_keep: the context has more tokens than this.
        tie_scale_aspect: one draw decides scale and aspect of a target, as in the released code: few shapes occur, and
            wide blocks are the small ones. False draws them independently.
        inclusive_end: True lets a block end at the grid's last row and column. In the released code it never does
            (on a 14 x 14 grid the context block is always the upper left 13 x 13).
        per_batch: the published rule, see the file's head.
    """

    targets: int = 4
    target_scale: Range = (0.15, 0.2)
    target_aspect: Range = (0.75, 1.5)
    context_scale: Range = (0.85, 1.0)
    min_keep: int = 10
    tie_scale_aspect: bool = True
    inclusive_end: bool = False
    per_batch: bool = False

    def __post_init__(self) -> None:
        _check_blocks(self.targets, self.target_scale, self.target_aspect)
        _check_blocks(1, self.context_scale, (1.0, 1.0))

    def __call__(self, key: Key, grid: tuple[int, ...], shared: Key | None = None) -> Split:
        """Draw a split: the context and `targets` target sets, each in raster order.

        Costs one host sync for each kind of set (its longest or shortest), and one for each round of draws.

        Args:
            key: the samples' key.
            grid: tokens along rows and columns.
            shared: for `per_batch`, a key that is the same for all samples and ranks of a step; its first row is used.

        Raises:
            ValueError: the grid is not two-dimensional; no context can be larger than `min_keep`; `per_batch` without
                `shared`.
        """
        if len(grid) != 2:
            raise ValueError(f"multi-block masking needs a 2-d token grid; got {' x '.join(map(str, grid))}")
        shared = _of_batch(shared, self.per_batch)
        context, blocks = _draw_until(self._draw, key, shared, self.min_keep, grid)
        targets = (_set(block, self.per_batch) for block in blocks.unbind(1))
        return Split(_set(context, self.per_batch), tuple(targets))

    def sizes(self, u: Float[Tensor, "batch 3"], grid: tuple[int, ...]) -> Int[Tensor, "batch 2 2"]:
        """Height and width of (targets, context) from three uniform draws: target scale, target aspect, context scale.

        With `tie_scale_aspect` the second draw is not used.
        """
        of_scale, of_aspect, of_context = u.double().unbind(1)
        of_aspect = of_scale if self.tie_scale_aspect else of_aspect
        limit = [n - (not self.inclusive_end) for n in grid]
        target = block_size(_between(self.target_scale, of_scale), _between(self.target_aspect, of_aspect), grid, limit)
        context = block_size(_between(self.context_scale, of_context), torch.ones_like(of_context), grid, limit)
        return torch.stack([target, context], dim=1)

    def _draw(self, key: Key, shared: Key | None, grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The context and the targets, drawn once: [batch, tokens] and [batch, targets, tokens]."""
        target, context = self.sizes((shared or key).stream("sizes").uniform(3), grid).unbind(1)
        size = torch.cat([target[:, None].expand(-1, self.targets, -1), context[:, None]], dim=1)
        size = size.expand(len(key.state), -1, -1)  # [batch, targets + 1, 2]
        room = torch.tensor(grid, device=size.device) - size + self.inclusive_end
        return context_and_targets(_starts(key.stream("places"), room), size, grid)


@dataclass(frozen=True)
class SpaceTimeBlockMasking:
    """V-JEPA: the union of a few large blocks is the target, and all the rest is context.

    The published pair of maskings is short-range, 8 blocks of 0.15 (the default), and long-range, 2 blocks of 0.7, each
    over all of time. They are drawn for every sample, one from ``key.stream("short")`` and one from
    ``key.stream("long")``, say. The released code seeds both alike, so that with `per_batch` and one `shared` key for
    both, blocks of both kinds have the same aspect.

    Args:
        blocks: how many blocks are hidden; they may overlap.
        spatial_scale: a block's share of rows x columns, drawn uniformly from this range.
        temporal_scale: its share of the time steps, from this range.
        aspect: its height over its width, from this range.
        per_batch: the published rule, see the file's head. Context and target are then cut: some tokens are in neither.
    """

    blocks: int = 8
    spatial_scale: Range = (0.15, 0.15)
    temporal_scale: Range = (1.0, 1.0)
    aspect: Range = (0.75, 1.5)
    per_batch: bool = False

    def __post_init__(self) -> None:
        _check_blocks(self.blocks, self.spatial_scale, self.aspect)
        _check_blocks(self.blocks, self.temporal_scale, (1.0, 1.0))

    def __call__(self, key: Key, grid: tuple[int, ...], shared: Key | None = None) -> Split:
        """Draw a split: the context and one target set, each in raster order, time first.

        Costs and arguments are those of `MultiBlockMasking.__call__`; the grid is (time, rows, columns).

        Raises:
            ValueError: the grid is not three-dimensional; no draw leaves a context; `per_batch` without `shared`.
        """
        if len(grid) != 3:
            raise ValueError(f"space-time blocks need a 3-d token grid; got {' x '.join(map(str, grid))}")
        shared = _of_batch(shared, self.per_batch)
        context, hidden = (_set(s, self.per_batch) for s in _draw_until(self._draw, key, shared, 0, grid))
        return Split(context, (hidden,))

    def sizes(self, u: Float[Tensor, "batch 3"], grid: tuple[int, ...]) -> Int[Tensor, "batch 3"]:
        """Steps, height and width of the blocks from three uniform draws: temporal scale, spatial scale, aspect."""
        of_time, of_space, of_aspect = u.double().unbind(1)
        steps = (grid[0] * _between(self.temporal_scale, of_time)).floor().long().clamp(min=1)
        scale, aspect = _between(self.spatial_scale, of_space), _between(self.aspect, of_aspect)
        return torch.cat([steps[:, None], block_size(scale, aspect, grid[1:], grid[1:])], dim=1)

    def _draw(self, key: Key, shared: Key | None, grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The context and its complement, drawn once: [batch, tokens] each."""
        size = self.sizes((shared or key).stream("sizes").uniform(3), grid)[:, None]
        size = size.expand(len(key.state), self.blocks, -1)  # [batch, blocks, 3]
        start = _starts(key.stream("places"), torch.tensor(grid, device=size.device) - size + 1)
        hidden = cover(start, size, grid).any(1)
        return ~hidden, hidden


def block_size(
    scale: Float[Tensor, "batch"], aspect: Float[Tensor, "batch"], grid: Sequence[int], limit: Sequence[int]
) -> Int[Tensor, "batch 2"]:
    """Height and width of blocks with a share of the grid's area and an aspect, each from 1 to its limit.

    As released: the area is rounded down first, then each side to the nearest integer, halves to even.
    """
    area = (math.prod(grid) * scale).floor()
    sides = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], dim=1).round().long()
    return torch.minimum(sides, torch.tensor(limit, device=sides.device)).clamp(min=1)


def cover(
    start: Int[Tensor, "batch blocks axes"], size: Int[Tensor, "batch blocks axes"], grid: tuple[int, ...]
) -> Bool[Tensor, "batch blocks tokens"]:
    """True at the tokens of each block, on a grid with any number of axes, flattened row-major."""
    inside = torch.ones(*start.shape[:2], 1, dtype=torch.bool, device=start.device)
    for axis, n in enumerate(grid):
        on_axis = covered(start[..., axis], size[..., axis], n)  # [batch, blocks, n]
        inside = (inside[..., None] & on_axis[:, :, None]).flatten(2)
    return inside


def context_and_targets(
    start: Int[Tensor, "batch blocks axes"], size: Int[Tensor, "batch blocks axes"], grid: tuple[int, ...]
) -> tuple[Bool[Tensor, "batch tokens"], Bool[Tensor, "batch targets tokens"]]:
    """I-JEPA's context and targets, given the starts of its blocks: the targets' first, the context block's last."""
    *targets, whole = cover(start, size, grid).unbind(1)
    blocks = torch.stack(targets, dim=1)  # [batch, targets, tokens]
    return whole & ~blocks.any(1), blocks


def _draw_until(
    draw: Draw, key: Key, shared: Key | None, min_keep: int, grid: tuple[int, ...]
) -> tuple[Bool[Tensor, "batch tokens"], Tensor]:
    """Draw for all samples, then again for those whose context is too small, until there are none."""
    context, targets = draw(key.stream(0), shared, grid)
    for attempt in range(1, _MOST_DRAWS):
        again = (context.sum(1) <= min_keep).nonzero()[:, 0]
        if len(again) == 0:
            return context, targets
        context[again], targets[again] = draw(Key(key.state[again]).stream(attempt), shared, grid)
    raise ValueError(
        f"blocks of these settings leave a context of at most {min_keep} of {math.prod(grid)} tokens: lower min_keep, "
        "the number of blocks or their scale, or take more tokens (a larger input, a smaller patch)"
    )


def _set(members: Bool[Tensor, "batch tokens"], cut: bool) -> Indices:
    """The tokens marked True, in raster order; cut to the smallest number in the batch, or padded to the largest."""
    return Indices.from_members(members, int(members.sum(1).min()) if cut else None)


def _of_batch(shared: Key | None, per_batch: bool) -> Key | None:
    """The key of the block sizes that a batch shares; None where every sample draws its own."""
    if not per_batch:
        return None
    if shared is None:
        raise ValueError(
            "per_batch=True draws block sizes once for a batch: give a key that is the same for all its samples as "
            "`shared`, or set per_batch to false"
        )
    return Key(shared.state[:1])


def _starts(key: Key, room: Int[Tensor, "batch blocks axes"]) -> Int[Tensor, "batch blocks axes"]:
    """The start of each block along each axis, uniform over range(room)."""
    u = key.uniform(room[0].numel()).double().view(room.shape)
    return (u * room).floor().long()


def _between(limits: Range, u: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
    return limits[0] + u * (limits[1] - limits[0])


def _check_blocks(count: int, scale: Range, aspect: Range) -> None:
    if count < 1:
        raise ValueError(f"{count} blocks: at least one is needed")
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"block scale {scale} is not a rising range within (0, 1]: it is a share of the token grid")
    if not 0 < aspect[0] <= aspect[1]:
        raise ValueError(f"block aspect {aspect} is not a rising range of positive numbers (height over width)")
