"""What a point-cloud run's page shows: clouds with what was hidden and what is predicted, loss terms, probes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from unmask.core.report.gather import RunFacts
from unmask.core.report.parts import Probes, Rows, Section
from unmask.core.report.probes import Wording
from unmask.core.report.probes import probes as core_probes
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
    "Each term before it is weighted. Predicting 0 everywhere costs exactly ln 2 for which cells hold points and 1/3 "
    "for normals; for centroids 1/3 if points lie anywhere in their cell (its middle would cost 1/12), and for "
    "curvature between 1/9 (scattered) and 1/3 (lines). Which cells hold points costs the entropy of their share, "
    "0.20 at 5 %, if that share is predicted everywhere: a model has learned something below that."
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
    columns = ["term", "weight", "training, first", "training, last", "validation, last", "predicting 0"]
    return [Section("What the loss is made of", _TERMS_NOTE, columns, rows)]


# ---- probes --------------------------------------------------------------------------------------------------------


def probes(run: RunFacts) -> Probes | None:
    """The evaluation of whole clouds and of points in one table; None before there is one."""
    return core_probes(run, _WORDING)


def _remarks(found: Mapping[str, Any]) -> list[str]:
    """What `unmask evaluate` says below its table, apart from the note on missing labels."""
    lines = remarks({name: value for name, value in found.items() if name != "note"})
    return [line[0].upper() + line[1:] + ("" if line.endswith(".") else ".") for line in lines]


_WORDING = Wording(
    features="the maximum and the mean over a cloud's pillars, and of a point those of its pillar",
    more=(("points", ("dense", "accuracy")), ("mean IoU", ("dense", "mean_iou"))),
    judged=(("Linear probe of clouds", ("linear",)), ("Mean IoU of points", ("dense", "mean_iou"))),
    remarks=_remarks,
)
