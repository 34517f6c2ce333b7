"""Clouds as pictures: the points, what the encoder sees, and what the model predicts where it sees nothing.

Points are projected in parallel, sorted by depth and drawn as dots and polygons by matplotlib's Agg, which needs no
display and draws the same everywhere. True and predicted share view, limits and colours.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.offsetbox import AnchoredOffsetbox, DrawingArea, HPacker, TextArea
from matplotlib.patches import Rectangle
from PIL import Image

from unmask.pointcloud.report.scene import (
    Limits,
    Scene,
    View,
    blocks,
    choose_view,
    crop,
    discs,
    fit,
    limits_of,
    part_of,
    subset,
)

LEAST_CURVED = 0.1  # end of the curvature's colours, so that a flat scene does not show its noise
DPI = 150
_INK, _FAINT, _HIDDEN = "#16202c", "#c3c9d1", "#aab4c2"
# Facing along x, along y and up: Okabe and Ito's vermilion and blue, which any colour vision tells apart, and a pale
# green, so that the ground stays in the background.
DIRECTIONS = np.array([[0.835, 0.369, 0.0], [0.0, 0.447, 0.698], [0.62, 0.78, 0.72]])
_LIT = np.array([0.8, 0.9, 1.0])[:, None]  # light comes from above


def normal_colours(normals: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    """A colour for every direction without sign: `DIRECTIONS` mixed by the squares of its components, which sum to 1.

    Unlike a colour of the signed components it does not jump where a wall's normal leans a little up or down.
    """
    squares = normals**2
    return (squares / np.maximum(squares.sum(1, keepdims=True), 1e-12)) @ DIRECTIONS


# ---- the figure ----------------------------------------------------------------------------------------------------


class Scale(NamedTuple):
    """Colours of values between two ends; values beyond have the ends' colours."""

    low: float
    high: float
    colours: Callable[[Float[np.ndarray, "n"]], Float[np.ndarray, "n 4"]]


class _Canvas(NamedTuple):
    """What all panels of a figure share."""

    scene: Scene
    view: View
    height: Scale
    curvature: Scale
    limits: Limits
    marker: float

    @property
    def wide_pillars(self) -> bool:
        """Whether there is room for lines between them."""
        return self.scene.pillar[0] > (self.limits[1] - self.limits[0]) / 50


class _Pair(NamedTuple):
    """Two panels side by side, which one key below explains."""

    titles: tuple[str, str]
    panels: tuple[Callable[[Any, _Canvas], None], Callable[[Any, _Canvas], None]]
    key: Callable[[_Canvas], list[Any]]


def draw(scene: Scene, unit: str = "m", view: View | None = None) -> bytes:
    """One wide figure as a PNG: panels in pairs, two pairs in a row. What the scene lacks has no panel.

    Of a grid of more than `ZOOM` pillars, all panels but the first show a part, which is outlined in the first.

    Args:
        scene: the cloud.
        unit: of lengths; empty where the cloud was scaled to radius 1.
        view: chosen by the cloud's shape where it is not given.
    """
    view = choose_view(scene.points) if view is None else view
    whole = limits_of(scene, view)
    limits = part_of(scene, whole) if view.above else whole
    part = scene if limits == whole else crop(scene, limits)
    ratio = min(1.25, max(0.45, (limits[3] - limits[2]) / (limits[1] - limits[0])))
    scales = height_scale(part), curvature_scale(part)
    first = _Canvas(scene, view, *scales, fit(whole, ratio), _marker_size(len(scene.points)))
    zoomed = _Canvas(part, view, *scales, fit(limits, ratio), _marker_size(len(part.points)))
    pairs = _pairs(part, unit)
    figure, axes, keys = _grid(len(pairs), ratio)
    for i, pair in enumerate(pairs):
        for j, (title, panel) in enumerate(zip(pair.titles, pair.panels, strict=True)):
            axis, canvas = axes[2 * i + j], zoomed if i + j else first
            axis.set(xlim=canvas.limits[:2], ylim=canvas.limits[2:])
            _title(axis, title)
            panel(axis, canvas)
        _key(keys[i], pair.key(zoomed))
    if part is not scene:
        _title(axes[0], "the whole cloud, zoom framed")
        _frame(axes[0], limits)
    figure.canvas.draw()
    return _png(np.asarray(figure.canvas.buffer_rgba()))


