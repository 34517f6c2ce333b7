"""Clouds as pictures: what was there, what the model saw, and what it answers where it saw nothing.

Everything is drawn in two dimensions by matplotlib's Agg: points are projected in parallel, sorted by depth and put
down as small squares, so that a picture needs no display and comes out the same everywhere.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

MOST_POINTS = 20_000  # drawn in one panel; more only hide one another
ZOOM = 80  # pillars along a side of what is shown of wider scenes: each is then a few pixels
FLAT = 0.2  # a cloud lower than this share of its width is drawn from above
AZIMUTH, ELEVATION = np.radians(-60.0), np.radians(28.0)  # of the eye, for all other clouds
DPI = 140
_INK, _FAINT, _HIDDEN, _EDGE = "#16202c", "#c3c9d1", "#e3e7ec", "#b3bbc6"
# Facing along x, along y and up: three of Okabe and Ito's colours that people with any colour vision tell apart.
DIRECTIONS = np.array([[0.835, 0.369, 0.0], [0.0, 0.447, 0.698], [0.72, 0.74, 0.76]])


class Compared(NamedTuple):
    """The same thing as it is and as a model answers it."""

    true: np.ndarray
    predicted: np.ndarray


@dataclass(frozen=True)
class Scene:
    """One cloud and what was asked about it. Components are x, y, z; lengths are metres, or whatever the points have.

    Args:
        points: every point inside the range.
        pillar_of: the hidden pillar (a row of `corners`) that a point lies in; -1 where it is visible.
        corners: lower corner of every hidden pillar.
        pillar: size of a pillar.
        centroids: [cells, 3] means of the points in finest cells: those that hold points, and those that the model
            expects to; None where it answers nothing of the kind.
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


@dataclass(frozen=True)
class View:
    """A parallel projection.

    Args:
        axes: unit vectors to the right, upwards and towards the eye, as rows.
        above: whether it looks straight down.
    """

    axes: Float[np.ndarray, "3 3"]
    above: bool

    def __call__(self, places: Float[np.ndarray, "*lead 3"]) -> Float[np.ndarray, "*lead 3"]:
        """Right, up and depth (larger is nearer) of places."""
        return places @ self.axes.T


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


