"""Runs that are killed at a chosen moment, in processes of their own."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import toy

TRAINING = {"batch_size": 8, "micro_batch": 4, "workers": 0, "threads": 1}


def die() -> None:
    """What a power cut looks like from inside."""
    os.kill(os.getpid(), signal.SIGKILL)


def train(out: Path, fault: str = "", resume: bool = False, workers: int = 0) -> None:
    """Train the toy for 9 steps of two micro-batches, saving every 2 steps; `fault` names the moment of death."""
    multiprocessing.set_start_method("fork", force=True)  # for data workers, as in an ordinary process
    recipe = toy.toy_recipe(**{**TRAINING, "workers": workers, "checkpoint_every_steps": 2, "log_every": 1})
    options: dict[str, Any] = {"method": toy.ToyMethod(dropout=0.2), "train": toy.ToySet(28)}
    FAULTS[fault](options)
    try:
        toy.run_toy(out, recipe, resume=resume, **options)
    except Exception as error:
        (out / "error.txt").write_text(f"{type(error).__name__}: {error}")
        raise SystemExit(1) from None


def _at_forward(count: int) -> Callable[[dict[str, Any]], None]:
    """Die in the forward pass number `count` of those that train."""

    def plant(options: dict[str, Any]) -> None:
        calls = []

        class Doomed(toy.ToyMethod):
            def forward(self, batch: Any, plan: Any) -> Any:
                calls.extend([1] if self.training else [])
                if len(calls) == count:
                    die()
                return super().forward(batch, plan)

        options["method"] = Doomed(dropout=0.2)

    return plant


def _at_after_step(options: dict[str, Any]) -> None:
    """Die when the weights of step 6 have moved and nothing has been written about it."""

    class Doomed(toy.ToyMethod):
        def after_step(self, clock: Any) -> None:
            if clock.step == 5:
                die()

    options["method"] = Doomed(dropout=0.2)


def _in_save(options: dict[str, Any]) -> None:
    """Die with the temporary file of step 6's checkpoint half written."""
    from unmask.core.training import checkpoint

    save_file = checkpoint.save_file

    def half(tensors: Any, path: Path, **kwargs: Any) -> None:
        save_file(tensors, path, **kwargs)
        if "step-00000006" in path.name:
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size // 2)
            die()

    checkpoint.save_file = half  # type: ignore[assignment]


def _before_rename(options: dict[str, Any]) -> None:
    """Die when step 6's checkpoint is whole but has not its name yet."""
    from unmask.core.training import files

    replace = os.replace

    def doomed(source: Any, target: Any) -> None:
        if "step-00000006" in str(target):
            die()
        replace(source, target)

    files.os.replace = doomed  # type: ignore[assignment]


def _in_worker(options: dict[str, Any]) -> None:
    """A data worker dies while it loads for the second epoch."""
    parent = os.getpid()

    class Doomed(toy.ToySet):
        def __getitem__(self, item: tuple[int, int]) -> Any:
            if item == (3, 1) and os.getpid() != parent:
                die()
            return super().__getitem__(item)

    options["train"] = Doomed(28)


def _terminated(options: dict[str, Any]) -> None:
    """SIGTERM arrives in the middle of step 5."""
    _signalled(options, signal.SIGTERM)


def _interrupted(options: dict[str, Any]) -> None:
    """Ctrl-C arrives in the middle of step 5."""
    _signalled(options, signal.SIGINT)


def _signalled(options: dict[str, Any], number: int) -> None:
    class Signalled(toy.ToyMethod):
        def after_step(self, clock: Any) -> None:
            if clock.step == 4:
                os.kill(os.getpid(), number)

    options["method"] = Signalled(dropout=0.2)


def _full_disk(options: dict[str, Any]) -> None:
    """From step 5 on the system refuses files of more than 8000 bytes: metrics still fit, a checkpoint does not."""

    class Full(toy.ToyMethod):
        def after_step(self, clock: Any) -> None:
            if clock.step == 4:
                resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))

    options["method"] = Full(dropout=0.2)


FAULTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "": lambda options: None,
    "in the first step": _at_forward(1),
    "in a step": _at_after_step,
    "in accumulation": _at_forward(10),
    "in a save": _in_save,
    "before the rename": _before_rename,
    "in a worker": _in_worker,
    "terminated": _terminated,
    "interrupted": _interrupted,
    "full disk": _full_disk,
}


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what the clock on the wall says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]
