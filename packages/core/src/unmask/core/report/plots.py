"""Curves as inline SVG that takes its colours from the page, so that one file is right in light and in dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from unmask.core.report.reference import Reference

# Matplotlib draws in these stand-ins; `_svg` turns each into a variable of the page's style sheet.
INK, MUTED, GRID = "#010203", "#010204", "#010205"
MAIN, SECOND, THIRD = "#010206", "#010207", "#010208"
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line", MAIN: "main", SECOND: "second", THIRD: "third"}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "unmask",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


def _draw(name: str, draw: Callable[[Any], None]) -> str:
    """An SVG of one pair of axes; ids in it begin with `name`."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.4, 3.1), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _svg(buffer.getvalue(), name)


def _svg(text: str, name: str) -> str:
    """Matplotlib's file as an element: no prologue, no fixed size, own ids, the page's colours and font."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, f"var(--{variable})")
    return text.replace("<svg ", '<svg aria-hidden="true" ', 1)


BEYOND = 2.0  # a reference is shown for at most this many times the run's steps, where the run would be a speck
Series = tuple[Sequence[int], Sequence[float]]


def loss_plot(loss: Series, val: Series, reference: Reference | None) -> str:
    """Training and validation loss by step, over the reference's band."""

    def draw(axes: Any) -> None:
        if reference is not None:
            low, high = reference.band(reference.step)
            axes.fill_between(reference.step, low, high, color=SECOND, alpha=0.18, linewidth=0, label="reference band")
            axes.plot(reference.step, reference.loss, color=SECOND, linewidth=1.2, linestyle="--", label="reference")
        axes.plot(*loss, color=MAIN, label="training")
        if val[0]:
            axes.plot(*val, color=THIRD, marker="o", markersize=3.5, linewidth=1.2, label="validation")
        _limits(axes, loss[1], val[1])
        if loss[0] and reference is not None and reference.step[-1] > (end := BEYOND * loss[0][-1]):
            axes.set_xlim(-0.05 * end, end)
        axes.set_xlabel("step")
        axes.legend(loc="upper right")

    return _draw("loss", draw)


def _limits(axes: Any, *values: Sequence[float]) -> None:
    """Up to where the curve is after its first tenth, so that the steep start does not flatten the rest."""
    rest = [v for series in values for v in series[len(series) // 10 :]]
    if rest:
        low, high = min(rest), max(rest)
        margin = max(high - low, 1e-3 * abs(high), 1e-9)
        axes.set_ylim(low - 0.08 * margin, high + 0.35 * margin)


def validation_plot(name: str, curves: dict[str, Series], label: str) -> str:
    """Numbers of validation by step, a line each, from 0 up.

    Args:
        name: of the plot, for ids.
        curves: at most six, by what the legend calls them.
        label: of the values.
    """
    looks = [(color, line) for line in ("-", "--") for color in (MAIN, SECOND, THIRD)]

    def draw(axes: Any) -> None:
        for (text, curve), (color, line) in zip(curves.items(), looks, strict=False):
            axes.plot(*curve, color=color, linestyle=line, marker="o", markersize=3.5, label=text)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.legend(loc="best")

    return _draw(name, draw)


def speed_plot(speed: Series) -> str:
    """Samples per second by step."""

    def draw(axes: Any) -> None:
        axes.plot(*speed, color=MAIN)
        axes.axhline(float(np.median(speed[1])), color=SECOND, linewidth=1.2, linestyle="--", label="median")
        axes.set_ylim(0, 1.15 * max(speed[1]))
        axes.set_xlabel("step")
        axes.set_ylabel("samples per second")
        axes.legend(loc="lower right")

    return _draw("speed", draw)


def rate_plot(rate: Series) -> str:
    """The learning rate by step."""

    def draw(axes: Any) -> None:
        axes.plot(*rate, color=MAIN)
        axes.set_ylim(0, 1.1 * max(rate[1]) or 1)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))
        axes.set_xlabel("step")

    return _draw("rate", draw)


def few_label_plot(curves: dict[str, dict[str, float]]) -> str:
    """Probe accuracy by the share of labels, a line per row of the evaluation.

    Args:
        curves: by the row's name: accuracies in [0, 1] by the share in percent, as text.
    """

    def draw(axes: Any) -> None:
        looks = [(MAIN, "-", "o", 1.0), (SECOND, "--", "s", 0.9), (THIRD, ":", "^", 0.9)]
        for (label, curve), (color, line, marker, width) in zip(curves.items(), looks, strict=False):
            shares = [float(share) for share in curve]
            heights = [100 * v for v in curve.values()]
            look = {"color": color, "marker": marker, "markersize": 4, "linewidth": 1.8 * width}
            axes.plot(shares, heights, line, label=label, **look)
        axes.set_xscale("log")
        axes.set_xticks(shares, [f"{share:g} %" for share in shares])
        axes.minorticks_off()
        axes.set_xlabel("labels used")
        axes.set_ylabel("test accuracy (%)")
        axes.legend(loc="lower right")

    return _draw("few", draw)
