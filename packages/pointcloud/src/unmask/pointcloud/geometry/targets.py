"""The geometry that GeoMAE predicts: centres of mass, occupied cells, surface normals and curvatures.

Computed from raw points, without gradient, in float64 inside and float32 outside. Components are z, y, x. GeoMAE:
arXiv 2305.08808; the targets are those of the released code (Tsinghua-MARS-Lab/GeoMAE, Apache-2.0), the computation is
ours: sums run over occupied cells instead of dense tables, the neighbourhood's scatter matrix is assembled from ten
sums per pillar, and its eigenvectors have a closed form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmask.core.nn.ragged import run_offsets, segment_mean, segment_sum, unravel
from unmask.pointcloud.geometry.voxels import VoxelGrid, Voxels, low_units, neighbours

_BELOW_ONE = 1 - 2.0**-24  # the largest float32 below 1
_LEVEL = 1e-3  # radians: a component below this does not decide a normal's sign
_KAPPA_EPS = 1e-9  # of the released code, square metres


@dataclass(frozen=True)
class GeometryTargets:
    """The targets of some pillars; float32 without gradient, components z, y, x.

    Args:
        low: centre of mass of the points in each finest cell, from the cell's lower corner and in units of the cell:
            in [0, 1); 0 where no point is.
        med: the same for middle cells.
        top: the same for the pillars.
        low_occupied: which finest cells have points.
        med_occupied: which middle cells have points.
        normal: unit normal of the surface around the pillar. An eigenvector has no sign; ours points up: z > 0 or,
            within a milliradian of the horizontal, y > 0 or, if that is as small, x > 0. So rotating a cloud about the
            vertical, or mirroring it in x or y, keeps the side that is up. (0, 0, 1) where the neighbourhood is a
            single point. Where the two smaller shares are equal, as for points on a line, it is some direction at right
            angles to the line, which rounding decides.
        curvature: shares of the neighbourhood's scatter along its principal axes, descending, with sum 1: (1/2, 1/2, 0)
            for a level plane, (1, 0, 0) for a line, thirds for a ball and for a single point.
    """

    low: Float[Tensor, "rows num_low 3"]
    med: Float[Tensor, "rows num_med 3"]
    top: Float[Tensor, "rows 3"]
    low_occupied: Bool[Tensor, "rows num_low"]
    med_occupied: Bool[Tensor, "rows num_med"]
    normal: Float[Tensor, "rows 3"]
    curvature: Float[Tensor, "rows 3"]


@dataclass(frozen=True)
class _Centroids:
    """The centres of mass of one level's occupied cells, ordered by pillar and slot."""

    pillar: Int[Tensor, "cells"]
    slot: Int[Tensor, "cells"]  # index in the pillar
    count: Float[Tensor, "cells"]  # points inside
    position: Float[Tensor, "cells 3"]  # z, y, x from the pillar's lower corner, in finest cells

    def merged(self, slot: Int[Tensor, "cells"], slots: int) -> _Centroids:
        """The centres of mass of larger cells: `slot` is that of each cell, of `slots` per pillar."""
        key, by_key = torch.sort(self.pillar * slots + slot, stable=True)
        weighted = torch.cat([self.position * self.count[:, None], self.count[:, None]], dim=1)
        starts = run_offsets(key)
        sums = segment_sum(weighted.index_select(0, by_key), starts)
        pillar = key[starts[:-1]] // slots
        return _Centroids(pillar, key[starts[:-1]] - pillar * slots, sums[:, 3], sums[:, :3] / sums[:, 3:])


@torch.no_grad()
def geometry_targets(
    points: Float[Tensor, "total channels"], voxels: Voxels, grid: VoxelGrid, rows: Int[Tensor, "rows"]
) -> GeometryTargets:
    """The targets of some pillars. Their neighbours count with all points, whether they are among `rows` or not.

    The neighbourhood of a pillar is the centres of mass q_k, in metres, of all middle cells with points in its 3 x 3
    pillars; normal and curvature come from the eigenvectors and eigenvalues of ``sum_k (q_k - c)(q_k - c)^T``, c being
    the pillar's own centre of mass. The host waits twice, for the number of occupied middle cells and of pillars.

    Args:
        points: x, y, z in metres, then features, which are not read.
        voxels: of these points.
        grid: the cells of `voxels`.
        rows: which pillars, each at most once.
    """
    low = _low(points, voxels, grid)
    med = low.merged(grid.med_slot(low.slot), grid.num_med)
    top = med.merged(torch.zeros_like(med.slot), 1)
    row = torch.full_like(top.pillar, len(rows))
    row[rows] = torch.arange(len(rows), device=rows.device)
    low_table, low_occupied = _table(low, grid.low, grid.low, row, len(rows))
    med_table, med_occupied = _table(med, grid.med, grid.low, row, len(rows))
    top_table, _ = _table(top, (1, 1, 1), grid.low, row, len(rows))
    values, vectors = symmetric_eig3(_scatter(med, top, voxels, grid, rows))
    spread = values.clamp(min=0) + _KAPPA_EPS
    return GeometryTargets(
        low=low_table,
        med=med_table,
        top=top_table[:, 0],
        low_occupied=low_occupied,
        med_occupied=med_occupied,
        normal=_upward(vectors[:, :, 2].float()),
        curvature=(spread / spread.sum(1, keepdim=True)).float(),
    )


