"""What a run will cost, learnt from a few samples of it: ``unmask train --dry-run``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from unmask.core import registry
from unmask.core.mask import Mask
from unmask.core.progress import duration
from unmask.core.training.launch import build, check_draw, make_fabric, open_data
from unmask.core.training.measure import StepCost, Trial, process_bytes
from unmask.core.training.position import Position
from unmask.core.training.recipe import Recipe, micro_batch, to_yaml
from unmask.core.training.schedules import run_length
from unmask.core.training.stages import Bench, Planned

_SECONDS = 4.0  # for trying batches of growing size, over all stages


@dataclass(frozen=True)
class StageEstimate:
    """One stage of a run.

    Args:
        name: as its folder's; ``training`` for the run itself.
        steps: optimizer steps; None where it trains nothing.
        seconds: None where they are not known before.
        memory_bytes: per device, as far as known.
    """

    name: str
    steps: int | None
    seconds: float | None
    memory_bytes: int

    def line(self) -> str:
        """The stage for a person."""
        steps = "" if self.steps is None else f"{self.steps:,} steps"
        seconds = "not measured" if self.seconds is None else f"about {duration(self.seconds)}"
        return f"  {self.name:<20} {steps:<16} {seconds}"


@dataclass(frozen=True)
class Estimate:
    """The size of a run, measured where it can be.

    Args:
        parameters: of the whole method.
        trainable: those that learn.
        tokens: per sample; None where the method's plan has no mask.
        visible: of these, on average.
        train_samples: size of the training split.
        val_samples: size of the validation split.
        steps: optimizer steps of the last stage.
        steps_per_epoch: of these, in one pass over the data.
        memory_bytes: per device, of the stage that takes most: weights, gradients, optimizer, what one micro-batch
            takes, and on a CPU the process itself; processes that load data come on top.
        flops_per_sample: forward and backward.
        seconds_per_step: of the last stage.
        seconds_per_epoch: that, times the steps of an epoch.
        seconds: of all stages whose time is known, validation included.
        stages: one by one, in order.
    """

    parameters: int
    trainable: int
    tokens: int | None
    visible: float | None
    train_samples: int
    val_samples: int
    steps: int
    steps_per_epoch: int
    memory_bytes: int
    flops_per_sample: float
    seconds_per_step: float
    seconds_per_epoch: float
    seconds: float
    stages: tuple[StageEstimate, ...]

    def lines(self) -> list[str]:
        """What was measured, for a person."""
        tokens = "-" if self.tokens is None else f"{self.tokens} per sample, {self.visible:g} visible"
        each = f"about {self.seconds_per_step:.2g} s a step, {duration(self.seconds_per_epoch)} an epoch"
        return [
            f"tokens      {tokens}",
            f"memory      about {size(self.memory_bytes)} per device",
            f"compute     {self.flops_per_sample / 1e9:.3g} GFLOP per sample, forward and backward",
            *(["stages", *[stage.line() for stage in self.stages]] if len(self.stages) > 1 else []),
            f"time        {each}, {duration(self.seconds)} in all",
        ]


def dry_run(
    recipe: Recipe, *, devices: int = 1, nodes: int = 1, show: Callable[[str], Any] = lambda text: None
) -> tuple[str, Estimate]:
    """Make everything a run needs, try a few samples on one device, and write nothing.

    Args:
        recipe: see `unmask.core.training.recipe.load_recipe`.
        devices: of the run, on each machine.
        nodes: of the run.
        show: told the recipe, then the counts, then the costs, each as soon as it is known.

    Returns:
        The resolved recipe as YAML, and the estimate.
    """
    fabric = make_fabric(recipe, ".", check=False)
    stages = _stages(recipe)
    last = [stage.recipe for stage in stages if stage.recipe is not None][-1]
    last, train_set, val_set, collate = open_data(last, lambda text: print(text, file=sys.stderr, flush=True))
    text = to_yaml(last if recipe.stages is None else recipe)
    show(text)
    data = _Data(fabric, devices * nodes, train_set, val_set, collate)
    position = data.position(last)
    show(
        f"data        {len(train_set):,} to train on, {data.validated:,} to validate on\n"
        f"length      {position.total:,} steps, {position.steps_per_epoch:,} an epoch"
    )
    method = build(last)
    check_draw(method, train_set, collate, last)
    parameters = sum(p.numel() for p in method.parameters())
    trainable = sum(p.numel() for p in method.parameters() if p.requires_grad)
    show(f"parameters  {parameters:,} ({trainable:,} trainable)")
    trained = data.measure(last, method.to(fabric.device), _SECONDS / len(stages))
    before = process_bytes()
    found = tuple(data.stage(stage, last, trained, _SECONDS / len(stages)) for stage in stages)
    grown = max(0, process_bytes() - before) if fabric.device.type == "cpu" else 0  # libraries of the other stages
    tokens, visible = _tokens(trained.cost.plan)
    estimate = Estimate(
        parameters=parameters,
        trainable=trainable,
        tokens=tokens,
        visible=visible,
        train_samples=len(train_set),
        val_samples=data.validated,
        steps=position.total,
        steps_per_epoch=position.steps_per_epoch,
        memory_bytes=max(stage.memory_bytes for stage in found) + grown,
        flops_per_sample=trained.cost.flops * trained.shorter,
        seconds_per_step=trained.step_seconds,
        seconds_per_epoch=trained.step_seconds * position.steps_per_epoch,
        seconds=sum(stage.seconds or 0.0 for stage in found),
        stages=found,
    )
    show("\n".join(estimate.lines()))
    return text, estimate


def _stages(recipe: Recipe) -> list[Planned]:
    if recipe.stages is None:
        return [Planned("training", recipe)]
    found: list[Planned] = registry.load(recipe.method).outline(recipe)
    return found


@dataclass(frozen=True)
class _Trained:
    """What a stage that trains takes.

    Args:
        method: built for it.
        cost: of samples of the greatest length.
        shorter: an average sample's length, as a share of theirs.
        step_seconds: of an optimizer step.
        val_seconds: of the loss on the validation split.
        memory: bytes per device.
    """

    method: nn.Module
    cost: StepCost
    shorter: float
    step_seconds: float
    val_seconds: float
    memory: int


@dataclass(frozen=True)
class _Data:
    """The data of a run, and what it is measured with."""

    fabric: Any
    world: int
    train_set: Any
    val_set: Any | None
    collate: Any

    @property
    def validated(self) -> int:
        """Samples of the validation split."""
        return len(self.val_set) if self.val_set is not None else 0

    def position(self, recipe: Recipe) -> Position:
        """Where a stage's steps are in the data."""
        micro, total = micro_batch(recipe, self.world), run_length(recipe, len(self.train_set))
        lengths, admitted = (getattr(self.train_set, name, None) for name in ("lengths", "admitted"))
        sizes = len(self.train_set), recipe.training.batch_size, micro, total
        return Position(recipe.seed, *sizes, world=self.world, lengths=lengths, admitted=admitted)

    def measure(self, recipe: Recipe, method: nn.Module, budget: float) -> _Trained:
        """Try a stage's steps, on the longest samples where samples have lengths: a batch may hold them."""
        position, shorter = self.position(recipe), 1.0
        micro = position.micro_batch
        indices = [index for index, _ in next(iter(position))]
        if position.lengths is not None:
            indices = position.lengths.argsort(descending=True, stable=True)[:micro].tolist()
            shorter = float(position.lengths.float().mean() / position.lengths[indices].float().mean())
        cost = Trial(self.fabric, method, recipe, self.train_set, self.collate).run(indices, micro, budget)
        passed = cost.seconds.at(micro * shorter) * position.micro_batches
        loading = cost.loading * shorter * micro * position.micro_batches
        workers = recipe.training.workers
        seconds = max(passed, loading / workers) if workers else passed + loading
        return _Trained(
            method,
            cost,
            shorter,
            step_seconds=seconds + cost.optimizer.seconds,
            # A forward pass is a third of both.
            val_seconds=self.validated / self.world * shorter * (cost.seconds.slope / 3 + cost.loading),
            memory=cost.memory(micro, position.micro_batches, self.world),
        )

    def stage(self, stage: Planned, last: Recipe, trained: _Trained, budget: float) -> StageEstimate:
        """What a stage takes; `trained` is of the `last` one, and of every one that trains the same network."""
        if stage.recipe is None:
            bench = Bench(self.train_set, self.val_set, trained.method, self.fabric.device)
            cost = stage.work(bench) if stage.work is not None else None
            if cost is None:
                return StageEstimate(stage.name, None, None, 0)
            own = trained.cost.base_bytes + trained.cost.optimizer.weights
            return StageEstimate(stage.name, None, cost.seconds, own + cost.memory_bytes)
        total = self.position(stage.recipe).total
        if stage.recipe.model != last.model:
            trained = self.measure(stage.recipe, build(stage.recipe).to(self.fabric.device), budget)
        every = stage.recipe.training.validate_every_epochs * self.position(stage.recipe).steps_per_epoch
        seconds = total * trained.step_seconds + -(-total // every) * trained.val_seconds
        return StageEstimate(stage.name, total, seconds, trained.memory)


def size(count: int) -> str:
    """Bytes as a person says them."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _tokens(plan: Any) -> tuple[int | None, float | None]:
    mask = getattr(plan, "mask", None)
    if not isinstance(mask, Mask):
        return None, None
    return mask.hidden.shape[1], float(mask.visible.sum(1).float().mean())
