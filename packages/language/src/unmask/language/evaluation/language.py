"""The task ``language``: perplexity on whole texts, beside an untrained model and the frequencies of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from unmask.core.evaluation.run import Job
from unmask.core.evaluation.tables import lookup, row_table
from unmask.core.losses.vocabulary import IGNORE
from unmask.core.mask import Mask
from unmask.core.method import Plan
from unmask.language.data.vocabulary import known
from unmask.language.evaluation.passes import batches_of
from unmask.language.evaluation.scoring import masked_scores, perplexity

ROWS = {"trained": "trained model", "random": "untrained model", "unigram": "frequencies of tokens"}
NO_FINE_TUNING = (
    "no classifier is put on a language model. Export it with `unmask export RUN --out DIR`; transformers opens DIR, "
    "and a causal model is tuned on prompts and answers with `unmask train language/meap_sft --network model=DIR "
    "--data CHATS.jsonl --out TUNED`"
)
_QUICK = 64  # blocks of each split in a quick evaluation
_MASKED = 32  # blocks of each split where every token costs a pass of its block; 8 in a quick evaluation
_COUNTED = 4096  # training blocks whose tokens give the frequencies


def measure(job: Job) -> dict[str, Any]:
    """exp of the mean cross-entropy of every token, given those before it, on validation and test texts.

    A method whose ``predicts`` is ``masked`` is asked for every token given all others, one hidden at a time.
    """
    masked = _masked(job.run.method)
    measured = _masked_perplexity if masked else _perplexity
    most = (_MASKED // 4 if job.quick else _MASKED) if masked else (_QUICK if job.quick else None)
    splits = {name: job.open(name).view(slice(most)) for name in ("val", "test")}
    rows = {
        row: {"perplexity": {name: measured(job, method, part) for name, part in splits.items()}}
        for row, method in job.methods.items()
    }
    if job.references:
        rows["unigram"] = {"perplexity": _unigram(job, splits)}
    how = "each hidden by itself, special ones left out" if masked else "nothing hidden"
    protocol = {"perplexity": f"exp(mean over predicted tokens of -log p), blocks as in training, {how}"}
    sizes = {name: len(part) for name, part in splits.items()}
    return {"labelled": False, "splits": sizes, "rows": rows, "protocol": protocol}


def _masked(method: Any) -> bool:
    """Whether it is a masked language model that the method trains, as its attribute ``predicts`` says."""
    return getattr(method, "predicts", "next") == "masked"


def _plain(batch: Any, method: Any) -> Plan:
    """A plan that hides nothing."""
    width = getattr(method, "length", batch.tokens.shape[1])
    return Plan(Mask.from_hidden(torch.zeros_like(batch.tokens[:, :width], dtype=torch.bool)))


@torch.no_grad()
def _perplexity(job: Job, method: Any, part: Any) -> float:
    total, count = 0.0, 0.0
    for batch in batches_of(job, part):
        (term,) = method(batch, _plain(batch, method)).terms.values()
        total, count = total + float(term.total), count + float(term.count)
    return math.exp(min(700.0, total / max(1.0, count)))


def _masked_perplexity(job: Job, method: Any, part: Any) -> float:
    """The masked language model that the method trains, on the tokens that are not special."""
    vocabulary = known(job.run.recipe.data.vocabulary)
    sentences = [tokens.tolist() for batch in batches_of(job, part) for tokens in batch.tokens]
    return perplexity(masked_scores(method.model, sentences, mask=vocabulary.mask, special=vocabulary.special))


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
    special = torch.tensor(known(job.run.recipe.data.vocabulary).special)
    for batch in batches_of(job, part):
        if _masked(method):
            tokens = batch.tokens.flatten().cpu()
            yield tokens[~torch.isin(tokens, special)]
        else:
            targets = method.target(batch, _plain(batch, method)).flatten().cpu()
            yield targets[targets != IGNORE]


def table(result: dict[str, Any]) -> str:
    """What `evaluate` returned, as text for a terminal."""

    def cell(split: str) -> Any:
        return lambda row: f"{lookup(row, 'perplexity', split):,.1f}"

    return row_table(result, [("perplexity, validation", cell("val")), ("test", cell("test"))])
