"""What SimMIM promises as a fact."""

from __future__ import annotations

import math

import pytest
import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor

from unmask.core.masking import BernoulliMasking
from unmask.core.method import Clock, Plan
from unmask.core.randomness import Key
from unmask.core.targets import patchify
from unmask.vision.data.images import ImageBatch
from unmask.vision.data.images import Settings as DataSettings
from unmask.vision.encoders.timm import SwinEncoder, SwinSettings
from unmask.vision.methods.simmim import BEiTSettings, Settings, SimMIM, build

IDS = torch.arange(3)
VIT = Settings(BEiTSettings(patch_size=4, dim=32, depth=3, heads=2, drop_path=0.0), mask_unit=8)
SWIN = Settings(SwinSettings(patch_size=2, dim=16, depths=(2, 2), heads=(2, 2), window=4), mask_unit=8)
SMALL_UNIT = Settings(SWIN.encoder, mask_unit=2)  # a feature stands for 4 x 4 pixels, only some of them hidden
ALL = pytest.mark.parametrize("settings", [VIT, SWIN, SMALL_UNIT], ids=["vit", "swin", "swin-small-unit"])


def data(channels: int = 3) -> DataSettings:
    return DataSettings(source="unused", image_size=(32, 32), channels=channels)


def make(settings: Settings, channels: int = 3) -> tuple[SimMIM, ImageBatch, Plan]:
    torch.manual_seed(0)
    model = build(settings, data(channels))
    batch = ImageBatch(torch.randn(3, channels, 32, 32), IDS)
    return model, batch, model.draw(batch, Clock(), Key.of(0, IDS))


def hidden_pixels(model: SimMIM, plan: Plan) -> Tensor:
    """[batch, 1, height, width], True = hidden."""
    grid = plan.mask.hidden.view(-1, 1, *model.encoder.grid)
    return grid.repeat_interleave(model.patch_size, 2).repeat_interleave(model.patch_size, 3)


