"""The task ``representation`` of lines: probes of the encoder beside the same at random weights and letters' counts."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from unmask.core.evaluation import Splits
from unmask.core.evaluation.run import Job
from unmask.core.evaluation.samples import features, probe
from unmask.core.evaluation.tables import row_table, sample_columns
from unmask.letters.data.decode import VOCABULARY
from unmask.letters.data.lines import LineBatch

ROWS = {"trained": "trained encoder", "random": "untrained encoder", "letters": "counts of letters"}


def measure(job: Job) -> dict[str, Any]:
    """k-NN, a linear probe, and the same with few labels."""
    splits = {"train": job.open_train(), "val": job.open("val"), "test": job.open("test")}
    sizes = {name: len(part) for name, part in splits.items()} | {"classes": len(splits["train"].classes)}
    found = {split: features(job, part, split, {"letters": counts}) for split, part in splits.items()}
    rows = {name: probe(Splits(**{s: x[name] for s, x in found.items()}), job.seed) for name in ROWS}
    return {"labelled": True, "splits": sizes, "rows": rows, "protocol": {}}


def counts(batch: LineBatch) -> Float[Tensor, "batch letters"]:
    """How often each letter is in a line."""
    return F.one_hot(batch.letters, VOCABULARY)[..., 1:].sum(1).float()


def table(result: dict[str, Any]) -> str:
    """What `evaluate` returned, as text for a terminal."""
    return row_table(result, sample_columns(result))
