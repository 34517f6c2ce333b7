"""Work in stages (labels, then training; teacher, then student), each done once and never half.

A stage writes into a folder of its own. Its folder appears under its name only when the stage is done, together with a
digest of what it was made from; when nothing of that changed the stage is skipped the next time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from unmask.core.training.files import write_json
from unmask.core.training.recipe import Recipe

_DONE = "stage.json"
_PATIENCE = timedelta(days=30)  # of the processes that wait for the first one's stage


@dataclass(frozen=True)
class Stage:
    """One piece of work.

    Args:
        name: its folder's name, unique among the stages.
        run: does the work, into the folder it is given. A stage that can resume by itself finds there what an
            interrupted attempt of the same inputs left, if it is `resumable`.
        inputs: settings that the result depends on, as JSON values; the stages of `after` count by themselves.
        resumable: keep the folder of an interrupted attempt for the next one.
        after: names of the earlier stages that this one uses; None for all of them.
        on_all_ranks: run in every process (training); else in the first one while the others wait.
    """

    name: str
    run: Callable[[Path], Any]
    inputs: Mapping[str, Any] = field(default_factory=dict)
    resumable: bool = False
    after: tuple[str, ...] | None = None
    on_all_ranks: bool = False


@dataclass(frozen=True)
class Cost:
    """What a piece of work takes.

    Args:
        seconds: of all of it.
        memory_bytes: of the process at its peak, without what the process is itself.
    """

    seconds: float
    memory_bytes: int


@dataclass(frozen=True)
class Bench:
    """What the cost of a stage can be measured with, before anything is made.

    Args:
        train_set: the training split.
        val_set: the validation split, where there is one.
        method: of the last stage that trains, on the device, with random weights.
        device: where the stage would compute.
    """

    train_set: Any
    val_set: Any | None
    method: Any
    device: torch.device


@dataclass(frozen=True)
class Planned:
    """A stage before any is done, as a method's ``outline(recipe) -> list[Planned]`` gives them for a dry run.

    Args:
        name: as the stage's.
        recipe: what it trains, with stand-ins for what earlier stages make; the data are those of the last stage.
            None where it does other work.
        work: measures what other work costs, in a second or so; None where that cannot be known before.
    """

    name: str
    recipe: Recipe | None = None
    work: Callable[[Bench], Cost] | None = None


def run_stages(
    out: str | Path,
    stages: Sequence[Stage],
    *,
    fabric: Any = None,
    say: Callable[[str], Any] = lambda text: None,
    keep_done: bool = False,
) -> list[Path]:
    """Run the stages in order, skipping those that are done, and return their folders.

    A stage is done when its folder was made from the same inputs and the same earlier stages.

    Args:
        out: the folder that holds the stages' folders.
        stages: in order.
        fabric: Lightning Fabric, where several processes run this together.
        say: told which stage begins.
        keep_done: take stages that are done as they are, whatever they were made from; they then count as made from
            these inputs, too.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    digests: dict[str, str] = {}
    for i, stage in enumerate(stages, start=1):
        before = digests if stage.after is None else {name: digests[name] for name in stage.after}
        digests[stage.name] = _digest(before, stage)
        made_from = _made_from(out / stage.name)
        if digests[stage.name] in made_from or (keep_done and made_from):
            _keep(out / stage.name, digests[stage.name], fabric)
            say(f"stage {i} of {len(stages)}, {stage.name}: done before")
            continue
        say(f"stage {i} of {len(stages)}: {stage.name}")
        _run(stage, out / stage.name, digests[stage.name], fabric)
    return [out / stage.name for stage in stages]


def _run(stage: Stage, folder: Path, digest: str, fabric: Any) -> None:
    first = fabric is None or fabric.is_global_zero
    unfinished = folder.with_name(f".{folder.name}-{digest}")
    if first:
        if not stage.resumable:
            shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(exist_ok=True)
    with _waiting(fabric):
        if first or stage.on_all_ranks:
            stage.run(unfinished)
    if first:
        write_json(unfinished / _DONE, {"made_from": digest, "inputs": dict(stage.inputs)})
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(unfinished, folder)
    _wait(fabric)


def _wait(fabric: Any) -> None:
    if fabric is not None:
        fabric.barrier()


@contextmanager
def _waiting(fabric: Any) -> Iterator[None]:
    """A barrier before and after, the latter without Fabric's limit of half an hour: labels may take the first days.

    It is of gloo, which notices at once when a process that it waits for has died.
    """
    _wait(fabric)
    if fabric is None or fabric.world_size == 1:
        yield
        return
    group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
    yield
    torch.distributed.barrier(group)
    torch.distributed.destroy_process_group(group)


def _made_from(folder: Path) -> list[str]:
    """The digest of what a stage was made from, and of what it was kept for; empty where it is not done."""
    path = folder / _DONE
    if not path.is_file():
        return []
    done = json.loads(path.read_text(encoding="utf-8"))
    return [done["made_from"], *done.get("kept_for", [])]


def _keep(folder: Path, digest: str, fabric: Any) -> None:
    """Record that a stage was taken as it is, or the next run without `keep_done` would do it again."""
    made_from = _made_from(folder)
    if digest not in made_from and (fabric is None or fabric.is_global_zero):
        done = json.loads((folder / _DONE).read_text(encoding="utf-8"))
        write_json(folder / _DONE, done | {"kept_for": [*made_from[1:], digest]})


def _digest(before: Mapping[str, str], stage: Stage) -> str:
    text = json.dumps([dict(before), stage.name, dict(stage.inputs)], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
