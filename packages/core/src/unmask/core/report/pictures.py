"""A method at work on validation samples, for a domain to draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from unmask.core import registry
from unmask.core.errors import UnmaskError
from unmask.core.method import Clock, to_device
from unmask.core.randomness import Key
from unmask.core.report.gather import RunFacts
from unmask.core.report.parts import Pictures
from unmask.core.training.checkpoint import LoadedRun, load_run


@dataclass(frozen=True)
class Shown:
    """Validation samples and what a run's method chose for them.

    Args:
        run: the method, in eval mode on the CPU, with its recipe and step.
        batch: the samples.
        plan: drawn at the run's last step, keyed so that a report repeats.
        names: of the samples.
    """

    run: LoadedRun
    batch: Any
    plan: Any
    names: list[str]


def draw_with(run: RunFacts, samples: int, draw: Callable[[Shown], Pictures]) -> Pictures:
    """Show a run's method `samples` validation samples, evenly spaced, and let a domain draw what it answers.

    Without weights or data there is a note instead, and of a method that has no ``picture`` there is nothing.
    """
    try:
        loaded = load_run(run.path)
    except UnmaskError as error:
        return Pictures(note=f"No pictures: {error}")
    parameters = sum(p.numel() for p in loaded.method.parameters())
    if not all(hasattr(loaded.method, face) for face in ("draw", "picture")):
        return Pictures(parameters=parameters)
    try:
        with torch.no_grad():
            found = draw(_show(loaded, samples))
    except UnmaskError as error:
        found = Pictures(note=f"No pictures: {error}")
    return replace(found, parameters=parameters)


def show(path: Path, samples: int) -> Shown:
    """A run's method and `samples` validation samples, evenly spaced, with what it chooses for them.

    Raises:
        UnmaskError: it has no weights yet, or its data are gone.
    """
    return _show(load_run(path), samples)


def _show(run: LoadedRun, samples: int) -> Shown:
    part, seed, method = registry.data_kind(run.recipe.method), run.recipe.seed, run.method
    dataset = part.open_split(run.recipe.data, "val", seed=seed, augment=False)
    chosen = torch.linspace(0, len(dataset) - 1, min(samples, len(dataset))).long().tolist()
    batch = to_device(part.collate([dataset[index, 0] for index in chosen]), "cpu")
    key = Key.of(seed, batch.ids, 0).stream("plan")
    plan = method.draw(batch, Clock(run.step, max(1, run.step)), key)  # type: ignore[operator]  # a method has it
    return Shown(run, batch, plan, [dataset.name_of(int(i)) for i in batch.ids])
