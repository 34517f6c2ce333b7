"""A cloud's pillars, mask, turn and points are its own: batch size, workers, ranks and resumption have no say."""

from __future__ import annotations

import pytest
import torch
from scans import MODEL
from torch import Tensor

from unmask.core.method import Clock
from unmask.core.randomness import Key
from unmask.core.training.position import Position, batches
from unmask.core.training.recipe import make_recipe
from unmask.pointcloud.data.clouds import collate, open_split
from unmask.pointcloud.methods import geomae

SEED, SAMPLES = 5, 64
Seen = dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]]


def seen(batch_size: int, workers: int = 0, world: int = 1, start: int = 0) -> Seen:
    """(sample id, epoch) -> (points, pillars, which are hidden) of two epochs, as training would draw them."""
    data = {
        "source": "shapes",
        "normalize": "sphere",
        "range": [-1.0, -1.0, -1.0, 1.0, 1.0, 1.0],
        "pillar": [0.25, 0.25],
        "max_points": 300,
    }
    recipe = make_recipe({"method": "pointcloud/geomae", "model": MODEL, "data": data})
    items = open_split(recipe.data, "train", seed=SEED, augment=True)
    model = geomae.build(recipe.model, recipe.data)
    steps = 2 * SAMPLES // batch_size
    result: Seen = {}
    for rank in range(world):
        position = Position(SEED, SAMPLES, batch_size, batch_size // world, steps, start, rank, world)
        order = list(position)
        for chunk, batch in zip(order, batches(items, order, collate, workers, pin=False), strict=True):
            epoch = chunk[0][1]
            plan = model.draw(batch, Clock(), Key.of(SEED, batch.ids, epoch).stream("plan"))
            bounds = plan.voxels.offsets.tolist()
            for row, sample in enumerate(batch.ids.tolist()):
                assert (sample, epoch) not in result
                pillars = plan.voxels.pillars[bounds[row] : bounds[row + 1], 1:]
                hidden = plan.mask.hidden[row, : len(pillars)]
                assert int((~hidden).sum()) == max(1, int(0.3 * len(pillars)))
                result[sample, epoch] = batch.take([row]).points, pillars, hidden
    return result


def assert_equal(a: Seen, b: Seen) -> None:
    shared = a.keys() & b.keys()
    assert len(shared) == min(len(a), len(b)) > 0
    for key in shared:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(a[key], b[key], strict=True)), key


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # four workers on fewer cores are the point
def test_the_same_cloud_gets_the_same_mask() -> None:
    usual = seen(32)
    assert len(usual) == 2 * SAMPLES
    assert_equal(usual, seen(1))
    assert_equal(usual, seen(32, workers=4))
    assert_equal(usual, seen(32, world=2))
    assert_equal(usual, seen(32, start=3))


def test_another_epoch_brings_another_turn_and_mask() -> None:
    usual = seen(32)
    sample = next(iter(usual))[0]
    for first, second in zip(usual[sample, 0], usual[sample, 1], strict=True):
        assert first.shape != second.shape or not torch.equal(first, second)