def _grid(pairs: int, ratio: float) -> tuple[Any, list[Any], list[Any]]:
    """A figure with two panels per pair, their height so many times their width, and the key below both."""
    title, key, gap, columns = 0.34, 0.4, 0.1, min(2, pairs)  # inches, but for the last
    width = 2.54 if columns == 2 else 4.0  # whole pixels with the gap: panels of a pair can be equal
    height = width * ratio
    wide, high = 2 * (width + gap), title + height + key
    across, down = columns * wide, -(-pairs // columns) * high
    figure = Figure(figsize=(across, down), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)

    def add(left: float, top: float, size: tuple[float, float]) -> Any:
        axis = figure.add_axes((left / across, 1 - (top + size[1]) / down, size[0] / across, size[1] / down))
        axis.set_axis_off()
        return axis

    axes, keys = [], []
    for i in range(pairs):
        left, top = i % columns * wide, i // columns * high
        axes += [add(left + gap / 2 + j * (width + gap), top + title, (width, height)) for j in (0, 1)]
        keys.append(add(left, top + title + height, (wide, key)))
    return figure, axes, keys


def _pairs(scene: Scene, unit: str) -> list[_Pair]:
    length = f"height in {unit}" if unit else "height (the cloud has radius 1)"
    titles, panels = ("the whole cloud", "what the encoder sees"), (_all_points, _visible_points)
    pairs = [_Pair(titles, panels, lambda canvas: [_bar(length, canvas.height), _swatch("hidden pillar", _HIDDEN)])]
    keys: list[Callable[[_Canvas], list[Any]]] = [
        lambda canvas: [_bar(length, canvas.height), _swatch("visible", _FAINT)],
        lambda canvas: [_cross(canvas.view), *map(_swatch, ("facing x", "facing y", "facing up"), DIRECTIONS)],
        lambda canvas: [_bar("share of the smallest axis (0: flat)", canvas.curvature)],
    ]
    compared = (scene.centroids, scene.normals, scene.curvature)
    whats, panel_of = ("hidden points", "normals", "curvature"), (_centroids, _normals, _curvature)
    for what, values, panel, key in zip(whats, compared, panel_of, keys, strict=True):
        if values is not None:
            both = partial(panel, values=values.true), partial(panel, values=values.predicted)
            pairs.append(_Pair((f"{what}: true", f"{what}: predicted"), both, key))
    return pairs


def _title(axis: Any, words: str) -> None:
    axis.set_title(words, fontsize=10.5, color=_INK, pad=4)


def _frame(axis: Any, limits: Limits) -> None:
    left, right, low, high = limits
    axis.add_patch(Rectangle((left, low), right - left, high - low, fill=False, edgecolor=_INK, linewidth=1.1))


def _png(rgba: UInt8[np.ndarray, "height width 4"]) -> bytes:
    """A PNG of 256 colours, a quarter of the size of one with all; rare and flat colours keep theirs."""
    image = Image.fromarray(np.ascontiguousarray(rgba[..., :3]))
    buffer = io.BytesIO()
    image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE).save(buffer, format="png")
    return buffer.getvalue()


# ---- panels --------------------------------------------------------------------------------------------------------


def _all_points(axis: Any, canvas: _Canvas) -> None:
    _by_height(axis, canvas, canvas.scene.points)


def _visible_points(axis: Any, canvas: _Canvas) -> None:
    _pillars(axis, canvas, _HIDDEN, alpha=1.0 if canvas.view.above else 0.6)
    _by_height(axis, canvas, canvas.scene.visible)


def _centroids(axis: Any, canvas: _Canvas, values: np.ndarray) -> None:
    """Centroids over the visible points, which are faint."""
    _scatter(axis, canvas, canvas.scene.visible, _FAINT)
    _by_height(axis, canvas, values)
    if len(values) == 0:
        _title(axis, axis.get_title() + " (none)")


def _normals(axis: Any, canvas: _Canvas, values: np.ndarray) -> None:
    """A disc in every hidden pillar, at right angles to the normal: either sign gives the same one."""
    if canvas.view.above:
        _pillars(axis, canvas, _HIDDEN, alpha=0.3)
    _scatter(axis, canvas, canvas.scene.visible, _FAINT)
    shown: Any = canvas.view(discs(canvas.scene, values, centred=canvas.view.above))
    order = np.argsort(shown[..., 2].mean(1), kind="stable")
    colours = normal_colours(values)[order]
    # The rim is all that is left of a disc that is seen from its edge.
    rim = 0.6 if canvas.wide_pillars else 0.2
    rings = PolyCollection(shown[order, :, :2], facecolors=colours, edgecolors=0.65 * colours, linewidths=rim)
    axis.add_collection(rings)


def _curvature(axis: Any, canvas: _Canvas, values: np.ndarray) -> None:
    _pillars(axis, canvas, canvas.curvature.colours(values))


def _by_height(axis: Any, canvas: _Canvas, points: np.ndarray) -> None:
    _scatter(axis, canvas, points, canvas.height.colours(points[:, 2]))


