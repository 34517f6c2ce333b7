"""Gradients of one optimizer step: exact for every masked mean, however the batch is cut.

The loss is ``sum over terms of weight * total / count`` with totals and counts summed over all micro-batches and ranks
*before* dividing. Data parallelism averages gradients over ranks, so each rank's loss is multiplied by their number.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unmask.core.method import Output, divisor


class Call:
    """A batch and a plan, opaque on their way through Fabric and DDP, which would cast or copy what they know."""

    def __init__(self, batch: Any, plan: Any) -> None:
        self.batch = batch
        self.plan = plan


class LossModule(nn.Module):
    """A method as Fabric wants it: one argument, plain tuples out."""

    def __init__(self, method: nn.Module) -> None:
        super().__init__()
        self.method = method

    def forward(self, call: Call) -> tuple[dict[str, tuple[Tensor, Any, float]], dict[str, Tensor]]:
        """Each term as (total, count, weight), and the metrics."""
        output: Output = self.method(call.batch, call.plan)
        return {name: (t.total, t.count, t.weight) for name, t in output.terms.items()}, output.metrics


@dataclass
class Sums:
    """What a step's forward passes gave on this rank; device tensors, nothing is waited for.

    Args:
        totals: one value per term, summed over micro-batches.
        counts: one value per term, summed over micro-batches and ranks.
        weights: one value per term.
        losses: the weighted total of every micro-batch; it is finite when all its terms are.
        metrics: means over micro-batches.
    """

    names: list[str]
    totals: Tensor
    counts: Tensor
    weights: list[float]
    losses: Tensor
    metrics: dict[str, Tensor]

    def finish(self, fabric: Any) -> dict[str, float]:
        """Loss, terms and metrics over all ranks, as numbers. Waits for the device."""
        means = fabric.all_reduce(self.totals, reduce_op="sum").to(self.counts.dtype) / divisor(self.counts)
        terms = {name: mean for name, mean in zip(self.names, means.tolist(), strict=True)}
        loss = sum(weight * terms[name] for name, weight in zip(self.names, self.weights, strict=True))
        metrics = {name: float(fabric.all_reduce(value, reduce_op="mean")) for name, value in self.metrics.items()}
        return {"loss": loss, **terms, **metrics}


class Gradients:
    """Runs the forward and backward passes of a step.

    Args:
        fabric: Lightning Fabric, launched.
        module: the `LossModule` that ``fabric.setup`` returned.
        micro_batches: forward passes per step on this rank.
    """

    def __init__(self, fabric: Any, module: Any, micro_batches: int) -> None:
        self.fabric = fabric
        self.module = module
        self.micro_batches = micro_batches
        self.method: nn.Module = module.module.method
        self.trainable = [p for p in self.method.parameters() if p.requires_grad]
        self.one_term: bool | None = None

    def step(self, calls: Iterator[Call]) -> Sums:
        """Accumulate the gradients of the whole global batch. Call with gradients cleared."""
        if self.micro_batches == 1:
            return self._whole(next(calls))
        first = next(calls)
        if self.one_term is None:
            self.one_term = len(self._counts(first)) == 1
        return self._streamed(first, calls) if self.one_term else self._counted([first, *self._rest(calls)])

    def _rest(self, calls: Iterator[Call]) -> Iterator[Call]:
        return (next(calls) for _ in range(self.micro_batches - 1))

    def _whole(self, call: Call) -> Sums:
        """One micro-batch: the counts are there before the backward pass."""
        terms, metrics = self.module(call)
        counts = self._reduced(_counts(terms))
        self.fabric.backward(self._loss(terms, counts))
        return _sums([terms], [metrics], counts)

    def _streamed(self, first: Call, calls: Iterator[Call]) -> Sums:
        """One term: backward on plain totals, and one division of the gradients at the end."""
        all_terms, all_metrics = [], []
        for i in range(self.micro_batches):
            last = i == self.micro_batches - 1
            with self.fabric.no_backward_sync(self.module, enabled=not last):
                terms, metrics = self.module(first if i == 0 else next(calls))
                (total, _, weight), *_ = terms.values()
                self.fabric.backward(total * weight)
            all_terms.append(_detached(terms))
            all_metrics.append(metrics)
        counts = self._reduced(torch.stack([_counts(terms) for terms in all_terms]).sum(0))
        gradients = [p.grad for p in self.trainable if p.grad is not None]
        torch._foreach_mul_(gradients, (self.fabric.world_size / divisor(counts[0])).to(gradients[0].dtype))
        return _sums(all_terms, all_metrics, counts)

    def _counted(self, calls: list[Call]) -> Sums:
        """Several terms: their counts first, in passes without gradients, then each backward on the final mean."""
        counts = self._reduced(torch.stack([self._counts(call) for call in calls]).sum(0))
        all_terms, all_metrics = [], []
        for i, call in enumerate(calls):
            with self.fabric.no_backward_sync(self.module, enabled=i < len(calls) - 1):
                terms, metrics = self.module(call)
                self.fabric.backward(self._loss(terms, counts))
            all_terms.append(_detached(terms))
            all_metrics.append(metrics)
        return _sums(all_terms, all_metrics, counts)

    def _loss(self, terms: dict[str, tuple[Tensor, Any, float]], counts: Tensor) -> Tensor:
        counts = divisor(counts)
        parts = [weight * total / count for (total, _, weight), count in zip(terms.values(), counts, strict=True)]
        return self.fabric.world_size * torch.stack([part.float() for part in parts]).sum()

    def _counts(self, call: Call) -> Tensor:
        """A micro-batch's counts, in the order of its terms, leaving generators and buffers alone.

        From the method's ``counts`` where it has that; else by a forward pass.
        """
        known: Any = getattr(self.method, "counts", None)
        if known is not None:
            found = known(call.batch, call.plan).values()
            device = call.batch.ids.device
            return torch.stack([_on_device(count, _exact(device), device) for count in found])
        with evaluating(self.method), self.fabric.autocast():
            output = self.method(call.batch, call.plan)
        return _counts({name: (t.total, t.count, t.weight) for name, t in output.terms.items()})

    def _reduced(self, counts: Tensor) -> Tensor:
        if self.fabric.world_size > 1:  # not Fabric's all_reduce, which begins with a barrier
            torch.distributed.all_reduce(counts)
        return counts


@contextmanager
def evaluating(method: nn.Module) -> Iterator[None]:
    """No gradients and every part in eval mode; afterwards each part is in the mode it was in."""
    training = [module for module in method.modules() if module.training]
    method.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _counts(terms: dict[str, tuple[Tensor, Any, float]]) -> Tensor:
    """Counts as one vector; double, so that counts of pixels stay exact (float on Apple GPUs, which have no double)."""
    device = next(iter(terms.values()))[0].device
    return torch.stack([_on_device(count, _exact(device), device) for _, count, _ in terms.values()])


def _exact(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _on_device(count: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A count as a tensor; a number is filled in there, since a copy would make the host wait for the device."""
    if isinstance(count, Tensor):
        return count.detach().to(device, dtype)
    return torch.full((), count, dtype=dtype, device=device)


def _detached(terms: dict[str, tuple[Tensor, Any, float]]) -> dict[str, tuple[Tensor, Any, float]]:
    return {name: (total.detach(), count, weight) for name, (total, count, weight) in terms.items()}


def _sums(all_terms: list[Any], all_metrics: list[dict[str, Tensor]], counts: Tensor) -> Sums:
    weights = [weight for _, _, weight in all_terms[0].values()]
    totals = torch.stack([torch.stack([t.detach().float() for t, _, _ in terms.values()]) for terms in all_terms])
    metrics = {name: torch.stack([m[name].detach().float() for m in all_metrics]).mean() for name in all_metrics[0]}
    return Sums(list(all_terms[0]), totals.sum(0), counts, weights, totals.sum(1), metrics)
