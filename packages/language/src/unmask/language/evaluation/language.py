"""The task ``language``: perplexity on whole texts, beside an untrained model and the frequencies of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from unmask.core import registry
from unmask.core.evaluation.run import Job
from unmask.core.evaluation.tables import lookup, row_table
from unmask.core.losses.vocabulary import IGNORE
from unmask.core.mask import Mask
from unmask.core.method import Plan, to_device
from unmask.core.training.position import batches
from unmask.language.data.vocabulary import known

ROWS = {"trained": "trained model", "random": "untrained model", "unigram": "frequencies of tokens"}
NO_FINE_TUNING = "a language model is fine-tuned as it is trained: unmask train language/meap_sft --init RUN"
_QUICK = 64  # blocks of each split in a quick evaluation
_COUNTED = 4096  # training blocks whose tokens give the frequencies


def measure(job: Job) -> dict[str, Any]:
    """exp of the mean cross-entropy of every next token, with nothing hidden, on validation and test texts."""
    splits = {name: job.open(name) for name in ("val", "test")}
    if job.quick:
        splits = {name: part.view(slice(_QUICK)) for name, part in splits.items()}
    rows = {
        row: {"perplexity": {name: _perplexity(job, method, part) for name, part in splits.items()}}
        for row, method in job.methods.items()
    }
    if job.references:
        rows["unigram"] = {"perplexity": _unigram(job, splits)}
    protocol = {"perplexity": "exp(mean over predicted tokens of -log p), blocks as in training, nothing hidden"}
    sizes = {name: len(part) for name, part in splits.items()}
    return {"labelled": False, "splits": sizes, "rows": rows, "protocol": protocol}


def _plain(batch: Any, method: Any) -> Plan:
    """A plan that hides nothing."""
    width = getattr(method, "length", batch.tokens.shape[1])
    return Plan(Mask.from_hidden(torch.zeros_like(batch.tokens[:, :width], dtype=torch.bool)))


def _batches(job: Job, part: Any) -> Iterator[Any]:
    at_once = job.run.recipe.training.micro_batch or job.run.recipe.training.batch_size
    rows = [[(i, 0) for i in range(start, min(start + at_once, len(part)))] for start in range(0, len(part), at_once)]
    collate = registry.data_kind(job.run.recipe.method).collate
    for batch in batches(part, rows, collate, job.workers, pin=False):
        yield to_device(batch, job.device)


@torch.no_grad()
def _perplexity(job: Job, method: Any, part: Any) -> float:
    total, count = 0.0, 0.0
    for batch in _batches(job, part):
        (term,) = method(batch, _plain(batch, method)).terms.values()
        total, count = total + float(term.total), count + float(term.count)
    return math.exp(min(700.0, total / max(1.0, count)))


def _unigram(job: Job, splits: dict[str, Any]) -> dict[str, float]:
    """The perplexity of the tokens' frequencies in the training split, each counted once more than it occurs."""
    counts = torch.ones(known(job.run.recipe.data.vocabulary).size, dtype=torch.float64)
    for targets in _targets(job, job.open("train").view(slice(_COUNTED))):
        counts += torch.bincount(targets, minlength=len(counts))
    logs = (counts / counts.sum()).log()
    found = {}
    for name, part in splits.items():
        every = torch.cat(list(_targets(job, part)))
        found[name] = math.exp(-logs[every].mean().item())
    return found


def _targets(job: Job, part: Any) -> Iterator[Tensor]:
    method: Any = job.run.method
    for batch in _batches(job, part):
        targets = method.target(batch, _plain(batch, method)).flatten().cpu()
        yield targets[targets != IGNORE]


def table(result: dict[str, Any]) -> str:
    """What `evaluate` returned, as text for a terminal."""

    def cell(split: str) -> Any:
        return lambda row: f"{lookup(row, 'perplexity', split):,.1f}"

    return row_table(result, [("perplexity, validation", cell("val")), ("test", cell("test"))])
