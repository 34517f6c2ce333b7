"""A run's directory: its recipe, environment, metrics and checkpoints."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from unmask.core import registry
from unmask.core.errors import UnmaskError
from unmask.core.training.changes import TOTAL, changed_keys
from unmask.core.training.files import write_json, write_text
from unmask.core.training.recipe import (
    Recipe,
    read_yaml,
    to_yaml,
)
from unmask.core.training.signals import Interrupted
from unmask.core.training.startup import StartupError

MADE_BY_A_RUN = ("recipe.yaml", "metrics.jsonl", "model.safetensors", "checkpoints")
_BEGUN = ("recipe.yaml", "environment.json", "metrics.jsonl")  # what is there before the first step


class RunDirectory:
    """The files of one run.

    Args:
        path: the directory, which need not exist yet.
        whole: the run that this one is a stage of, where it is one: what a person resumes.
    """

    def __init__(self, path: str | Path, whole: str | Path | None = None) -> None:
        self.path = Path(path)
        self.whole = Path(whole or path)
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model.safetensors"
        self.metrics = self.path / "metrics.jsonl"
        self.recipe = self.path / "recipe.yaml"
        self.verb = "train"  # what makes and resumes it
        self._is_ours = False  # the directory was made by `check_place`

    @property
    def resume_command(self) -> str:
        """What to type to go on."""
        return f"unmask {self.verb} --resume {self.whole}"

    def check_place(self, *, resume: bool) -> None:
        """Whether a run can begin, or go on, here. Leaves nothing behind but the directory.

        A run that was killed before its first step is not in the way.

        Raises:
            UnmaskError: something is in the way; the message says what to do.
        """
        found = [name for name in MADE_BY_A_RUN if (self.path / name).exists()]
        if resume and not self.recipe.is_file():
            raise UnmaskError(f"{self.path} has no recipe.yaml, so there is no run to resume; start one with --out")
        if found and not resume and not self._was_left:
            raise UnmaskError(
                f"{self.path} already holds a run ({', '.join(found)}). Go on with: {self.resume_command} - "
                "or choose another --out"
            )
        self._is_ours = not self.path.exists()
        check_writable(self.path)

    @property
    def _was_left(self) -> bool:
        """Whether what is here is of a run that ended before its first step, and before a stage of it was done.

        A recipe.yaml alone may be the user's own.
        """
        path = self.path / "environment.json"
        if self._has_steps or any(self.path.glob("stages/*/stage.json")) or not path.is_file():
            return False
        process = json.loads(path.read_text(encoding="utf-8")).get("process", {})
        return process.get("host") != platform.node() or not _is_alive(int(process["id"]))

    @property
    def _has_steps(self) -> bool:
        """Whether a step was made here or in an earlier stage."""
        made = ("metrics.jsonl", "model.safetensors", "checkpoints/step-*")
        places = [self.path, *self.path.glob("stages/*")]
        return any(file.stat().st_size > 0 for place in places for name in made for file in place.glob(name))

    @contextlib.contextmanager
    def starting(self, *, resume: bool, first: bool) -> Iterator[None]:
        """While entered, an error before the first step takes away what was made, so that a corrected command can run.

        Stages that are done stay, and a corrected run takes them up where they suit it. Enter after `check_place`.

        Args:
            resume: the run goes on, so that nothing is taken away.
            first: this process writes the directory.
        """
        try:
            yield
        except Interrupted:
            raise
        except Exception as error:
            # A StartupError may come in the second step: the first is no progress then.
            if first and not resume and (isinstance(error, StartupError) or not self._has_steps):
                self._clear()
            raise

    def _clear(self) -> None:
        for name in _BEGUN:
            (self.path / name).unlink(missing_ok=True)
        for unfinished in self.path.glob("stages/.*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        empty = [self.checkpoints, self.path / "stages", *([self.path] if self._is_ours else [])]
        for folder in empty:
            with contextlib.suppress(OSError):  # it holds something, or is not there
                folder.rmdir()

    def check_same(self, recipe: Recipe, saved: dict[str, Any] | None, *, extend: bool) -> None:
        """Whether `recipe` is the one of the checkpoint it goes on from, or of recipe.yaml where there is none yet.

        Raises:
            UnmaskError: it is not; says what changed.
        """
        changes = changed_keys(saved or read_yaml(self.recipe), recipe)
        other = [text for key, text in changes.items() if key not in TOTAL]
        if other:
            raise UnmaskError(
                f"the recipe changed since {self.path} was started: {'; '.join(other)}. "
                "Put it back to resume, or start a new run with another --out"
            )
        if changes and not extend:
            raise UnmaskError(
                f"the length of {self.path} changed: {'; '.join(changes.values())}. Add --extend to train on to the "
                "new length (the learning rate then follows the new schedule)"
            )

    def announce(self, recipe: Recipe, facts: dict[str, Any], step: int = 0) -> None:
        """Write which run this is and where it goes on: before its first stage, and again before its first step."""
        self._write_environment(step, facts)
        write_text(self.recipe, to_yaml(recipe))

    def begin(self, recipe: Recipe, step: int, facts: dict[str, Any], *, unfinished: bool) -> None:
        """Write what is known at the start, and cut the metrics back to `step`."""
        if unfinished:  # final weights of a run that is now made longer; its checkpoint of that step has them too
            self.model.unlink(missing_ok=True)
        self.announce(recipe, facts, step)
        self.checkpoints.mkdir(exist_ok=True)
        write_text(self.metrics, "".join(metrics_until(self.metrics, step)))
        with contextlib.suppress(registry.UnknownMethodError):  # `fit` takes methods that no package has, too
            keep = getattr(registry.data_kind(recipe.method), "keep", None)
            if keep is not None:
                keep(recipe.data, self.path)

    def _write_environment(self, step: int, facts: dict[str, Any]) -> None:
        path = self.path / "environment.json"
        now = {**environment(), **facts}
        if step and path.is_file():
            first = json.loads(path.read_text(encoding="utf-8"))
            now = {**first, "resumed": [*first.get("resumed", []), {"step": step, **now}]}
        write_json(path, now)

    def note_problems(self, names: list[str]) -> None:
        """Record which samples were left out."""
        path = self.path / "environment.json"
        write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "left_out": names})

    def append(self, line: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl, written out at once.

        Raises:
            UnmaskError: the disk is full; says how to go on.
        """
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as error:
            raise UnmaskError(
                f"cannot write {self.metrics}: {error.strerror}. The last checkpoint is intact; make room and go on "
                f"with: {self.resume_command}"
            ) from error

    def lines(self, step: int) -> list[dict[str, Any]]:
        """The metrics up to and with `step`."""
        return [json.loads(line) for line in metrics_until(self.metrics, step)]

    def sync_metrics(self) -> None:
        """Have metrics.jsonl on the disk: done before a checkpoint that counts on its lines."""
        with self.metrics.open("a", encoding="utf-8") as file:
            os.fsync(file.fileno())


