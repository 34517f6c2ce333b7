"""Gradients of one optimizer step: exact for every masked mean, however the batch is cut.

The loss is ``sum over terms of weight * total / count`` with totals and counts summed over all micro-batches and ranks
*before* dividing. Data parallelism averages gradients over ranks, so each rank's loss is multiplied by their number.
Metrics are summed and divided in the same way. A method with its own `backward` is given an `Engine` instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unmask.core.errors import UnmaskError
from unmask.core.mask import Mask
from unmask.core.method import Clock, Metric, Output, Term, divisor, to_device
from unmask.core.randomness import Key
from unmask.core.training.engine import Engine, reduced
from unmask.core.training.startup import StartupError


class Call:
    """A batch and a plan, opaque on their way through Fabric and DDP, which would cast or copy what they know."""

    def __init__(self, batch: Any, plan: Any) -> None:
        self.batch = batch
        self.plan = plan


def draw_call(fabric: Any, method: Any, seed: int, batch: Any, clock: Clock, visit: int | None = None) -> Call:
    """A batch on the device with its plan, drawn as `forward` runs: under the same autocast.

    Args:
        fabric: Lightning Fabric, launched.
        method: what draws.
        seed: the run's.
        batch: as it was loaded.
        clock: when the draw is made.
        visit: of the samples; None is the clock's epoch.
    """
    batch = to_device(batch, fabric.device)
    key = Key.of(seed, batch.ids, clock.epoch if visit is None else visit).stream("plan")
    with torch.no_grad(), fabric.autocast():
        return Call(batch, method.draw(batch, clock, key))


class LossModule(nn.Module):
    """A method as Fabric wants it: one argument, plain tuples out."""

    def __init__(self, method: nn.Module) -> None:
        super().__init__()
        self.method = method

    def forward(self, call: Call) -> tuple[dict[str, tuple[Tensor, Any, float]], dict[str, tuple[Tensor, Any]]]:
        """Each term as (total, count, weight), and each metric as (total, count)."""
        output: Output = self.method(call.batch, call.plan)
        for name, metric in output.metrics.items():
            if not isinstance(metric, Metric):
                raise StartupError(f"metric {name!r} is a {type(metric).__name__}; give Metric(total, count)")
        metrics = {name: (m.total.detach(), m.count) for name, m in output.metrics.items()}
        return {name: (t.total, t.count, t.weight) for name, t in output.terms.items()}, metrics


@dataclass
class Sums:
    """What a step gave on this rank; device tensors, nothing is waited for.

    Args:
        names: of the terms.
        totals: one value per term, summed over micro-batches.
        counts: one value per term, summed over micro-batches and ranks.
        weights: one value per term.
        losses: the total of every micro-batch; it is finite when all its terms are.
        metrics: total and count of each, summed over micro-batches.
        norm: of all gradients together, before clipping; the same on all ranks.
    """

    names: list[str]
    totals: Float[Tensor, "terms"]
    counts: Float[Tensor, "terms"]
    weights: list[float]
    losses: Float[Tensor, "micro_batches"]
    metrics: dict[str, Float[Tensor, "2"]]
    norm: Float[Tensor, ""]

    def finish(self, fabric: Any) -> dict[str, float]:
        """Loss, terms and metrics over all ranks, as numbers. Waits for the device."""
        means = fabric.all_reduce(self.totals, reduce_op="sum").to(self.counts.dtype) / divisor(self.counts)
        terms = {name: mean for name, mean in zip(self.names, means.tolist(), strict=True)}
        loss = sum(weight * terms[name] for name, weight in zip(self.names, self.weights, strict=True))
        return {"loss": loss, **terms, **counted_means(fabric, self.metrics)}


class Gradients:
    """Runs the forward and backward passes of a step.

    Args:
        fabric: Lightning Fabric, launched.
        module: the `LossModule` that ``fabric.setup`` returned.
        micro_batches: forward passes per step on this rank.

    Raises:
        UnmaskError: the method has a `backward` of its own, and a step is several passes.
    """

    def __init__(self, fabric: Any, module: Any, micro_batches: int) -> None:
        self.fabric = fabric
        self.module = module
        self.micro_batches = micro_batches
        self.method: Any = module.module.method
        self.trainable = [p for p in self.method.parameters() if p.requires_grad]
        self.one_term: bool | None = None
        if micro_batches > 1 and hasattr(self.method, "backward"):
            raise UnmaskError(
                f"training.micro_batch: {type(self.method).__name__} makes its own gradients from those of a whole "
                f"batch, and a step is {micro_batches} passes; set training.micro_batch=null"
            )

    def step(self, calls: Iterator[Call]) -> Sums:
        """Accumulate the gradients of the whole global batch. Call with gradients cleared."""
        outputs, counts = self._accumulate(calls)
        norm = nn.utils.get_total_norm([p.grad for p in self.trainable if p.grad is not None])
        return _sums(outputs, counts, norm)

    def _accumulate(self, calls: Iterator[Call]) -> tuple[list[Output], Tensor]:
        if hasattr(self.method, "backward"):
            return self._own(next(calls))
        if self.micro_batches == 1:
            return self._whole(next(calls))
        first = next(calls)
        if self.one_term is None or hasattr(self.method, "counts"):  # which is cheap: terms may come and go
            self.one_term = len(self._counts(first)) == 1
        return self._streamed(first, calls) if self.one_term else self._counted([first, *self._rest(calls)])

    def _rest(self, calls: Iterator[Call]) -> Iterator[Call]:
        return (next(calls) for _ in range(self.micro_batches - 1))

    def _own(self, call: Call) -> tuple[list[Output], Tensor]:
        """The method's own backward; what it takes from the engine is already summed over ranks."""
        with self.fabric.no_backward_sync(self.module):
            output = self._forward(call)
            counts = reduced(self.fabric, _counts(output))
            pairs = zip(output.terms.items(), divisor(counts), strict=True)
            means = {name: (term.total / count).float() for (name, term), count in pairs}
            self.method.backward(output, Engine(self.fabric, means, call.plan))
        return [_detached(output)], counts

    def _whole(self, call: Call) -> tuple[list[Output], Tensor]:
        """One micro-batch: the counts are there before the backward pass."""
        output = self._forward(call)
        counts = reduced(self.fabric, _counts(output))
        self.fabric.backward(self._loss(output, counts))
        return [_detached(output)], counts

    def _streamed(self, first: Call, calls: Iterator[Call]) -> tuple[list[Output], Tensor]:
        """One term: backward on plain totals, and one division of the gradients at the end."""
        outputs = []
        for i in range(self.micro_batches):
            with self.fabric.no_backward_sync(self.module, enabled=i < self.micro_batches - 1):
                output = self._forward(first if i == 0 else next(calls))
                (term,) = output.terms.values()
                self.fabric.backward(term.total * term.weight)
            outputs.append(_detached(output))
        counts = reduced(self.fabric, torch.stack([_counts(output) for output in outputs]).sum(0))
        gradients = [p.grad for p in self.trainable if p.grad is not None]
        torch._foreach_mul_(gradients, (self.fabric.world_size / divisor(counts[0])).to(gradients[0].dtype))
        return outputs, counts

    def _counted(self, calls: list[Call]) -> tuple[list[Output], Tensor]:
        """Several terms: their counts first, in passes without gradients, then each backward on the final mean."""
        counts = reduced(self.fabric, torch.stack([self._counts(call) for call in calls]).sum(0))
        outputs = []
        for i, call in enumerate(calls):
            with self.fabric.no_backward_sync(self.module, enabled=i < len(calls) - 1):
                output = self._forward(call)
                self.fabric.backward(self._loss(output, counts))
            outputs.append(_detached(output))
        return outputs, counts

    def _forward(self, call: Call) -> Output:
        terms, metrics = self.module(call)
        named = {name: Metric(*metric) for name, metric in metrics.items()}
        return Output({name: Term(*term) for name, term in terms.items()}, named | hidden_share(call.plan))

    def _loss(self, output: Output, counts: Tensor) -> Tensor:
        pairs = zip(output.terms.values(), divisor(counts), strict=True)
        parts = [term.weight * term.total / count for term, count in pairs]
        return self.fabric.world_size * torch.stack([part.float() for part in parts]).sum()

    def _counts(self, call: Call) -> Tensor:
        """A micro-batch's counts, in the order of its terms, leaving generators and buffers alone.

        From the method's ``counts`` where it has that; else by a forward pass.
        """
        known: Any = getattr(self.method, "counts", None)
        if known is not None:
            device = call.batch.ids.device
            return torch.stack([_on_device(count, device) for count in known(call.batch, call.plan).values()])
        with evaluating(self.method), self.fabric.autocast():
            return _counts(self.method(call.batch, call.plan))


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


