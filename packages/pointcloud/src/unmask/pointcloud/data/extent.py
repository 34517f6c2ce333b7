"""Which range and pillars suit a data set, from some of its training clouds.

The range holds nearly all points of augmented clouds: in x and y it reaches as far from 0 either way (clouds are
mirrored) as 99.5 % of the points, in z from the 0.5 % to the 99.5 % quantile, and a twentieth further; every cloud
counts the same, however many points it has. The pillars are nearly square, between 8 and 512 a side, and of the size at
which a median cloud has closest to 8 points in each pillar that is not empty. All of this is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Shaped

Range = tuple[float, float, float, float, float, float]
_INSIDE = 0.995  # of the points
_MARGIN = 0.05
_WANTED = 8  # points in a pillar
_FEWEST, _MOST = 8, 512  # pillars a side
_SIDES = [round(_FEWEST * 2 ** (step / 2)) for step in range(13)]
_POOLED = 4096  # points of a cloud that quantiles are taken of


def inside(points: Shaped[np.ndarray, "points channels"], bounds: Range | None) -> Bool[np.ndarray, "points"]:
    """Which points lie in the range: from its lower corner up to, and not including, its upper one."""
    if bounds is None:
        return np.ones(len(points), bool)
    xyz = points[:, :3].astype(np.float64)
    within: np.ndarray = (xyz >= np.array(bounds[:3])) & (xyz < np.array(bounds[3:]))
    return np.asarray(within.all(1))


def holds_origin(xyz: Float[np.ndarray, "points 3"]) -> bool:
    """Whether the origin lies within a cloud as seen from above, a hundredth of its points cut off on each side."""
    low, high = np.quantile(xyz[:, :2], (0.01, 0.99), axis=0)
    return bool((low < 0).all() and (high > 0).all())


def choose_range(clouds: Sequence[Float[np.ndarray, "_ 3"]], pillar: tuple[float, float] | None) -> Range:
    """A range for these clouds: a whole number of pillars, where their size is given; see the module's docstring."""
    pooled = np.concatenate([cloud[:: -(-len(cloud) // _POOLED)] for cloud in clouds]).astype(np.float64)
    x, y = (1 + _MARGIN) * np.quantile(np.abs(pooled[:, :2]), _INSIDE, axis=0)
    low, high = np.quantile(pooled[:, 2], (1 - _INSIDE, _INSIDE))
    least = max(x, y, high - low, 1e-3) / 100  # flat clouds get some thickness, too
    margin = max(_MARGIN * (high - low), least / 2)
    step = 10.0 ** (math.floor(math.log10(high - low + 2 * margin)) - 2)
    z0, z1 = math.floor((low - margin) / step) * step, math.ceil((high + margin) / step) * step
    x, y = _round_up(max(x, least)), _round_up(max(y, least))
    if pillar is not None:
        x, y = (math.ceil(2 * half / size - 1e-6) * size / 2 for half, size in zip((x, y), pillar, strict=True))
    return -x, -y, float(f"{z0:.6g}"), x, y, float(f"{z1:.6g}")


def _round_up(value: float) -> float:
    """To three digits."""
    step = 10.0 ** (math.floor(math.log10(value)) - 2)
    return float(f"{math.ceil(value / step - 1e-9) * step:.4g}")


def choose_pillar(clouds: Sequence[Float[np.ndarray, "_ 3"]], bounds: Range) -> tuple[float, float]:
    """The size of pillars along x and y for these clouds, each with a point in the range."""
    best, distance = _size(bounds, _FEWEST), math.inf
    for side in _SIDES:
        size = _size(bounds, side)
        ratio = float(np.median([_points_a_pillar(cloud, bounds, size) for cloud in clouds]))
        if abs(math.log(ratio / _WANTED)) <= distance:
            best, distance = size, abs(math.log(ratio / _WANTED))
        if ratio <= _WANTED:
            break  # smaller pillars hold no more
    return best


def _size(bounds: Range, side: int) -> tuple[float, float]:
    """Nearly square pillars, `side` of them along the longer side of the range and at least 8 along the other."""
    widths = bounds[3] - bounds[0], bounds[4] - bounds[1]
    x, y = (width / max(_FEWEST, round(side * width / max(widths))) for width in widths)
    return x, y


def _points_a_pillar(cloud: Float[np.ndarray, "_ 3"], bounds: Range, size: tuple[float, float]) -> float:
    kept = cloud[inside(cloud, bounds), :2].astype(np.float64)
    cells = np.floor((kept - np.array(bounds[:2])) / np.array(size)).astype(np.int64)
    return len(kept) / len(np.unique(cells[:, 0] * 2 * _MOST + cells[:, 1]))
