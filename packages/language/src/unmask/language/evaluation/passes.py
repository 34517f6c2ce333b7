"""A pass over a split, batch by batch, in its own order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from unmask.core import registry
from unmask.core.evaluation.run import Job
from unmask.core.method import to_device
from unmask.core.training.position import batches


def batches_of(job: Job, part: Any) -> Iterator[Any]:
    """Every sample of a split once, at visit 0, on the job's device."""
    recipe = job.run.recipe
    size = recipe.training.micro_batch or recipe.training.batch_size
    rows = [[(i, 0) for i in range(start, min(start + size, len(part)))] for start in range(0, len(part), size)]
    for batch in batches(part, rows, registry.data_kind(recipe.method).collate, job.workers, pin=False):
        yield to_device(batch, job.device)