def normal_colours(normals: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    """A colour for every direction without sign: `DIRECTIONS` mixed by the squares of its components, which sum to 1.

    Unlike a colour of the signed components it does not jump where a wall's normal leans a little up or down.
    """
    squares = normals**2
    return (squares / np.maximum(squares.sum(1, keepdims=True), 1e-12)) @ DIRECTIONS


# ---- panels --------------------------------------------------------------------------------------------------------

Colours = Callable[[Float[np.ndarray, "n"]], Float[np.ndarray, "n 4"]]


class _Canvas(NamedTuple):
    """What all panels of a figure share: scene, view, the colour scales, and (left, right, low, high) of the panels."""

    scene: Scene
    view: View
    height: Colours
    curvature: Colours
    limits: tuple[float, float, float, float]
    marker: float


def draw(scene: Scene, unit: str = "m") -> bytes:
    """One wide figure as a PNG: panels in pairs, two pairs in a row. What the scene lacks has no panel.

    Of a grid of more than `ZOOM` pillars, all panels but the first show a part, which is outlined in the first.
    """
    view = choose_view(scene.points)
    whole = _limits(scene, view)
    limits = _part(scene, whole) if view.above else whole
    part = scene if limits == whole else crop(scene, limits)
    colours = _scales(part)
    first = _Canvas(scene, view, *colours, whole, _marker_size(len(scene.points)))
    others = _Canvas(part, view, *colours, limits, _marker_size(len(part.points)))
    panels = _panels(part, unit)
    columns = min(4, len(panels))
    width = 3.0 if columns == 4 else 4.5
    height = width * min(1.25, max(0.45, (limits[3] - limits[2]) / (limits[1] - limits[0])))
    figure, axes = _grid(len(panels), columns, width, height)
    for i, (axis, (title, panel)) in enumerate(zip(axes, panels, strict=True)):
        canvas = others if i else first
        axis.set_title(title, fontsize=9.5, color=_INK, pad=3)
        axis.set(xlim=canvas.limits[:2], ylim=canvas.limits[2:], aspect="equal")
        panel(axis, canvas)
    if part is not scene:
        _frame(axes[0], limits)
    figure.canvas.draw()
    return _png(np.asarray(figure.canvas.buffer_rgba()))


def _grid(count: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure with panels of a size in inches, each with room for a title above and a key below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    above, below, between = 0.26, 0.24, 0.08
    rows = -(-count // columns)
    across, down = columns * (width + between), rows * (above + height + below)
    figure = Figure(figsize=(across, down), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = []
    for i in range(count):
        left, top = i % columns * (width + between) + between / 2, i // columns * (above + height + below) + above
        axis = figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))
        axis.set_axis_off()
        axes.append(axis)
    return figure, axes


def _panels(scene: Scene, unit: str) -> list[tuple[str, Callable[[Any, _Canvas], None]]]:
    found: list[tuple[str, Callable[[Any, _Canvas], None]]] = []
    found += [("the cloud", partial(_all_points, unit=unit)), ("what the encoder sees", _visible_points)]
    for pair, title, panel in (
        (scene.centroids, "hidden cells", _centroids),
        (scene.normals, "hidden normals", _normals),
        (scene.curvature, "hidden curvature", _curvature),
    ):
        if pair is not None:
            found.append((f"{title}: true", partial(panel, values=pair.true)))
            found.append((f"{title}: predicted", partial(panel, values=pair.predicted)))
    return found


def _all_points(axis: Any, canvas: _Canvas, unit: str) -> None:
    points = canvas.scene.points
    _scatter(axis, canvas, points, canvas.height(points[:, 2]))
    ends = np.percentile(points[:, 2], [1, 99])
    _key(axis, [(f"{end:.2g} {unit}".strip(), colour) for end, colour in zip(ends, canvas.height(ends), strict=True)])


def _frame(axis: Any, limits: tuple[float, float, float, float]) -> None:
    from matplotlib.patches import Rectangle

    left, right, low, high = limits
    axis.add_patch(Rectangle((left, low), right - left, high - low, fill=False, edgecolor=_INK, linewidth=1.1))


def _visible_points(axis: Any, canvas: _Canvas) -> None:
    points = canvas.scene.points[canvas.scene.pillar_of < 0]
    _boxes(axis, canvas, _HIDDEN)
    _scatter(axis, canvas, points, canvas.height(points[:, 2]))


def _centroids(axis: Any, canvas: _Canvas, values: np.ndarray) -> None:
    """Centroids over what is visible, which is faint."""
    _scatter(axis, canvas, canvas.scene.points[canvas.scene.pillar_of < 0], _FAINT)
    _scatter(axis, canvas, values, canvas.height(values[:, 2]))
    if len(values) == 0:
        axis.set_title(axis.get_title() + " (none)", fontsize=9.5, color=_INK, pad=3)


def _normals(axis: Any, canvas: _Canvas, values: np.ndarray) -> None:
    _by_pillar(axis, canvas, normal_colours(values))
    _key(axis, list(zip(("faces x", "faces y", "faces up"), DIRECTIONS, strict=True)))


def _curvature(axis: Any, canvas: _Canvas, values: np.ndarray) -> None:
    _by_pillar(axis, canvas, canvas.curvature(values))
    ends = np.array([0.0, 1 / 6, 1 / 3])
    _key(axis, list(zip(("flat", "curved", "scattered"), canvas.curvature(ends), strict=True)))


def _by_pillar(axis: Any, canvas: _Canvas, colours: Float[np.ndarray, "hidden channels"]) -> None:
    """A colour per hidden pillar: of the pillar itself from above, of the points in it from elsewhere."""
    if canvas.view.above:
        _boxes(axis, canvas, colours)
        return
    scene = canvas.scene
    chosen = np.flatnonzero(scene.pillar_of >= 0)
    _scatter(axis, canvas, scene.points[chosen], colours[scene.pillar_of[chosen]])


def _scatter(axis: Any, canvas: _Canvas, places: np.ndarray, colours: Any) -> None:
    """Points with the nearest on top; large ones are set apart by a white rim."""
    chosen = subset(len(places))
    shown = canvas.view(places[chosen])
    order = np.argsort(shown[:, 2], kind="stable")
    c = colours if isinstance(colours, str) else colours[chosen][order]
    rim = 0.35 if canvas.marker > 6 else 0.0
    axis.scatter(shown[order, 0], shown[order, 1], s=canvas.marker, c=c, linewidths=rim, edgecolors="white")


def _boxes(axis: Any, canvas: _Canvas, colours: Any) -> None:
    """The ground under every hidden pillar."""
    from matplotlib.collections import PolyCollection

    shapes = canvas.view(_ground(canvas.scene))[..., :2]
    wide = canvas.scene.pillar[0] > (canvas.limits[1] - canvas.limits[0]) / 50
    edge = _EDGE if isinstance(colours, str) and wide else "face"
    axis.add_collection(PolyCollection(list(shapes), facecolors=colours, edgecolors=edge, linewidths=0.4))


def _ground(scene: Scene) -> Float[np.ndarray, "hidden 4 3"]:
    """Corners of every hidden pillar's footprint, at the height of the cloud's lowest point."""
    size = np.array([*scene.pillar[:2], 0.0])
    ground = scene.corners[:, None] + size * np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]])
    ground[..., 2] = scene.points[:, 2].min()
    return ground


