"""A sample's mask and crop are its own: batch size, workers, ranks and resumption have no say."""

from __future__ import annotations

import pytest
import torch

from unmask.core.masking import NoiseMasking, RandomMasking
from unmask.core.method import Clock
from unmask.core.randomness import Key
from unmask.core.training.position import Position, batches
from unmask.vision.data.images import Settings, collate, open_split
from unmask.vision.encoders.vit import VisionTransformer, ViTSettings
from unmask.vision.methods.mae import MAE, DecoderSettings

SEED, SAMPLES = 5, 128
Seen = dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]


def seen(batch_size: int, workers: int = 0, world: int = 1, start: int = 0, masking: object = None) -> Seen:
    """(sample id, epoch) -> (mask, augmented image) of two epochs, as training would draw them on all ranks."""
    settings = Settings("digits", (16, 16), 1, mean=(0.5,), std=(0.5,), crop_scale=(0.5, 1.0))
    items = open_split(settings, "train", seed=SEED, augment=True)
    encoder = VisionTransformer(ViTSettings(patch_size=2, dim=16, depth=1, heads=1), (16, 16), 1)
    model = MAE(encoder, DecoderSettings(16, 1, 1), masking=masking)  # type: ignore[arg-type]
    steps = 2 * SAMPLES // batch_size
    result: Seen = {}
    for rank in range(world):
        position = Position(SEED, SAMPLES, batch_size, batch_size // world, steps, start, rank, world)
        order = list(position)
        for chunk, batch in zip(order, batches(items, order, collate, workers, pin=False), strict=True):
            epoch = chunk[0][1]
            plan = model.draw(batch, Clock(), Key.of(SEED, batch.ids, epoch).stream("plan"))
            for row, sample in enumerate(batch.ids.tolist()):
                assert (sample, epoch) not in result
                result[sample, epoch] = plan.mask.hidden[row], batch.images[row]
    return result


def assert_equal(a: Seen, b: Seen) -> None:
    shared = a.keys() & b.keys()
    assert len(shared) == min(len(a), len(b)) > 0
    for key in shared:
        assert torch.equal(a[key][0], b[key][0]) and torch.equal(a[key][1], b[key][1]), key


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # four workers on fewer cores are the point
@pytest.mark.parametrize("masking", [RandomMasking(0.75), NoiseMasking(size=64, slices=4)], ids=["mae", "colormae"])
def test_the_same_sample_gets_the_same_mask(masking: object) -> None:
    usual = seen(64, masking=masking)
    assert len(usual) == 2 * SAMPLES
    assert_equal(usual, seen(1, masking=masking))
    assert_equal(usual, seen(64, workers=4, masking=masking))
    assert_equal(usual, seen(64, world=2, masking=masking))
    assert_equal(usual, seen(64, start=3, masking=masking))


def test_another_epoch_brings_another_mask() -> None:
    usual = seen(64)
    sample = next(iter(usual))[0]
    assert not torch.equal(usual[sample, 0][0], usual[sample, 1][0])
    assert not torch.equal(usual[sample, 0][1], usual[sample, 1][1])
