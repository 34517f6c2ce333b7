"""Sparse convolutions over occupied cells only: submanifold (kernel 3), strided (kernel 2, stride 2) and its inverse.

Features are rows [cells, channels]; `cells` are integer coordinates (sample, z, y, x) or (sample, y, x) within a grid
of any spatial shape. Which rows are paired under which offset of the kernel depends on the cells only, so it is
computed once, in a `Rulebook`, and shared by all layers over the same cells:

    rules = submanifold_rules(cells, shape)                        # SubmanifoldConv: the same cells in and out
    coarse, coarse_shape, down = strided_rules(cells, shape)       # StridedConv(x, down)
    InverseConv(y, down.inverse)                                   # from the coarse cells back to `cells`

The cells of a rulebook need not be those that an encoder saw: a decoder that starts from more cells than the encoder
builds its own. Layers compute in plain torch or with spconv, see `unmask.pointcloud.geometry.pairwise`; parameters and
rulebooks are the same for both. Timings of both, and of a dense convolution: tools/compare_sparse.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from unmask.core.nn.ragged import unravel
from unmask.pointcloud.geometry.pairwise import Backend, resolve_backend, spconv_conv, torch_conv


@dataclass(frozen=True)
class Rulebook:
    """Which input row is added to which output row, under each offset of a kernel.

    Args:
        inputs: rows of the input, sorted by offset; within one offset each row occurs once at most.
        outputs: the row of the output that each goes to; within one offset each occurs once at most.
        counts: pairs of each offset, offsets in row-major order of the kernel.
        rows_in: rows of the input.
        rows_out: rows of the output.
        own: the offset that pairs every row with itself, whose pairs are left out of the lists; None without one.
    """

    inputs: Int[Tensor, "pairs"]
    outputs: Int[Tensor, "pairs"]
    counts: tuple[int, ...]
    rows_in: int
    rows_out: int
    own: int | None = None

    @property
    def inverse(self) -> Rulebook:
        """The rules of the inverse convolution: inputs and outputs swapped, offsets unchanged."""
        return Rulebook(self.outputs, self.inputs, self.counts, self.rows_out, self.rows_in, self.own)

    @cached_property
    def for_spconv(self) -> tuple[Int[Tensor, "2 offsets most"], Int[Tensor, "offsets"]]:
        """The pairs as spconv takes them, int32: one padded row per offset, and the counts."""
        pairs = self.inputs.new_full((2, len(self.counts), max(self.counts)), -1, dtype=torch.int32)
        both = torch.stack([self.inputs, self.outputs])
        for offset, chunk in enumerate(both.split(self.counts, dim=1)):
            pairs[:, offset, : chunk.shape[1]] = chunk
        return pairs, torch.tensor(self.counts, dtype=torch.int32)


def submanifold_rules(cells: Int[Tensor, "cells axes_plus_1"], shape: Sequence[int]) -> Rulebook:
    """The rules of a convolution with kernel 3 from cells to the same cells.

    Neighbours are found by binary search in sorted integer keys. Costs host syncs.

    Args:
        cells: distinct (sample, z, y, x) or (sample, y, x), in any order.
        shape: cells of the grid along each axis, (z, y, x) or (y, x); samples x the product must stay below 2^62.

    Raises:
        ValueError: a cell lies outside `shape` or occurs twice.
    """
    extent = [size + 1 for size in shape]  # an empty cell behind each axis, or neighbours would wrap around
    keys, order = _keys(cells, extent).sort()
    _check_cells(cells, shape, keys)
    strides = [math.prod(extent[axis + 1 :]) for axis in range(len(extent))]
    kernel = list(itertools.product((-1, 0, 1), repeat=len(extent)))
    middle = len(kernel) // 2
    deltas = [sum(o * s for o, s in zip(offset, strides, strict=True)) for offset in kernel[:middle]]
    wanted = keys + torch.tensor(deltas, device=keys.device)[:, None]
    match = torch.searchsorted(keys, wanted).clamp_(max=max(0, len(keys) - 1))
    offset, row = (keys[match] == wanted).nonzero(as_tuple=True)  # sorted by offset
    counts = torch.bincount(offset, minlength=middle).tolist()
    inputs, outputs = order[match[offset, row]], order[row]
    # The other half of the kernel is the first half mirrored: the same pairs the other way round.
    mirrored_inputs, mirrored_outputs = outputs.split(counts)[::-1], inputs.split(counts)[::-1]
    return Rulebook(
        torch.cat([inputs, *mirrored_inputs]),
        torch.cat([outputs, *mirrored_outputs]),
        (*counts, 0, *counts[::-1]),
        len(cells),
        len(cells),
        own=middle,
    )


def strided_rules(
    cells: Int[Tensor, "cells axes_plus_1"], shape: Sequence[int]
) -> tuple[Int[Tensor, "coarse axes_plus_1"], tuple[int, ...], Rulebook]:
    """The rules of a convolution with kernel 2 and stride 2, from cells to the coarse cells that hold any of them.

    Every cell has a coarse one: odd sizes are rounded up. Costs host syncs.

    Args:
        cells: distinct (sample, z, y, x) or (sample, y, x), in any order.
        shape: cells of the grid along each axis; samples x the product must stay below 2^62.

    Returns:
        The coarse cells in lexicographic order, the coarse grid's shape, and the rules.

    Raises:
        ValueError: a cell lies outside `shape` or occurs twice.
    """
    _check_cells(cells, shape, _keys(cells, shape).sort().values)
    coarse_shape = tuple(-(-size // 2) for size in shape)
    parents = torch.cat([cells[:, :1], cells[:, 1:] // 2], dim=1)
    keys, parent_of = _keys(parents, coarse_shape).unique(return_inverse=True)
    powers = torch.tensor([2**axis for axis in reversed(range(len(shape)))], device=cells.device)
    corner = (cells[:, 1:] % 2 * powers).sum(1)
    inputs = corner.argsort(stable=True)
    counts = tuple(torch.bincount(corner, minlength=2 ** len(shape)).tolist())
    coarse = unravel(keys, coarse_shape).to(cells.dtype)
    return coarse, coarse_shape, Rulebook(inputs, parent_of[inputs], counts, len(cells), len(coarse))


class SparseConv(nn.Module):
    """A convolution along the pairs of a rulebook; use one of the three kinds below.

    Weights have spconv's layout and the initialisation of torch's dense convolutions (uniform, 1 / sqrt(fan-in)).

    Args:
        channels: channels of the input.
        out_channels: channels of the output.
        axes: 2 for cells (sample, y, x), 3 for (sample, z, y, x).
        bias: whether a bias is added.
        backend: see `unmask.pointcloud.geometry.pairwise.resolve_backend`.

    Raises:
        UnmaskError: `backend` is ``spconv`` and it cannot be imported.
    """

    kernel_size: int

    def __init__(
        self, channels: int, out_channels: int, axes: int = 2, bias: bool = True, backend: Backend = "auto"
    ) -> None:
        super().__init__()
        self.backend = resolve_backend(backend)
        self.weight = nn.Parameter(torch.empty(out_channels, *[self.kernel_size] * axes, channels))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise weights and bias."""
        bound = self.weight[0].numel() ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Float[Tensor, "rows channels"], rules: Rulebook) -> Float[Tensor, "rows_out out_channels"]:
        """Add up weight[:, offset] @ x[input] over the pairs of each output row, and the bias.

        Raises:
            ValueError: the rules are for another number of rows, or for another kernel.
        """
        if len(x) != rules.rows_in or self.weight[0, ..., 0].numel() != len(rules.counts):
            raise ValueError(
                f"{type(self).__name__} of kernel {tuple(self.weight.shape[1:-1])} got {len(x)} rows and rules for "
                f"{rules.rows_in} rows and {len(rules.counts)} offsets"
            )
        if self.backend == "spconv" and len(x):  # it refuses empty tensors
            y = spconv_conv(x, self.weight, *rules.for_spconv, rules.rows_out, rules.own)  # [rows_out, out_channels]
        else:
            weight = self.weight.flatten(1, -2)  # [out_channels, offsets, channels]
            y = torch_conv(x, weight, rules.inputs, rules.outputs, rules.counts, rules.rows_out, rules.own)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"{self.weight.shape[-1]}, {len(self.weight)}, kernel={self.kernel_size}, backend={self.backend}"


