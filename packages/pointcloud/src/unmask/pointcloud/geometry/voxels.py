"""Which point lies in which cell: pillars, two finer grids inside them, neighbours, and reductions over cells.

A pillar is a column over the whole height of the range, the unit that is hidden and encoded (0.256 m wide in GeoMAE,
arXiv 2305.08808). It is cut into "low" cells, the finest, and into "med" cells, blocks of low ones. Cells are counted
along z, y, x, points are x, y, z.

Every level comes from the finest by integer division, so a point on a border is in one cell at all levels. The released
code (Tsinghua-MARS-Lab/GeoMAE, Apache-2.0) floors each level on its own in float32, where levels can disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmask.core.errors import UnmaskError
from unmask.core.nn.ragged import rows_of, run_offsets, take_ragged, unravel


@dataclass(frozen=True)
class VoxelGrid:
    """The cells of a range, half-open: a point on the upper border is outside.

    Args:
        lower: the range's lower corner x, y, z, in metres.
        pillar: size of a pillar along x, y, z, in metres; z is the height of the whole range.
        shape: pillars along y (rows) and x (columns).
        low: finest cells per pillar along z, y, x.
        med: middle cells per pillar along z, y, x; each divides that of `low`.

    Raises:
        UnmaskError: for a size or count that is not positive, a `med` that does not divide `low`, or too many cells.
    """

    lower: tuple[float, float, float]
    pillar: tuple[float, float, float]
    shape: tuple[int, int]
    low: tuple[int, int, int] = (8, 4, 4)
    med: tuple[int, int, int] = (4, 2, 2)

    def __post_init__(self) -> None:
        if min(self.pillar) <= 0 or min((*self.shape, *self.low, *self.med)) < 1:
            raise UnmaskError(
                f"a grid of {self.shape} pillars of {self.pillar} m, cut into {self.low} and {self.med} cells, is "
                "empty: sizes must be above 0 and counts at least 1"
            )
        if any(low % med for low, med in zip(self.low, self.med, strict=True)):
            raise UnmaskError(
                f"the middle cells {self.med} (z, y, x) of a pillar do not divide the finest cells {self.low}; "
                "take divisors, such as half of each"
            )
        if self.shape[0] * self.shape[1] * self.num_low >= 2**53:
            raise UnmaskError(
                f"{self.shape} pillars of {self.num_low} cells are too many to be numbered; take larger pillars "
                "(data.pillar)"
            )

    @property
    def num_low(self) -> int:
        """Finest cells per pillar."""
        return self.low[0] * self.low[1] * self.low[2]

    @property
    def num_med(self) -> int:
        """Middle cells per pillar."""
        return self.med[0] * self.med[1] * self.med[2]

    @property
    def low_cell(self) -> tuple[float, float, float]:
        """Size of a finest cell along x, y, z, in metres."""
        (x, y, z), (nz, ny, nx) = self.pillar, self.low
        return x / nx, y / ny, z / nz

    @property
    def bounds(self) -> tuple[float, float, float, float, float, float]:
        """Both corners of the range, x, y, z and x, y, z, in metres."""
        (x, y, z), (dx, dy, dz), (ny, nx) = self.lower, self.pillar, self.shape
        return x, y, z, x + nx * dx, y + ny * dy, z + dz

    def med_slot(self, low_slot: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
        """The middle cells that these finest cells are part of, computed on their device."""
        (lz, ly, lx), (mz, my, mx) = self.low, self.med
        rows = low_slot // lx
        z, y, x = rows // (ly * (lz // mz)), rows % ly // (ly // my), low_slot % lx // (lx // mx)
        return (z * my + y) * mx + x


@dataclass(frozen=True)
class Voxels:
    """The points of a batch sorted into cells: integers only, made from positions by `voxelise`.

    Args:
        order: rows of the batch's points inside the range, sorted by sample, pillar (y, x) and low slot, stable.
        pillar_of: the pillar (row of `pillars`) of each of them, ascending.
        slot_of: its finest cell in the pillar, ``(z * low_y + y) * low_x + x``.
        pillars: sample, y and x of every pillar with a point, in lexicographic order.
        offsets: where each sample starts in `pillars`, and their number.
        pillar_starts: where each pillar starts in `order`, and the number of points inside.
        low_pillar: the pillar of every finest cell with a point, ordered by pillar and slot.
        low_slot: its slot in the pillar.
        low_starts: where each of these cells starts in `order`, and the number of points inside.
        point_offsets: where each sample starts in the batch's points, those outside included, and their number.
    """

    order: Int[Tensor, "kept"]
    pillar_of: Int[Tensor, "kept"]
    slot_of: Int[Tensor, "kept"]
    pillars: Int[Tensor, "pillars 3"]
    offsets: Int[Tensor, "batch_plus_1"]
    pillar_starts: Int[Tensor, "pillars_plus_1"]
    low_pillar: Int[Tensor, "cells"]
    low_slot: Int[Tensor, "cells"]
    low_starts: Int[Tensor, "cells_plus_1"]
    point_offsets: Int[Tensor, "batch_plus_1"]

    def take(self, rows: Sequence[int]) -> Voxels:
        """The structure of these samples alone, in this order: what `voxelise` makes of ``batch.take(rows)``.

        The host waits for the samples' bounds.
        """
        chosen = torch.as_tensor(rows, dtype=torch.int64, device=self.order.device)
        kept_offsets = self.pillar_starts[self.offsets]
        cell_offsets = torch.searchsorted(self.low_starts, kept_offsets)
        pillar, offsets = take_ragged(self.offsets, rows)
        kept, new_kept = take_ragged(kept_offsets, rows)
        cell, new_cell = take_ragged(cell_offsets, rows)
        _, points = take_ragged(self.point_offsets, rows)

        def moved(values: Tensor, old: Tensor, new: Tensor, at: Tensor) -> Tensor:
            """Row numbers `values`, one per member of the new sets `at`, counted from where their samples now lie."""
            return values + (new[:-1] - old[chosen]).repeat_interleave(at.diff(), output_size=len(values))

        sample = rows_of(offsets, len(pillar))
        total = new_kept[-1:]
        return Voxels(
            moved(self.order[kept], self.point_offsets, points, new_kept),
            moved(self.pillar_of[kept], self.offsets, offsets, new_kept),
            self.slot_of[kept],
            torch.cat([sample[:, None], self.pillars[pillar, 1:]], dim=1),
            offsets,
            torch.cat([moved(self.pillar_starts[pillar], kept_offsets, new_kept, offsets), total]),
            moved(self.low_pillar[cell], self.offsets, offsets, new_cell),
            self.low_slot[cell],
            torch.cat([moved(self.low_starts[cell], kept_offsets, new_kept, new_cell), total]),
            points,
        )


def low_units(
    points: Float[Tensor, "total channels"], grid: VoxelGrid
) -> tuple[Float[Tensor, "total"], Float[Tensor, "total"], Float[Tensor, "total"]]:
    """Positions z, y, x in finest cells from the range's lower corner, in float64; their floor is the cell."""
    cells = grid.low_cell
    x, y, z = ((points[:, axis].double() - grid.lower[axis]) / cells[axis] for axis in range(3))
    return z, y, x


