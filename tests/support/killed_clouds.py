"""GeoMAE on synthetic solids, small enough for tests, in a process that can be killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from scans import MODEL

STEPS = 6
RECIPE: dict[str, Any] = {
    "method": "pointcloud/geomae",
    "model": MODEL,
    "data": {
        "source": "shapes",
        "normalize": "sphere",
        "range": [-1.0, -1.0, -1.0, 1.0, 1.0, 1.0],
        "pillar": [0.25, 0.25],
        "max_points": 256,
    },
    "schedule": {"steps": STEPS, "warmup_epochs": 0.01},
    "training": {"batch_size": 8, "micro_batch": 4, "threads": 1, "log_every": 1, "checkpoint_every_steps": 2},
}


def train_geomae(out: Path, die_in: int = 0, resume: bool = False) -> None:
    """Train six steps of two micro-batches, saving every two; die in the forward pass of that number, if any."""
    from unmask.core.training.loop import train
    from unmask.core.training.recipe import make_recipe, read_yaml
    from unmask.pointcloud.methods import geomae

    calls = []
    forward = geomae.GeoMAE.forward

    def doomed(self: geomae.GeoMAE, *args: object) -> object:
        calls.extend([1] if self.training else [])
        if len(calls) == die_in:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, *args)  # type: ignore[arg-type]

    geomae.GeoMAE.forward = doomed  # type: ignore[method-assign,assignment]
    raw = read_yaml(out / "recipe.yaml") if resume else RECIPE
    train(make_recipe(raw), out, resume=resume, progress=False)
