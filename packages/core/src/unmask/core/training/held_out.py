"""What is measured on held-out samples while a run trains: validation loss, collapse, online probes.

Nothing of it touches what is trained: the method is in eval mode and without gradients, the generators are not drawn
from, and masks are those of a fixed clock, so that losses are bit for bit those of a run without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from unmask.core.evaluation.online import keyed_choice
from unmask.core.training.collapse import SAMPLES, CollapseMonitor, is_watched
from unmask.core.training.gradients import Call, draw_call
from unmask.core.training.numbers import validate
from unmask.core.training.position import Collate, Position, batches, validation_sampler
from unmask.core.training.probes import OnlineProbes
from unmask.core.training.recipe import Recipe, micro_batch


class HeldOut:
    """The numbers of a run's validation.

    Args:
        fabric: Lightning Fabric, launched.
        method: what is trained.
        val_set: the validation split; None or empty where there is none, and then nothing is measured.
        probe_set: the training split, for online probes.
        collate: samples to a batch.
        recipe: see `fit`.
        position: of the run.
        earlier: its metrics lines up to here.
    """

    def __init__(
        self,
        fabric: Any,
        method: Any,
        val_set: Any | None,
        probe_set: Any,
        collate: Collate,
        recipe: Recipe,
        position: Position,
        earlier: Sequence[Mapping[str, Any]],
    ) -> None:
        """Raises UnmaskError where probes are asked for and there is nothing to probe."""
        self.fabric, self.method, self.recipe, self.position = fabric, method, recipe, position
        self.val_set, self.collate = val_set, collate
        self.there = val_set is not None and len(val_set) > 0
        watched = self.there and len(val_set) >= fabric.world_size and is_watched(method, recipe)  # type: ignore[arg-type]
        self.monitor = CollapseMonitor(fabric, method, earlier) if watched else None
        probed = recipe.training.probe_every_epochs is not None
        self.probes = OnlineProbes(fabric, method, probe_set, val_set, recipe.seed) if probed else None

    def begin(self) -> None:
        """Look at the features before the first step: a collapse may come sooner than the first validation."""
        if self.monitor is not None:
            self.monitor.begin(self._some())

    def measure(self, step: int) -> tuple[dict[str, float], list[str]]:
        """The numbers that are due after `step`, and what to say about them; every rank calls it."""
        numbers, said = self._validate() if self._due(step, self.recipe.training.validate_every_epochs) else ({}, [])
        if self.probes is not None and self._due(step, self.recipe.training.probe_every_epochs):
            found = self.probes.measure(self.batches)
            numbers |= found
            said.append(", ".join(f"{name.replace('_', ' ')} {100 * value:.1f} %" for name, value in found.items()))
        return numbers, said

    def _validate(self) -> tuple[dict[str, float], list[str]]:
        if not self.there:
            return {}, []
        everything = torch.arange(len(self.val_set))  # type: ignore[arg-type]
        numbers = validate(self.fabric, self.method, self._calls(everything))
        said = [f"validation loss {numbers['val_loss']:.4f}"]
        if self.monitor is not None:
            found = self.monitor.measure(self._some())
            alarm = self.monitor.alarm(found)
            numbers |= found
            said += [] if alarm is None else [alarm]
        return numbers, said

    def _due(self, step: int, every_epochs: int | None) -> bool:
        if every_epochs is None:
            return False
        return step % (every_epochs * self.position.steps_per_epoch) == 0 or step == self.position.total

    def _some(self) -> Iterator[Call]:
        ids = self.val_set.ids  # type: ignore[union-attr]  # there is a monitor, hence a split
        return self._calls(keyed_choice(ids, SAMPLES, self.recipe.seed).sort().values)

    def _calls(self, index: Int[Tensor, "n"]) -> Iterator[Call]:
        """This rank's batches of some validation samples, at masks that are the same every time."""
        clock = self.position.clock(self.position.total)
        for batch in self.batches(self.val_set, index):
            yield draw_call(self.fabric, self.method, self.recipe.seed, batch, clock, visit=0)

    def batches(self, dataset: Any, index: Int[Tensor, "n"]) -> Iterator[Any]:
        """This rank's batches of the samples at `index`."""
        world, rank = self.fabric.world_size, self.fabric.global_rank
        lengths = getattr(dataset, "lengths", None)
        lengths = None if lengths is None else lengths[index]
        sampler = validation_sampler(len(index), micro_batch(self.recipe, world), rank, world, lengths)
        chosen = [[(int(index[i]), visit) for i, visit in batch] for batch in sampler]
        yield from batches(dataset, chosen, self.collate, self.recipe.training.workers, pin=False)
