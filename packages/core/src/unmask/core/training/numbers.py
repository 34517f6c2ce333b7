"""Numbers about a run that have to be right and must not make the device wait: finiteness, validation, masked share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unmask.core.errors import UnmaskError
from unmask.core.mask import Mask
from unmask.core.method import divisor
from unmask.core.training.gradients import Call, Sums, evaluating
from unmask.core.training.position import Position
from unmask.core.training.startup import shorten


class NotFiniteError(UnmaskError):
    """A loss or gradient became NaN or infinite; the message names the batch and the checkpoint to go back to."""


class FiniteWatch:
    """Notices losses that are not finite without waiting for the device, and says which batch it was.

    Args:
        fabric: Lightning Fabric, launched.
        position: which samples a step takes.
        samples: the training set, for names.
        checkpoints: folder of the checkpoints.
    """

    def __init__(self, fabric: Any, position: Position, samples: Any, checkpoints: Path) -> None:
        self.fabric, self.position, self.samples, self.checkpoints = fabric, position, samples, checkpoints
        # step * micro_batches + micro_batch of the first loss that was not finite, or -1; stays on the device.
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=fabric.device)

    def note(self, step: int, sums: Sums) -> None:
        """Look at a step's losses, on the device."""
        bad = ~torch.isfinite(sums.losses)
        here = step * self.position.micro_batches + bad.int().argmax()
        self.first_bad = torch.where((self.first_bad < 0) & bad.any(), here, self.first_bad)

    def check_losses(self) -> None:
        """Raise NotFiniteError if a loss on any rank was not finite. Waits for the device."""
        found = [(code, rank) for rank, code in enumerate(self.fabric.all_gather(self.first_bad).reshape(-1).tolist())]
        bad = sorted((code, rank) for code, rank in found if code >= 0)
        if bad:
            step, micro = divmod(bad[0][0], self.position.micro_batches)
            raise NotFiniteError(self._message("loss", step, self.position.indices(step, micro, bad[0][1])))

    def check_gradient(self, step: int, norm: Tensor) -> None:
        """Raise NotFiniteError if the gradient of step number `step` (from 0) is not finite. Waits for the device."""
        if not bool(torch.isfinite(norm)):
            micros, ranks = range(self.position.micro_batches), range(self.position.world)
            indices = [i for micro in micros for rank in ranks for i in self.position.indices(step, micro, rank)]
            raise NotFiniteError(self._message("gradient", step, indices))

    def _message(self, what: str, step: int, indices: list[int]) -> str:
        names = [self.samples.name_of(int(self.samples.ids[i])) for i in indices]
        good = sorted(self.checkpoints.glob("step-*.safetensors"))
        back = f"The last good checkpoint is {good[-1]}" if good else "No checkpoint had been saved yet"
        return (
            f"the {what} is NaN or infinite at step {step + 1}, in the batch with {shorten(names, 8)}. {back}. "
            "Look at these samples; else lower optimizer.base_lr, set optimizer.clip_norm, or train in 32-true"
        )


def validation_loss(fabric: Any, method: nn.Module, calls: Iterable[Call]) -> dict[str, float]:
    """The loss and its terms over all of a rank's `calls` and all ranks, as ``val_loss`` and ``val_TERM``.

    Totals and counts are summed before dividing, so the numbers do not depend on how the split is cut.
    """
    weights: dict[str, float] = {}
    sums: dict[str, Tensor] = {}
    with evaluating(method):
        for call in calls:
            with fabric.autocast():
                terms = method(call.batch, call.plan).terms
            for name, term in terms.items():
                count = torch.as_tensor(term.count, device=fabric.device).float()
                part = torch.stack([term.total.float(), count]).to(_exact(fabric.device))
                sums[name] = sums.get(name, torch.zeros_like(part)) + part
                weights[name] = term.weight
    names, weights = fabric.broadcast((sorted(sums), weights))  # a rank without a batch does not know them
    none = torch.zeros(2, dtype=_exact(fabric.device), device=fabric.device)
    both = fabric.all_reduce(torch.stack([sums.get(name, none) for name in names]), reduce_op="sum")
    means = dict(zip(names, (both[:, 0] / divisor(both[:, 1])).tolist(), strict=True))
    loss = sum(weights[name] * mean for name, mean in means.items())
    return {"val_loss": loss, **{f"val_{name}": mean for name, mean in means.items() if name != "loss"}}


def hidden_share(fabric: Any, masks: list[Mask | None]) -> float | None:
    """The share of a step's tokens that were hidden, over all ranks; None where plans have no mask."""
    found = [mask for mask in masks if mask is not None]
    if not found:
        return None
    tokens = [mask.hidden.numel() if mask.valid is None else mask.valid.sum() for mask in found]
    both = [sum(mask.hidden.sum() for mask in found), sum(tokens)]
    summed = torch.stack([torch.as_tensor(n, device=fabric.device).to(_exact(fabric.device)) for n in both])
    hidden, of = fabric.all_reduce(summed, reduce_op="sum").tolist()
    return hidden / of


def _exact(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