@ALL
def test_mask_counts_in_pixels(settings: Settings) -> None:
    model, _, plan = make(settings)
    squares = math.ceil((32 // settings.mask_unit) ** 2 * 0.6)
    assert hidden_pixels(model, plan).sum((1, 2, 3)).tolist() == [squares * settings.mask_unit**2] * 3


@ALL
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_gradient_with_respect_to_the_prediction(settings: Settings, channels: int, monkeypatch) -> None:
    """sign(x_rec - x) / (channels * hidden pixels) on every hidden value; visible pixels are not even predicted."""
    model, batch, plan = make(settings, channels)
    prediction = model.predict(batch, plan).detach().requires_grad_()
    monkeypatch.setattr(model, "predict", lambda *_: prediction)
    model(batch, plan).loss.backward()
    target = plan.mask.hidden_indices.take(patchify(batch.images, model.patch_size, "channels_first"))
    pixels = hidden_pixels(model, plan).sum()
    assert prediction.numel() == channels * pixels
    torch.testing.assert_close(prediction.grad, (prediction - target).sign() / (channels * pixels))


@ALL
def test_hidden_pixels_do_not_reach_the_encoder(settings: Settings) -> None:
    model, batch, plan = make(settings)
    expected = model.predict(batch, plan)
    for value in (batch.images.roll(1, 0) * 7, torch.full_like(batch.images, float("nan"))):
        changed = torch.where(hidden_pixels(model, plan), value, batch.images)
        assert torch.equal(model.predict(ImageBatch(changed, IDS), plan), expected)
    seen = torch.where(hidden_pixels(model, plan), batch.images, batch.images + 1)
    assert not torch.equal(model.predict(ImageBatch(seen, IDS), plan), expected)


@ALL
def test_closed_form(settings: Settings) -> None:
    """An image of zeros and an answer of ones: the loss is 1 (the released 1e-5 in the divisor is not here)."""
    model, batch, plan = make(settings)
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.ones_(model.head.bias)
    assert model(ImageBatch(torch.zeros_like(batch.images), IDS), plan).loss.item() == 1.0


@ALL
def test_layout_is_that_of_a_pixel_shuffle(settings: Settings) -> None:
    model, batch, plan = make(settings)
    torch.nn.init.zeros_(model.head.weight)
    s = model.encoder.stride
    model.head.bias.data = torch.arange(3.0 * s * s)  # the index of (channel, row, column)
    side = 32 // s
    expected = torch.nn.functional.pixel_shuffle(model.head.bias.data.view(1, -1, 1, 1).expand(3, -1, side, side), s)
    assert expected[0, 1, 2 % s, 1] == 1 * s * s + (2 % s) * s + 1
    reconstruction = model.picture(batch, plan)["reconstruction"]
    assert torch.equal(reconstruction, torch.where(hidden_pixels(model, plan), expected, batch.images))


@ALL
def test_the_sequence_keeps_its_length(settings: Settings) -> None:
    model, batch, plan = make(settings)
    masked = model.encoder.forward_replaced(batch.images, plan.mask.hidden, model.mask_token)
    assert masked.tokens.shape == model.encode(batch).tokens.shape == (3, 64, 32)
    assert masked.grid == (8, 8)


@ALL
def test_encode_never_masks(settings: Settings) -> None:
    model, batch, _ = make(settings)
    expected = model.eval().encode(batch).tokens
    torch.nn.init.constant_(model.mask_token, float("nan"))
    assert torch.equal(model.train().encode(batch).tokens, expected)


@ALL
def test_picture(settings: Settings) -> None:
    model, batch, plan = make(settings)
    picture = model.picture(batch, plan)
    hidden = hidden_pixels(model, plan).expand(-1, 3, -1, -1)
    assert torch.equal(picture["input"], batch.images)
    assert picture["masked"][hidden].eq(0).all()
    assert torch.equal(picture["masked"][~hidden], batch.images[~hidden])
    assert torch.equal(picture["reconstruction"][~hidden], batch.images[~hidden])


def test_ragged_masks_give_the_mean_over_hidden_pixels() -> None:
    torch.manual_seed(0)
    model, batch, _ = make(VIT)
    mask = BernoulliMasking(0.4)(Key.of(1, IDS), model.encoder.grid)
    assert len(set(mask.hidden.sum(1).tolist())) > 1
    plan = Plan(mask)
    reconstruction = model.picture(batch, plan)["reconstruction"]  # equals the input where visible
    expected = (reconstruction - batch.images).abs().sum() / (3 * hidden_pixels(model, plan).sum())
    torch.testing.assert_close(model(batch, plan).loss, expected)


def test_initial_weights() -> None:
    """Every matrix truncated normal with std 0.02; two of them divided by sqrt(2 k); the mask token within 1 std."""
    model = build(Settings(BEiTSettings(patch_size=4, dim=192, depth=4, heads=3), mask_unit=8), data())
    assert 0 < model.mask_token.abs().max() <= 0.02
    for k, block in enumerate(model.encoder.blocks, start=1):
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * k), rel=0.03)
        assert block.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert block.attn.qkv.bias.eq(0).all()
        assert block.ls1.gamma.eq(0.1).all()
    assert model.encoder.rel_pos_bias.table.eq(0).all()
    assert model.encoder.pos_embed is None
    assert model.head.weight.std().item() == pytest.approx(1 / math.sqrt(3 * 192), rel=0.03)  # torch's default


def test_a_constant_key_bias_changes_nothing() -> None:
    """BEiT's keys have no bias; ours is the same function because softmax cancels it."""
    model, batch, plan = make(VIT)
    expected = model.predict(batch, plan)
    for block in model.encoder.blocks:
        block.attn.qkv.bias.data[32:64] += torch.randn(32)
    torch.testing.assert_close(model.predict(batch, plan), expected, rtol=1e-4, atol=1e-5)


def test_what_does_not_decay() -> None:
    for settings, expected in ((VIT, {"encoder.cls_token", "encoder.pos_embed"}), (SWIN, {"mask_token"})):
        assert make(settings)[0].no_weight_decay() == expected


@pytest.mark.parametrize("unit", [0, 6, 12, 24])
def test_a_unit_that_does_not_fit_is_refused(unit: int) -> None:
    with pytest.raises(ValueError, match=rf"mask_unit {unit} must be a multiple of the patch \(4 .* do: 4, 8, 16"):
        build(Settings(VIT.encoder, mask_unit=unit), data())


def test_other_timm_classes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="SwinTransformerV2 is not supported"):
        SwinEncoder(SwinTransformerV2(img_size=32, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 2)))


def test_swin_refuses_an_image_that_its_stride_does_not_divide() -> None:
    with pytest.raises(ValueError, match="36 x 36"):
        build(Settings(SwinSettings(patch_size=4, dim=16, depths=(1, 1), heads=(2, 2)), mask_unit=4),
              DataSettings(source="unused", image_size=(36, 36), channels=3))  # fmt: skip
    with pytest.raises(ValueError, match="one entry per stage"):
        SwinSettings(depths=(1, 1), heads=(2, 2, 4))
