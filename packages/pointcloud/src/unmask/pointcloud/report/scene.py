"""A cloud as geometry to be drawn: the viewpoint, what of the cloud is shown, and shapes for what was hidden."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

MOST_POINTS = 20_000  # drawn in one panel; more only hide one another
ZOOM = 80  # pillars along a side of what is shown of wider scenes: each is then a few pixels
FLAT = 0.2  # a cloud lower than this share of its width is drawn from above
AZIMUTH, ELEVATION = np.radians(-60.0), np.radians(28.0)  # of the viewpoint, for higher clouds
# Corners of a block's faces across x, across y and of its top: 0 is the lower end along each axis, 1 the upper.
_FACES = np.array([
    [[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 1]],
    [[0, 1, 0], [1, 1, 0], [1, 1, 1], [0, 1, 1]],
    [[0, 0, 1], [1, 0, 1], [1, 1, 1], [0, 1, 1]],
])  # fmt: skip

Limits = tuple[float, float, float, float]  # left, right, low and high end of what a panel shows


class Compared(NamedTuple):
    """The same quantity as it is and as a model predicts it."""

    true: np.ndarray
    predicted: np.ndarray


@dataclass(frozen=True)
class Scene:
    """One cloud with targets and predictions. Components are x, y, z; lengths are metres, or the points' own unit.

    Args:
        points: every point inside the range.
        pillar_of: the hidden pillar (a row of `corners`) that a point lies in; -1 where it is visible.
        corners: lower corner of every hidden pillar.
        pillar: size of a pillar.
        centroids: [cells, 3] means of the points in finest cells: those that hold points, and those that the model
            expects to; None where it predicts nothing of the kind.
        normals: [hidden, 3] for every hidden pillar, of either sign and any length, or None.
        curvature: [hidden] share of the smallest axis of the surface around, 0 (flat) to 1/3 (none in particular), or
            None.
    """

    points: Float[np.ndarray, "points 3"]
    pillar_of: Int[np.ndarray, "points"]
    corners: Float[np.ndarray, "hidden 3"]
    pillar: tuple[float, float, float]
    centroids: Compared | None = None
    normals: Compared | None = None
    curvature: Compared | None = None

    @property
    def visible(self) -> Float[np.ndarray, "visible 3"]:
        """The points in visible pillars."""
        return self.points[self.pillar_of < 0]

    @property
    def middles(self) -> Float[np.ndarray, "hidden 2"]:
        """The middle of every hidden pillar, x and y."""
        return self.corners[:, :2] + np.array(self.pillar[:2]) / 2


@dataclass(frozen=True)
class View:
    """A parallel projection.

    Args:
        axes: unit vectors to the right, upwards and towards the viewer, as rows.
        above: whether it looks straight down.
    """

    axes: Float[np.ndarray, "3 3"]
    above: bool

    def __call__(self, xyz: Float[np.ndarray, "*lead 3"]) -> Float[np.ndarray, "*lead 3"]:
        """Right, up and depth (larger is nearer) of positions."""
        return xyz @ self.axes.T


ABOVE = View(np.eye(3), above=True)


def oblique(azimuth: float = AZIMUTH, elevation: float = ELEVATION) -> View:
    """From a side and from higher up; angles in radians, azimuth from x towards y."""
    (s, c), (se, ce) = (np.sin(azimuth), np.cos(azimuth)), (np.sin(elevation), np.cos(elevation))
    return View(np.array([[-s, c, 0.0], [-se * c, -se * s, ce], [ce * c, ce * s, se]]), above=False)


def choose_view(points: Float[np.ndarray, "points 3"]) -> View:
    """From above for what is flat and wide, as a street is; obliquely for the rest. Outliers do not decide."""
    x, y, z = np.ptp(np.percentile(points, [2, 98], axis=0), axis=0)
    return ABOVE if z < FLAT * max(x, y) else oblique()


def subset(count: int, most: int = MOST_POINTS) -> Int[np.ndarray, "chosen"]:
    """Rows of at most `most` of `count` points, rising: at random, but always the same ones."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).permutation(count)[:most])


def crop(scene: Scene, limits: Limits) -> Scene:
    """The part of a scene between `limits` (x from, x to, y from, y to): hidden pillars whose middle lies there."""
    low, high = np.array(limits[::2]), np.array(limits[1::2])

    def inside(xyz: np.ndarray) -> np.ndarray:
        return np.all((xyz[:, :2] >= low) & (xyz[:, :2] < high), axis=1)

    kept = inside(scene.middles)
    row = np.append(np.where(kept, kept.cumsum() - 1, -2), -1)  # -2: hidden, but not here
    points = inside(scene.points) & (row[scene.pillar_of] > -2)

    def cut(pair: Compared | None, where: Callable[[np.ndarray], np.ndarray]) -> Compared | None:
        return None if pair is None else Compared(*(values[where(values)] for values in pair))

    return replace(
        scene,
        points=scene.points[points],
        pillar_of=row[scene.pillar_of][points],
        corners=scene.corners[kept],
        centroids=cut(scene.centroids, inside),
        normals=cut(scene.normals, lambda _: kept),
        curvature=cut(scene.curvature, lambda _: kept),
    )


