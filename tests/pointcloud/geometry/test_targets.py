"""Targets: against a loop over pillars, against closed forms, against LAPACK and open3d."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from dataclasses import fields
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from unmask.pointcloud.data.batches import PointBatch, Sample, collate
from unmask.pointcloud.geometry.targets import GeometryTargets, geometry_targets, symmetric_eig3
from unmask.pointcloud.geometry.voxels import VoxelGrid, voxelise

GRID = VoxelGrid((-1.5, -2.0, -0.6), (0.3, 0.5, 2.4), (8, 10), low=(6, 4, 2), med=(3, 2, 1))
# Pillars of 1 m around the origin, whose middle cells are layers of 4 m cut in four; a surface fits into one layer.
PATCH = VoxelGrid((-1.5, -1.5, -2.0), (1.0, 1.0, 16.0), (3, 3))


def cloud(n: int, seed: int = 0) -> Tensor:
    """Points on three bent sheets and all over the place, a tenth of them outside the range; one feature."""
    u = torch.rand(n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    xyz = torch.stack([3.3 * u[:, 0] - 1.6, 4.4 * u[:, 1] - 2.1, 2.4 * u[:, 2] - 0.6], dim=1)
    sheet = torch.arange(n) % 4
    xyz[sheet == 1, 2] = 0.2 * xyz[sheet == 1, 0] + 0.1 * torch.sin(xyz[sheet == 1, 1])
    xyz[sheet == 2, 0] = 0.4 + 0.02 * u[sheet == 2, 3]
    xyz[sheet == 3, :2] = xyz[sheet == 3, :2].round(decimals=0)
    return torch.cat([xyz, u[:, 3:]], dim=1).float()


def targets(clouds: PointBatch | Tensor, grid: VoxelGrid, rows: Tensor | None = None) -> GeometryTargets:
    """Those of all pillars, or of `rows`."""
    batch = collate([Sample(clouds, 0)]) if isinstance(clouds, Tensor) else clouds
    voxels = voxelise(batch.points, batch.offsets, grid)
    return geometry_targets(batch.points, voxels, grid, torch.arange(len(voxels.pillars)) if rows is None else rows)


def pick(of: GeometryTargets, rows: Tensor | slice) -> GeometryTargets:
    return GeometryTargets(*(getattr(of, field.name)[rows] for field in fields(of)))


def assert_close(a: GeometryTargets, b: GeometryTargets, atol: float = 1e-6) -> None:
    for field in fields(GeometryTargets):
        torch.testing.assert_close(getattr(a, field.name), getattr(b, field.name), atol=atol, rtol=0, msg=field.name)


# --- the published procedure, pillar by pillar ---


def levels(grid: VoxelGrid) -> dict[str, tuple[int, int, int]]:
    return {"low": grid.low, "med": grid.med, "top": (1, 1, 1)}


def sort_points(xyz: Tensor, grid: VoxelGrid) -> dict[tuple[int, int], dict[str, dict[tuple[int, ...], np.ndarray]]]:
    """The points (float64; z, y, x) of every cell of every pillar of one cloud: ``[pillar][level][cell]``."""
    lists: dict = defaultdict(lambda: {level: defaultdict(list) for level in levels(grid)})
    for point in xyz.double().numpy()[:, ::-1]:
        fine = np.floor((point - grid.lower[::-1]) / grid.low_cell[::-1]).astype(int)
        pillar, inside = fine // grid.low, fine % grid.low
        if pillar[0] == 0 and all(pillar[1:] >= 0) and all(pillar[1:] < grid.shape):
            for level, counts in levels(grid).items():
                cell = inside // (np.array(grid.low) // counts)
                lists[tuple(pillar[1:].tolist())][level][tuple(cell.tolist())].append(point)
    return {
        pillar: {level: {cell: np.array(members) for cell, members in cells.items()} for level, cells in of.items()}
        for pillar, of in lists.items()
    }


def slow_targets(xyz: Tensor, grid: VoxelGrid) -> tuple[GeometryTargets, list[tuple[int, int]]]:
    """Targets of all pillars of one cloud, and the pillars; normals have any sign."""
    sorted_points = sort_points(xyz, grid)
    made = []
    for y, x in sorted(sorted_points):
        of = sorted_points[y, x]
        tables = {}
        for level, counts in levels(grid).items():
            table, occupied = np.zeros((*counts, 3)), np.zeros(counts, dtype=bool)
            size = np.array(grid.pillar[::-1]) / counts
            for cell, members in of[level].items():
                corner = np.array(grid.lower[::-1]) + (np.array([0, y, x]) * counts + cell) * size
                table[cell], occupied[cell] = (members.mean(0) - corner) / size, True
            tables[level] = table.reshape(-1, 3), occupied.reshape(-1)
        own = of["top"][0, 0, 0].mean(0)
        s = np.zeros((3, 3))
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                for members in sorted_points.get((y + dy, x + dx), {"med": {}})["med"].values():
                    q = members.mean(0) - own
                    s += np.outer(q, q)
        _, sigma, vh = torch.linalg.svd(torch.tensor(s))
        kappa = (sigma + 1e-9) / (sigma + 1e-9).sum()
        made.append([*(tables[level][0] for level in tables), tables["low"][1], tables["med"][1], vh[2], kappa])
    low, med, top, low_in, med_in, normal, kappa = (np.stack(rows) for rows in zip(*made, strict=True))
    tensors = [torch.tensor(a).float() for a in (low, med, top[:, 0])]
    occupied = [torch.tensor(a) for a in (low_in, med_in)]
    result = GeometryTargets(*tensors, *occupied, torch.tensor(normal).float(), torch.tensor(kappa).float())
    return result, sorted(sorted_points)


@pytest.mark.parametrize("grid", [GRID, VoxelGrid((-1.5, -2.0, -0.6), (0.6, 1.0, 2.4), (4, 5))], ids=["finer", "4x4x8"])
def test_targets_as_the_loop_makes_them(grid: VoxelGrid) -> None:
    points = cloud(300)
    slow, pillars = slow_targets(points[:, :3], grid)
    voxels = voxelise(points, torch.tensor([0, len(points)]), grid)
    assert voxels.pillars[:, 1:].tolist() == [list(pillar) for pillar in pillars] and len(pillars) > 15
    fast = targets(points, grid)
    side = torch.where((fast.normal * slow.normal).sum(1, keepdim=True) < 0, -1.0, 1.0)
    clear = slow.curvature[:, 1] - slow.curvature[:, 2] > 1e-4  # a normal is defined if its eigenvalue is apart
    assert clear.sum() > 0.8 * len(clear)
    torch.testing.assert_close((side * fast.normal)[clear], slow.normal[clear], atol=1e-6, rtol=0)
    same_normals = {field.name: getattr(slow, field.name) for field in fields(slow)} | {"normal": fast.normal}
    assert_close(fast, GeometryTargets(**same_normals))


def test_rows_are_the_pillars_asked_for_and_neighbours_count_all_the_same() -> None:
    points = cloud(300)
    everything = targets(points, GRID)
    rows = torch.randperm(len(everything.top))[:20]
    assert_close(targets(points, GRID, rows), pick(everything, rows), atol=0)
    none = targets(points, GRID, rows[:0])
    assert none.low.shape == (0, 48, 3) and none.normal.shape == none.curvature.shape == (0, 3)


# --- what holds for every cloud ---


def test_centroids_lie_in_their_cells_and_lead_back_to_the_means() -> None:
    points = cloud(2000)
    got = targets(points, GRID)
    cells = sort_points(points[:, :3], GRID)
    for level, counts in levels(GRID).items():
        t = getattr(got, level).view(len(cells), *counts, 3)
        assert t.min() >= 0 and t.max() < 1 and t.max() - t.min() > 0.7
        size = np.array(GRID.pillar[::-1]) / counts
        for row, (y, x) in enumerate(sorted(cells)):
            for cell, members in cells[y, x][level].items():
                corner = np.array(GRID.lower[::-1]) + (np.array([0, y, x]) * counts + cell) * size
                assert np.allclose(corner + t[row][cell].numpy() * size, members.mean(0), atol=1e-5, rtol=0)


def test_centroids_that_float32_would_round_to_one_stay_below() -> None:
    grid = VoxelGrid((-1.0, -1.0, -1.0), (1.0, 1.0, 1.0), (1, 1))
    got = targets(torch.full((3, 3), -1e-12), grid)
    for t in (got.low[got.low_occupied], got.med[got.med_occupied], got.top):
        assert t.tolist() == [[1 - 2.0**-24] * 3]


def test_empty_cells_are_zero_and_middle_cells_pool_finest_ones() -> None:
    got = targets(cloud(2000), GRID)
    for t, occupied in ((got.low, got.low_occupied), (got.med, got.med_occupied)):
        assert 0 < occupied.float().mean() < 1
        assert (t[~occupied] == 0).all() and (t[occupied] != 0).any(1).all()
    blocks = [low // med for low, med in zip(GRID.low, GRID.med, strict=True)]
    pooled = torch.nn.functional.max_pool3d(got.low_occupied.view(-1, 1, *GRID.low).float(), blocks)
    assert torch.equal(pooled.flatten(1).bool(), got.med_occupied)
    assert (got.low_occupied.sum(1) >= got.med_occupied.sum(1)).all()


def test_normals_are_unit_and_curvatures_shares_in_float32_without_gradient() -> None:
    points = cloud(500).requires_grad_()
    got = targets(points, GRID)
    assert not any(getattr(got, field.name).requires_grad for field in fields(got))
    assert {getattr(got, name).dtype for name in ("low", "med", "top", "normal", "curvature")} == {torch.float32}
    torch.testing.assert_close(got.normal.norm(dim=1), torch.ones(len(got.normal)))
    torch.testing.assert_close(got.curvature.sum(1), torch.ones(len(got.normal)))
    assert (got.curvature.diff(dim=1) <= 0).all() and (got.curvature >= 0).all()


def test_the_order_of_points_does_not_matter() -> None:
    points = cloud(1000)
    assert_close(targets(points[torch.randperm(1000)], GRID), targets(points, GRID), atol=2e-6)


def test_a_batch_is_its_clouds_one_by_one() -> None:
    broken = cloud(30, seed=9)
    broken[::3, 1] = math.nan
    clouds = [cloud(200, seed=1), cloud(0), cloud(1, seed=2), broken, cloud(150, seed=3)]
    batch = collate([Sample(points, i) for i, points in enumerate(clouds)])
    together = targets(batch, GRID)
    offsets = voxelise(batch.points, batch.offsets, GRID).offsets.tolist()
    assert offsets[2] == offsets[1] and offsets[-1] == len(together.top)
    for i in range(len(clouds)):
        alone = targets(batch.take([i]), GRID)
        assert_close(alone, pick(together, slice(offsets[i], offsets[i + 1])), atol=0)
        assert all(torch.isfinite(getattr(alone, name)).all() for name in ("low", "normal", "curvature"))


def test_one_point_more_than_once_and_no_points() -> None:
    point = torch.tensor([[0.1, 0.2, 0.3]])
    single, twins = targets(point, GRID), targets(point.repeat(7, 1), GRID)
    assert_close(single, twins)
    assert single.low_occupied.sum() == single.med_occupied.sum() == 1
    for got in (single, twins):  # no spread, no direction
        assert got.normal.tolist() == [[0, 0, 1]]
        torch.testing.assert_close(got.curvature, torch.full((1, 3), 1 / 3))
    assert targets(point[:0], GRID).top.shape == (0, 3)


def test_a_millimetre_of_spread_is_little_more_than_none() -> None:
    """Two middle cells' points on both sides of their border: the 1e-9 square metres added to each share show."""
    points = torch.tensor([[0.1, 0.2, 2.0 - 2.0**-11], [0.1, 0.2, 2.0 + 2.0**-11]])
    spread = 2 * 4.0**-11
    expected = [(spread + 1e-9) / (spread + 3e-9), *[1e-9 / (spread + 3e-9)] * 2]
    assert targets(points, PATCH).curvature.tolist() == [pytest.approx(expected, rel=1e-5)]