class SubmanifoldConv(SparseConv):
    """Kernel 3 (3x3 or 3x3x3) on the occupied cells; the others count as zero and stay empty: `submanifold_rules`."""

    kernel_size = 3


class StridedConv(SparseConv):
    """Kernel 2, stride 2, from cells to coarse cells: `strided_rules`."""

    kernel_size = 2


class InverseConv(SparseConv):
    """Kernel 2, from coarse cells back to cells (a transposed convolution, read there): `strided_rules`, `inverse`."""

    kernel_size = 2


def _keys(cells: Tensor, extent: Sequence[int]) -> Tensor:
    """Integers that sort as (sample, ..., y, x) does."""
    keys = cells[:, 0].long()
    for axis, size in enumerate(extent, start=1):
        keys = keys * size + cells[:, axis]
    return keys


def _check_cells(cells: Tensor, shape: Sequence[int], keys: Tensor) -> None:
    """Refuse cells that would silently be paired with the wrong neighbours; `keys` are sorted."""
    upper = torch.tensor(shape, device=cells.device)
    outside = ((cells < 0).any(1) | (cells[:, 1:] >= upper).any(1)).sum()
    twice = (keys[1:] == keys[:-1]).sum()
    bad_outside, bad_twice = torch.stack([outside, twice]).tolist()
    if bad_outside or bad_twice:
        raise ValueError(
            f"{bad_outside} of {len(cells)} cells lie outside the grid {tuple(shape)} and {bad_twice} occur twice; "
            "expected distinct (sample, ..., y, x) within the grid"
        )
