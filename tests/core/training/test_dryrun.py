"""A dry run: what it says, when it says it, and whether that comes true."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy
from PIL import Image
from processes import in_process
from torch import nn

from unmask.core.errors import UnmaskError
from unmask.core.training import dryrun
from unmask.core.training.dryrun import dry_run
from unmask.core.training.launch import make_fabric
from unmask.core.training.loop import train
from unmask.core.training.measure import Line, LiveBytes, StepCost, Trial
from unmask.core.training.recipe import Recipe, load_recipe, make_recipe

ENCODER = {"patch_size": 8, "dim": 64, "depth": 4, "heads": 2}
DECODER = {"dim": 64, "depth": 2, "heads": 2}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(draw.integers(0, 255, (40, 40), dtype=np.uint8)).save(folder / f"{i:02}.png")
    return folder


def mae(pictures: Path, size: int, batch: int) -> Recipe:
    """MAE on few pictures, blown up to `size` pixels."""
    return make_recipe(
        {
            "method": "vision/mae",
            "model": {"encoder": ENCODER, "decoder": DECODER},
            "data": {"source": str(pictures), "image_size": size, "channels": 1, "flip": 0.0, "val_share": 0.2},
            "schedule": {"epochs": 2, "warmup_epochs": 0},
            "training": {"batch_size": batch, "threads": 1},
        }
    )


def grown(work: Any) -> tuple[Any, int]:
    """What `work` returns, and by how much it raised the most memory that this process ever had."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = work()
    return result, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def test_a_line_goes_through_the_largest_and_never_falls() -> None:
    assert Line.through([(1, 5.0)]).at(4) == 20
    assert Line.through([(1, 9.0), (2, 5.0), (4, 9.0)]).at(8) == 17, "5 + 2 a sample, of the two largest"
    assert Line.through([(2, 6.0), (4, 5.0)]).at(100) == 5
    assert Line.through([(1, 1.0), (2, 6.0)]).at(10) == 30, "no steeper than from 0"


def test_live_bytes_are_those_of_the_tensors_alive() -> None:
    x = torch.zeros(1000)
    with LiveBytes() as live:
        y = x + 1
        z = (y * 2).view(10, 100)[1:]  # a view keeps the whole
        assert live.now == 8000
        del y
        z.add_(1)
        assert live.now == 4000
        w = z.sum()
    assert w.item() == 2700
    assert live.peak == 8000
    with LiveBytes() as live:
        x.requires_grad_(True).square().exp().sum().backward()
    assert live.peak >= 3 * 4000, "what the backward pass needs is kept, and its own results come on top"


class Normed(toy.ToyMethod):
    """The toy with a norm over the batch, which needs two samples."""

    def __init__(self) -> None:
        super().__init__()
        self.over_batch = nn.BatchNorm1d(toy.TOKENS * toy.WIDTH)

    def forward(self, batch: toy.ToyBatch, plan: Any) -> Any:
        x = self.over_batch(batch.x.flatten(1)).reshape(batch.x.shape)
        return super().forward(toy.ToyBatch(x, batch.ids), plan)


def trial(method: nn.Module, most: int, budget: float, tmp_path: Path) -> tuple[Trial, StepCost]:
    recipe = toy.toy_recipe()
    tried = Trial(make_fabric(recipe, tmp_path), method, recipe, toy.ToySet(28), toy.collate)
    return tried, tried.run(range(28), most, budget)


def test_sizes_double_until_the_batch_or_the_budget_is_full(tmp_path: Path) -> None:
    assert [n for n, _ in trial(toy.ToyMethod(), 9, 60.0, tmp_path)[0].seconds] == [1, 2, 4, 8]
    tried, cost = trial(toy.ToyMethod(), 9, 0.0, tmp_path)
    assert [n for n, _ in tried.seconds] == [1]
    parameters = 4 * sum(p.numel() for p in tried.method.parameters())
    assert (cost.optimizer.weights, cost.optimizer.gradients) == (parameters, parameters)
    assert 2 * parameters <= cost.optimizer.state <= 2 * parameters + 100, "two moments, and step counts"


def test_a_norm_over_the_batch_is_tried_with_two(tmp_path: Path) -> None:
    assert [n for n, _ in trial(Normed(), 8, 0.0, tmp_path)[0].seconds] == [2]
    with pytest.raises(ValueError, match="more than 1 value"):
        trial(Normed(), 1, 0.0, tmp_path)


def test_recipe_and_counts_are_shown_before_anything_is_measured(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []

    class Watched(Trial):
        def run(self, *args: Any) -> StepCost:
            shown.append("MEASURED")
            return super().run(*args)

    monkeypatch.setattr(dryrun, "Trial", Watched)
    text, estimate = dry_run(mae(pictures, 16, 8), show=shown.append)
    assert shown[0] == text and text.startswith("method: vision/mae")
    assert shown[1].splitlines() == ["data        32 to train on, 8 to validate on", "length      8 steps, 4 an epoch"]
    assert shown[2].startswith("parameters ")
    assert shown[3] == "MEASURED"
    assert shown[4].splitlines() == estimate.lines()
    assert estimate.seconds >= estimate.seconds_per_step * 8


def estimate_only(pictures: Path, size: int, batch: int, out: Path) -> None:
    began = time.perf_counter()
    (_, estimate), most = grown(lambda: dry_run(mae(pictures, size, batch)))
    out.write_text(json.dumps([estimate.memory_bytes, most, time.perf_counter() - began]))


def train_only(pictures: Path, size: int, batch: int, out: Path) -> None:
    train(mae(pictures, size, batch), out.with_suffix(".run"), progress=False)
    out.write_text(json.dumps(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def test_a_large_batch_is_not_tried_whole(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "numbers"
    assert in_process(estimate_only, pictures, 512, 32, out) == 0
    memory, most, seconds = json.loads(out.read_text())
    assert memory > 2 * 2**30, "what the whole batch would take"
    assert most < 2**30
    assert seconds < 60


def test_the_memory_comes_true(pictures: Path, tmp_path: Path) -> None:
    for name, work in (("said", estimate_only), ("took", train_only)):
        assert in_process(work, pictures, 128, 32, tmp_path / name) == 0
    said, took = json.loads((tmp_path / "said").read_text())[0], json.loads((tmp_path / "took").read_text())
    assert took / 1.4 < said < took * 1.4


def test_the_recipe_of_a_wrong_ratio_is_refused_in_one_line(pictures: Path) -> None:
    changes = {"data.source": str(pictures), "model.mask_ratio": 0.999, "training.batch_size": 8}
    recipe = load_recipe("vision/mae", "tiny", changes)
    with pytest.raises(UnmaskError, match="model: 0 of 49 tokens visible"):
        dry_run(recipe)
