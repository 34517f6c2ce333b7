"""`unmask evaluate`: a run is loaded, its task measures it beside references, and the result is written and shown.

What is measured is the task's (`unmask.core.domain.Task`): one module a task in a domain's ``evaluation`` folder.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from unmask.core import registry
from unmask.core.evaluation.encoding import (
    Encode,
    Encoding,
    encoder_of_samples,
    encoding_of,
    name_left_out,
    say_notes,
    settle_on,
    untrained,
)
from unmask.core.evaluation.features import pick_device
from unmask.core.training.checkpoint import LoadedRun, load_run
from unmask.core.training.files import write_json
from unmask.core.training.rundir import metrics_until


@dataclass(frozen=True)
class Job:
    """One evaluation, as a task gets it.

    Args:
        run: the trained method, in eval mode on `device`, with its recipe.
        data: settings of the data to measure on.
        device: where to compute.
        quick: leave out what takes longest.
        seed: of everything that is chosen.
        epochs: passes of fine-tuning; None for the protocol's.
        references: measure the reference rows, too.
    """

    run: LoadedRun
    data: Any
    device: torch.device
    quick: bool = False
    seed: int = 0
    epochs: int | None = None
    references: bool = True

    @property
    def encoding(self) -> Encoding:
        return encoding_of(self.run.recipe.method)

    @cached_property
    def random(self) -> nn.Module:
        """The same method at random weights: the reference of what is trained."""
        return untrained(self.run, self.seed).to(self.device)

    @property
    def methods(self) -> dict[str, Any]:
        """The trained method and, where references are wanted, the same at random weights, by row."""
        return {"trained": self.run.method} | ({"random": self.random} if self.references else {})

    @property
    def encoders(self) -> dict[str, Encode]:
        """`methods` as functions of a batch to one vector per sample."""
        return {name: encoder_of_samples(method, self.encoding) for name, method in self.methods.items()}

    @property
    def at_once(self) -> int:
        """Samples per forward pass."""
        return self.encoding.at_once(self.run.recipe)

    @property
    def workers(self) -> int:
        return self.run.recipe.training.workers

    def open(self, split: Literal["train", "val", "test"]) -> Any:
        """A split of the data, without augmentation.

        Raises:
            UnmaskError: there is none.
        """
        return registry.data_kind(self.run.recipe.method).open_split(self.data, split)

    def open_train(self) -> Any:
        """The training split, once the methods are ready to be measured on data like it.

        What it has to say for itself is said, and BatchNorm gets its statistics on it (`settle`): those of a short run
        have some of its start's, and a random encoder has none. On disk the run stays as it is.
        """
        train = self.open("train")
        say_notes(train, self.data.source, self.run)
        for method in self.methods.values():
            settle_on(method, self.run, train, self.device, self.seed)
        return train

    def name_left_out(self, *splits: Any) -> None:
        """Name the samples of these splits that could not be used, each once."""
        problems = dict.fromkeys(tuple(problem) for split in splits for problem in split.problems)
        name_left_out(list(problems), self.run.recipe.method)


def evaluate(
    run_dir: str | Path,
    *,
    data: str | None = None,
    device: str = "auto",
    quick: bool = False,
    seed: int = 0,
    epochs: int | None = None,
    references: bool = True,
) -> dict[str, Any]:
    """Measure a run by its method's task, beside reference rows. Writes RUN/evaluation.json.

    Args:
        run_dir: a run directory; one that is still training is measured as far as it is.
        data: other data than the run's own: a folder or an embedded set.
        device: ``auto``, ``cpu`` or ``cuda``.
        quick: leave out what takes longest, for example fine-tuning.
        seed: of everything that is chosen, and of the reference's random weights.
        epochs: passes of fine-tuning; None for the protocol's.
        references: measure the reference rows, too; without them only ``trained`` is, for a comparison that has them.

    Returns:
        What was written, as a reader of the file gets it: which run on which data; ``names``, titles of the rows;
        ``val_loss``, the last one of training; and what the task measured, its ``rows`` among it. `table` makes text
        of it.

    Raises:
        UnmaskError: no run, no data, no such device, or its domain does not evaluate its task.
    """
    began, place = time.perf_counter(), pick_device(device)
    run = load_run(run_dir, place)
    task = registry.task(run.recipe.method)
    settings = encoding_of(run.recipe.method).settings(run.recipe.data, data)
    measured = task.measure(Job(run, settings, place, quick, seed, epochs, references))
    result = {
        "run": str(run_dir),
        "method": run.recipe.method,
        "step": run.step,
        "data": settings.source,
        "seed": seed,
        "quick": quick,
        "names": {name: title for name, title in task.ROWS.items() if name in measured["rows"]},
        "val_loss": val_loss(Path(run_dir)),
        **measured,
        "seconds": round(time.perf_counter() - began, 1),
    }
    write_json(Path(run_dir) / "evaluation.json", result)
    return json.loads(json.dumps(result))


def val_loss(run_dir: Path) -> float | None:
    """The last validation loss that training wrote."""
    lines = [json.loads(line) for line in metrics_until(run_dir / "metrics.jsonl", sys.maxsize)]
    return next((line["val_loss"] for line in reversed(lines) if "val_loss" in line), None)


def table(result: dict[str, Any]) -> str:
    """What `evaluate` returned, as text for a terminal."""
    return registry.task(result["method"]).table(result)
