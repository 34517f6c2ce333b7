"""The task ``representation`` of images: probes of the encoder beside the same at random weights and raw pixels."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from unmask.core.evaluation.finetune import protocol_for
from unmask.core.evaluation.run import Job
from unmask.core.evaluation.samples import labelled, probe_samples, spread_of
from unmask.core.evaluation.tables import row_table, sample_columns
from unmask.vision.data.images import ImageBatch

ROWS = {"trained": "trained encoder", "random": "untrained encoder", "pixels": "raw pixels"}
PIXELS_SIDE = 32  # larger images are averaged down to this before their pixels are probed


def measure(job: Job) -> dict[str, Any]:
    """k-NN, a linear probe, the same with few labels, and fine-tuning; data without labels give RankMe only."""
    train = job.open_train()
    raw = {"pixels": pixels_of}
    if not labelled(train):
        note = (
            f"{job.data.source} has no labels, so there are no probes: only how many dimensions the features use. For "
            "probes, give labelled images with --data: one folder per class."
        )
        rows = spread_of(job, train, raw)
        return {"labelled": False, "note": note, "splits": {"train": len(train)}, "rows": rows, "protocol": {}}
    splits = {"train": train, "val": job.open("val"), "test": job.open("test")}
    sizes = {name: len(part) for name, part in splits.items()} | {"classes": len(train.classes)}
    protocol = protocol_for(len(train), job.at_once, job.epochs)
    return {"labelled": True, "splits": sizes} | probe_samples(job, splits, raw, protocol)


def pixels_of(batch: ImageBatch) -> Float[Tensor, "batch values"]:
    """`pixels` of a batch."""
    return pixels(batch.images)


def pixels(images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch values"]:
    """Normalised pixels as features, images larger than `PIXELS_SIDE` averaged down to it."""
    rows, columns = (min(side, PIXELS_SIDE) for side in images.shape[-2:])
    return F.adaptive_avg_pool2d(images, (rows, columns)).flatten(1)


def table(result: dict[str, Any]) -> str:
    """What `evaluate` returned, as text for a terminal."""
    return row_table(result, sample_columns(result), [result["note"]] if "note" in result else [])
