"""The task ``generation`` of vectors: how far what a method answers lies from what it should have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from toyland import data
from unmask.core.evaluation.run import Job
from unmask.core.evaluation.tables import row_table

ROWS = {"trained": "what it answers", "random": "without training", "mean": "the mean"}


def measure(job: Job) -> dict[str, Any]:
    val = job.open("val")
    batch = data.collate([val[i, 0] for i in range(len(val))])
    with torch.no_grad():
        rows = {name: _error(method.head(method.encoder(batch.x)), batch.x) for name, method in job.methods.items()}
    if job.references:
        rows["mean"] = _error(batch.x.mean().expand_as(batch.x), batch.x)
    return {"labelled": False, "splits": {"val": len(val)}, "rows": rows}


def _error(answer: Tensor, x: Tensor) -> dict[str, float]:
    return {"error": float((answer - x).square().mean())}


def table(result: dict[str, Any]) -> str:
    return row_table(result, [("error", lambda row: f"{row['error']:.3f}")])