def _key(axis: Any, entries: list[tuple[str, Any]]) -> None:
    """What colours mean, in one line under a panel."""
    from matplotlib.lines import Line2D

    dots = [Line2D([], [], color=colour, marker="o", linestyle="", markersize=4.5) for _, colour in entries]
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "borderpad": 0.0, "borderaxespad": 0.2}
    look = {"fontsize": 7.5, "frameon": False, "labelcolor": _INK, "handletextpad": 0.1, "columnspacing": 0.9}
    axis.legend(dots, [label for label, _ in entries], ncols=len(entries), **place, **look)


# ---- the figure ----------------------------------------------------------------------------------------------------


def crop(scene: Scene, limits: tuple[float, float, float, float]) -> Scene:
    """The part of a scene between `limits` (x from, x to, y from, y to): hidden pillars whose middle lies there."""
    low, high = np.array(limits[::2]), np.array(limits[1::2])

    def inside(places: np.ndarray) -> np.ndarray:
        return np.all((places[:, :2] >= low) & (places[:, :2] < high), axis=1)

    kept = inside(scene.corners[:, :2] + np.array(scene.pillar[:2]) / 2)
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


def _part(scene: Scene, whole: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    """A square of `ZOOM` pillars around the middle of the points, or all of it where that is not larger."""
    side = ZOOM * max(scene.pillar[:2])
    if max(whole[1] - whole[0], whole[3] - whole[2]) <= 1.25 * side:
        return whole
    x, y = np.median(scene.points[:, :2], axis=0).tolist()
    return (x - side / 2, x + side / 2, y - side / 2, y + side / 2)


def _limits(scene: Scene, view: View) -> tuple[float, float, float, float]:
    """Left, right, low and high end of what is shown, a little wider than the cloud and its footprints."""
    shown = view(np.concatenate([scene.points, _ground(scene).reshape(-1, 3)]))[:, :2]
    low, high = shown.min(0), shown.max(0)
    margin = 0.03 * float((high - low).max()) + 1e-6
    left, down, right, up = np.concatenate([low - margin, high + margin]).tolist()
    return left, right, down, up


def _marker_size(points: int) -> float:
    """Points squared: what lets `points` of them cover a panel about once."""
    return float(np.clip(14_000 / max(points, 1), 0.8, 14.0))


def _scales(scene: Scene) -> tuple[Colours, Colours]:
    """Colours by height and by curvature, without the ends that vanish on white."""
    from matplotlib import colormaps

    low, high = np.percentile(scene.points[:, 2], [1, 99])

    def height(z: np.ndarray) -> np.ndarray:
        return np.asarray(colormaps["viridis"](0.93 * np.clip((z - low) / max(high - low, 1e-9), 0, 1)))

    def curvature(values: np.ndarray) -> np.ndarray:
        return np.asarray(colormaps["magma_r"](0.15 + 0.77 * np.clip(3 * values, 0, 1)))

    return height, curvature


def _png(rgba: UInt8[np.ndarray, "height width 4"]) -> bytes:
    """A PNG of 256 colours, a quarter of the size of one with all; rare and flat colours keep theirs."""
    from PIL import Image

    rgb = np.ascontiguousarray(rgba[..., :3])
    image = Image.fromarray(rgb).quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    place = np.asarray(image).ravel()
    count = np.maximum(np.bincount(place, minlength=256), 1)
    means = [np.bincount(place, rgb[..., i].ravel(), 256) / count for i in range(3)]
    image.putpalette(np.stack(means, axis=1).round().astype(np.uint8).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return buffer.getvalue()