def voxelise(points: Float[Tensor, "total channels"], offsets: Int[Tensor, "batch_plus_1"], grid: VoxelGrid) -> Voxels:
    """Sort points into cells, with no cap on points or cells.

    Points outside the range, or with a position that is not finite, are in no cell; a sample may have none that is.
    The host waits three times, for the numbers of points inside, of cells and of pillars.

    Args:
        points: x, y, z in metres, then features, which are not read.
        offsets: where each sample starts in `points`, and their number.
        grid: the cells.
    """
    per_sample = grid.shape[0] * grid.shape[1]
    key, inside = _keys(points, grid)
    rows = inside.nonzero()[:, 0]
    sample = rows_of(offsets, len(points))
    key = key.index_select(0, rows).long() + sample.index_select(0, rows) * (per_sample * grid.num_low)
    key, by_key = torch.sort(key, stable=True)
    low_starts = run_offsets(key)
    cell_key = key[low_starts[:-1]]
    pillar_key = cell_key // grid.num_low
    first_cells = run_offsets(pillar_key)
    pillars = pillar_key[first_cells[:-1]]
    low_pillar, low_slot = rows_of(first_cells, len(cell_key)), cell_key - pillar_key * grid.num_low
    cell = rows_of(low_starts, len(key))
    return Voxels(
        order=rows.index_select(0, by_key),
        pillar_of=low_pillar.index_select(0, cell),
        slot_of=low_slot.index_select(0, cell),
        pillars=unravel(pillars, grid.shape),
        offsets=torch.searchsorted(pillars, torch.arange(len(offsets), device=points.device) * per_sample),
        pillar_starts=low_starts[first_cells],
        low_pillar=low_pillar,
        low_slot=low_slot,
        low_starts=low_starts,
        point_offsets=offsets,
    )


def _keys(
    points: Float[Tensor, "total channels"], grid: VoxelGrid
) -> tuple[Float[Tensor, "total"], Bool[Tensor, "total"]]:
    """``pillar * num_low + slot`` within the own sample, and whether a point is in the range at all.

    In float64, where whole numbers below 2^53 and the floors of their quotients are exact: quicker than integers.
    """
    (nz, ny, nx), (rows, columns) = grid.low, grid.shape
    z, y, x = (u.floor_() for u in low_units(points, grid))
    # Comparisons with NaN are false.
    inside = (z >= 0) & (z < nz) & (y >= 0) & (y < rows * ny) & (x >= 0) & (x < columns * nx)
    pillar_y, pillar_x = torch.floor(y / ny), torch.floor(x / nx)
    slot = (z * ny + (y - pillar_y * ny)) * nx + (x - pillar_x * nx)
    return (pillar_y * columns + pillar_x) * grid.num_low + slot, inside


def neighbours(pillars: Int[Tensor, "pillars 3"], shape: tuple[int, int]) -> Int[Tensor, "pillars 9"]:
    """The rows of each pillar's 3 x 3 neighbours, row-major over dy and dx in -1, 0, 1, itself in the middle.

    Args:
        pillars: sample, y, x, each at most once, in any order.
        shape: pillars of the grid along y and x.

    Returns:
        Rows of `pillars`; -1 where there is none. The host waits for nothing.
    """
    # One empty pillar around every sample's grid, so that a step over the edge gives a key that no pillar has.
    width = shape[1] + 2
    key = (pillars[:, 0] * (shape[0] + 2) + pillars[:, 1] + 1) * width + pillars[:, 2] + 1
    ascending, row = torch.sort(key)
    step = torch.arange(-1, 2, device=key.device)
    wanted = key[:, None] + (step[:, None] * width + step).flatten()
    at = torch.searchsorted(ascending, wanted).clamp_(max=len(key) - 1)
    return torch.where(ascending[at] == wanted, row[at], -1)
