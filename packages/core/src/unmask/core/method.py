"""What a method is: five plain functions on a module, and the small types that travel between them.

A trained method is an ``nn.Module`` with

* ``draw(batch, clock, key) -> Plan``: every random or scheduled choice (masks, times, noise, gates);
* ``forward(batch, plan) -> Output``: the loss terms, a pure function of both apart from dropout;
* ``encode(batch) -> Features``: what transfers. Never masks, in any mode, and keeps spatial order;
* ``predict(batch, plan) -> Tensor``: the predictions for the hidden tokens; `forward` scores them, and `check_method`
  tests them for leaks;
* ``picture(batch, plan) -> dict``: named images for the report.

Kinds other than ``pretrain`` may leave out the last three, and their plan may hold no mask, or be None.

`draw` and `forward` run under the same autocast, `draw` without gradients: a teacher that runs in `draw` computes in
the student's type. What a draw needs in full precision it computes under ``torch.autocast(device, enabled=False)``.

Optional:

* ``after_step(clock)``: called once after every optimizer step with the clock of that step (teachers);
* ``no_weight_decay() -> set`` of parameter names, besides vectors and biases;
* ``param_groups() -> list`` of learning-rate and weight-decay groups: see `unmask.core.training.groups`;
* ``backward(output, engine) -> None``: fills the gradients itself, where they are not those of the loss: see
  `unmask.core.training.engine`;
* ``counts(batch, plan) -> dict``, for methods with several loss terms: each term's count by name, in the terms' order,
  from batch and plan alone. It saves the forward passes that find them when gradients are accumulated.

The network that transfers is the attribute ``encoder``, or what ``encoder_of() -> nn.Module`` gives where it is another
or several (an ``nn.ModuleDict``). `encode` runs it and nothing else that has weights.

What `check_method` needs to know, where it differs from the defaults:

* ``target(batch, plan)``: the targets at hidden tokens, which `forward` takes from there. A loss is then checked with
  its target held fixed; define it wherever the target is more than a copy of the input. The collapse monitor
  measures the rank of targets that are vectors (see `unmask.core.training.collapse`).
* ``loss_on``: the tokens that the loss is taken on, one word, or a dict of words by term: "hidden" (the default),
  "visible", "all", or "features" for a regulariser that scores no token and may see hidden input.
* ``norms_over_all() -> set``: names of BatchNorms, GroupNorms and InstanceNorms whose statistics include hidden input,
  as published. Leaks are then looked for with these norms cut out: nothing hidden may go any other way.
* ``students() -> dict``: from the path of an EMA teacher to the module it follows, where the method has no module, or
  several, with the teacher's parameters (see `unmask.core.checks.teachers`).

A method of the kind ``generate`` has ``generate(count, seed)``: samples, a tensor or a dict of tensors with a row for
each, the same for the same seed, for ``unmask generate``. One of the kind ``explain`` is mostly no module but a plain
function on a network: see `unmask.core.explanation`. One that is trained has ``explain(batch)``: a map for each sample,
[batch, *space], finite, without gradient, and the same for the same input.

There is no base class: whatever has these functions works in our loop, and a method works in anybody's loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor, nn

from unmask.core.errors import UnmaskError
from unmask.core.mask import Mask
from unmask.core.randomness import Key

T = TypeVar("T")


@dataclass(frozen=True)
class Clock:
    """How far a run has come. Schedules depend on this and on nothing else.

    Training draws at steps 0 to ``total_steps - 1``. Validation draws at the end of the run (`step` is `total_steps`,
    `epoch` is `total_epochs`), however early it comes: its masks never move, and a curriculum is judged by what it
    leads to.

    Args:
        step: optimizer steps done before this one.
        total_steps: optimizer steps of the whole run.
        epoch: passes over the data completed.
        total_epochs: passes over the data of the whole run, the last of which may be cut short.
    """

    step: int = 0
    total_steps: int = 1
    epoch: int = 0
    total_epochs: int = 1

    @property
    def progress(self) -> float:
        """The share of the run that is done, in [0, 1]."""
        return min(1.0, self.step / max(1, self.total_steps))


def divisor(count: Tensor) -> Tensor:
    """What a total is divided by: its count, and 1 where nothing was counted, so that the mean is 0 there."""
    return torch.where(count == 0, 1, count)


@dataclass(frozen=True)
class Metric:
    """A mean to log, kept as a sum and a count so that means over micro-batches and ranks are exact.

    Args:
        total: the sum over items; its gradient is dropped.
        count: how many items were summed. A metric that counted nothing in a whole step is left out of its line.
    """

    total: Num[Tensor, ""]
    count: Tensor | float | int

    @property
    def mean(self) -> Float[Tensor, ""]:
        """total / count; 0 where nothing was counted."""
        return self.total / (divisor(self.count) if isinstance(self.count, Tensor) else self.count or 1)


@dataclass(frozen=True)
class Term(Metric):
    """One part of a loss.

    Args:
        total: the sum of the per-item losses.
        count: how many items were summed. Depends on the batch and the plan only, never on what the network computes.
        weight: its weight in the loss.
    """

    weight: float = 1.0


@dataclass(frozen=True)
class Output:
    """What a forward pass returns: loss terms and metrics by name."""

    terms: dict[str, Term]
    metrics: dict[str, Metric] = field(default_factory=dict)

    @property
    def loss(self) -> Float[Tensor, ""]:
        """The weighted sum of the terms' means: call ``output.loss.backward()`` in your own loop."""
        return torch.stack([term.weight * term.mean for term in self.terms.values()]).sum()


