"""HuBERT in two iterations on synthetic clips, small enough for tests, in processes that can be killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

ENCODER = {"channels": 8, "dim": 16, "depth": 2, "heads": 2, "positional_kernel": 4, "positional_groups": 2}
KMEANS = {"n_init": 1}


def write_clips(folder: Path, count: int = 24) -> Path:
    """Chirps and noise of 0.4 to 0.8 s at 16 kHz, by two speakers."""
    rng = np.random.default_rng(0)
    for i in range(count):
        time = np.arange(int(16_000 * rng.uniform(0.4, 0.8))) / 16_000
        tone = np.sin(2 * np.pi * (150 + 25 * (i % 8)) * time * (1 + 0.3 * time))
        place = folder / f"speaker{i % 2}" / f"{i:02d}.wav"
        place.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(place, (0.3 * tone + 0.02 * rng.standard_normal(len(time))).astype(np.float32), 16_000)
    return folder


def raw_recipe(data: Path, method: str = "speech_audio/hubert", **changes: Any) -> dict[str, Any]:
    """A recipe as nested mappings: 4 steps on MFCC clusters, then 6 on clusters of layer 1."""
    first = {"targets": [{"kind": "mfcc", "clusters": 4, "kmeans": KMEANS}], "length": 0.67}
    second = {"targets": [{"kind": "layer", "layers": [1], "clusters": 5, "kmeans": KMEANS}]}
    return {
        "method": method,
        "stages": {"iterations": [first, second]},
        "model": {"encoder": dict(ENCODER), "head": {"dim": 8}, "masking": {"length": 4}},
        "data": {"source": str(data), "min_seconds": 0.2, "max_seconds": 0.6, "val_share": 0.2},
        "optimizer": {"base_lr": 1e-3, "reference_batch": 6},
        "schedule": {"steps": 6, "epochs": 10, "warmup_epochs": 1, "decay": "linear"},
        "training": {"batch_size": 6, "log_every": 1, "checkpoint_every_steps": 2, "threads": 1},
    } | changes


def train_hubert(data: Path, out: Path, fault: str = "", resume: bool = False) -> None:
    """Train it, and die in the stage that `fault` names: in a model's fourth step, or when labels are half written."""
    from unmask.core.training.loop import Loop, train
    from unmask.core.training.recipe import make_recipe, read_yaml
    from unmask.speech_audio.targets.labels import LabelWriter

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if fault.startswith("model"):
        real_step, stage = Loop._train_step, fault.removeprefix("model ")

        def step(self: Any, calls: Any) -> Any:
            inner = self.run_dir.path != Path(out)
            if self.step == 3 and (stage == "1") == inner:
                die()
            return real_step(self, calls)

        Loop._train_step = step  # type: ignore[method-assign]
    elif fault.startswith("labels"):
        real_add, stage = LabelWriter.add, fault.removeprefix("labels ")

        def add(self: Any, *args: Any) -> None:
            if f"labels-{stage}" in str(self.out) and add.count == 5:  # type: ignore[attr-defined]
                die()
            add.count += f"labels-{stage}" in str(self.out)  # type: ignore[attr-defined]
            real_add(self, *args)

        add.count = 0  # type: ignore[attr-defined]
        LabelWriter.add = add  # type: ignore[method-assign]
    raw = read_yaml(out / "recipe.yaml") if resume else raw_recipe(data)
    train(make_recipe(raw), out, resume=resume, progress=False)