def counted_means(fabric: Any, sums: dict[str, Float[Tensor, "2"]]) -> dict[str, float]:
    """Means over all ranks of what is given as total and count, as numbers; what counted nothing is left out.

    Every rank gives the same names. Waits for the device.
    """
    if not sums:
        return {}
    both = fabric.all_reduce(torch.stack(list(sums.values())), reduce_op="sum").tolist()
    return {name: total / count for name, (total, count) in zip(sums, both, strict=True) if count}


def pair(metric: Metric) -> Float[Tensor, "2"]:
    """Total and count as a vector in which counts of pixels stay exact."""
    device = metric.total.device
    return torch.stack([metric.total.detach().to(exact(device)), _on_device(metric.count, device)])


def hidden_share(plan: Any) -> dict[str, Metric]:
    """The share of tokens that a plan's mask hides, as a metric; nothing where it has no mask."""
    mask = getattr(plan, "mask", None)
    if not isinstance(mask, Mask):
        return {}
    return {"hidden_share": Metric(mask.hidden.sum(), mask.hidden.numel() if mask.valid is None else mask.valid.sum())}


def exact(device: torch.device) -> torch.dtype:
    """Double, so that counts of pixels stay exact; float on Apple GPUs, which have no double."""
    return torch.float32 if device.type == "mps" else torch.float64


def _counts(output: Output) -> Tensor:
    """The terms' counts as one vector."""
    device = next(iter(output.terms.values())).total.device
    return torch.stack([_on_device(term.count, device) for term in output.terms.values()])


def _on_device(count: Tensor | float, device: torch.device) -> Tensor:
    """A count as a tensor; a number is filled in there, since a copy would make the host wait for the device."""
    if isinstance(count, Tensor):
        return count.detach().to(device, exact(device))
    return torch.full((), count, dtype=exact(device), device=device)


def _detached(output: Output) -> Output:
    terms = {name: Term(term.total.detach(), term.count, term.weight) for name, term in output.terms.items()}
    return Output(terms, output.metrics)


def _sums(outputs: list[Output], counts: Tensor, norm: Tensor) -> Sums:
    terms = outputs[0].terms
    totals = torch.stack([torch.stack([t.total.float() for t in output.terms.values()]) for output in outputs])
    metrics = {name: torch.stack([pair(o.metrics[name]) for o in outputs]).sum(0) for name in outputs[0].metrics}
    weights = [term.weight for term in terms.values()]
    return Sums(list(terms), totals.sum(0), counts, weights, totals.sum(1), metrics, norm)
