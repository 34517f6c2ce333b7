"""A run of GeoMAE that is killed goes on to the same weights, statistics and optimizer state, bit for bit."""

from __future__ import annotations

import signal
from pathlib import Path

import torch
from faults import metrics
from killed_clouds import STEPS, train_geomae
from processes import in_process

from unmask.core.training.checkpoint import newest, read


def test_killed_in_accumulation_it_resumes_exactly(tmp_path: Path) -> None:
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    assert in_process(train_geomae, undisturbed) == 0
    # Two micro-batches a step: in the second of step 4, when BatchNorm has already seen the first.
    assert in_process(train_geomae, run, 8) == -signal.SIGKILL
    found = newest(run / "checkpoints")
    assert found is not None
    assert found.meta["step"] == 2
    assert in_process(train_geomae, run, 0, True) == 0

    for name in ("model.safetensors", f"checkpoints/step-{STEPS:08}.safetensors"):
        mine, theirs = read(run / name).tensors, read(undisturbed / name).tensors
        assert mine.keys() == theirs.keys()
        assert not [k for k in mine if not torch.equal(mine[k], theirs[k])]
    assert metrics(run) == metrics(undisturbed)
    seen = read(run / "model.safetensors").tensors["pillar_encoder.layers.0.norm.num_batches_tracked"]
    assert seen.item() == 2 * STEPS