def _low(points: Tensor, voxels: Voxels, grid: VoxelGrid) -> _Centroids:
    """The centres of mass of the finest cells."""
    inside = torch.stack([u.frac() for u in low_units(points[:, :3].index_select(0, voxels.order), grid)], dim=1)
    position = segment_mean(inside, voxels.low_starts) + unravel(voxels.low_slot, grid.low[1:])
    return _Centroids(voxels.low_pillar, voxels.low_slot, voxels.low_starts.diff().double(), position)


def _table(
    centroids: _Centroids,
    counts: tuple[int, int, int],
    low: tuple[int, int, int],
    row: Int[Tensor, "pillars"],
    rows: int,
) -> tuple[Float[Tensor, "rows slots 3"], Bool[Tensor, "rows slots"]]:
    """Centres of mass from the corner of their own cell and in units of it, and which cells have one.

    A level has `counts` cells per pillar, the finest has `low`. `row` is each pillar's row in the result; those without
    one share the row `rows`, which is cut off: to leave their cells out, the host would have to wait for their number.
    """
    slots = counts[0] * counts[1] * counts[2]
    per = [fine / own for fine, own in zip(low, counts, strict=True)]
    inside = centroids.position / _constant(per, centroids.position) - unravel(centroids.slot, counts[1:])
    at = row[centroids.pillar] * slots + centroids.slot
    table = inside.new_zeros((rows + 1) * slots, 3, dtype=torch.float32)
    table[at] = inside.float().clamp_(0, _BELOW_ONE)
    occupied = torch.zeros(len(table), dtype=torch.bool, device=table.device)
    occupied[at] = True
    return table.view(rows + 1, slots, 3)[:-1], occupied.view(rows + 1, slots)[:-1]


def _scatter(
    med: _Centroids, top: _Centroids, voxels: Voxels, grid: VoxelGrid, rows: Int[Tensor, "rows"]
) -> Float[Tensor, "rows 3 3"]:
    """``sum_k (q_k - c)(q_k - c)^T`` over the middle cells of each pillar's 3 x 3 neighbourhood, in square metres.

    A pillar j adds its moments about its own centre c_j, shifted by D = c_j - c: with d_k = q_k - c_j that is
    ``sum d d^T + (sum d) D^T + D (sum d)^T + n D D^T``. So a pillar is summed once, not for each of nine neighbours,
    and no term is much larger than the result.
    """
    size = _constant(grid.low_cell[::-1], med.position)
    d = (med.position - top.position.index_select(0, med.pillar)) * size
    z, y, x = d.unbind(1)
    moments = torch.stack([z * z, z * y, z * x, y * y, y * x, x * x, z, y, x, torch.ones_like(z)], dim=1)
    starts = torch.searchsorted(med.pillar, torch.arange(len(top.pillar) + 1, device=rows.device))
    corner = torch.nn.functional.pad(voxels.pillars[:, 1:], (1, 0)) * _constant(grid.low, size)
    own = torch.cat([segment_sum(moments, starts), (top.position + corner) * size], dim=1)
    # A missing neighbour is read from a row of zeros before the first pillar.
    around = neighbours(voxels.pillars, grid.shape).index_select(0, rows) + 1
    near = torch.cat([own.new_zeros(1, 13), own]).index_select(0, around.flatten())
    second, first, count, centre = near.view(len(rows), 9, 13).split([6, 3, 1, 3], dim=2)
    shift = centre - centre[:, 4:5]
    cross = torch.bmm((first + count * shift / 2).mT, shift)
    zz, zy, zx, yy, yx, xx = second.sum(1).unbind(1)
    local = torch.stack([zz, zy, zx, zy, yy, yx, zx, yx, xx], dim=1)
    return local.view(-1, 3, 3) + cross + cross.mT


def _upward(normals: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]:
    """The same normals, with the sign that `GeometryTargets` describes."""
    z, y, x = normals.unbind(1)
    decides = torch.where(z.abs() > _LEVEL, z, torch.where(y.abs() > _LEVEL, y, x))
    return torch.where(decides[:, None] < 0, -normals, normals)