# --- closed forms on a full 3 x 3 neighbourhood ---


def patch(slope_x: float, slope_y: float) -> Tensor:
    """The plane z = 4 + slope_x x + slope_y y over all nine pillars, the same in every middle cell."""
    side = torch.arange(-1.5 + 1 / 16, 1.5, 1 / 8)
    x, y = torch.meshgrid(side, side, indexing="ij")
    return torch.stack([x, y, 4 + slope_x * x + slope_y * y], dim=-1).view(-1, 3)


@pytest.mark.parametrize(
    ("slopes", "kappa"),
    [((0.0, 0.0), (0.5, 0.5, 0.0)), ((0.3, 0.1), (0.5238, 0.4762, 0)), ((0, -1.0), (2 / 3, 1 / 3, 0))],
)
def test_a_plane(slopes: tuple[float, float], kappa: tuple[float, float, float]) -> None:
    got = targets(patch(*slopes), PATCH)
    normal = torch.tensor([1.0, -slopes[1], -slopes[0]], dtype=torch.float64)
    cosine = got.normal[4].double() @ normal / normal.norm()
    assert abs(cosine - 1) < 1e-6  # and not -1: the normal points up
    torch.testing.assert_close(got.curvature[4], torch.tensor(kappa), atol=5e-5, rtol=0)
    assert got.curvature[4, 2] < 1e-7
    # The tilted plane's larger share: (1 + 0.3^2 + 0.1^2) / (2 + 0.3^2 + 0.1^2).
    steep = 1 + slopes[0] ** 2 + slopes[1] ** 2
    assert got.curvature[4, 0] == pytest.approx(steep / (1 + steep), abs=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_line(axis: int) -> None:
    points = torch.tensor([0.01, 0.02, 6.0]).repeat(200, 1)
    points[:, axis] = torch.linspace(PATCH.bounds[axis] + 0.01, PATCH.bounds[axis + 3] - 0.01, 200)
    got = targets(points, PATCH)
    middle = len(got.top) // 2
    torch.testing.assert_close(got.curvature[middle], torch.tensor([1.0, 0.0, 0.0]), atol=1e-6, rtol=0)
    assert abs(got.normal[middle, 2 - axis]) < 1e-6


def test_an_isotropic_cloud() -> None:
    """One point in the middle of each of 27 cubes."""
    grid = VoxelGrid((-1.5, -1.5, -1.5), (1.0, 1.0, 3.0), (3, 3), low=(3, 1, 1), med=(3, 1, 1))
    points = torch.cartesian_prod(*[torch.arange(-1.0, 2.0)] * 3)
    got = targets(points, grid)
    torch.testing.assert_close(got.curvature[4], torch.full((3,), 1 / 3), atol=1e-7, rtol=0)
    assert got.normal[4].tolist() == [0, 0, 1]


def test_a_pillar_far_from_the_origin_keeps_its_digits() -> None:
    """The same plane 3 km away, as floats there hold it: a difference of large sums would drown it."""
    far = VoxelGrid((4096.0 - 1.5, -4096.0 - 1.5, -2.0), PATCH.pillar, PATCH.shape)
    got = targets(patch(0.5, 0.25) + torch.tensor([4096.0, -4096.0, 0.0]), far)
    assert_close(got, targets(patch(0.5, 0.25), PATCH), atol=2e-6)


# --- rotation, and the sign of normals ---


@pytest.mark.parametrize(
    "turn", [[[0, -1], [1, 0]], [[-1, 0], [0, -1]], [[1, 0], [0, -1]], [[-1, 0], [0, 1]], [[0, 1], [1, 0]]]
)
def test_quarter_turns_and_mirrors_take_normals_along(turn: list[list[int]]) -> None:
    """About the vertical axis of a square grid, where every neighbourhood stays whole."""
    grid = VoxelGrid((-1.0, -1.0, -1.0), (0.4, 0.4, 2.0), (5, 5), low=(4, 4, 4), med=(2, 2, 2))
    matrix = torch.eye(3)
    matrix[:2, :2] = torch.tensor(turn)
    points = 2 * torch.rand(400, 3) - 1
    points[:, 2] *= 0.2
    before, after = (voxelise(p, torch.tensor([0, 400]), grid) for p in (points, points @ matrix.T))
    centres = before.pillars[:, [2, 1]] - 2.0
    moved = centres @ matrix[:2, :2].T + 2
    where = {tuple(pillar): row for row, pillar in enumerate(after.pillars[:, [2, 1]].tolist())}
    rows = torch.tensor([where[tuple(place)] for place in moved.long().tolist()])
    one, other = targets(points, grid), pick(targets(points @ matrix.T, grid), rows)
    torch.testing.assert_close(other.curvature, one.curvature, atol=1e-5, rtol=0)
    flat = one.normal[:, 0] > 2e-3
    assert flat.sum() > 20
    expected = (one.normal.flip(1) @ matrix.T).flip(1)  # x, y, z for the turn
    torch.testing.assert_close(other.normal[flat], expected[flat], atol=1e-4, rtol=0)


def random_rotations(n: int) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(n, 3, 3, dtype=torch.float64))
    q = q * r.diagonal(dim1=1, dim2=2).sign()[:, None]
    return q * torch.linalg.det(q)[:, None, None]


