"""Numbers that move as a run goes on (learning rate, weight decay, a teacher's momentum), as functions of the clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from unmask.core.errors import UnmaskError

if TYPE_CHECKING:
    from unmask.core.method import Clock
    from unmask.core.training.recipe import Recipe

Shape = Literal["linear", "cosine"]
NotNegative = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class Scheduled:
    """A number that moves from `start` to `end`, after a warm-up if there is one. Call it with a clock.

    Positions are shares of the run, so a schedule keeps its shape when a run is made longer or shorter.

    Args:
        start: the value at the beginning, or at the end of the warm-up.
        end: the value at the horizon, which it keeps from there on; null stays at `start`.
        shape: a line, or half a cosine.
        warmup: share of the run, in [0, 1], that rises from `warmup_start` to `start`.
        warmup_start: the value at step 0 when there is a warm-up.
        warmup_shape: of the rise.
        moves_from: whether the way to `end` begins after the warm-up or at step 0 (the warm-up then cuts into it).
        horizon: where `end` is, as a multiple of the run: beyond 1 the run stops on the way, as V-JEPA's does at 1.25.
        epochs: lay the schedule over this many epochs instead of the run, and move it once an epoch, as HPM does.
    """

    start: NotNegative
    end: NotNegative | None = None
    shape: Shape = "linear"
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.0
    warmup_start: NotNegative = 0.0
    warmup_shape: Shape = "linear"
    moves_from: Literal["warmup", "start"] = "warmup"
    horizon: Annotated[float, Field(gt=0)] = 1.0
    epochs: Annotated[int, Field(ge=1)] | None = None

    def __call__(self, clock: Clock) -> float:
        """The value at the step that `clock` is at."""
        at = clock.progress if self.epochs is None else clock.epoch / self.epochs
        if at < self.warmup:
            return self.warmup_start + (self.start - self.warmup_start) * _rise(self.warmup_shape, at / self.warmup)
        if self.end is None:
            return self.start
        begin = self.warmup if self.moves_from == "warmup" else 0.0
        done = min((at - begin) / max(self.horizon - begin, 1e-12), 1.0)
        return self.end + (self.start - self.end) * _fall(self.shape, done)


def _rise(shape: Shape, done: float) -> float:
    return done if shape == "linear" else 0.5 * (1.0 - math.cos(math.pi * done))


def _fall(shape: Shape, done: float) -> float:
    return 1.0 - done if shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def _kind(value: Any) -> str:
    return "schedule" if isinstance(value, Mapping | Scheduled) else "number"


# A setting that is a number or a schedule: ``0.05`` in a recipe, or ``{start: 0.04, end: 0.4, shape: cosine}``.
NumberOrSchedule = Annotated[
    Annotated[NotNegative, Tag("number")] | Annotated[Scheduled, Tag("schedule")], Discriminator(_kind)
]


def value_at(value: float | Callable[[Clock], float], clock: Clock) -> float:
    """A number, or what a schedule says at `clock`."""
    return value(clock) if callable(value) else value


@dataclass(frozen=True)
class Drops:
    """A schedule times 0.1 at each of `at`, shares of the run, once its warm-up is over."""

    schedule: Scheduled
    at: tuple[float, ...]

    def __call__(self, clock: Clock) -> float:
        """The value at the step that `clock` is at."""
        value = self.schedule(clock)
        if clock.progress < self.schedule.warmup:
            return value
        return value * 0.1 ** sum(clock.progress >= drop for drop in self.at)


def learning_rate(recipe: Recipe) -> Callable[[Clock], float]:
    """The learning rate of a recipe, with the linear scaling rule applied."""
    o, s = recipe.optimizer, recipe.schedule
    scale = recipe.training.batch_size / o.reference_batch
    schedule = Scheduled(
        start=o.base_lr * scale,
        end=None if s.decay in ("constant", "step") else s.min_lr * scale,
        shape="linear" if s.decay == "linear" else "cosine",
        warmup=s.warmup_epochs / s.epochs,
        warmup_start=s.start_lr * scale,
        warmup_shape=s.warmup,
        moves_from=s.cosine_from,
        horizon=s.horizon,
    )
    return Drops(schedule, tuple(at / s.epochs for at in s.step_at)) if s.decay == "step" else schedule


def total_steps(recipe: Recipe, samples: int) -> int:
    """Optimizer steps of a run on `samples` training samples; the last, incomplete batch of an epoch is dropped."""
    return recipe.schedule.steps or recipe.schedule.epochs * (samples // recipe.training.batch_size)


def run_length(recipe: Recipe, samples: int) -> int:
    """Steps of a run on so many training samples.

    Raises:
        UnmaskError: there are fewer samples than one batch needs.
    """
    if samples < recipe.training.batch_size:
        raise UnmaskError(
            f"{samples} training samples do not fill one batch of {recipe.training.batch_size}; "
            f"lower training.batch_size (--set training.batch_size={max(1, samples)}) or give more data"
        )
    return total_steps(recipe, samples)
