"""Cells and GeoMAE's targets of a lidar sweep: ours beside a loop over points and pillars, and open3d's normals.

The cloud is synthetic, ten sweeps of a turning 32-beam lidar like that of nuScenes: rays from -30.67 to 10.67 degrees,
1.84 m above level ground among cars, walls, trunks and people, the car driving 8 m/s and swaying by 3 mrad, 2 cm of
range noise. Pillars are those of GeoMAE (0.256 m, 8 m high, 400 x 400; 128 and 16 cells); 70 % of them are hidden.

The loop follows the published definition pillar by pillar in NumPy, for as many points and pillars as the options say;
its times are scaled to the whole cloud, and its numbers are checked against ours first. open3d gives every point a
normal, of its 30 nearest points, and nothing else. Every repetition times all contenders once in one process, each
after a call that is not timed; the table shows medians. Threads of all sides are set alike by OMP_NUM_THREADS. Memory
is the largest resident set of a fresh process that makes cells and targets of this cloud, beside what it held before.

    OMP_NUM_THREADS=1 python tools/compare_geometry.py [--points 300000] [--repeats 5] [--loop-points 10000]
        [--loop-pillars 200] [--out benchmarks/speed/geometry_cpu.json]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from machine import about, interleaved

from unmask.pointcloud.geometry.targets import GeometryTargets, geometry_targets
from unmask.pointcloud.geometry.voxels import VoxelGrid, Voxels, voxelise

GRID = VoxelGrid((-51.2, -51.2, -5.0), (0.256, 0.256, 8.0), (400, 400))
HIDDEN = 0.7
# --- the cloud: angles in radians, lengths in metres, speeds in m/s ---
BEAMS = np.deg2rad(np.linspace(-30.67, 10.67, 32))
COLUMNS, SWEEPS, PERIOD = 1300, 10, 0.05
HEIGHT, SPEED, NOISE, SWAY, REACH = 1.84, 8.0, 0.02, 0.003, 80.0
SOLIDS = ((4.6, 1.9, 1.6, 40, 5), (20.0, 8.0, 8.0, 8, 25), (0.4, 0.4, 5.0, 40, 8), (0.6, 0.6, 1.75, 20, 5))
Box = tuple[np.ndarray, np.ndarray, float]


def boxes(rng: np.random.Generator) -> list[Box]:
    """Cars, walls, trunks and people: centre, half size (x, y, z, metres) and turn about the vertical."""
    made = []
    for *size, count, nearest in SOLIDS:
        for _ in range(count):
            far, where, half = rng.uniform(nearest, 50) + size[0] / 2, rng.uniform(0, 2 * np.pi), np.array(size) / 2
            centre = np.array([far * np.cos(where), far * np.sin(where), half[2] - HEIGHT])
            made.append((centre, half, rng.uniform(0, np.pi)))
    return made


def sweep(origin: np.ndarray, solids: list[Box], rng: np.random.Generator) -> np.ndarray:
    """Where the rays of one turn first meet the ground or a box, [points, 3]."""
    up, around = (a.ravel() for a in np.meshgrid(BEAMS, np.linspace(0, 2 * np.pi, COLUMNS, endpoint=False)))
    pitch, roll = rng.normal(0, SWAY, 2)
    up = up + pitch * np.cos(around) + roll * np.sin(around)
    rays = np.stack([np.cos(up) * np.cos(around), np.cos(up) * np.sin(around), np.sin(up)], axis=1)
    reach = np.full(len(rays), np.inf)
    down = rays[:, 2] < 0
    reach[down] = -(HEIGHT + origin[2]) / rays[down, 2]
    for centre, half, turn in solids:
        axes = np.array([[np.cos(turn), np.sin(turn), 0], [-np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
        # Only rays that point into the box's horizontal directions.
        dx, dy = (centre - origin)[:2]
        aside = np.abs(rays[:, 0] * dy - rays[:, 1] * dx) < np.hypot(*half[:2]) * np.cos(up)
        near = np.flatnonzero(aside & (rays[:, 0] * dx + rays[:, 1] * dy > 0))
        towards, start = rays[near] @ axes.T, axes @ (origin - centre)
        ends = (np.stack([-half, half])[:, None] - start) / towards
        enter, leave = ends.min(0).max(1), ends.max(0).min(1)
        hit = (enter > 0) & (enter < leave)
        reach[near[hit]] = np.minimum(reach[near[hit]], enter[hit])
    met = reach < REACH
    return origin + rays[met] * (reach[met] + rng.normal(0, NOISE, met.sum()))[:, None]


def make_cloud(points: int) -> torch.Tensor:
    """So many points of ten sweeps, float32 x, y, z, intensity, seconds; the key frame's sensor is at the origin."""
    rng = np.random.default_rng(0)
    solids, sweeps = boxes(rng), []
    for i in range(SWEEPS):
        xyz = sweep(np.array([-SPEED * PERIOD * i, 0.0, 0.0]), solids, rng)
        sweeps.append(np.column_stack([xyz, rng.random(len(xyz)), np.full(len(xyz), PERIOD * i)]))
    every = np.concatenate(sweeps)
    if points > len(every):
        raise SystemExit(f"--points {points}: the synthetic sweeps have {len(every)} points; ask for at most that many")
    chosen = np.sort(rng.choice(len(every), points, replace=False))
    return torch.from_numpy(every[chosen].astype(np.float32))


