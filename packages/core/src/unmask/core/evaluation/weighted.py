"""A linear probe on a weighted sum of layers: which layers of a frozen encoder a task wants, and how much they know."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from unmask.core.evaluation.features import FeatureSplit, Splits
from unmask.core.evaluation.linear import LinearProbe, minimise, penalised, standardize

_MIX_SCALE = 0.1  # the layers' logits move this much less per step than the classifier's weights


@dataclass(frozen=True)
class WeightedProbe:
    """SUPERB's frozen protocol (arXiv 2105.01051, section 3.2) with a linear probe as its head.

    One weight per layer, a softmax over them that starts uniform, the weighted sum of the layers' features, and a
    linear classifier on it, fitted together; nothing reaches the encoder. Features are pooled over time before the sum,
    which for means is the same and needs one vector per layer and sample.

    Differences from SUPERB: its heads are trained by Adam for up to 200,000 steps with a learning rate tuned per model,
    and project to 256 dimensions first; here `LinearProbe`'s objective, grid of strengths and L-BFGS are used, so that
    the two probes differ in the layers alone. Every layer is standardised per dimension by the training split, since
    the largest layer would otherwise fill the sum. The weights of the layers are not penalised, and start uniform at
    every strength: a weight that a strong penalty drove to zero would not come back. The objective is not convex in
    both together, so this is a local optimum, the same one every time.

    Args:
        linear: grid and limits of the fit.
    """

    linear: LinearProbe = field(default_factory=LinearProbe)


@dataclass(frozen=True)
class WeightedProbed:
    """What the probe reached.

    Args:
        accuracy: on the test split, in [0, 1].
        val_accuracy: on the validation split.
        strength: the C that was chosen.
        weights: of the layers, from the input on; they sum to 1.
        labels: how many it was fitted on.
    """

    accuracy: float
    val_accuracy: float
    strength: float
    weights: list[float]
    labels: int


def layer_of(split: FeatureSplit, layer: int, layers: int) -> FeatureSplit:
    """One layer of features that hold all layers side by side: row i of ``x`` is layer 0, layer 1, ... of sample i."""
    width = split.x.shape[1] // layers
    start = layer % layers * width
    return FeatureSplit(split.x[:, start : start + width], split.ids, split.y)


def weighted_probe(splits: Splits, layers: int, protocol: WeightedProbe | None = None) -> WeightedProbed:
    """Fit on train at every strength, choose on validation, score test once. With one layer this is `linear_probe`.

    Args:
        splits: features of `layers` layers of equal width side by side; see `layer_of`.
        layers: how many there are.
        protocol: the hyper-parameters.

    Raises:
        ValueError: the features do not divide into so many layers.
    """
    protocol = protocol or WeightedProbe()
    width, rest = divmod(splits.train.x.shape[1], layers)
    if rest:
        raise ValueError(f"features of {splits.train.x.shape[1]} values do not divide into {layers} layers")
    train, val, test = (x.unflatten(1, (layers, -1)).movedim(1, 0).contiguous() for x in standardize(splits))
    classes = int(max(s.labels.max() for s in (splits.train, splits.val, splits.test))) + 1
    weight = torch.zeros(classes, width + 1, device=train.device)
    best: tuple[float, float, Tensor, Tensor] | None = None
    for strength in protocol.linear.strengths:
        weight, mix = _fit(train, splits.train.labels, weight, strength, protocol.linear)
        accuracy = _accuracy(weight, mix, val, splits.val.labels)
        if best is None or accuracy > best[0]:
            best = (accuracy, strength, weight, mix)
    assert best is not None
    val_accuracy, strength, weight, mix = best
    accuracy = _accuracy(weight, mix, test, splits.test.labels)
    return WeightedProbed(accuracy, val_accuracy, strength, _shares(mix).tolist(), train.shape[1])


def _fit(
    x: Float[Tensor, "layers n dim"],
    y: Int[Tensor, "n"],
    start: Float[Tensor, "classes dim_plus_1"],
    strength: float,
    protocol: LinearProbe,
) -> tuple[Float[Tensor, "classes dim_plus_1"], Float[Tensor, "layers"]]:
    """The classifier (biases in the last column) and what `_shares` makes the layers' weights of."""
    weight = start.clone().requires_grad_(True)
    mix = torch.zeros(len(x), device=x.device, requires_grad=len(x) > 1)
    parameters = [weight, mix] if len(x) > 1 else [weight]
    minimise(parameters, lambda: penalised(_logits(weight, mix, x), y, weight, strength), protocol)
    return weight.detach(), mix.detach()


def _shares(mix: Float[Tensor, "layers"]) -> Float[Tensor, "layers"]:
    """The layers' weights. Scaled, since a first step of the size that suits the classifier would leave one layer."""
    return (_MIX_SCALE * mix).softmax(0)


def _logits(weight: Tensor, mix: Tensor, x: Float[Tensor, "layers n dim"]) -> Tensor:
    # One product of a vector and a matrix that is already laid out for it: many times faster than a sum of products.
    mixed = (_shares(mix) @ x.flatten(1)).view(x.shape[1:])
    return F.linear(mixed, weight[:, :-1], weight[:, -1])


def _accuracy(weight: Tensor, mix: Tensor, x: Tensor, y: Tensor) -> float:
    return float((_logits(weight, mix, x).argmax(1) == y).float().mean())
