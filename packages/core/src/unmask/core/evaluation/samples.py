"""Probes of whole samples: the task ``representation`` where every sample has one vector and may have one class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unmask.core import registry
from unmask.core.evaluation.encoding import Encode
from unmask.core.evaluation.features import FeatureSplit, Splits, extract
from unmask.core.evaluation.finetune import FineTuned, FineTuning, tune, tuned_recipe
from unmask.core.evaluation.knn import KNN, knn_accuracy
from unmask.core.evaluation.linear import FewLabels, LinearProbe, few_label_curve
from unmask.core.evaluation.rankme import deviation, rankme
from unmask.core.evaluation.run import Job
from unmask.core.progress import progress_bar
from unmask.core.training.launch import make_fabric


def labelled(split: Any) -> bool:
    """Whether every sample of a split has a class."""
    return split.labels is not None and split.classes is not None


def spread_of(job: Job, train: Any, raw: Mapping[str, Encode]) -> dict[str, dict[str, Any]]:
    """Rows for data without labels: how many dimensions the features use."""
    return {name: spread(found.x) for name, found in features(job, train, "train", raw).items()}


def probe_samples(
    job: Job, splits: Mapping[str, Any], raw: Mapping[str, Encode], protocol: FineTuning
) -> dict[str, Any]:
    """Probe the trained encoder, the same at random weights and raw features in the same way.

    Probes are fitted on the train split, chosen on validation, and the test split is scored once.

    Args:
        job: what is measured; `Job.quick` leaves fine-tuning out.
        splits: ``train``, ``val`` and ``test`` with labels, without augmentation.
        raw: what the encoders are held against: functions of a batch to one vector per sample, by row.
        protocol: of fine-tuning.

    Returns:
        ``rows`` (``trained``, ``random`` and those of `raw`; accuracies in [0, 1]) and ``protocol``.
    """
    found = {split: features(job, part, split, raw) for split, part in splits.items()}
    rows = {name: probe(Splits(**{split: x[name] for split, x in found.items()}), job.seed) for name in found["train"]}
    about = {"knn": asdict(KNN()), "linear": asdict(LinearProbe()), "few_label": asdict(FewLabels())}
    if not job.quick:
        about["finetune"] = asdict(protocol) | {"layer_decay_of_random": 1.0}
        for name, method in job.methods.items():
            # From scratch there is nothing that slow lower layers would protect; they would only handicap it.
            tuned = _tune(job, method, splits, protocol if name == "trained" else replace(protocol, layer_decay=1.0))
            rows[name] |= {"finetune": tuned.accuracy, "finetune_val": tuned.val_accuracy}
    return {"rows": rows, "protocol": about}


def _tune(job: Job, method: Any, splits: Mapping[str, Any], protocol: FineTuning) -> FineTuned:
    """Fine-tune a method; nothing of it stays."""
    train, run = splits["train"], replace(job.run, method=method)
    recipe = replace(tuned_recipe(run, job.data, protocol, train.classes, len(train)), seed=job.seed)
    fabric = make_fabric(recipe, ".", accelerator=job.device.type, check=False)
    return tune(run, splits, recipe, fabric=fabric)


def features(job: Job, part: Any, split: str, raw: Mapping[str, Encode]) -> dict[str, FeatureSplit]:
    """The vectors of a split's samples by row, in one pass: samples may take longer to read than to encode."""
    encoders = job.encoders | (dict(raw) if job.references else {})
    widths: list[int] = []

    def encode(batch: Any) -> Float[Tensor, "batch all"]:
        found = [encode_one(batch) for encode_one in encoders.values()]
        widths[:] = [x.shape[1] for x in found]
        return torch.cat(found, dim=1)

    collate = registry.data_kind(job.run.recipe.method).collate
    with progress_bar(f"encoding, {split}", len(part)) as advance:
        options: dict[str, Any] = {"batch_size": job.at_once, "workers": job.workers, "advance": advance}
        found = extract(encode, part, collate, device=job.device, **options)
    parts = found.x.split(widths, dim=1)
    return {name: replace(found, x=x.contiguous()) for name, x in zip(encoders, parts, strict=True)}


def probe(splits: Splits, seed: int) -> dict[str, Any]:
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
    } | spread(train.x)


def spread(x: Float[Tensor, "n dim"]) -> dict[str, Any]:
    """How many dimensions features use."""
    return {"rankme": rankme(x), "deviation": deviation(x), "dim": x.shape[1]}
