"""What only a GPU can show. Skipped where there is none; `pytest tests/gpu` on a machine that has one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unmask.core.masking import BernoulliMasking, BlockMasking, NoiseMasking, RandomMasking
from unmask.core.method import Clock
from unmask.core.randomness import Key
from unmask.vision.checks import check_method
from unmask.vision.data.images import ImageBatch
from unmask.vision.encoders.vit import VisionTransformer, ViTSettings
from unmask.vision.methods.mae import MAE, DecoderSettings
from unmask.vision.methods.simmim import BEiTSettings, SimMIM

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SMALL = dict(patch_size=4, dim=64, depth=2, heads=4)


def keys() -> tuple[Key, Key]:
    ids = torch.arange(-50, 50) * 7919
    return Key.of(3, ids, 5), Key.of(3, ids.cuda(), 5)


def test_bits_and_uniforms_are_equal_on_both_devices() -> None:
    here, there = keys()
    assert torch.equal(here.bits(1000), there.bits(1000).cpu())
    assert torch.equal(here.uniform(1000), there.uniform(1000).cpu())


@pytest.mark.parametrize(
    "masking",
    [
        RandomMasking(0.75),
        RandomMasking(0.6, "ceil_hide", 2),
        BernoulliMasking(0.5),
        BlockMasking(0.4),
        BlockMasking(0.4, exact=True),
        NoiseMasking("green"),
        NoiseMasking("blue"),
    ],
    ids=str,
)
def test_masks_are_equal_on_both_devices(masking: object) -> None:
    here, there = (masking(key, (14, 14)) for key in keys())  # type: ignore[operator]
    assert torch.equal(here.hidden, there.hidden.cpu())


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_methods_pass_the_check_suite_on_the_gpu(name: str) -> None:
    if name == "mae":
        method = MAE(VisionTransformer(ViTSettings(**SMALL), (32, 32)), DecoderSettings(32, 1, 4))
    else:
        settings = BEiTSettings(**SMALL, drop_path=0.0)
        method = SimMIM(VisionTransformer(settings, (32, 32)), masking=RandomMasking(0.6, "ceil_hide", 2))
    generator = torch.Generator().manual_seed(0)
    batch = ImageBatch(torch.randn(6, 3, 32, 32, generator=generator).cuda(), torch.arange(6).cuda())
    check_method(method.cuda(), batch)


def test_a_step_does_not_wait_for_the_device() -> None:
    model = MAE(VisionTransformer(ViTSettings(**SMALL), (32, 32)), DecoderSettings(32, 1, 4)).cuda()
    batch = ImageBatch(torch.randn(8, 3, 32, 32).cuda(), torch.arange(8).cuda())
    model(batch, model.draw(batch, Clock(), Key.of(0, batch.ids))).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(batch, model.draw(batch, Clock(), Key.of(0, batch.ids, 1))).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_interrupted_run_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    from unmask.core.training.loop import train
    from unmask.core.training.recipe import load_recipe

    overrides = {
        "data.source": "digits", "training.batch_size": 64, "training.checkpoint_every_steps": 4, "schedule.steps": 12,
        "training.log_every": 1, "model.encoder.depth": 2,
    }  # fmt: skip
    recipe = load_recipe("vision/mae", "tiny", overrides)
    for name in ("whole", "cut"):
        train(recipe, tmp_path / name, deterministic=True, progress=False)
    cut = tmp_path / "cut"
    (cut / "checkpoints" / "step-00000012.safetensors").unlink()
    (cut / "model.safetensors").unlink()
    train(recipe, cut, resume=True, deterministic=True, progress=False)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert metrics(tmp_path / "whole") == metrics(cut)


def metrics(run: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]
