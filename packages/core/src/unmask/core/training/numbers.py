"""Numbers about a run that have to be right and must not make the device wait: finiteness and validation."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unmask.core.errors import UnmaskError
from unmask.core.method import divisor
from unmask.core.training.gradients import Call, Sums, counted_means, evaluating, exact, pair
from unmask.core.training.position import Position
from unmask.core.training.startup import shorten


class NotFiniteError(UnmaskError):
    """A loss or gradient became NaN or infinite; the message names the batch and the checkpoint to go back to."""


class FiniteWatch:
    """Notices the first loss or gradient that is not finite, without waiting for the device, and names its batch.

    Args:
        fabric: Lightning Fabric, launched.
        position: which samples a step takes.
        samples: the training set, for names.
        checkpoints: folder of the checkpoints.
    """

    def __init__(self, fabric: Any, position: Position, samples: Any, checkpoints: Path) -> None:
        self.fabric, self.position, self.samples, self.checkpoints = fabric, position, samples, checkpoints
        # A step has a slot for each micro-batch's loss and one more for its gradient: step * slots + slot of the first
        # that was not finite, or -1. It stays on the device.
        self.slots = position.micro_batches + 1
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=fabric.device)

    def note(self, step: int, sums: Sums) -> None:
        """Look at the losses and the gradient of step number `step` (from 0), on the device."""
        bad = ~torch.isfinite(torch.cat([sums.losses, sums.norm.float()[None]]))
        here = step * self.slots + bad.int().argmax()
        self.first_bad = torch.where((self.first_bad < 0) & bad.any(), here, self.first_bad)

    def check(self) -> None:
        """Raise NotFiniteError if a loss on any rank, or a gradient, was not finite. Waits for the device."""
        found = self.fabric.all_gather(self.first_bad).reshape(-1).tolist()
        bad = sorted((code, rank) for rank, code in enumerate(found) if code >= 0)
        if bad:
            (step, slot), rank = divmod(bad[0][0], self.slots), bad[0][1]
            raise NotFiniteError(self._message(step, slot, rank))

    def _message(self, step: int, slot: int, rank: int) -> str:
        of_loss = slot < self.position.micro_batches
        names = [self.samples.name_of(int(self.samples.ids[i])) for i in self._indices(step, slot, rank)]
        good = sorted(self.checkpoints.glob("step-*.safetensors"))
        back = f"The last good checkpoint is {good[-1]}" if good else "No checkpoint had been saved yet"
        return (
            f"the {'loss' if of_loss else 'gradient'} is NaN or infinite at step {step + 1}, in the batch with "
            f"{shorten(names, 8)}. {back}. "
            "Look at these samples; else lower optimizer.base_lr, set optimizer.clip_norm, or train in 32-true"
        )

    def _indices(self, step: int, slot: int, rank: int) -> list[int]:
        """The samples of one rank's micro-batch, or, for the gradient, of the whole step."""
        if slot < self.position.micro_batches:
            return self.position.indices(step, slot, rank)
        micros, ranks = range(self.position.micro_batches), range(self.position.world)
        return [i for micro in micros for rank in ranks for i in self.position.indices(step, micro, rank)]


def validate(fabric: Any, method: nn.Module, calls: Iterable[Call]) -> dict[str, float]:
    """Loss, terms and metrics over all of a rank's `calls` and all ranks, as ``val_loss`` and ``val_NAME``.

    Totals and counts are summed before dividing, so the numbers do not depend on how the split is cut.
    """
    weights: dict[str, float] = {}
    terms: dict[str, Tensor] = {}
    metrics: dict[str, Tensor] = {}
    with evaluating(method):
        for call in calls:
            with fabric.autocast():
                output = method(call.batch, call.plan)
            weights = {name: term.weight for name, term in output.terms.items()}
            for sums, values in ((terms, output.terms), (metrics, output.metrics)):
                for name, value in values.items():
                    sums[name] = sums[name] + pair(value) if name in sums else pair(value)
    # A rank without a batch does not know the names.
    names, weights, measured = fabric.broadcast((sorted(terms), weights, sorted(metrics)))
    both = fabric.all_reduce(_in_order(fabric, terms, names), reduce_op="sum")
    means = dict(zip(names, (both[:, 0] / divisor(both[:, 1])).tolist(), strict=True))
    loss = sum(weights[name] * mean for name, mean in means.items())
    rows = _in_order(fabric, metrics, measured)
    means |= counted_means(fabric, dict(zip(measured, rows, strict=True)))
    return {"val_loss": loss, **{f"val_{name}": mean for name, mean in means.items() if name != "loss"}}


def _in_order(fabric: Any, sums: dict[str, Tensor], names: list[str]) -> Float[Tensor, "names 2"]:
    none = torch.zeros(2, dtype=exact(fabric.device), device=fabric.device)
    return torch.stack([sums.get(name, none) for name in names]) if names else none[None][:0]