def _scatter(axis: Any, canvas: _Canvas, points: np.ndarray, colours: Any) -> None:
    """Points with the nearest on top; large ones are set apart by a white rim."""
    chosen = subset(len(points))
    shown = canvas.view(points[chosen])
    order = np.argsort(shown[:, 2], kind="stable")
    c = colours if isinstance(colours, str) else colours[chosen][order]
    rim = 0.3 if canvas.marker > 6 else 0.0
    axis.scatter(shown[order, 0], shown[order, 1], s=canvas.marker, c=c, linewidths=rim, edgecolors="white")


def _pillars(axis: Any, canvas: _Canvas, colours: Any, alpha: float = 1.0) -> None:
    """Every hidden pillar: its ground from above, else a block as high as the points in it."""
    scene = canvas.scene
    rgb = np.broadcast_to(to_rgb(colours) if isinstance(colours, str) else colours[:, :3], (len(scene.corners), 3))
    faces = canvas.view(blocks(scene, canvas.view))[..., :2]
    order = np.argsort(canvas.view(scene.corners * [1, 1, 0])[:, 2], kind="stable")
    lit = (_LIT[-faces.shape[1] :] * rgb[order, None]).reshape(-1, 3)
    edge, line = ("white", 0.4) if canvas.wide_pillars else ("face", 0.2)
    quads: Any = faces[order].reshape(-1, 4, 2)  # each is drawn over those before it
    axis.add_collection(PolyCollection(quads, facecolors=lit, alpha=alpha, edgecolors=edge, linewidths=line))


# ---- keys ----------------------------------------------------------------------------------------------------------


def _key(axis: Any, entries: list[Any]) -> None:
    """What colours mean, in one line."""
    line = HPacker(children=entries, align="center", pad=0, sep=16)
    axis.add_artist(AnchoredOffsetbox("upper center", child=line, frameon=False, pad=0.2, borderpad=0.2))


def _text(words: str) -> Any:
    return TextArea(words, textprops={"fontsize": 8.5, "color": _INK})


def _strip(colours: Any, width: float) -> Any:
    """Colours from left to right, `width` points in all."""
    area, each = DrawingArea(width, 7), width / len(colours)
    for i, colour in enumerate(colours):
        area.add_artist(Rectangle((i * each, 0), each, 7, facecolor=colour, edgecolor=colour, linewidth=0.2))
    return area


def _swatch(words: str, colour: Any) -> Any:
    return HPacker(children=[_strip([colour], 9), _text(words)], align="center", pad=0, sep=4)


def _cross(view: View) -> Any:
    """The axes x, y and z in their `DIRECTIONS`, one that points at the eye as a dot."""
    area, middle, reach = DrawingArea(16, 16), 8.0, 7.5
    for (x, y), colour in zip(reach * view(np.eye(3))[:, :2], DIRECTIONS, strict=True):
        look: Any = {"marker": "o", "markersize": 4} if abs(x) + abs(y) < 1 else {"linewidth": 1.8}
        area.add_artist(Line2D([middle - x, middle + x], [middle - y, middle + y], color=colour, **look))
    return area


def _bar(words: str, scale: Scale) -> Any:
    """A scale between the values at its ends."""
    colours = scale.colours(np.linspace(scale.low, scale.high, 12))
    parts = [_text(words + ":"), _text(f"{scale.low:.2g}"), _strip(colours, 70), _text(f"{scale.high:.2g}")]
    return HPacker(children=parts, align="center", pad=0, sep=4)


# ---- scales --------------------------------------------------------------------------------------------------------


def _marker_size(points: int) -> float:
    """Points squared: what lets `points` of them cover a panel about once."""
    return float(np.clip(14_000 / max(points, 1), 0.8, 14.0))


def height_scale(scene: Scene) -> Scale:
    """Colours by height but for the hundredth that is highest and lowest; none vanishes on white."""
    low, high = np.percentile(scene.points[:, 2], [1, 99]).tolist()
    return _scale(low, high, "viridis", 0.0, 0.93)


def curvature_scale(scene: Scene) -> Scale:
    """Colours from 0 to the largest true or predicted value: at least `LEAST_CURVED`, at most 1/3."""
    values = np.concatenate([*(scene.curvature or []), [LEAST_CURVED]])
    return _scale(0.0, min(1 / 3, float(values.max())), "magma_r", 0.08, 0.85)


def _scale(low: float, high: float, name: str, first: float, last: float) -> Scale:
    """The part of one of matplotlib's colour maps from `first` to `last`, for values from `low` to `high`."""

    def colours(values: np.ndarray) -> np.ndarray:
        share = np.clip((values - low) / max(high - low, 1e-9), 0, 1)
        return np.asarray(colormaps[name](first + (last - first) * share))

    return Scale(low, high, colours)