def check_writable(path: Path) -> None:
    """Raise UnmaskError unless files can be made in `path`, which is created."""
    probe = path / ".writable"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"unmask")
        probe.unlink(missing_ok=True)
    except OSError as error:
        with contextlib.suppress(OSError):
            probe.unlink()
        raise UnmaskError(f"cannot write to {path}: {error.strerror}. Choose another --out") from None


def metrics_until(path: Path, step: int) -> list[str]:
    """The lines of a metrics file up to and with `step`; a line cut short by a crash ends them."""
    kept: list[str] = []
    if not path.is_file():
        return kept
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(line)
    return kept


def environment() -> dict[str, Any]:
    """Versions, hardware and command: what a reader needs to repeat a run."""
    names = ("torch", "numpy", "safetensors", "lightning-fabric", "timm", "transformers", "unmask-core")
    packages = [*names, *(f"unmask-{name.replace('_', '-')}" for name in registry.domains())]
    cuda = torch.cuda.is_available()
    return {
        "process": {"host": platform.node(), "id": os.getpid()},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": {name: v for name in packages if (v := _version(name))},
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "cuda": torch.version.cuda if cuda else None,
        "commit": _commit(),
    }


def _is_alive(process: int) -> bool:
    """Whether another process of this machine has this number."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return process != os.getpid()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
