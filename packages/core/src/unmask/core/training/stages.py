"""Work in stages (quantizer, then training; teacher, then student), each done once and never half.

A stage writes into a folder of its own. Its folder appears under its name only when the stage is done, together with a
digest of what it was made from; when nothing of that changed the stage is skipped the next time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_DONE = "stage.json"


@dataclass(frozen=True)
class Stage:
    """One piece of work.

    Args:
        name: its folder's name, unique among the stages.
        run: does the work, into the folder it is given. A stage that can resume by itself finds there what an
            interrupted attempt of the same inputs left, if it is `resumable`.
        inputs: settings that the result depends on, as JSON values; earlier stages count by themselves.
        resumable: keep the folder of an interrupted attempt for the next one.
    """

    name: str
    run: Callable[[Path], Any]
    inputs: Mapping[str, Any] = field(default_factory=dict)
    resumable: bool = False


def run_stages(out: str | Path, stages: Sequence[Stage]) -> list[Path]:
    """Run the stages in order, skipping those that are done, and return their folders.

    A stage is done when its folder was made from the same inputs and the same earlier stages.
    """
    out, digest = Path(out), ""
    out.mkdir(parents=True, exist_ok=True)
    folders = []
    for stage in stages:
        digest = _digest(digest, stage)
        folders.append(out / stage.name)
        if _made_from(folders[-1]) != digest:
            _run(stage, folders[-1], digest)
    return folders


def _run(stage: Stage, folder: Path, digest: str) -> None:
    unfinished = folder.with_name(f".{folder.name}-{digest}")
    if not stage.resumable:
        shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(exist_ok=True)
    stage.run(unfinished)
    (unfinished / _DONE).write_text(json.dumps({"made_from": digest}), encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(unfinished, folder)


def _made_from(folder: Path) -> str | None:
    path = folder / _DONE
    return json.loads(path.read_text(encoding="utf-8"))["made_from"] if path.is_file() else None


def _digest(before: str, stage: Stage) -> str:
    text = json.dumps([before, stage.name, dict(stage.inputs)], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
