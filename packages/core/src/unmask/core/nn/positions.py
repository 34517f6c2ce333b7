"""Position embeddings: fixed sine-cosine tables and learned relative biases."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


def sincos_positions(grid: Sequence[int], dim: int) -> Float[Tensor, "tokens dim"]:
    """The fixed position table of MAE (arXiv 2111.06377), for a grid with any number of axes.

    The channels are shared equally between the axes, **the last axis first** (for images: the column in the first half,
    the row in the second), and each share holds all sines, then all cosines, at frequencies ``10000 ** (-k / (share /
    2))``. Coordinates are integer token indices. Computed in float64, returned in float32.

    Args:
        grid: tokens along each axis, for example (rows, columns).
        dim: width of the table; must be divisible by twice the number of axes.
    """
    share, left = divmod(dim, len(grid))
    if left or share % 2:
        raise ValueError(f"dim {dim} must be divisible by {2 * len(grid)} for positions on a {len(grid)}-d grid")
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    frequency = 10000.0 ** (-torch.arange(share // 2, dtype=torch.float64) / (share / 2))
    angles = [axis.flatten()[:, None] * frequency for axis in reversed(axes)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1).float()


class RelativePositionBias(nn.Module):
    """A learned attention bias per head and relative (row, column) offset, as in BEiT (arXiv 2106.08254).

    With a class token the table has three entries more: class to token, token to class, class to class.
    The table starts at zero.
    """

    index: Tensor

    def __init__(self, grid: tuple[int, int], heads: int, class_token: bool = True) -> None:
        super().__init__()
        rows, columns = grid
        offsets = (2 * rows - 1) * (2 * columns - 1)
        self.table = nn.Parameter(torch.zeros(offsets + 3 * class_token, heads))
        position = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        offset = position[:, None] - position[None] + torch.tensor([rows - 1, columns - 1])
        index = offset[..., 0] * (2 * columns - 1) + offset[..., 1]
        if class_token:
            index = nn.functional.pad(index, (1, 0, 1, 0))
            index[0, :], index[:, 0], index[0, 0] = offsets, offsets + 1, offsets + 2
        self.register_buffer("index", index, persistent=False)

    def forward(self) -> Float[Tensor, "heads tokens tokens"]:
        """The bias of every head for every pair (query, key)."""
        n = len(self.index)
        return self.table[self.index.flatten()].view(n, n, -1).permute(2, 0, 1)  # [heads, tokens, tokens]