def test_any_rotation_of_a_neighbourhood_turns_its_normal_and_keeps_its_curvature() -> None:
    q = torch.randn(300, 20, 3, dtype=torch.float64) * torch.tensor([3.0, 1.0, 0.2])
    turn = random_rotations(300)
    (one, axes), (other, turned) = (symmetric_eig3(x.mT @ x) for x in (q, q @ turn.mT))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    cosines = (turned * (turn @ axes)).sum(1).abs()
    torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=1e-12)


def test_normals_point_up_and_walls_have_a_side_too() -> None:
    rough = targets(cloud(2000), GRID).normal
    assert ((rough[:, 0] > 1e-3).sum() > 20) and (rough[:, 0] >= -1e-3).all()
    wall = torch.rand(500, 3) * 3 - 1.5
    for axis, name in ((0, [0.0, 0.0, 1.0]), (1, [0.0, 1.0, 0.0])):
        points = wall.clone()
        points[:, axis] = 0.1
        normal = targets(points, PATCH).normal
        torch.testing.assert_close(normal, torch.tensor(name).expand_as(normal), atol=1e-5, rtol=0)


# --- the eigenvalues and vectors of symmetric matrices ---


def matrices(name: str, n: int = 500) -> Tensor:
    turn, few = random_rotations(n), torch.rand(n, 3, dtype=torch.float64) * 3 - 1
    values = {
        "random": few,
        "first two tied": few[:, [0, 0, 1]],
        "all tied": few[:, [0, 0, 0]],
        "nearly tied": few[:, :1] + 10.0 ** torch.linspace(-17, -3, n, dtype=torch.float64)[:, None] * few,
        "nearly two tied": few[:, [0, 0, 1]] + 10.0 ** torch.linspace(-17, -3, n, dtype=torch.float64)[:, None] * few,
        "rank 1": few * torch.tensor([1, 0, 0]),
        "rank 2": few * torch.tensor([1, 1, 0]),
        "graded": few * torch.tensor([1, 1e-6, 1e-12]),
        "tiny": 1e-8 * few,
        "huge": 1e8 * few,
        "tiniest": 1e-300 * few,
        "zero": 0 * few,
    }[name]
    s = turn @ torch.diag_embed(values) @ turn.mT
    return (s + s.mT) / 2


