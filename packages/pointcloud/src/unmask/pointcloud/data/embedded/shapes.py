"""Points on surfaces, and `shapes`: a synthetic set of solids, made from a seed when it is read, for tests and demos.

Each cloud is one of ten kinds of solid with random proportions, turned about z by a random angle and sampled evenly by
area, with Gaussian noise on every coordinate. Its points are classed by where the surface faces: down (bottom), up
(top) or sideways. Nothing of it was ever measured: a good score on it says that the code works, and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

Triangles = Float[np.ndarray, "triangles 3 3"]  # corners; counter-clockwise as seen from outside for our own solids
Numbers = Sequence[float | int] | Float[np.ndarray, "n"]
POINT_CLASSES = ("bottom", "side", "top")
PER_CLASS = 100
POINTS = 1_024
_SEED = 20_260_102  # ours, and never a run's seed: the set is the same for every run
_NOISE = 0.005  # metres; the solids are 0.5 to 1.8 m large
_LEVEL = 0.5  # a surface whose normal rises by more than 30 degrees is top
_STEPS = 32  # facets around a curve


def sample_surface(
    triangles: Triangles, count: int, rng: np.random.Generator
) -> tuple[Float[np.ndarray, "count 3"], Int[np.ndarray, "count"]]:
    """Points spread evenly over a surface, and the triangle that each lies on.

    Args:
        triangles: corners; those without area get no points.
        count: points to draw.
        rng: what to draw with.

    Raises:
        ValueError: the surface has no area.
    """
    first, second = triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]
    until = double_areas(triangles).cumsum()
    if not len(until) or not until[-1] > 0:
        raise ValueError("a surface without area has no points")
    rows = np.searchsorted(until, rng.random(count) * until[-1], side="right")
    # Uniform in the parallelogram of the two edges; its far half is folded back onto the triangle.
    u, v = rng.random((2, count, 1))
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
    return triangles[rows, 0] + u * first[rows] + v * second[rows], rows


def double_areas(triangles: Triangles) -> Float[np.ndarray, "triangles"]:
    """Twice the area of each triangle."""
    return np.linalg.norm(np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]), axis=1)


def solid(index: int) -> tuple[Float[np.ndarray, "points 3"], Int[np.ndarray, "points"]]:
    """Positions in metres and point classes of a solid of the set; takes about a millisecond.

    Args:
        index: its number in the set, from 0 to PER_CLASS * len(CLASSES) - 1.
    """
    rng = np.random.default_rng([_SEED, index])
    triangles = _SOLIDS[CLASSES[index // PER_CLASS]](rng)
    points, rows = sample_surface(triangles, POINTS, rng)
    normals = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])[rows]
    rise = normals[:, 2] / np.linalg.norm(normals, axis=1)
    labels = 1 + (rise > _LEVEL).astype(np.int64) - (rise < -_LEVEL)
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    return points @ turn.T + rng.normal(0, _NOISE, points.shape), labels


def _mesh(grid: Float[np.ndarray, "rows columns 3"]) -> Triangles:
    """The triangles of a curved sheet, given by points on it; rows x columns has to point outwards."""
    a, b, c, d = grid[:-1, :-1], grid[1:, :-1], grid[1:, 1:], grid[:-1, 1:]
    return np.concatenate([np.stack([a, b, c], 2).reshape(-1, 3, 3), np.stack([a, c, d], 2).reshape(-1, 3, 3)])


def _revolved(radius: Numbers, height: Numbers, facets: int = _STEPS) -> Triangles:
    """A profile turned about z; it has to be given upwards, with what is outside on its right."""
    angle = np.linspace(0, 2 * np.pi, facets + 1)[:, None]
    r, z = np.asarray(radius), np.broadcast_to(height, (facets + 1, len(height)))
    return _mesh(np.stack([r * np.cos(angle), r * np.sin(angle), z], -1))


def _box(low: Numbers, high: Numbers) -> Triangles:
    """A box along the axes."""
    unit = _revolved([0, 2**-0.5, 2**-0.5, 0], [-0.5, -0.5, 0.5, 0.5], 4)
    eighth = np.sqrt(0.5) * np.array([[1, -1, 0], [1, 1, 0], [0, 0, np.sqrt(2)]])  # the corners come to lie at +-1/2
    size = np.subtract(high, low)
    return unit @ eighth.T * size + (np.asarray(low) + size / 2)


def _ellipsoid(axes: Float[np.ndarray, "3"]) -> Triangles:
    rise = np.linspace(-np.pi / 2, np.pi / 2, _STEPS // 2 + 1)
    return _revolved(np.cos(rise), np.sin(rise)) * axes


def _cylinder(rng: np.random.Generator) -> Triangles:
    radius, height = rng.uniform(0.2, 0.5), rng.uniform(0.5, 1.2)
    return _revolved([0, radius, radius, 0], [0, 0, height, height])


def _torus(rng: np.random.Generator) -> Triangles:
    radius = rng.uniform(0.4, 0.6)
    tube, around = radius * rng.uniform(0.2, 0.5), np.linspace(0, 2 * np.pi, _STEPS + 1)
    return _revolved(radius + tube * np.cos(around), tube * np.sin(around))


def _pyramid(rng: np.random.Generator) -> Triangles:
    (width, depth), height = rng.uniform(0.6, 1.0, 2), rng.uniform(0.5, 1.2)
    tapered = _box([-width / 2, -depth / 2, 0], [width / 2, depth / 2, height])
    tapered[..., :2] *= 1 - tapered[..., 2:] / height
    return tapered


def _spring(rng: np.random.Generator) -> Triangles:
    """A round wire along a helix; its ends are open."""
    radius, wire, turns = rng.uniform(0.25, 0.4), rng.uniform(0.03, 0.06), rng.uniform(2.5, 5)
    t = np.linspace(0, 2 * np.pi * turns, int(_STEPS * turns))[:, None]
    around, pitch = np.linspace(0, 2 * np.pi, 9)[None], rng.uniform(0.2, 0.3) / (2 * np.pi)
    out = np.stack(np.broadcast_arrays(np.cos(t), np.sin(t), 0 * t), -1)
    along = np.stack(np.broadcast_arrays(-radius * np.sin(t), radius * np.cos(t), pitch), -1)
    up = np.cross(out, along / np.linalg.norm(along, axis=-1, keepdims=True))
    ring = np.cos(around)[..., None] * out + np.sin(around)[..., None] * up
    return _mesh(radius * out + pitch * t[..., None] * [0, 0, 1] + wire * ring)


def _table(rng: np.random.Generator) -> Triangles:
    width, depth, height = rng.uniform(0.7, 1.4), rng.uniform(0.5, 0.9), rng.uniform(0.4, 0.9)
    leg, thickness = rng.uniform(0.05, 0.1), rng.uniform(0.03, 0.08)
    legs = [_box([x, y, 0], [x + leg, y + leg, height]) for x in (0, width - leg) for y in (0, depth - leg)]
    return np.concatenate([_box([0, 0, height], [width, depth, height + thickness]), *legs])


def _cross(rng: np.random.Generator) -> Triangles:
    """A middle with four arms, along x and z."""
    (half, depth), arms = rng.uniform(0.06, 0.12, 2), rng.uniform(0.3, 0.6, 2)
    middle = _box([-half, -depth, -half], [half, depth, half])
    parts = [middle]
    for axis, length in zip((0, 2), arms, strict=True):
        for side in (-1, 1):
            part = middle.copy()
            part[..., axis] = part[..., axis] * length / (2 * half) + side * (half + length / 2)
            parts.append(part)
    triangles = np.concatenate(parts)
    x, z = np.abs(triangles.mean(1)[:, [0, 2]]).T
    hidden = np.maximum(x, z) < half * (1 + 1e-6)  # where the arms meet the middle
    on_y = np.ptp(triangles[..., 1], axis=1) == 0  # its own faces
    return triangles[~hidden | on_y]


_SOLIDS: dict[str, Callable[[np.random.Generator], Triangles]] = {
    "sphere": lambda rng: _ellipsoid(np.full(3, rng.uniform(0.3, 0.6))),
    "ellipsoid": lambda rng: _ellipsoid(
        rng.permutation([1, rng.uniform(0.6, 0.8), rng.uniform(0.3, 0.5)]) * rng.uniform(0.5, 0.7)
    ),
    "cylinder": _cylinder,
    "cone": lambda rng: _revolved([0, rng.uniform(0.3, 0.6), 0], [0, 0, rng.uniform(0.5, 1.2)]),
    "torus": _torus,
    "box": lambda rng: _box([0, 0, 0], rng.uniform(0.4, 1.2, 3)),
    "pyramid": _pyramid,
    "spring": _spring,
    "table": _table,
    "cross": _cross,
}
CLASSES = tuple(_SOLIDS)