@dataclass(frozen=True)
class Plan:
    """Every random or scheduled choice of one forward pass. Methods that choose more than a mask extend it."""

    mask: Mask


@dataclass(frozen=True)
class Features:
    """The output of an encoder: tokens in spatial order, without class or register tokens.

    Args:
        tokens: one vector per token, row-major over `grid`.
        grid: tokens along each axis, for example (rows, columns).
        cls: the class token's vector, where the encoder has one.
        valid: False = padding, in samples shorter than the longest; None when there is none.
    """

    tokens: Float[Tensor, "batch tokens dim"]
    grid: tuple[int, ...]
    cls: Float[Tensor, "batch dim"] | None = None
    valid: Bool[Tensor, "batch tokens"] | None = None

    @property
    def pooled(self) -> Float[Tensor, "batch dim"]:
        """The mean over tokens, padding left out: one vector per sample."""
        if self.valid is None:
            return self.tokens.mean(1)
        kept = self.tokens.masked_fill(~self.valid[..., None], 0.0)
        return kept.sum(1) / self.valid.sum(1, keepdim=True).clamp(min=1)


class Batch(Protocol):
    """A frozen dataclass of tensors, with the samples' ids (see `unmask.core.randomness`)."""

    ids: Tensor


class Method(Protocol):
    """The functions of a trained method; see the module's docstring."""

    def draw(self, batch: Any, clock: Clock, key: Key) -> Any: ...
    def __call__(self, batch: Any, plan: Any) -> Output: ...
    def encode(self, batch: Any) -> Features: ...
    def predict(self, batch: Any, plan: Any) -> Tensor: ...
    def picture(self, batch: Any, plan: Any) -> dict[str, Tensor]: ...


def encoder_of(method: Any) -> nn.Module:
    """The network that transfers: what the method's ``encoder_of()`` gives, else its attribute ``encoder``.

    Raises:
        UnmaskError: it has neither.
    """
    network = method.encoder_of() if hasattr(method, "encoder_of") else getattr(method, "encoder", None)
    if not isinstance(network, nn.Module):
        raise UnmaskError(
            f"which network of {type(method).__name__} transfers? Name it `encoder`, or offer `encoder_of() -> "
            "nn.Module` (a ModuleDict of several)"
        )
    return network


def map_tensors(value: T, function: Any) -> T:
    """Apply `function` to every tensor in nested dataclasses, mappings and sequences."""
    if isinstance(value, Tensor):
        return function(value)
    if is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: map_tensors(getattr(value, f.name), function) for f in fields(value)}
        return replace(value, **changed)
    if isinstance(value, Mapping):
        return type(value)((k, map_tensors(v, function)) for k, v in value.items())  # type: ignore[call-arg]
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(v, function) for v in value)
    return value


def to_device(value: T, device: torch.device | str) -> T:
    """Move every tensor of a batch or plan to `device`, without waiting where the memory is pinned."""
    return map_tensors(value, lambda tensor: tensor.to(device, non_blocking=True))