NAMES = ["random", "first two tied", "all tied", "nearly tied", "nearly two tied", "rank 1", "rank 2", "graded", "tiny"]


@pytest.mark.parametrize("name", [*NAMES, "huge", "tiniest", "zero"])
def test_eigenvalues_as_lapack_finds_them(name: str) -> None:
    s = matrices(name)
    values, vectors = symmetric_eig3(s)
    scale = s.abs().amax((1, 2))
    assert ((values - torch.linalg.eigvalsh(s).flip(1)).abs().amax(1) <= 4e-15 * scale).all()
    assert ((s @ vectors - vectors * values[:, None]).abs().amax((1, 2)) <= 4e-15 * scale).all()
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(3).double().expand_as(s), atol=4e-15, rtol=0)
    assert (values.diff(dim=1) <= 0).all()


def test_vectors_as_lapack_finds_them_where_they_are_defined() -> None:
    s = matrices("random")
    values, vectors = symmetric_eig3(s)
    cosines = (vectors * torch.linalg.eigh(s)[1].flip(2)).sum(1).abs()
    apart = values.diff(dim=1).abs().amin(1) > 0.05
    assert apart.sum() > 400
    torch.testing.assert_close(cosines[apart], torch.ones_like(cosines[apart]), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "diagonal", [(1, 2, 3), (3, 2, 1), (2, 3, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1), (1, 0, 0), (0, 0, -1), (1, -1, 0)]
)
def test_axis_parallel_matrices(diagonal: tuple[int, int, int]) -> None:
    s = torch.diag(torch.tensor(diagonal, dtype=torch.float64))[None]
    values, vectors = symmetric_eig3(s)
    torch.testing.assert_close(values[0], torch.tensor(sorted(diagonal, reverse=True)).double(), atol=1e-15, rtol=0)
    torch.testing.assert_close(vectors @ torch.diag_embed(values) @ vectors.mT, s, atol=1e-15, rtol=0)


