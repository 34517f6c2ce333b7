"""Vision Transformers of timm behind our interface, and MAE around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import unmask.vision
from unmask.core.errors import UnmaskError
from unmask.core.mask import Indices
from unmask.core.masking import BernoulliMasking
from unmask.core.method import Clock
from unmask.core.randomness import Key
from unmask.core.training.loop import train
from unmask.core.training.recipe import RecipeError, make_recipe
from unmask.vision.checks import check_method
from unmask.vision.data.images import ImageBatch
from unmask.vision.encoders.timm import TimmViT, TimmViTSettings, timm_vit
from unmask.vision.interop.export import export
from unmask.vision.methods.mae import MAE, DecoderSettings

SIZE = (64, 48)  # 4 x 3 patches of 16
IMAGES = torch.randn(3, 3, *SIZE, generator=torch.Generator().manual_seed(0))
# A class token; registers and positions that leave them out; no class token; a norm before the blocks, layer scale.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers": {"reg_tokens": 4, "no_embed_class": True},
    "registers with positions": {"reg_tokens": 2},
    "no class token": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "no positions": {"pos_embed": "none"},
    "norm before, layer scale": {"pre_norm": True, "init_values": 0.1, "qk_norm": True},
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    shape = {"img_size": SIZE, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    made = timm.create_model("vit_tiny_patch16_224", **shape, **request.param).eval()
    for parameter in made.parameters():  # positions and gains that are not those of initialisation
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return made


def all_tokens(batch: int, order: Tensor) -> Indices:
    return Indices(order.expand(batch, -1))


def test_features_are_timms(model: Any) -> None:
    features, theirs = TimmViT(model)(IMAGES), model.forward_features(IMAGES)
    torch.testing.assert_close(features.tokens, theirs[:, model.num_prefix_tokens :], rtol=1e-6, atol=1e-6)
    assert features.grid == (4, 3)
    assert (features.cls is None) == (model.cls_token is None)
    assert features.cls is None or torch.equal(features.cls, theirs[:, 0])


def test_taking_all_tokens_in_any_order_is_taking_the_image(model: Any) -> None:
    encoder, order = TimmViT(model), torch.randperm(12)
    taken = encoder.forward_visible(IMAGES, all_tokens(3, order))
    theirs, prefix = model.forward_features(IMAGES), model.num_prefix_tokens
    torch.testing.assert_close(taken[:, prefix:], theirs[:, prefix:][:, order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(taken[:, :prefix], theirs[:, :prefix], rtol=1e-5, atol=1e-5)


def test_padding_of_ragged_sets_changes_nothing(model: Any) -> None:
    encoder, lengths = TimmViT(model), [3, 7, 5]
    index = torch.stack([torch.randperm(12)[:7] for _ in lengths])
    valid = torch.arange(7) < torch.tensor(lengths)[:, None]
    together = encoder.forward_visible(IMAGES, Indices(index, valid))
    for i, length in enumerate(lengths):
        alone = encoder.forward_visible(IMAGES[i : i + 1], Indices(index[i : i + 1, :length]))
        real = together[i : i + 1, : encoder.prefix_tokens + length]
        torch.testing.assert_close(real, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("registers", [False, True])
def test_mae_around_it_passes_the_checks(registers: bool) -> None:
    name = "vit_tiny_patch16_224"
    model = timm.create_model(name, img_size=64, embed_dim=32, depth=2, num_heads=2, reg_tokens=3 * registers)
    mae = MAE(TimmViT(model), DecoderSettings(dim=16, depth=1, heads=2))
    check_method(mae, ImageBatch(torch.randn(4, 3, 64, 64), torch.arange(4)), skip={"compiles"})


def test_mae_around_it_takes_ragged_masks() -> None:
    encoder = timm_vit(TimmViTSettings("test_vit"), (64, 64))
    mae = MAE(encoder, DecoderSettings(dim=16, depth=1, heads=2), masking=BernoulliMasking(0.5))
    batch = ImageBatch(torch.randn(4, 3, 64, 64), torch.arange(4))
    plan = mae.draw(batch, Clock(), Key.of(0, batch.ids))
    assert plan.mask.visible.sum(1).unique().numel() > 1
    assert mae(batch, plan).loss.isfinite()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("swin_tiny_patch4_window7_224", "'swin_tiny_patch4_window7_224' is not supported: give a timm Vision"),
        ("deit_tiny_distilled_patch16_224", "'deit_tiny_distilled_patch16_224' is not supported"),
        ("vit_small_r26_s32_224", "HybridEmbed is not supported"),
        ("vit_tini_patch16_224", "no such model; near it: vit_tiny_patch16_224"),
    ],
)
def test_what_is_refused_is_named(name: str, said: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=said):
        timm_vit(TimmViTSettings(name), (224, 224))


def test_another_class_is_refused_by_name() -> None:
    with torch.device("meta"):
        model = timm.create_model("deit_tiny_distilled_patch16_224")
    with pytest.raises(ValueError, match="VisionTransformerDistilled is not supported"):
        TimmViT(model)


def test_models_named_in_the_messages_are_taken() -> None:
    with torch.device("meta"):
        for name in ("vit_small_patch16_224", "deit3_small_patch16_224"):
            assert timm_vit(TimmViTSettings(name), (224, 224)).grid == (14, 14)


def recipe_of(encoder: dict[str, Any]) -> Any:
    return make_recipe(
        {
            "method": "vision/mae",
            "model": {"encoder": encoder, "decoder": {"dim": 16, "depth": 1, "heads": 2}},
            "data": {"source": "digits", "image_size": 32, "channels": 1, "mean": [0.4], "std": [0.3]},
            "schedule": {"epochs": 1, "steps": 2},
            "training": {"batch_size": 8, "precision": "32-true", "validate_every_epochs": 1000},
        }
    )


def test_a_recipe_names_it_and_timm_loads_what_was_trained(tmp_path: Path) -> None:
    run = train(
        recipe_of({"kind": "timm", "architecture": "test_vit", "drop_path": 0.1}), tmp_path / "run", progress=False
    )
    theirs = timm.create_model(f"local-dir:{export(run, tmp_path / 'out', 'timm')}", pretrained=True).eval()
    ours, x = unmask.vision.load(run), torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), ours(x).pooled, rtol=1e-5, atol=1e-5)
    with pytest.raises(UnmaskError, match="its encoder is timm's"):
        export(run, tmp_path / "other", "transformers")


@pytest.mark.parametrize(
    ("encoder", "said"),
    [
        ({"kind": "timm"}, "model.encoder.architecture: missing"),
        ({"kind": "time"}, "model.encoder.kind: 'time' is not one of"),
        ({"kind": "timm", "architecture": "test_vit", "depth": 3}, "model.encoder.depth: unknown key"),
        ({"depht": 3}, "model.encoder.depht: unknown key; did you mean depth"),
        ({"kind": "timm", "architecture": "vit_tiny_patch16_22"}, "near it: vit_tiny_patch16_224"),
    ],
)
def test_a_wrong_encoder_is_told(encoder: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipe_of(encoder)
    assert said in str(error.value)