def part_of(scene: Scene, whole: Limits) -> Limits:
    """`ZOOM` pillars along x and y around the point nearest to the middle, or all where that is not much larger."""
    side = ZOOM * max(scene.pillar[:2])
    if max(whole[1] - whole[0], whole[3] - whole[2]) <= 1.25 * side:
        return whole
    xy = scene.points[:, :2]
    x, y = xy[np.linalg.norm(xy - np.median(xy, axis=0), axis=1).argmin()].tolist()
    left, right, low, high = whole
    return max(left, x - side / 2), min(right, x + side / 2), max(low, y - side / 2), min(high, y + side / 2)


def fit(limits: Limits, ratio: float) -> Limits:
    """Wider or higher limits with the same middle: their height is `ratio` times their width."""
    left, right, low, high = limits
    width = max(right - left, (high - low) / ratio)
    x, y = (left + right) / 2, (low + high) / 2
    return x - width / 2, x + width / 2, y - ratio * width / 2, y + ratio * width / 2


def limits_of(scene: Scene, view: View) -> Limits:
    """Left, right, low and high end of what is shown, a little wider than the cloud and its hidden pillars."""
    shown = view(np.concatenate([scene.points, blocks(scene, view).reshape(-1, 3)]))[:, :2]
    low, high = shown.min(0), shown.max(0)
    margin = 0.03 * float((high - low).max()) + 1e-6
    left, down, right, up = np.concatenate([low - margin, high + margin]).tolist()
    return left, right, down, up


def blocks(scene: Scene, view: View) -> Float[np.ndarray, "hidden faces 4 3"]:
    """The visible faces of hidden pillars, each after those it may hide: x, y and top, or only the ground."""
    low = scene.corners * [1, 1, 0]
    ends = low[:, None, :] + np.array([[0.0, 0.0, 0.0], [*scene.pillar[:2], 0.0]])
    ends[:, 0, 2], ends[:, 1, 2] = _heights(scene)
    if view.above:
        return ends[:, _FACES[2:], np.arange(3)] * [1, 1, 0]
    # The side that faces the viewer, of the two along x and along y.
    faces = _FACES.copy()
    for axis in (0, 1):
        faces[axis, :, axis] = view.axes[2, axis] > 0
    return ends[:, faces, np.arange(3)]


def _heights(scene: Scene) -> tuple[Float[np.ndarray, "hidden"], Float[np.ndarray, "hidden"]]:
    """The lowest and the highest point in every hidden pillar; the cloud's lowest where there is none."""
    z, of = scene.points[:, 2], scene.pillar_of
    low, high = np.full(len(scene.corners), np.inf), np.full(len(scene.corners), -np.inf)
    np.minimum.at(low, of[of >= 0], z[of >= 0])
    np.maximum.at(high, of[of >= 0], z[of >= 0])
    bottom = z.min() if len(z) else 0.0
    return np.where(low <= high, low, bottom), np.where(low <= high, high, bottom)


def discs(
    scene: Scene, normals: Float[np.ndarray, "hidden 3"], centred: bool = False
) -> Float[np.ndarray, "hidden corners 3"]:
    """Discs nearly as wide as a pillar, at right angles to normals of either sign and any length (level for length 0).

    Each lies at the mean of its pillar's points or, `centred`, at that height in the middle of the pillar.
    """
    size = np.linalg.norm(normals, axis=1, keepdims=True)
    unit = np.where(size > 1e-9, normals / np.maximum(size, 1e-9), [0.0, 0.0, 1.0])
    u = np.cross(unit, np.eye(3)[np.abs(unit).argmin(1)])  # with the axis that the normal is farthest from
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)[:, None]
    ring = np.cos(angle) * u[:, None] + np.sin(angle) * np.cross(unit, u)[:, None]
    centres = _means(scene)
    if centred:
        centres[:, :2] = scene.middles
    return centres[:, None] + 0.46 * min(scene.pillar[:2]) * ring


def _means(scene: Scene) -> Float[np.ndarray, "hidden 3"]:
    """The mean of the points in every hidden pillar; its lower corner where there is none."""
    of, inside = scene.pillar_of, scene.pillar_of >= 0
    sums = np.zeros((len(scene.corners), 3))
    np.add.at(sums, of[inside], scene.points[inside])
    count = np.bincount(of[inside], minlength=len(sums))[:, None]
    return np.where(count > 0, sums / np.maximum(count, 1), scene.corners)