def test_equal_entries_up_to_the_last_bit() -> None:
    """All matrices whose entries differ by a few units in the last place from those of the identity."""
    unit = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)] * 6) * 2.0**-52
    s = torch.diag_embed(unit[:, :3]) + torch.eye(3)
    for k, (i, j) in enumerate(((1, 0), (2, 0), (2, 1))):
        s[:, i, j] = s[:, j, i] = unit[:, 3 + k]
    values, vectors = symmetric_eig3(s)
    assert (values - 1).abs().max() < 2e-15
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(3).double().expand_as(s), atol=4e-15, rtol=0)


def test_multiples_of_the_identity_and_what_is_above_the_diagonal() -> None:
    for factor in (0.0, 1.0, -2.5e7):
        assert torch.equal(symmetric_eig3(factor * torch.eye(3)[None])[1][0], torch.eye(3).double())
    s = matrices("random")
    upper = torch.full((3, 3), math.nan).triu(1)
    for ours, theirs in zip(symmetric_eig3(s.tril() + upper), symmetric_eig3(s), strict=True):
        assert torch.equal(ours, theirs)
    values, vectors = symmetric_eig3(torch.zeros(0, 3, 3))
    assert values.shape == (0, 3) and vectors.shape == (0, 3, 3)


# --- beside open3d, whose components are x, y, z ---