# --- the loop: components z, y, x ---


def loop_cells(xyz: np.ndarray) -> dict[tuple[int, int], list[np.ndarray]]:
    """The points of every pillar (y, x), in units of finest cells, point by point."""
    lower, size, per = (np.array(v[::-1]) for v in (GRID.lower, GRID.low_cell, GRID.low[::-1]))
    pillars = defaultdict(list)
    for point in xyz[:, ::-1]:
        place = (point - lower) / size
        z, y, x = (int(v) for v in np.floor(place / per))
        if z == 0 and 0 <= y < GRID.shape[0] and 0 <= x < GRID.shape[1]:
            pillars[y, x].append(place)
    return pillars


def loop_level(places: np.ndarray, corner: np.ndarray, counts: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Of one pillar and level: centres of mass in units of the cell from its corner, and which cells have points."""
    per = np.array(GRID.low) // counts
    inside = (places - corner) / per
    cells = np.floor(inside).astype(int)
    table, occupied = np.zeros((*counts, 3)), np.zeros(counts, dtype=bool)
    for cell in np.unique(cells, axis=0):
        at = tuple(cell)
        table[at], occupied[at] = inside[(cells == cell).all(1)].mean(0) - cell, True
    return table, occupied


def loop_targets(pillars: dict[tuple[int, int], np.ndarray], rows: list[tuple[int, int]]) -> list[list[np.ndarray]]:
    """Of these pillars: tables of the three levels, occupancy of two, normal and curvature."""
    size = np.array(GRID.low_cell[::-1])
    per, made = np.array(GRID.low) // GRID.med, []
    middle: dict[tuple[int, int], np.ndarray] = {}

    def centres(y: int, x: int, corner: np.ndarray) -> np.ndarray:
        """A pillar's centres of mass of middle cells, in metres; worked out once."""
        if (y, x) not in middle:
            table, occupied = loop_level(pillars[y, x], corner, GRID.med)
            middle[y, x] = (corner + (np.argwhere(occupied) + table[occupied]) * per) * size
        return middle[y, x]

    for y, x in rows:
        corner = np.array([0, y, x]) * GRID.low
        (low, low_in), (med, med_in), (top, _) = (
            loop_level(pillars[y, x], corner, counts) for counts in (GRID.low, GRID.med, (1, 1, 1))
        )
        around = [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        near = [centres(*at, np.array([0, *at]) * GRID.low) for at in around if at in pillars]
        q = np.concatenate(near) - pillars[y, x].mean(0) * size
        _, sigma, axes = np.linalg.svd(q.T @ q)
        made.append([low, med, top, low_in, med_in, axes[2], (sigma + 1e-9) / (sigma + 1e-9).sum()])
    return made


def check(ours: GeometryTargets, loop: list[list[np.ndarray]]) -> None:
    """Stop unless both sides have the same numbers; normals up to sign, where their eigenvalue is apart."""
    low, med, top, low_in, med_in, normal, kappa = (np.stack(rows) for rows in zip(*loop, strict=True))
    for name, theirs in (("low", low), ("med", med), ("top", top), ("curvature", kappa)):
        mine = getattr(ours, name).numpy()
        assert np.abs(mine - theirs.reshape(mine.shape)).max() < 1e-5, name
    assert (ours.low_occupied.numpy() == low_in.reshape(len(loop), -1)).all()
    assert (ours.med_occupied.numpy() == med_in.reshape(len(loop), -1)).all()
    clear = kappa[:, 1] - kappa[:, 2] > 1e-3
    assert np.abs((ours.normal.numpy() * normal).sum(1)[clear]).min() > 1 - 1e-5


# --- what is timed ---


def open3d_normals(xyz: np.ndarray) -> np.ndarray:
    """A normal for every point."""
    import open3d  # takes seconds, and hundreds of MiB that are not ours

    points = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(xyz))
    points.estimate_normals(open3d.geometry.KDTreeSearchParamKNN(30))
    return np.asarray(points.normals)


def hide(voxels: Voxels) -> torch.Tensor:
    """The hidden pillars, rising."""
    count = len(voxels.pillars)
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[: round(HIDDEN * count)].sort().values


def contenders(
    points: torch.Tensor, loop_points: int, loop_pillars: int
) -> tuple[dict[str, int], dict[str, tuple[Callable[[], object], float]]]:
    """The cloud's sizes; and what is timed, with the factor that scales it to the whole cloud."""
    offsets, xyz, rng = torch.tensor([0, len(points)]), points[:, :3].double().numpy(), np.random.default_rng(0)
    voxels = voxelise(points, offsets, GRID)
    hidden = hide(voxels)
    chosen = hidden[torch.from_numpy(rng.choice(len(hidden), min(loop_pillars, len(hidden)), replace=False))]
    rows = [(y, x) for _, y, x in voxels.pillars[chosen].tolist()]
    some = rng.choice(xyz, min(loop_points, len(xyz)), replace=False)
    pillars = {at: np.stack(places) for at, places in loop_cells(xyz).items()}
    check(geometry_targets(points, voxels, GRID, chosen), loop_targets(pillars, rows))
    sizes = {"points": len(points), "inside": len(voxels.order), "finest cells": len(voxels.low_pillar)}
    return sizes | {"pillars": len(voxels.pillars), "hidden": len(hidden)}, {
        "unmask, cells": (lambda: voxelise(points, offsets, GRID), 1),
        "loop, cells": (lambda: loop_cells(some), len(xyz) / len(some)),
        "unmask, targets": (lambda: geometry_targets(points, voxels, GRID, hidden), 1),
        "loop, targets": (lambda: loop_targets(pillars, rows), len(hidden) / len(rows)),
        "open3d, normals": (lambda: open3d_normals(xyz), 1),
    }


def resident() -> dict[str, float]:
    """MiB that this process holds now (VmRSS), and held at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
    return {name: int(fields[name]) / 1024 for name in ("VmRSS", "VmHWM")}


def use_memory(file: str) -> dict[str, float]:
    """Make cells and targets of the cloud in `file` in this process: MiB resident before, and at most."""
    points = torch.from_numpy(np.load(file))
    before = resident()["VmRSS"]
    voxels = voxelise(points, torch.tensor([0, len(points)]), GRID)
    geometry_targets(points, voxels, GRID, hide(voxels))
    return {"before_mib": round(before), "peak_mib": round(resident()["VmHWM"])}


def measure_memory(points: torch.Tensor) -> dict[str, float]:
    """The same in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cloud.npy"
        np.save(file, points.numpy())
        run = subprocess.run([sys.executable, __file__, "--memory-of", str(file)], check=True, capture_output=True)
    return json.loads(run.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=300_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--loop-points", type=int, default=10_000, help="points that the loop sorts")
    parser.add_argument("--loop-pillars", type=int, default=200, help="pillars that the loop makes targets of")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.memory_of:
        print(json.dumps(use_memory(args.memory_of)))
        return
    points = make_cloud(args.points)
    memory = measure_memory(points)
    sizes, timed = contenders(points, args.loop_points, args.loop_pillars)
    taken = interleaved({name: run for name, (run, _) in timed.items()}, args.repeats)
    times = {name: taken[name] * scale for name, (_, scale) in timed.items()}
    rates = {name: round(1e3 * len(points) / ms) for name, ms in times.items()}
    print(", ".join(f"{count:,} {name}" for name, count in sizes.items()))
    print(f"median ms for the whole cloud, {torch.get_num_threads()} thread(s)")
    for name, ms in times.items():
        ours = "unmask, cells" if name.endswith("cells") else "unmask, targets"
        print(f"  {name:16s} {ms:10.1f} {rates[name]:12,} points/s {ms / times[ours]:8.1f} x {ours}")
    print(f"memory: {memory['peak_mib']} MiB at most, {memory['before_mib']} MiB before")
    if args.out:
        settings = {k: v for k, v in vars(args).items() if k not in ("out", "memory_of")}
        found = {**about(packages=("numpy", "open3d")), "settings": settings, "cloud": sizes}
        found |= {"median_ms": times, "points_per_second": rates, "memory": memory}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
