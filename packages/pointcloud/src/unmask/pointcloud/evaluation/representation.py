"""Judge and use a trained encoder of point clouds: `evaluate`, `finetune`, `embed`.

`evaluate` measures three things in the same way: the trained encoder, the same encoder at random weights, and what the
raw coordinates say. Clouds with a class are probed as wholes, points with a class one by one; data may have both. The
measures of whole clouds and their fixed protocols are core's (`unmask.core.evaluation`), that of points is
`unmask.pointcloud.evaluation.dense`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unmask.core.evaluation.features import FeatureSplit, Splits, extract, pick_device
from unmask.core.evaluation.finetune import FineTuning
from unmask.core.evaluation.knn import KNN, knn_accuracy
from unmask.core.evaluation.linear import FewLabels, LinearProbe, few_label_curve
from unmask.core.evaluation.rankme import deviation, rankme
from unmask.core.progress import progress_bar
from unmask.core.training.checkpoint import LoadedRun, load_run
from unmask.core.training.files import write_json
from unmask.core.training.rundir import metrics_until
from unmask.pointcloud.data.batches import PointBatch
from unmask.pointcloud.data.clouds import PointClouds, collate, open_split
from unmask.pointcloud.evaluation.dense import DenseProbe, NoPointLabels, Reading, dense_probe
from unmask.pointcloud.evaluation.embedding import embed as embed
from unmask.pointcloud.evaluation.encoding import clouds_at_once, data_settings, name_left_out, random_method, settle_on
from unmask.pointcloud.evaluation.features import coordinates, of_clouds, of_points, raw_points
from unmask.pointcloud.evaluation.finetuning import finetune as finetune
from unmask.pointcloud.evaluation.finetuning import load_classifier as load_classifier
from unmask.pointcloud.evaluation.finetuning import protocol_for, tune
from unmask.pointcloud.evaluation.tables import ROWS
from unmask.pointcloud.evaluation.tables import table as table

Encode = Callable[[PointBatch], Tensor]
Rows = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class _Judged:
    """What is measured, and on what.

    Args:
        run: the trained method.
        random: the same at random weights.
        splits: ``train``, and ``val`` and ``test`` where there are labels.
        device: where to compute.
        seed: of everything that is chosen.
    """

    run: LoadedRun
    random: nn.Module
    splits: dict[str, PointClouds]
    device: torch.device
    seed: int

    @property
    def train(self) -> PointClouds:
        return self.splits["train"]

    @property
    def methods(self) -> dict[str, Any]:
        """The two encoders, by row."""
        return {"trained": self.run.method, "random": self.random}

    @property
    def grid(self) -> Any:
        method: Any = self.run.method
        return method.grid


def evaluate(
    run_dir: str | Path,
    *,
    data: str | None = None,
    device: str = "auto",
    quick: bool = False,
    seed: int = 0,
    epochs: int | None = None,
) -> dict[str, Any]:
    """Measure a run's encoder beside the same encoder at random weights and the raw coordinates.

    Where clouds have a class: k-NN, a linear probe, the same with few labels, and fine-tuning, on the maximum and the
    mean over a cloud's pillars (`cloud_vectors`), against statistics of the points (`coordinates`). Where points have a
    class: a linear probe on the vector of the pillar that a point lies in, against what can be read off the points
    around it (`point_coordinates`), on at most 1,000 training and 500 validation points per class and all test points
    (`DenseProbe`). Probes are fitted on the data's train split, chosen on validation, and the test split is scored
    once. Data without labels give RankMe and the validation loss only, and the result says so. Writes
    RUN/evaluation.json.

    The random encoder's weights are not those that training began from. Its BatchNorm has no statistics of its own, and
    that of a short run has some of its start's: up to 256 training clouds are passed through both in train mode,
    without augmentation, and what they normalise by there, averaged over batches, becomes their running statistics
    (`settle`). On disk the run stays as it is. Both get the same probes with the same tuning.

    Args:
        run_dir: a run directory; one that is still training is measured as far as it is.
        data: a labelled folder or embedded set; the run's own data when not given. Range, pillars, features and
            normalisation stay the run's.
        device: ``auto``, ``cpu`` or ``cuda``.
        quick: leave fine-tuning out, which takes longer than all the rest.
        seed: of the few-label subsets, the choice of points, fine-tuning, and the reference's random weights.
        epochs: passes of fine-tuning; None for the protocol's.

    Returns:
        What was written: ``rows`` (``trained``, ``random``, ``coordinates``; accuracies in [0, 1], those of points
        under ``dense``), ``labelled``, ``point_labelled``, ``protocol``, ``splits``, ``skipped`` with reasons, and so
        on. `table` makes text of it.

    Raises:
        UnmaskError: no run, no data, or no such device.
    """
    began, place = time.perf_counter(), pick_device(device)
    run = load_run(run_dir, place)
    settings = data_settings(run, data)
    splits = {"train": open_split(settings, "train")}
    labelled = splits["train"].labels is not None and splits["train"].classes is not None
    if labelled or splits["train"].point_classes is not None:
        splits |= {"val": open_split(settings, "val"), "test": open_split(settings, "test")}
    settle_on(run.method, run, splits["train"], place, seed)
    judged = _Judged(run, random_method(run, splits["train"], place, seed), splits, place, seed)
    result: dict[str, Any] = {
        "run": str(run_dir),
        "method": run.recipe.method,
        "step": run.step,
        "data": settings.source,
        "seed": seed,
        "quick": quick,
        "names": ROWS,
        "val_loss": _val_loss(Path(run_dir)),
        "labelled": labelled,
        "point_labelled": False,
        "splits": {name: len(part) for name, part in splits.items()},
        "skipped": {},
        "rows": {},
        "protocol": {},
    }
    if labelled:
        _add_clouds(result, judged, None if quick else protocol_for(len(judged.train), clouds_at_once(run), epochs))
    else:
        result["rows"] = {name: _spread(found) for name, found in _features(judged, "train").items()}
    if judged.train.point_classes is not None:
        try:
            _add_points(result, judged)
        except NoPointLabels as error:
            result["skipped"] = {"points": str(error)}
    if not labelled:
        result["note"] = _note(settings.source, result["point_labelled"])
    name_left_out(list(dict.fromkeys(p for part in splits.values() for p in part.problems)))
    result["seconds"] = round(time.perf_counter() - began, 1)
    write_json(Path(run_dir) / "evaluation.json", result)
    return json.loads(json.dumps(result))


def _val_loss(run_dir: Path) -> float | None:
    """The last validation loss that training wrote."""
    lines = [json.loads(line) for line in metrics_until(run_dir / "metrics.jsonl", sys.maxsize)]
    return next((line["val_loss"] for line in reversed(lines) if "val_loss" in line), None)


def _note(source: str, by_point: bool) -> str:
    if by_point:
        return f"{source} has classes of points, not of whole clouds, so there are no probes of whole clouds."
    return (
        f"{source} has no labels, so there are no probes: only how many dimensions the features use. For probes, give "
        "labelled clouds with --data: one folder per class, or files with a class for every point."
    )


# ---- whole clouds --------------------------------------------------------------------------------------------------


def _features(judged: _Judged, split: str) -> dict[str, FeatureSplit]:
    """The vectors of a split's clouds by row of the result, in one pass: clouds take longer to read than to encode."""
    encoders: dict[str, Encode] = {name: of_clouds(method) for name, method in judged.methods.items()}
    encoders["coordinates"] = partial(coordinates, grid=judged.grid)
    widths: list[int] = []

    def encode(batch: PointBatch) -> Tensor:
        parts = [encode_one(batch) for encode_one in encoders.values()]
        widths[:] = [part.shape[1] for part in parts]
        return torch.cat(parts, dim=1)

    clouds, run = judged.splits[split], judged.run
    at_once, workers = clouds_at_once(run), run.recipe.training.workers
    with progress_bar(f"encoding, {split}", len(clouds)) as advance:
        found = extract(
            encode, clouds, collate, batch_size=at_once, device=judged.device, workers=workers, advance=advance
        )
    parts = found.x.split(widths, dim=1)
    return {name: replace(found, x=x.contiguous()) for name, x in zip(encoders, parts, strict=True)}


