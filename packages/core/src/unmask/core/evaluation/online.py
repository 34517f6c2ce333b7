"""k-NN and a linear probe on a few features, often: how features become better while they are trained.

The numbers are for curves. They are fitted on at most `TRAIN` samples and scored on at most `VAL` of the validation
split, with a coarser search than `unmask evaluate` makes, so compare them with those of the same run, and let a test
split decide between runs.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from unmask.core.evaluation.features import FeatureSplit, Splits
from unmask.core.evaluation.knn import knn_accuracy
from unmask.core.evaluation.linear import LinearProbe, linear_probe
from unmask.core.randomness import Key

TRAIN, VAL = 5_000, 2_000
PROTOCOL = LinearProbe(strengths=(1e-2, 1.0, 100.0), max_iterations=100, tolerance=1e-3)


def online_probes(train: FeatureSplit, val: FeatureSplit, seed: int) -> dict[str, float]:
    """Accuracies on `val`, in [0, 1]: ``knn`` fitted on all of `train`, ``linear`` on four fifths.

    The fifth that is left, which the seed decides, chooses the probe's strength: chosen on `val`, its accuracy would
    look too good.

    Args:
        train: features with labels, of two samples at least.
        val: features with labels; those of classes that `train` has not count as wrong.
        seed: of the choice.
    """
    order = keyed_choice(train.ids, len(train), seed, "fifth").to(train.x.device)
    fifth = max(1, len(train) // 5)
    splits = Splits(train.take(order[fifth:]), train.take(order[:fifth]), val)
    return {
        "knn": knn_accuracy(train.x, train.labels, val.x, val.labels),
        "linear": linear_probe(splits, PROTOCOL).accuracy,
    }


def keyed_choice(ids: Int[Tensor, "n"], limit: int, seed: int, stream: str = "held out") -> Int[Tensor, "m"]:
    """Indices of at most `limit` samples in a random order that depends on (seed, ids) alone."""
    bits = Key.of(seed, ids.cpu()).stream(stream).bits(1)[:, 0]
    return torch.argsort(bits, stable=True)[:limit]