@pytest.fixture(scope="module")
def open3d() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("open3d")


def open3d_cloud(open3d: ModuleType, xyz: np.ndarray, neighbours: int) -> tuple[np.ndarray, np.ndarray]:
    """Covariance and normal of every point's nearest neighbours."""
    cloud = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(xyz))
    search = open3d.geometry.KDTreeSearchParamKNN(neighbours)
    cloud.estimate_covariances(search)
    cloud.estimate_normals(search, fast_normal_computation=False)
    return np.asarray(cloud.covariances), np.asarray(cloud.normals)


def test_normals_of_open3d_from_its_own_covariances(open3d: ModuleType) -> None:
    xyz = cloud(600)[:, :3].double().numpy()
    covariances, normals = open3d_cloud(open3d, xyz, 12)
    values, vectors = symmetric_eig3(torch.tensor(covariances))
    clear = (values[:, 1] - values[:, 2] > 1e-6 * values[:, 0]).numpy()
    assert clear.mean() > 0.9
    cosines = np.abs((vectors[:, :, 2].numpy() * normals).sum(1))
    assert np.allclose(cosines[clear], 1, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_normal_and_curvature_of_a_neighbourhood_as_open3d_has_them(open3d: ModuleType, seed: int) -> None:
    """Of neighbourhoods that their centre mirrors: there its mean, which open3d centres at, is our centre too."""
    grid = VoxelGrid((-1.5, -1.5, -2.0), (1.0, 1.0, 4.0), (3, 3))
    half = (torch.rand(60, 3, generator=torch.Generator().manual_seed(seed)) - 0.5) * torch.tensor([3.0, 3.0, 4.0])
    half[:, 2] = 0.3 * half[:, 2] + 0.4 * half[:, 0]
    points = torch.cat([half, -half])
    points = points[points[:, 2].abs() < 2]
    got = targets(points, grid)
    assert len(got.top) == 9
    cells = [cell for of in sort_points(points, grid).values() for cell in of["med"].values()]
    q = np.array([members.mean(0)[::-1] for members in cells])
    covariances, normals = open3d_cloud(open3d, q, len(q))
    assert abs(got.normal[4].flip(0).double().numpy() @ normals[0]) == pytest.approx(1, abs=1e-6)
    shares = np.linalg.eigvalsh(covariances[0])[::-1]
    assert got.curvature[4].tolist() == pytest.approx((shares / shares.sum()).tolist(), abs=1e-6)
