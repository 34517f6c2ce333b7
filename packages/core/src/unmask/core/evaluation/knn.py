"""Weighted k-nearest neighbours: what features know without any training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class KNN:
    """The classifier of InstDisc (Wu et al., CVPR 2018, arXiv 1805.01978, section 3.4).

    Neighbours by cosine similarity s vote with weight exp(s / temperature). Temperature 0.07 is the paper's; k = 20 is
    what DINO (arXiv 2104.14294) found best across models, against the paper's 200. Nothing is chosen on validation.

    Args:
        k: neighbours; all of them where there are fewer training samples.
        temperature: of the votes.
    """

    k: int = 20
    temperature: float = 0.07


def knn_predict(
    train: Float[Tensor, "n dim"],
    labels: Int[Tensor, "n"],
    queries: Float[Tensor, "m dim"],
    protocol: KNN | None = None,
    chunk: int = 2048,
) -> Int[Tensor, "m"]:
    """The class of each query.

    Args:
        train: features that are searched.
        labels: their class indices.
        queries: features to classify.
        protocol: neighbours and temperature.
        chunk: queries compared at a time; bounds memory at chunk * n similarities.
    """
    protocol = protocol or KNN()
    bank, k = F.normalize(train, dim=1), min(protocol.k, len(train))
    votes = torch.zeros(len(queries), int(labels.max()) + 1, device=train.device)
    for start in range(0, len(queries), chunk):
        similarity = F.normalize(queries[start : start + chunk], dim=1) @ bank.T
        nearest, index = similarity.topk(k, dim=1)
        # Shifted by the nearest one: the same winner, and no overflow at small temperatures.
        weights = ((nearest - nearest[:, :1]) / protocol.temperature).exp()
        votes[start : start + chunk].scatter_add_(1, labels[index], weights)
    return votes.argmax(1)


def knn_accuracy(
    train: Float[Tensor, "n dim"],
    train_labels: Int[Tensor, "n"],
    test: Float[Tensor, "m dim"],
    test_labels: Int[Tensor, "m"],
    protocol: KNN | None = None,
) -> float:
    """The share of test samples whose class is right, in [0, 1]; see `knn_predict`."""
    return float((knn_predict(train, train_labels, test, protocol) == test_labels).float().mean())
