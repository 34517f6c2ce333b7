"""Rotary positions: queries and keys are rotated by an angle that grows with the position.

Four published layouts are one formula here, ``x * cos + partner(x) * sin``, with one difference: which channels are
pairs, and how many channels an axis has.

* 1-D, ``halves``: LLaMA (arXiv 2302.13971); channel i is paired with channel i + d / 2.
* 1-D, ``adjacent``: RoFormer (arXiv 2104.09864); channel 2i is paired with channel 2i + 1.
* 2-D, ``halves`` within each axis, base 100: CroCo v2 (arXiv 2211.10408); first half of a head is the row, second half
  the column.
* 3-D: V-JEPA 2 (arXiv 2506.09985); time, row and column share a head's channels, and what is left over is not rotated.
  Its released weights are trained with ``adjacent_tiled``: adjacent channels are pairs, but frequencies are laid out as
  for halves, so that the two channels of a pair have different angles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from unmask.core.mask import Indices

Pairs = Literal["halves", "adjacent", "adjacent_tiled"]


@dataclass(frozen=True)
class Rotary:
    """The rotation of some tokens. Make one with `rotary_positions`, for all tokens of a grid, and `take` from it.

    Args:
        cos: cosines of the angles, for the channels that are rotated; channels after them stay as they are.
        sin: sines, negative in the first channel of each pair.
        distance: channels between the two of a pair.
    """

    cos: Float[Tensor, "batch 1 tokens channels"]
    sin: Float[Tensor, "batch 1 tokens channels"]
    distance: int

    def rotate(self, x: Float[Tensor, "n heads tokens head_dim"]) -> Float[Tensor, "n heads tokens head_dim"]:
        """Rotate queries or keys: in float32, returned in their own type."""
        pairs, rest = x.split([self.cos.shape[-1], x.shape[-1] - self.cos.shape[-1]], dim=-1)
        partner = pairs.unflatten(-1, (-1, 2, self.distance)).flip(-2).flatten(-3)
        return torch.cat([(pairs * self.cos + partner * self.sin).to(x.dtype), rest], dim=-1)

    def take(self, indices: Indices) -> Rotary:
        """The rotation of each sample's tokens `indices`, out of one for all tokens of the grid."""
        batch = len(indices.index)
        cos, sin = (indices.take(t[:, 0].expand(batch, -1, -1))[:, None] for t in (self.cos, self.sin))
        return Rotary(cos, sin, self.distance)

    def last(self, count: int) -> Rotary:
        """The rotation of the last `count` tokens."""
        return Rotary(self.cos[:, :, -count:], self.sin[:, :, -count:], self.distance)

    def with_prefix(self, tokens: int) -> Rotary:
        """The same, with `tokens` tokens in front that are not rotated (class and register tokens)."""
        return Rotary(F.pad(self.cos, (0, 0, tokens, 0), value=1.0), F.pad(self.sin, (0, 0, tokens, 0)), self.distance)

    @classmethod
    def concatenate(cls, parts: Sequence[Rotary]) -> Rotary:
        """The rotation of token sequences that are concatenated, the same number of samples in each."""
        cos, sin = (torch.cat([getattr(part, name) for part in parts], dim=2) for name in ("cos", "sin"))
        return cls(cos, sin, parts[0].distance)


def rotary_positions(
    positions: Int[Tensor, "*batch tokens axes"],
    head_dim: int,
    *,
    base: float = 10000.0,
    pairs: Pairs = "halves",
) -> Rotary:
    """The rotation of tokens at these positions.

    Every axis has ``2 * (head_dim // axes // 2)`` channels, in the order of the axes; pair k of an axis with d channels
    is rotated by ``position * base ** (-2k / d)``. Angles are float32 whatever the precision of the network.

    Args:
        positions: coordinates of each token; no batch axis where all samples have the same.
        head_dim: channels of one head.
        base: 10000 in RoFormer, LLaMA and V-JEPA 2; 100 in CroCo v2.
        pairs: which channels are paired; see the file's head.

    Raises:
        ValueError: a head has too few channels for the number of axes.
    """
    axes = positions.shape[-1]
    share = 2 * (head_dim // axes // 2)
    if share == 0:
        raise ValueError(f"a head of {head_dim} channels has no pair for each of {axes} axes; use at least {2 * axes}")
    half = share // 2
    frequency = base ** (-torch.arange(half, dtype=torch.float32, device=positions.device) / half)
    angle = positions.to(torch.float32)[..., None] * frequency  # [*batch, tokens, axes, half]
    angle = angle.repeat_interleave(2, -1) if pairs == "adjacent" else torch.cat([angle, angle], -1)
    angle = angle.flatten(-2).unsqueeze(-3)  # [*batch, 1, tokens, channels]: the same for every head
    angle = angle if angle.dim() == 4 else angle[None]
    distance = half if pairs == "halves" else 1
    first = torch.arange(axes * share, device=positions.device) // distance % 2 == 0
    return Rotary(angle.cos(), torch.where(first, -angle.sin(), angle.sin()), distance)


def grid_positions(grid: Sequence[int], device: torch.device | None = None) -> Int[Tensor, "tokens axes"]:
    """The coordinates of a grid's tokens, row-major."""
    index = torch.arange(math.prod(grid), device=device)
    return torch.stack(torch.unravel_index(index, tuple(grid)), dim=-1)
