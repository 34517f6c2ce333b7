"""A linear classifier of single positions (pixels, frames, points) on frozen features, and its scores.

A domain reads its samples and says which positions count; what is fitted and counted then is the same for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from unmask.core.evaluation.linear import LinearProbe, fit_logistic


@dataclass(frozen=True)
class Positions:
    """A sample of labelled positions, to fit on or to choose on.

    Args:
        y: their classes.
        rank: a random number of each: those with the smallest are kept, whatever the batches and their order.
        x: their features, by encoder or reference.
    """

    y: Int[Tensor, "n"]
    rank: Int[Tensor, "n"]
    x: dict[str, Tensor]

    def smallest(self, most: int) -> Positions:
        """The positions with the smallest ranks of every class, at most so many of each."""
        kept = smallest_of_each(self.y, self.rank, most)
        return Positions(self.y[kept], self.rank[kept], {name: x[kept] for name, x in self.x.items()})

    def __add__(self, more: Positions) -> Positions:
        x = {name: torch.cat([own, more.x[name]]) for name, own in self.x.items()}
        return Positions(torch.cat([self.y, more.y]), torch.cat([self.rank, more.rank]), x)


def smallest_of_each(y: Int[Tensor, "n"], rank: Int[Tensor, "n"], most: int) -> Int[Tensor, "m"]:
    """Rows with the `most` smallest `rank` of each class in `y`, by class and rank."""
    order = rank.argsort(stable=True)
    order = order[y[order].argsort(stable=True)]
    _, count = y.unique(return_counts=True)
    first = (count.cumsum(0) - count).repeat_interleave(count)
    return order[torch.arange(len(y), device=y.device) - first < most]


@dataclass(frozen=True)
class LinearClassifier:
    """A fitted probe: logits are ``(x - mean) * scale`` times `weight`, whose last column is the bias.

    Args:
        mean: of the training positions.
        scale: one over their deviation; 0 where they do not vary.
        weight: of each class, its bias in the last column.
        classes: what each row of `weight` stands for: the classes that the training positions have.
        strength: the C that was chosen.
        val_accuracy: what it was chosen by, in [0, 1].
    """

    mean: Float[Tensor, "dim"]
    scale: Float[Tensor, "dim"]
    weight: Float[Tensor, "classes dim_plus_1"]
    classes: Int[Tensor, "classes"]
    strength: float
    val_accuracy: float

    def __call__(self, x: Float[Tensor, "n dim"]) -> Int[Tensor, "n"]:
        """The class of each row."""
        return self.classes[_predict(self.weight, (x - self.mean) * self.scale)]


def fit_classifier(
    x: Float[Tensor, "n dim"],
    y: Int[Tensor, "n"],
    val_x: Float[Tensor, "m dim"],
    val_y: Int[Tensor, "m"],
    protocol: LinearProbe,
) -> LinearClassifier:
    """Fit at every strength, choose on validation; the smallest of equal strengths."""
    mean, varies = x.mean(0), x.amax(0) != x.amin(0)
    scale = torch.where(varies, 1 / x.std(0, correction=0).clamp(min=1e-6), 0.0)
    train, val = (x - mean) * scale, (val_x - mean) * scale
    classes, y = y.unique(return_inverse=True)
    weight = torch.zeros(len(classes), x.shape[1] + 1, device=x.device)
    best: LinearClassifier | None = None
    for strength in protocol.strengths:
        weight = fit_logistic(train, y, weight, strength, protocol)
        accuracy = float((classes[_predict(weight, val)] == val_y).float().mean())
        if best is None or accuracy > best.val_accuracy:
            best = LinearClassifier(mean, scale, weight, classes, strength, accuracy)
    assert best is not None
    return best


def _predict(weight: Tensor, x: Tensor) -> Int[Tensor, "n"]:
    return F.linear(x, weight[:, :-1], weight[:, -1]).argmax(1)


def confusion_matrix(
    true: Int[Tensor, "n"], predicted: Int[Tensor, "n"], classes: int
) -> Int[Tensor, "classes classes"]:
    """How many positions of each class (rows) got each prediction (columns), on the CPU."""
    return (true * classes + predicted).bincount(minlength=classes**2).view(classes, classes).cpu()


def scores(confusion: Int[Tensor, "classes classes"], classes: Sequence[str]) -> dict[str, Any]:
    """``accuracy``, and ``iou`` (intersection over union) of every class that occurs, and ``mean_iou``; in [0, 1]."""
    right, true, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    iou = right / (true + predicted - right).clamp(min=1)
    occurs = (true > 0).tolist()
    by_class = {name: float(value) for name, value, here in zip(classes, iou, occurs, strict=True) if here}
    mean_iou = sum(by_class.values()) / len(by_class)
    return {"accuracy": float(right.sum() / true.sum()), "mean_iou": mean_iou, "iou": by_class}