def _add_clouds(result: dict[str, Any], judged: _Judged, tuning: FineTuning | None) -> None:
    """Probes of whole clouds and, with a protocol for it, fine-tuning."""
    classes = judged.train.classes
    assert classes is not None
    result["splits"]["classes"] = len(classes)
    rows: Rows = result["rows"]
    features = {split: _features(judged, split) for split in judged.splits}
    for name in ROWS:
        rows[name] = _probe(Splits(**{split: found[name] for split, found in features.items()}), judged.seed)
    result["protocol"] |= {"knn": asdict(KNN()), "linear": asdict(LinearProbe()), "few_label": asdict(FewLabels())}
    if tuning is None:
        return
    # From scratch there is nothing that slow lower layers would protect; they would only handicap the reference.
    tunings = {"trained": tuning, "random": replace(tuning, layer_decay=1.0)}
    result["protocol"]["finetune"] = asdict(tuning) | {"layer_decay_of_random": 1.0}
    for name, method in judged.methods.items():
        tuned = tune(method, judged.splits, judged.run, tunings[name], judged.seed, judged.device)
        rows[name] |= {"finetune": tuned.accuracy, "finetune_val": tuned.val_accuracy}


def _probe(splits: Splits, seed: int) -> dict[str, Any]:
    """Every measure on frozen features; accuracies are on the test split."""
    curve = few_label_curve(splits, seed)
    full = curve[1.0]
    train, test = splits.train, splits.test
    return {
        "knn": knn_accuracy(train.x, train.labels, test.x, test.labels),
        "linear": full.accuracy,
        "linear_val": full.val_accuracy,
        "linear_strength": full.strength,
        "few_label": {f"{100 * share:g}": probed.accuracy for share, probed in curve.items()},
    } | _spread(train)


def _spread(features: FeatureSplit) -> dict[str, Any]:
    return {"rankme": rankme(features.x), "deviation": deviation(features.x), "dim": features.x.shape[1]}


# ---- points --------------------------------------------------------------------------------------------------------


def _add_points(result: dict[str, Any], judged: _Judged) -> None:
    """The dense probe."""
    classes, run, protocol = judged.train.point_classes, judged.run, DenseProbe()
    assert classes is not None
    readouts = {name: of_points(method) for name, method in judged.methods.items()}
    readouts["coordinates"] = raw_points(judged.grid)
    workers = run.recipe.training.workers
    reading = Reading(judged.grid, judged.device, clouds_at_once(run), workers, judged.seed)
    rows, about = dense_probe(readouts, judged.splits, classes, reading, protocol)
    for name, row in rows.items():
        result["rows"][name]["dense"] = row
    result["point_labelled"] = True
    result["dense"] = about | {"pillar": list(judged.grid.pillar[:2])}
    result["protocol"]["dense"] = asdict(protocol)
