"""The linear probe: multinomial logistic regression on frozen features, and the same with few labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from unmask.core.evaluation.features import FeatureSplit, Splits, keyed_subset


@dataclass(frozen=True)
class LinearProbe:
    """Logistic regression as in CLIP's evaluation (arXiv 2103.00020, appendix A.3): L-BFGS, one strength chosen.

    Features are standardised by the training split's mean and deviation; what is constant there is left out. The
    objective is scikit-learn's, which is convex, so there is no learning rate, seed or schedule to tune: C * (sum of
    cross-entropies) + |W|^2 / 2, without the bias. C is the one with the best validation accuracy (the smallest of
    equals), from the same grid for every encoder and reference. The weights are not fitted again with the validation
    split.

    Args:
        strengths: the grid of C, rising; each fit starts from the one before.
        max_iterations: L-BFGS iterations per C (the limit of CLIP's evaluation is 1,000 from a cold start).
        tolerance: stop when no entry of the gradient of the mean cross-entropy is larger.
    """

    strengths: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0)
    max_iterations: int = 200
    tolerance: float = 1e-4


@dataclass(frozen=True)
class FewLabels:
    """The linear probe on a stratified share of the training labels.

    Subsets are keyed by (seed, sample id) and nested. C is still chosen on the whole validation split, so the curve
    compares features; it does not say what a person with only that many labels in all would reach.

    Args:
        shares: in (0, 1], of the labels of each class; at least one of each.
    """

    shares: tuple[float, ...] = (0.01, 0.05, 0.1, 1.0)


@dataclass(frozen=True)
class Probed:
    """What a probe reached.

    Args:
        accuracy: on the test split, in [0, 1].
        val_accuracy: on the validation split.
        strength: the C that was chosen.
        labels: how many it was fitted on.
    """

    accuracy: float
    val_accuracy: float
    strength: float
    labels: int


def linear_probe(splits: Splits, protocol: LinearProbe | None = None) -> Probed:
    """Fit on train at every strength, choose on validation, score test once."""
    protocol = protocol or LinearProbe()
    train, val, test = standardize(splits)
    classes = int(max(s.labels.max() for s in (splits.train, splits.val, splits.test))) + 1
    weight = torch.zeros(classes, train.shape[1] + 1, device=train.device)
    best: tuple[float, float, Tensor] | None = None
    for strength in protocol.strengths:
        weight = fit_logistic(train, splits.train.labels, weight, strength, protocol)
        accuracy = _accuracy(weight, val, splits.val.labels)
        if best is None or accuracy > best[0]:
            best = (accuracy, strength, weight)
    assert best is not None
    return Probed(_accuracy(best[2], test, splits.test.labels), best[0], best[1], len(train))


def standardize(splits: Splits) -> tuple[Tensor, Tensor, Tensor]:
    """Train, validation and test features by the training split's mean and deviation.

    A dimension that is constant in training becomes 0 everywhere: divided by next to nothing it would drown the others
    wherever validation or test differ in it, as the corner pixels of digits do.
    """
    x = splits.train.x
    mean, std, varies = x.mean(0), x.std(0, correction=0), x.amax(0) != x.amin(0)
    train, val, test = (
        torch.where(varies, (s.x - mean) / std.clamp(min=1e-6), 0.0) for s in (splits.train, splits.val, splits.test)
    )
    return train, val, test


def fit_logistic(
    x: Float[Tensor, "n dim"],
    y: Int[Tensor, "n"],
    start: Float[Tensor, "classes dim_plus_1"],
    strength: float,
    protocol: LinearProbe,
) -> Float[Tensor, "classes dim_plus_1"]:
    """Weights and, in the last column, biases that minimise the objective of `LinearProbe`, from `start`."""
    weight = start.clone().requires_grad_(True)
    minimise([weight], lambda: penalised(_logits(weight, x), y, weight, strength), protocol)
    return weight.detach()


def penalised(logits: Tensor, y: Int[Tensor, "n"], weight: Tensor, strength: float) -> Float[Tensor, ""]:
    """The objective of `LinearProbe`, divided by C * n: the tolerance then means the same for every strength and n."""
    return F.cross_entropy(logits, y) + 0.5 / (strength * len(y)) * weight[:, :-1].square().sum()


def minimise(parameters: list[Tensor], objective: Callable[[], Tensor], protocol: LinearProbe) -> None:
    """Minimise an objective of the parameters in place, by L-BFGS on all the data."""
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=protocol.max_iterations,
        tolerance_grad=protocol.tolerance,
        tolerance_change=0.0,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = objective()
        loss.backward()
        return loss

    optimizer.step(closure)


def _logits(weight: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, weight[:, :-1], weight[:, -1])


def _accuracy(weight: Tensor, x: Tensor, y: Tensor) -> float:
    return float((_logits(weight, x).argmax(1) == y).float().mean())


def few_label_curve(
    splits: Splits, seed: int, few: FewLabels | None = None, protocol: LinearProbe | None = None
) -> dict[float, Probed]:
    """The linear probe at each share of the training labels."""
    curve = {}
    for share in (few or FewLabels()).shares:
        train = _share(splits.train, share, seed)
        curve[share] = linear_probe(Splits(train, splits.val, splits.test), protocol)
    return curve


def _share(train: FeatureSplit, share: float, seed: int) -> FeatureSplit:
    if share == 1:
        return train
    return train.take(keyed_subset(train.ids, train.labels, share, seed).to(train.x.device))
