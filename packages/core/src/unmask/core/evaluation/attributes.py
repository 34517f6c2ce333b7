"""Probes of samples with several labels each, of which any may be unknown, on the layers of an encoder.

Where every sample has one class, `unmask.core.evaluation.samples` is all that is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmask.core.evaluation.features import FeatureSplit, Splits, keyed_subset
from unmask.core.evaluation.knn import knn_accuracy
from unmask.core.evaluation.linear import linear_probe
from unmask.core.evaluation.weighted import layer_of, weighted_probe

SPLITS = ("train", "val", "test")
_OWN_TEST, _OWN_VAL = 0.2, 0.125  # of the samples, and of those that are left, where a task makes its own splits
_FEWEST = 10  # samples of a class below which it gets no splits of its own


@dataclass(frozen=True)
class Task:
    """One label as a classification task: rows of all samples' features and their classes, split by split.

    Args:
        rows: for train, val and test, rows of the three splits' features put one after another.
        y: their classes, counted from 0 without gaps.
        classes: how many there are.
        left_out: classes that some split does not have; their samples are in none.
        own_splits: whether the task made its own splits of the training samples.
    """

    rows: dict[str, Int[Tensor, "n"]]
    y: dict[str, Int[Tensor, "n"]]
    classes: int
    left_out: list[str]
    own_splits: bool

    def splits(self, x: Float[Tensor, "n dim"], ids: Int[Tensor, "n"]) -> Splits:
        """The task on features of all samples."""
        return Splits(*(FeatureSplit(x[self.rows[s]], ids[self.rows[s]], self.y[s]) for s in SPLITS))

    def facts(self) -> dict[str, Any]:
        """Sizes for evaluation.json; ``chance`` is the share of the test split's most frequent class."""
        test = self.y["test"]
        return {
            "classes": self.classes,
            **{s: len(self.y[s]) for s in SPLITS},
            "chance": float(test.bincount().max()) / len(test),
            "left_out": self.left_out,
            "own_splits": self.own_splits,
        }


def make_task(
    y: Int[Tensor, "n"],
    split: Int[Tensor, "n"],
    ids: Int[Tensor, "n"],
    names: list[str],
    *,
    seed: int = 0,
    own: bool = False,
) -> Task | str:
    """A task from the labels of all samples (-1 = unknown) and the split each is in (0, 1, 2), or why there is none.

    Args:
        y: classes.
        split: of each sample.
        ids: sample ids.
        names: of the classes.
        seed: of splits of its own.
        own: where the splits share fewer than two classes (as of groups that they keep apart), split the training
            samples themselves: a fifth of each class for test, a tenth for validation.
    """
    present = set(y[y >= 0].tolist())
    if len(present) < 2:
        return "it has one class only" if present else "no sample has it"
    common = present.intersection(*(set(y[split == s].tolist()) for s in range(3)))
    made_own = len(common) < 2 and own
    training = (split == 0) & (y >= 0)
    if made_own:
        count = y[training].bincount(minlength=len(names))
        common = {c for c in present if count[c] >= _FEWEST}
    if len(common) < 2:
        return "fewer than two of its classes are in all of train, val and test"
    kept = torch.tensor(sorted(common))
    known = torch.isin(y, kept)
    if made_own:
        split = _own_splits(y, training & known, ids, seed)
    rows = {name: (known & (split == s)).nonzero()[:, 0] for s, name in enumerate(SPLITS)}
    classes = {name: torch.searchsorted(kept, y[r]) for name, r in rows.items()}
    left_out = [names[c] for c in sorted(present - common)]
    return Task(rows, classes, len(kept), left_out, made_own)


def _own_splits(y: Tensor, members: Bool[Tensor, "n"], ids: Tensor, seed: int) -> Int[Tensor, "n"]:
    split = torch.where(members, 0, -1)
    for code, share, name in ((2, _OWN_TEST, "own test split"), (1, _OWN_VAL, "own val split")):
        rows = (split == 0).nonzero()[:, 0]
        split[rows[keyed_subset(ids[rows], y[rows], share, seed, name)]] = code
    return split


# ---- probes --------------------------------------------------------------------------------------------------------


def probe(x: Float[Tensor, "n values"], layers: int, ids: Int[Tensor, "n"], task: Task) -> dict[str, Any]:
    """A weighted sum of layers, the last layer alone, and k-NN on the last layer; accuracies are on the test split.

    Features of one layer have no sum: their ``weighted`` is ``linear``.
    """
    last = layer_of(FeatureSplit(x, ids), -1, layers).x
    splits = task.splits(last, ids)
    linear = linear_probe(splits)
    found: dict[str, Any] = {
        "knn": knn_accuracy(splits.train.x, splits.train.labels, splits.test.x, splits.test.labels),
        "linear": linear.accuracy,
        "linear_val": linear.val_accuracy,
        "linear_strength": linear.strength,
        "weighted": linear.accuracy,
        "weighted_val": linear.val_accuracy,
    }
    if layers > 1:
        weighted = weighted_probe(task.splits(x, ids), layers)
        found |= {
            "weighted": weighted.accuracy,
            "weighted_val": weighted.val_accuracy,
            "weighted_strength": weighted.strength,
            "layer_weights": weighted.weights,
        }
    return found


def probe_within(
    x: Float[Tensor, "n values"], layers: int, ids: Int[Tensor, "n"], tasks: Mapping[str, Task]
) -> dict[str, Any]:
    """The weighted sum of layers fitted and tested within each group: accuracy of each, and their mean."""
    each = {name: weighted_probe(task.splits(x, ids), layers).accuracy for name, task in tasks.items()}
    return {"mean": sum(each.values()) / len(each), "each": each}
