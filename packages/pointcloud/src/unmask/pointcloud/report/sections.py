"""What a point-cloud run's page shows: clouds with what was hidden and what is answered, loss terms, probes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from unmask.core.report import plots
from unmask.core.report.gather import RunFacts
from unmask.core.report.page import Figure, Probes, Rows, Section
from unmask.core.report.reference import Verdict
from unmask.pointcloud.evaluation.tables import remarks
from unmask.pointcloud.report.pictures import draw_pictures as draw_pictures

COMMANDS = (
    ("Measure the encoder on labelled clouds of yours", "unmask evaluate {run} --data LABELLED"),
    ("Train a classifier from it", "unmask finetune {run} --data LABELLED"),
    ("One vector per cloud, as a parquet file", "unmask embed {run} FOLDER --out features.parquet"),
    ("Take the encoder to a detector built on SST", "unmask export {run} --to sst --out encoder/"),
)


# ---- loss terms ----------------------------------------------------------------------------------------------------

_TERMS = {
    "low": ("centroids, finest cells", "about 1/3"),
    "med": ("centroids, middle cells", "about 1/3"),
    "top": ("centroids, pillars", "about 1/3"),
    "low_occupancy": ("occupied, finest cells", f"{math.log(2):.4f}"),
    "med_occupancy": ("occupied, middle cells", f"{math.log(2):.4f}"),
    "normal": ("normals", f"{1 / 3:.4f}"),
    "curvature": ("curvature", "1/9 to 1/3"),
}
_TERMS_NOTE = (
    "Each term before it is weighted. Answering 0 everywhere costs exactly ln 2 for which cells hold points and 1/3 "
    "for normals; for centroids 1/3 if points lie anywhere in their cell (its middle would cost 1/12), and for "
    "curvature between 1/9 (scattered) and 1/3 (lines). Which cells hold points costs the entropy of their share, "
    "0.20 at 5 %, if that share is answered everywhere: a model has learned something below that."
)


def sections(run: RunFacts) -> list[Section]:
    """The page's part about the loss: a row per term that was logged."""
    weights = (run.recipe.get("model") or {}).get("weights") or {}
    named = [(name, *rest) for name, rest in _TERMS.items() if run.series(name)[0]]
    if not named:
        return []
    rows: Rows = []
    for name, title, zero in named:
        first, last, val = run.series(name)[1][0], run.last(name), run.last(f"val_{name}")
        cells = [f"{weights[name]:g}" if name in weights else "–", f"{first:.4f}", f"{last:.4f}"]
        cells += ["–" if val is None else f"{val:.4f}", zero]
        rows.append((title, [(cell, False) for cell in cells]))
    columns = ["term", "weight", "training, first", "training, last", "validation, last", "answering 0"]
    return [Section("What the loss is made of", _TERMS_NOTE, columns, rows)]


# ---- probes --------------------------------------------------------------------------------------------------------

Row = Mapping[str, Any]


def probes(run: RunFacts) -> Probes | None:
    """The evaluation of whole clouds and of points in one table; None before there is one."""
    found = run.evaluation
    if found is None:
        return None
    rows, names = found["rows"], found["names"]
    columns = _columns(rows)
    best = {title: max(v for row in rows.values() if (v := _value(row, path)) is not None) for title, path in columns}
    table: Rows = []
    for name, row in rows.items():
        values = [(title, _value(row, path)) for title, path in columns]
        cells = [("–" if v is None else f"{100 * v:.1f}", v is not None and v == best[title]) for title, v in values]
        table.append((names[name], [*cells, (f"{row['rankme']:.1f} of {row['dim']}", False)]))
    titles = [*(title for title, _ in columns), "RankMe"]
    if not columns:
        return Probes(titles, table, Verdict(found["note"], "plain"), " ".join(_remarks(found)))
    return Probes(titles, table, _verdict(found), _note(found), _curves(found))


def _columns(rows: Mapping[str, Row]) -> list[tuple[str, tuple[str, ...]]]:
    """Title and path of every measure that some row has."""
    shares = [share for share in rows["trained"].get("few_label", {}) if share != "100"]
    known: list[tuple[str, tuple[str, ...]]] = [("k-NN", ("knn",)), ("linear", ("linear",))]
    known += [(f"{share} % labels", ("few_label", share)) for share in shares]
    known += [("fine-tuned", ("finetune",)), ("points", ("dense", "accuracy")), ("mean IoU", ("dense", "mean_iou"))]
    return [(title, path) for title, path in known if any(_value(row, path) is not None for row in rows.values())]


def _value(row: Row, path: tuple[str, ...]) -> float | None:
    value: Any = row
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _verdict(found: dict[str, Any]) -> Verdict:
    """The linear probes of clouds and of points against the best reference, in a sentence each."""
    rows, names = found["rows"], found["names"]
    text, gaps = [], []
    for title, path in (("Linear probe of clouds", ("linear",)), ("Mean IoU of points", ("dense", "mean_iou"))):
        own = _value(rows["trained"], path)
        if own is None:
            continue
        best, name = max((_value(row, path) or 0.0, name) for name, row in rows.items() if name != "trained")
        gap, level = 100 * (own - best), 1.0
        if path == ("linear",):
            level = 196 * math.sqrt((own * (1 - own) + best * (1 - best)) / found["splits"]["test"])
        gaps.append(0 if abs(gap) < level else gap)
        side = "level with" if abs(gap) < level else f"{abs(gap):.1f} points {'above' if gap > 0 else 'below'}"
        text.append(f"{title} {100 * own:.1f} %: {side} the best reference ({names[name]}, {100 * best:.1f} %).")
        if path == ("linear",):
            text.append(f"With {found['splits']['test']:,} test clouds, {level:.1f} points may be chance.")
    tone: Any = "warn" if min(gaps) < 0 else "good" if min(gaps) > 0 else "plain"
    return Verdict(" ".join(text), tone)


def _note(found: dict[str, Any]) -> str:
    sizes = found["splits"]
    text = (
        f"Test scores in percent on {found['data']}: fitted on {sizes['train']:,} clouds, chosen on {sizes['val']:,}, "
        f"reported once on {sizes['test']:,}. Features of a cloud are the maximum and the mean over its pillars, those "
        "of a point its pillar's. The untrained encoder has the same architecture at random weights; every row gets "
        "the same probes and tuning. The best of a column is bold."
    )
    return " ".join([text, *_remarks(found), "RankMe counts the dimensions that features use; it is not a score."])


def _remarks(found: dict[str, Any]) -> list[str]:
    """What `unmask evaluate` says below its table, apart from the note on missing labels."""
    lines = remarks({name: value for name, value in found.items() if name != "note"})
    return [line[0].upper() + line[1:] + ("" if line.endswith(".") else ".") for line in lines]


def _curves(found: dict[str, Any]) -> Figure | None:
    curves = {found["names"][n]: row["few_label"] for n, row in found["rows"].items() if "few_label" in row}
    if not curves:
        return None
    lines = (f"{n}: " + ", ".join(f"{100 * v:.1f} % with {s} %" for s, v in c.items()) for n, c in curves.items())
    return Figure("Accuracy by labels used", plots.few_label_plot(curves), "; ".join(lines) + ".")
