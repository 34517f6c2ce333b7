"""Cells: against dictionaries, at borders, with broken and missing points, and after taking samples out."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from unmask.core.errors import UnmaskError
from unmask.pointcloud.data.batches import PointBatch, Sample, collate
from unmask.pointcloud.geometry.voxels import VoxelGrid, Voxels, neighbours, voxelise

# Not square, not symmetric, unequal cells: an axis mixed up shows.
GRID = VoxelGrid((-1.1, 2.0, -0.7), (0.3, 0.5, 2.4), (4, 7), low=(6, 2, 4), med=(3, 1, 2))
EXACT = VoxelGrid((-1.0, -2.0, -4.0), (0.5, 1.0, 8.0), (4, 4), low=(8, 4, 2), med=(4, 2, 1))  # floats hold all borders


def cloud(n: int, grid: VoxelGrid = GRID, seed: int = 0, beyond: float = 0.1) -> Tensor:
    """Points in the range and, by `beyond` of its size, around it; one feature."""
    bounds = torch.tensor(grid.bounds)
    spread = torch.rand(n, 3, generator=torch.Generator().manual_seed(seed)) * (1 + 2 * beyond) - beyond
    return torch.cat([bounds[:3] + spread * (bounds[3:] - bounds[:3]), torch.arange(n)[:, None]], dim=1)


def ragged() -> PointBatch:
    """Six clouds: broken points, nothing, one point, nothing inside, twins, and many points."""
    broken = cloud(50, seed=1)
    broken[::5, :3] = torch.tensor([math.nan, 0, 0]).roll(1)
    broken[1::5, 0], broken[2::5, 2] = math.inf, -math.inf
    twins = cloud(20, seed=2)[[3, 7, 3, 3, 7, 1, 9, 3]]
    clouds = [broken, cloud(0), cloud(1, beyond=0), cloud(9) + 100, twins, cloud(400, seed=3)]
    return collate([Sample(points, i) for i, points in enumerate(clouds)])


def slow(batch: PointBatch, grid: VoxelGrid) -> dict[tuple[int, int, int, int], list[int]]:
    """The points of every finest cell (sample, y, x, slot), one by one."""
    cells = defaultdict(list)
    counts = (grid.low[0], grid.shape[0] * grid.low[1], grid.shape[1] * grid.low[2])
    for row, (point, sample) in enumerate(zip(batch.points.tolist(), batch.sample_of.tolist(), strict=True)):
        if not all(math.isfinite(v) for v in point[:3]):
            continue
        axes = zip(point, grid.lower, grid.low_cell, strict=False)
        x, y, z = (math.floor((v - lower) / size) for v, lower, size in axes)
        if all(0 <= cell < n for cell, n in zip((z, y, x), counts, strict=True)):
            _, ny, nx = grid.low
            cells[sample, y // ny, x // nx, (z * ny + y % ny) * nx + x % nx].append(row)
    return cells


def make(batch: PointBatch, grid: VoxelGrid = GRID) -> Voxels:
    return voxelise(batch.points, batch.offsets, grid)


def one(points: list[list[float]] | Tensor, grid: VoxelGrid) -> Voxels:
    return make(collate([Sample(torch.as_tensor(points), 0)]), grid)


def assert_same(a: Voxels, b: Voxels) -> None:
    for field in fields(Voxels):
        ours, theirs = getattr(a, field.name), getattr(b, field.name)
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype == torch.int64, field.name


# --- the structure ---


def test_every_field_as_a_loop_over_points_makes_it() -> None:
    batch = ragged()
    cells, got = slow(batch, GRID), make(batch)
    order = sorted(cells)
    pillars = sorted({cell[:3] for cell in order})
    assert len(pillars) > 40 and len(order) > len(pillars)
    assert got.order.tolist() == [row for cell in order for row in cells[cell]]
    assert got.pillars.tolist() == [list(pillar) for pillar in pillars]
    assert got.pillar_of.tolist() == [pillars.index(cell[:3]) for cell in order for _ in cells[cell]]
    assert got.slot_of.tolist() == [cell[3] for cell in order for _ in cells[cell]]
    assert got.low_pillar.tolist() == [pillars.index(cell[:3]) for cell in order]
    assert got.low_slot.tolist() == [cell[3] for cell in order]
    assert got.low_starts.diff().tolist() == [len(cells[cell]) for cell in order]
    assert got.pillar_starts.tolist() == [
        *(got.pillar_of.tolist().index(i) for i in range(len(pillars))),
        len(got.order),
    ]
    assert got.offsets.tolist() == [sum(pillar[0] < i for pillar in pillars) for i in range(7)]
    assert got.offsets.diff().tolist()[1] == got.offsets.diff().tolist()[3] == 0
    assert torch.equal(got.point_offsets, batch.offsets)


def test_points_that_are_not_finite_or_outside_are_in_no_cell() -> None:
    batch = ragged()
    inside = make(batch).order
    assert batch.points[inside].isfinite().all() and len(inside) < len(batch.points)
    bounds = torch.tensor(GRID.bounds, dtype=torch.float64)
    xyz = batch.points[:, :3].double()
    assert len(inside) == ((xyz >= bounds[:3]) & (xyz < bounds[3:])).all(1).sum()


def test_a_point_on_a_border_is_in_the_upper_cell_and_on_the_upper_end_outside() -> None:
    counts = (EXACT.shape[1] * EXACT.low[2], EXACT.shape[0] * EXACT.low[1], EXACT.low[0])
    for axis, n in enumerate(counts):
        points = torch.tensor(EXACT.lower).repeat(n + 1, 1)
        points[:, axis] += torch.arange(n + 1) * EXACT.low_cell[axis]
        below = points[1:].clone()
        below[:, axis] -= 2.0**-20
        for cells in (points, below):
            got = one(cells, EXACT)
            place = torch.empty(n, 3, dtype=torch.int64)  # x, y, z in finest cells, in the order of the points
            _, ny, nx = EXACT.low
            lines = got.slot_of // nx
            pillar = got.pillars[got.pillar_of]
            place[got.order] = torch.stack(
                [pillar[:, 2] * nx + got.slot_of % nx, pillar[:, 1] * ny + lines % ny, lines // ny], dim=1
            )
            assert place[:, axis].tolist() == list(range(n))
    assert len(one([list(EXACT.bounds[3:])], EXACT).order) == 0
    assert one([list(EXACT.lower)], EXACT).slot_of.tolist() == [0]


def test_levels_agree_at_borders_that_float32_cannot_hold() -> None:
    """Points on borders of pillars, where floors at each level in float32 disagree."""
    grid = VoxelGrid((-30.0, -30.0, -5.0), (0.3, 0.3, 8.0), (200, 200), low=(6, 3, 3), med=(3, 1, 1))
    x = torch.arange(1, 200) * 0.3 - 30.0
    pillar32, low32 = (((x + 30.0) / size).floor() for size in (0.3, 0.1))
    assert (pillar32 != low32.div(3, rounding_mode="floor")).any()  # or this test would show nothing
    points = torch.stack([x, x.flip(0), torch.full_like(x, -1.0)], dim=1)
    got = one(points, grid)
    assert len(got.order) == 199
    corner = torch.tensor(grid.lower, dtype=torch.float64)[:2] + got.pillars[:, [2, 1]].double() * 0.3
    inside = points[got.order, :2].double() - corner[got.pillar_of]
    assert inside.min() > -1e-12 and inside.max() < 0.3
    cells = torch.stack([got.slot_of % 3, got.slot_of // 3 % 3], dim=1)
    assert ((inside - 0.1 * cells).abs() < 1e-5).any() and (inside >= 0.1 * cells - 1e-12).all()
    assert (inside < 0.1 * (cells + 1) + 1e-12).all()


def test_no_points_at_all() -> None:
    got = make(collate([Sample(torch.zeros(0, 4), 0), Sample(torch.zeros(0, 4), 1)]))
    assert got.pillars.shape == (0, 3) and got.offsets.tolist() == [0, 0, 0]
    assert got.pillar_starts.tolist() == got.low_starts.tolist() == [0]
    assert neighbours(got.pillars, GRID.shape).shape == (0, 9)


def test_twins_share_a_cell_in_their_order() -> None:
    got = one([[-1.0, 2.1, 0.0]] * 5, GRID)
    assert got.order.tolist() == [0, 1, 2, 3, 4] and got.low_starts.tolist() == got.pillar_starts.tolist() == [0, 5]


def test_the_order_of_points_changes_nothing_but_their_rows() -> None:
    points = cloud(500)
    shuffle = torch.randperm(500)
    one_way, other = one(points, GRID), one(points[shuffle], GRID)
    for name in ("pillar_of", "slot_of", "pillars", "offsets", "pillar_starts", "low_pillar", "low_slot", "low_starts"):
        assert torch.equal(getattr(one_way, name), getattr(other, name)), name
    cell = one_way.pillar_of * GRID.num_low + one_way.slot_of
    for rows in (one_way.order, shuffle[other.order]):
        # Sorted inside their cells, both orders list the same points.
        assert torch.equal(torch.stack([cell, rows]).T.unique(dim=0)[:, 1], one_way.order)


def test_sorted_by_sample_pillar_and_slot_and_stable() -> None:
    batch = ragged()
    got = make(batch)
    keys = torch.cat([got.pillars[got.pillar_of], got.slot_of[:, None], got.order[:, None]], dim=1).tolist()
    assert keys == sorted(keys)
    assert torch.equal(got.pillars[got.pillar_of, 0], batch.sample_of[got.order])


@pytest.mark.parametrize("rows", [[0], [5], [1], [3, 1], [5, 4, 3, 2, 1, 0], [4, 0, 4, 5, 5, 2], [0, 1, 2, 3, 4, 5]])
def test_taking_samples_is_voxelising_them(rows: list[int]) -> None:
    batch = ragged()
    assert_same(make(batch).take(rows), make(batch.take(rows)))


# --- the grid ---


@pytest.mark.parametrize(
    "grid", [GRID, EXACT, VoxelGrid((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (1, 1), (8, 6, 4), (2, 3, 4))]
)
def test_the_middle_cell_of_a_finest_one(grid: VoxelGrid) -> None:
    expected = []
    for cell in itertools.product(*(range(n) for n in grid.low)):
        z, y, x = (c // (low // med) for c, low, med in zip(cell, grid.low, grid.med, strict=True))
        expected.append((z * grid.med[1] + y) * grid.med[2] + x)
    assert grid.med_slot(torch.arange(grid.num_low)).tolist() == expected and len(expected) == grid.num_low
    assert grid.num_med == max(expected) + 1


def test_sizes() -> None:
    paper = VoxelGrid((-51.2, -51.2, -5.0), (0.256, 0.256, 8.0), (400, 400))
    assert (paper.num_low, paper.num_med) == (128, 16)
    assert paper.low_cell == pytest.approx((0.064, 0.064, 1.0))
    assert paper.bounds == pytest.approx((-51.2, -51.2, -5.0, 51.2, 51.2, 3.0))


def test_impossible_grids_are_refused() -> None:
    with pytest.raises(UnmaskError, match=r"\(3, 2, 2\).*do not divide.*\(8, 4, 4\)"):
        VoxelGrid((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (2, 2), med=(3, 2, 2))
    with pytest.raises(UnmaskError, match="sizes must be above 0"):
        VoxelGrid((0.0, 0.0, 0.0), (1.0, 0.0, 1.0), (2, 2))
    with pytest.raises(UnmaskError, match="counts at least 1"):
        VoxelGrid((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0, 2))


# --- neighbours ---


@pytest.mark.parametrize(
    ("shape", "samples", "count"), [((6, 9), 3, 80), ((1, 1), 4, 3), ((2, 1), 3, 4), ((40, 30), 1, 300)]
)
def test_neighbours_as_a_dictionary_finds_them(shape: tuple[int, int], samples: int, count: int) -> None:
    everywhere = torch.cartesian_prod(*(torch.arange(n) for n in (samples, *shape)))
    for pillars in (everywhere, everywhere[torch.randperm(len(everywhere))[:count]]):
        where = {tuple(pillar): row for row, pillar in enumerate(pillars.tolist())}
        expected = [[where.get((b, y + dy, x + dx), -1) for dy in (-1, 0, 1) for dx in (-1, 0, 1)] for b, y, x in where]
        assert neighbours(pillars, shape).tolist() == expected


def test_a_grid_too_fine_to_number_is_refused() -> None:
    with pytest.raises(UnmaskError, match=r"too many to be numbered; take larger pillars \(data\.pillar\)"):
        VoxelGrid((0.0, 0.0, 0.0), (1e-6, 1e-6, 1.0), (10**8, 10**8))
