"""The learning rate as a function of the clock."""

from __future__ import annotations

import math
from dataclasses import dataclass

from unmask.core.errors import UnmaskError
from unmask.core.method import Clock
from unmask.core.training.recipe import Recipe


@dataclass(frozen=True)
class LearningRate:
    """A warm-up, then half a cosine, a line or steps. A function of `clock.progress` and nothing else.

    Positions are shares of the run in [0, 1], so the schedule keeps its shape when a run is made longer or shorter.

    Args:
        peak: learning rate at the end of the warm-up.
        start: learning rate at step 0, when there is a warm-up.
        end: learning rate that the cosine or line falls to.
        warmup: share of the run that warms up.
        smooth: warm up along half a cosine instead of a line.
        cosine_from: share of the run at which the cosine or line is at its top; None for neither.
        linear: a line instead of the cosine.
        drops: shares of the run at which the rate is multiplied by 0.1.
    """

    peak: float
    start: float = 0.0
    end: float = 0.0
    warmup: float = 0.0
    smooth: bool = False
    cosine_from: float | None = 0.0
    linear: bool = False
    drops: tuple[float, ...] = ()

    @classmethod
    def of(cls, recipe: Recipe) -> LearningRate:
        """The schedule of a recipe, with the linear scaling rule applied."""
        o, s = recipe.optimizer, recipe.schedule
        scale = recipe.training.batch_size / o.reference_batch
        warmup = s.warmup_epochs / s.epochs
        cosine_from = warmup if s.cosine_from == "warmup" else 0.0
        return cls(
            peak=o.base_lr * scale,
            start=s.start_lr * scale,
            end=s.min_lr * scale,
            warmup=warmup,
            smooth=s.warmup == "cosine",
            cosine_from=None if s.decay == "step" else cosine_from,
            linear=s.decay == "linear",
            drops=tuple(at / s.epochs for at in s.step_at),
        )

    def __call__(self, clock: Clock) -> float:
        """The learning rate of the step that `clock` is at."""
        if clock.progress < self.warmup:
            done = clock.progress / self.warmup
            height = 0.5 * (1.0 - math.cos(math.pi * done)) if self.smooth else done
            return self.start + (self.peak - self.start) * height
        if self.cosine_from is None:
            return self.peak * 0.1 ** sum(clock.progress >= drop for drop in self.drops)
        done = min((clock.progress - self.cosine_from) / max(1.0 - self.cosine_from, 1e-12), 1.0)
        height = 1.0 - done if self.linear else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.end + (self.peak - self.end) * height


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
