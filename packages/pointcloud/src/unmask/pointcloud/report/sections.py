"""What a point-cloud run's page shows: clouds with what was hidden and what is answered, loss terms, probes."""

from __future__ import annotations

import math
from typing import Any

from unmask.core.report.gather import RunFacts
from unmask.core.report.parts import Probes, Rows, Section, Verdict
from unmask.core.report.probes import Path, best_reference, chance, few_label_figure, score_columns, score_table, value
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

_POINTS: list[tuple[str, Path]] = [("points", ("dense", "accuracy")), ("mean IoU", ("dense", "mean_iou"))]


def probes(run: RunFacts) -> Probes | None:
    """The evaluation of whole clouds and of points in one table; None before there is one."""
    found = run.evaluation
    if found is None:
        return None
    titles, table = score_table(found, _POINTS)
    if not score_columns(found["rows"], _POINTS):
        return Probes(titles, table, Verdict(found["note"], "plain"), " ".join(_remarks(found)))
    return Probes(titles, table, _verdict(found), _note(found), few_label_figure(found))


def _verdict(found: dict[str, Any]) -> Verdict:
    """The linear probes of clouds and of points against the best reference, in a sentence each."""
    text, gaps = [], []
    for title, path in (("Linear probe of clouds", ("linear",)), ("Mean IoU of points", ("dense", "mean_iou"))):
        own = value(found["rows"]["trained"], path)
        if own is None:
            continue
        best, name = best_reference(found, path)
        gap = 100 * (own - best)
        level = chance(own, best, found["splits"]["test"]) if path == ("linear",) else 1.0
        gaps.append(0 if abs(gap) < level else gap)
        side = "level with" if abs(gap) < level else f"{abs(gap):.1f} points {'above' if gap > 0 else 'below'}"
        text.append(f"{title} {100 * own:.1f} %: {side} the best reference ({name}, {100 * best:.1f} %).")
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
