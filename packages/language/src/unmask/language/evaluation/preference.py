"""The task ``preference``: how often the chosen response wins, and how far the policy has moved from its reference."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unmask.core.evaluation.run import Job
from unmask.core.evaluation.tables import Cell, lookup, percent, row_table
from unmask.core.losses.vocabulary import IGNORE
from unmask.language.data.preferences import PreferenceBatch
from unmask.language.encoders.language_model import last_hidden
from unmask.language.evaluation.passes import batches_of

ROWS = {"trained": "policy", "reference": "reference"}
NO_FINE_TUNING = (
    "no classifier is put on a policy. Export it with `unmask export RUN --out DIR`; transformers opens DIR, and it "
    "is tuned on more preferences with `unmask train language/sparsepo --network model=DIR --data PREFERENCES.jsonl "
    "--out TUNED`"
)
_QUICK = 64  # pairs of each split in a quick evaluation


def measure(job: Job) -> dict[str, Any]:
    """On validation and test pairs: three measures of the policy, and the first of them of its reference.

    ``likelier``: share of pairs whose chosen response has the higher log-likelihood. ``preferred``: share whose margin
    is positive, masks and divergences included, as in the method's loss. ``kl``: the sum over a response's tokens of
    KL(reference || policy), mean over both responses.
    """
    splits = {name: job.open(name) for name in ("val", "test")}
    if job.quick:
        splits = {name: part.view(slice(_QUICK)) for name, part in splits.items()}
    found = {name: _of_split(job, part) for name, part in splits.items()}
    names = ROWS if job.references else ["trained"]
    rows = {row: {name: values[row] for name, values in found.items()} for row in names}
    sizes = {name: len(part) for name, part in splits.items()}
    return {"labelled": False, "splits": sizes, "rows": rows, "protocol": {"kl": "KL(reference || policy), nats"}}


@torch.no_grad()
def _of_split(job: Job, part: Any) -> dict[str, dict[str, float]]:
    method: Any = job.run.method
    sums: defaultdict[str, float] = defaultdict(float)
    for batch in batches_of(job, part):
        metrics = method(batch, None).metrics
        sums["preferred"] += float(metrics["accuracy"].total)
        if method.settings.loss != "dpo":  # which does not compute it
            sums["kl"] += float(metrics["kl_chosen"].total + metrics["kl_rejected"].total) / 2
        for row, model, head in (
            ("trained", method.model, method.head),
            ("reference", method.reference.module, method.reference_head),
        ):
            likelihood = _log_likelihood(model, head, batch)
            sums[row] += int((likelihood[:, 0] > likelihood[:, 1]).sum())
    pairs = len(part)
    trained = {"likelier": sums["trained"] / pairs, "preferred": sums["preferred"] / pairs}
    trained |= {"kl": sums["kl"] / pairs} if "kl" in sums else {}
    return {"trained": trained, "reference": {"likelier": sums["reference"] / pairs}}


def _log_likelihood(model: Any, head: Any, batch: PreferenceBatch) -> Float[Tensor, "pairs 2"]:
    """The log-likelihood of both responses of every pair."""
    rows, response = batch.tokens.flatten(0, 1), batch.response.flatten(0, 1)[:, 1:]
    targets = rows[:, 1:].masked_fill(~response, IGNORE)
    hidden = last_hidden(model, rows[:, :-1])  # [2 pairs, length - 1, dim]
    losses = [head.loss(model, states, wanted) for states, wanted in zip(hidden, targets, strict=True)]
    return -torch.stack(losses).view(-1, 2)


def _number(*path: str) -> Cell:
    def text(row: Any) -> str:
        value = lookup(row, *path)
        return "-" if value is None else f"{value:.2f}"

    return text


def table(result: dict[str, Any]) -> str:
    """What `evaluate` returned, as text for a terminal."""
    columns = [("chosen likelier, %", percent("test", "likelier")), ("preferred, %", percent("test", "preferred"))]
    return row_table(result, [*columns, ("KL, nats", _number("test", "kl"))], ["All on test pairs."])