def symmetric_eig3(s: Float[Tensor, "n 3 3"]) -> tuple[Float[Tensor, "n 3"], Float[Tensor, "n 3 3"]]:
    """Eigenvalues and eigenvectors of symmetric 3 x 3 matrices, in float64.

    Closed form, the same operations for all of them: the eigenvalue that lies apart from the other two comes from the
    trigonometric solution of the characteristic equation (O. K. Smith, Commun. ACM 4(4), 1961), where that is well
    conditioned; its vector is a column of the adjugate; the other two pairs come from one rotation in the plane at
    right angles to it, which makes them as good for equal eigenvalues as for distinct ones (compare D. Eberly, A Robust
    Eigensolver for 3 x 3 Symmetric Matrices, 2014).

    Args:
        s: finite matrices; entries above the diagonal are not read.

    Returns:
        Eigenvalues, descending, to a few units of float64 rounding of the largest in size; and orthonormal vectors as
        columns, with any sign. A multiple of the identity has the columns of the identity.
    """
    a = s.double()
    # A symmetric matrix as its diagonal and, in row k of `off`, the entry that joins the two axes other than k.
    entries = torch.stack([a[:, 0, 0], a[:, 1, 1], a[:, 2, 2], a[:, 2, 1], a[:, 2, 0], a[:, 1, 0]])
    largest = entries.abs().amax(0)
    diagonal, off = (entries / torch.where(largest > 0, largest, 1)).split(3)
    mean = diagonal.mean(0)
    diagonal = diagonal - mean
    diagonal = diagonal - diagonal.mean(0)  # the mean was rounded, which counts where the entries are nearly equal
    scale = ((diagonal.square() + 2 * off.square()).sum(0) / 6).sqrt()
    flat = scale < 2.0**-60  # far below the rounding of the entries: a multiple of the identity
    divisor = torch.where(flat, 1, scale)
    diagonal, off = diagonal / divisor, off / divisor
    # Trace 0 and squares that sum to 6: the eigenvalues are 2 cos(angle) for three angles 120 degrees apart.
    half_det = diagonal.prod(0) / 2 + off.prod(0) - (diagonal * off.square()).sum(0) / 2
    apart = torch.copysign(2 * torch.cos(half_det.abs().clamp(max=1).acos() / 3), half_det)
    v = _null_vector(diagonal - apart, off)
    plane, within = _across(diagonal, off, v)
    largest_apart = half_det >= 0  # of the three eigenvalues; else it is the smallest
    values = torch.where(largest_apart, torch.stack([apart, *plane]), torch.stack([*plane, apart]))
    vectors = torch.where(largest_apart, torch.stack([v, *within]), torch.stack([*within, v]))
    identity = torch.eye(3, dtype=v.dtype, device=v.device)
    vectors = torch.where(flat[:, None, None], identity, vectors.permute(2, 1, 0))
    return ((values * scale + mean) * largest).T, vectors


def _null_vector(diagonal: Float[Tensor, "3 n"], off: Float[Tensor, "3 n"]) -> Float[Tensor, "3 n"]:
    """Unit vectors that symmetric matrices of rank two map to zero: the longest columns of their adjugates."""
    on = diagonal.roll(1, 0) * diagonal.roll(-1, 0) - off.square()
    cross = off.roll(1, 0) * off.roll(-1, 0) - off * diagonal
    columns = torch.stack([on[0], cross[2], cross[1], cross[2], on[1], cross[0], cross[1], cross[0], on[2]])
    longest = on.abs().argmax(0)
    v = columns.view(3, 3, -1).gather(0, longest.expand(1, 3, -1))[0]
    return v / v.square().sum(0).sqrt()


def _across(
    diagonal: Float[Tensor, "3 n"], off: Float[Tensor, "3 n"], v: Float[Tensor, "3 n"]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The eigenvalues [n], the larger first, and eigenvectors [3, n] in the plane at right angles to an eigenvector."""
    zero = torch.zeros_like(v[0])
    first = v[0].abs() > v[1].abs()
    u = torch.where(first, torch.stack([-v[2], zero, v[0]]), torch.stack([zero, v[2], -v[1]]))
    u = u / u.square().sum(0).sqrt()
    w = torch.linalg.cross(v, u, dim=0)
    su, sw = _times(diagonal, off, u), _times(diagonal, off, w)
    uu, uw, ww = (u * su).sum(0), (u * sw).sum(0), (w * sw).sum(0)
    middle, half = (uu + ww) / 2, (uu - ww) / 2
    angle, radius = torch.atan2(uw, half) / 2, torch.hypot(half, uw)
    cos, sin = angle.cos(), angle.sin()
    return (middle + radius, middle - radius), (cos * u + sin * w, cos * w - sin * u)


def _times(diagonal: Float[Tensor, "3 n"], off: Float[Tensor, "3 n"], v: Float[Tensor, "3 n"]) -> Float[Tensor, "3 n"]:
    """Symmetric matrices times vectors."""
    return diagonal * v + off.roll(1, 0) * v.roll(-1, 0) + off.roll(-1, 0) * v.roll(1, 0)


def _constant(values: Sequence[int] | Sequence[float], like: Tensor) -> Tensor:
    """A few numbers as a tensor, filled in on the device of `like`: a copy from the host would cost a sync."""
    return torch.stack([like.new_full((), value) for value in values])
