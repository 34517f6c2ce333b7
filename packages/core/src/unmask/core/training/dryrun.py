"""What a run will cost, learnt from a step or two of it: ``unmask train --dry-run``."""

from __future__ import annotations

import itertools
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unmask.core import registry
from unmask.core.method import Clock, to_device
from unmask.core.randomness import Key
from unmask.core.training.gradients import Call
from unmask.core.training.groups import make_optimizer
from unmask.core.training.launch import build, make_fabric, open_data
from unmask.core.training.monitor import count_flops, duration
from unmask.core.training.position import Position
from unmask.core.training.recipe import Recipe, micro_batch, to_yaml
from unmask.core.training.schedules import run_length


@dataclass(frozen=True)
class Estimate:
    """The size of a run, measured where it can be.

    Args:
        parameters: of the whole method.
        trainable: those that learn.
        tokens: per sample; None where the method's plan has no mask.
        visible: of these, on average.
        train_samples, val_samples: sizes of the splits.
        steps: optimizer steps of the run.
        steps_per_epoch: of these, in one pass over the data.
        memory_bytes: per device: weights, gradients, optimizer and what one micro-batch keeps for its backward pass.
        flops_per_sample: forward and backward.
        seconds_per_step: measured, without loading data in parallel.
        seconds_per_epoch: that, times the steps of an epoch.
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

    def lines(self) -> list[str]:
        """The estimate for a person."""
        length = f"{self.steps} steps, {self.steps_per_epoch} an epoch, about {self.seconds_per_step:.2g} s each"
        tokens = "-" if self.tokens is None else f"{self.tokens} per sample, {self.visible:g} visible"
        return [
            f"parameters  {self.parameters:,} ({self.trainable:,} trainable)",
            f"tokens      {tokens}",
            f"data        {self.train_samples:,} to train on, {self.val_samples:,} to validate on",
            f"memory      about {size(self.memory_bytes)} per device",
            f"compute     {self.flops_per_sample / 1e9:.3g} GFLOP per sample, forward and backward",
            f"length      {length}",
            f"time        about {duration(self.seconds_per_epoch)} an epoch, "
            f"{duration(self.seconds_per_step * self.steps)} in all",
        ]


def dry_run(recipe: Recipe, *, devices: int = 1, nodes: int = 1) -> tuple[str, dict[str, Any], list[str]]:
    """Make everything a run needs, try a micro-batch on one device, and write nothing.

    Returns:
        The resolved recipe as YAML, the `Estimate` as a dict, and the estimate as lines for a person.
    """
    fabric = make_fabric(recipe, ".", check=False)
    written = recipe
    if recipe.stages is not None:  # of the last stage, with stand-ins for what the earlier ones make
        recipe = registry.load(recipe.method).planned(recipe)
    recipe, train_set, val_set, collate = open_data(recipe, lambda text: print(text, file=sys.stderr))
    method: Any = build(recipe).to(fabric.device)
    world = devices * nodes
    micro, total = micro_batch(recipe, world), run_length(recipe, len(train_set))
    position = Position(
        recipe.seed, len(train_set), recipe.training.batch_size, micro, total, world=world,
        lengths=getattr(train_set, "lengths", None),
    )  # fmt: skip

    samples, loading = _load(train_set, position, max(1, recipe.training.workers))
    batch = to_device(collate(samples), fabric.device)
    call = Call(batch, method.draw(batch, Clock(0, total), Key.of(recipe.seed, batch.ids, 0).stream("plan")))
    flops = count_flops(fabric, method, call)
    seconds, memory = _try(fabric, method, recipe, call)
    step = max(seconds, loading) if recipe.training.workers else seconds + loading
    step *= position.micro_batches
    tokens, visible = _tokens(call.plan)
    found = Estimate(
        parameters=sum(p.numel() for p in method.parameters()),
        trainable=sum(p.numel() for p in method.parameters() if p.requires_grad),
        tokens=tokens,
        visible=visible,
        train_samples=len(train_set),
        val_samples=len(val_set) if val_set is not None else 0,
        steps=total,
        steps_per_epoch=position.steps_per_epoch,
        memory_bytes=memory,
        flops_per_sample=flops / micro,
        seconds_per_step=step,
        seconds_per_epoch=step * position.steps_per_epoch,
    )
    return to_yaml(recipe if written.stages is None else written), asdict(found), found.lines()


def size(count: int) -> str:
    """Bytes as a person says them."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _load(train_set: Any, position: Position, workers: int) -> tuple[list[Any], float]:
    """A micro-batch of samples and the seconds that loading one takes; the second of two, when caches are warm."""
    for items in itertools.islice(position, 2):
        began = time.perf_counter()
        samples = [train_set[item] for item in items]
        seconds = (time.perf_counter() - began) / workers
    return samples, seconds


def _try(fabric: Any, method: nn.Module, recipe: Recipe, call: Call) -> tuple[float, int]:
    """Seconds of a forward, backward and optimizer step, the better of two, and bytes per device."""
    optimizer = make_optimizer(method, recipe.optimizer)
    kept = _saved_bytes(fabric, method, call)
    seconds = []
    for _ in range(2):
        _wait(fabric.device)
        began = time.perf_counter()
        with fabric.autocast():
            loss = method(call.batch, call.plan).loss
        loss.backward()
        optimizer.step()
        _wait(fabric.device)
        seconds.append(time.perf_counter() - began)
    if fabric.device.type == "cuda":
        return min(seconds), torch.cuda.max_memory_allocated(fabric.device)
    weights = sum(p.numel() * p.element_size() * (4 if p.requires_grad else 1) for p in method.parameters())
    return min(seconds), weights + kept


def _saved_bytes(fabric: Any, method: nn.Module, call: Call) -> int:
    """Bytes that autograd keeps between the forward and the backward pass, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in method.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), fabric.autocast():
        method(call.batch, call.plan)
    return sum(kept.values())


def _tokens(plan: Any) -> tuple[int | None, float | None]:
    mask = getattr(plan, "mask", None)
    if mask is None:
        return None, None
    return mask.hidden.shape[1], float(mask.visible.sum(1).float().mean())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
