"""What a method's own ``backward(output, engine)`` works with: gradients of means over the whole batch.

A method has a `backward` where the optimizer is to follow something else than the gradient of the loss: one loss's
gradient gated by another's (R-AMT), or parts of the network that each follow a loss of their own (COMET). It is called
once a step, with what `forward` returned, and has to leave a gradient in every trainable parameter::

    def backward(self, output: Output, engine: Engine) -> None:
        wanted = engine.gradients(engine.mean("classes"), self.scores)
        known = engine.gradients(engine.mean("teacher"), self.scores)
        for score, a, b in zip(self.scores, wanted, known, strict=True):
            score.grad = torch.where(a * b >= 0, a, 0.0)

A term that only this uses has weight 0 in the loss, and is logged. Random choices come from the plan. The engine's
gradients are summed over ranks, so a rule that is not linear in them is the same on any number of devices. Over several
micro-batches it would not be, and such a run is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Engine:
    """A step's losses, and gradients of them over all ranks.

    Args:
        fabric: Lightning Fabric, launched.
        means: this rank's part of every term's mean.
        plan: the plan of the pass.
    """

    def __init__(self, fabric: Any, means: Mapping[str, Float[Tensor, ""]], plan: Any) -> None:
        self.fabric = fabric
        self.plan = plan
        self._means = means

    def mean(self, term: str) -> Float[Tensor, ""]:
        """This rank's part of a term's mean: its total over the count of all ranks. The parts of all ranks add up."""
        return self._means[term]

    def gradients(self, loss: Float[Tensor, ""], parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        """Gradients of a loss made of `mean`s, summed over ranks; zeros where it does not reach a parameter.

        The graph is kept, so that it can be asked for several losses.
        """
        found = torch.autograd.grad(loss, list(parameters), retain_graph=True, materialize_grads=True)
        return [self.all_reduce(gradient) for gradient in found]

    def backward(self, loss: Float[Tensor, ""], parameters: Iterable[nn.Parameter]) -> None:
        """Add a loss's gradients to those of `parameters`, and of no others that it reaches."""
        parameters = list(parameters)
        for parameter, gradient in zip(parameters, self.gradients(loss, parameters), strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def all_reduce(self, value: Tensor) -> Tensor:
        """The sum of a tensor over ranks, without gradient: for a rule that needs a mean's value."""
        return reduced(self.fabric, value.detach().clone())


def reduced(fabric: Any, value: Tensor) -> Tensor:
    """The sum over ranks, in place."""
    if fabric.world_size > 1:  # not Fabric's all_reduce, which begins with a barrier
        torch.distributed.all_reduce(value)
    return value
