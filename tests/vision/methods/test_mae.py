"""What MAE promises as a fact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unmask.core.mask import Mask
from unmask.core.masking import BernoulliMasking, RandomMasking
from unmask.core.method import Clock, Plan
from unmask.core.randomness import Key
from unmask.core.targets import normalize_patches, patchify
from unmask.vision.data.images import ImageBatch
from unmask.vision.data.images import Settings as DataSettings
from unmask.vision.encoders.vit import VisionTransformer, ViTSettings
from unmask.vision.methods.mae import MAE, DecoderSettings, Settings, build

IDS = torch.arange(4)
ENCODER = ViTSettings(patch_size=4, dim=48, depth=2, heads=4)
DECODER = DecoderSettings(dim=32, depth=2, heads=2)


def make(norm_pix: bool = True, channels: int = 3, class_token: bool = True) -> tuple[MAE, ImageBatch, Plan]:
    torch.manual_seed(0)
    encoder = VisionTransformer(ViTSettings(4, dim=48, depth=2, heads=4, class_token=class_token), (32, 32), channels)
    model = MAE(encoder, DECODER, norm_pix=norm_pix)
    batch = ImageBatch(torch.randn(4, channels, 32, 32), IDS)
    return model, batch, model.draw(batch, Clock(), Key.of(0, IDS))


def hidden_pixels(plan: Plan) -> Tensor:
    return plan.mask.hidden.view(-1, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)


@pytest.mark.parametrize(("tokens", "ratio"), [(64, 0.75), (196, 0.75), (100, 0.9), (196, 0.9), (49, 0.5)])
def test_counts_and_order(tokens: int, ratio: float) -> None:
    mask = RandomMasking(ratio)(Key.of(0, IDS), (tokens,))
    assert mask.hidden.sum(1).tolist() == [tokens - int(tokens * (1 - ratio))] * 4
    x = torch.randn(4, tokens, 5)
    together = torch.cat([mask.visible_indices.take(x), mask.hidden_indices.take(x)], dim=1)
    assert torch.equal(together.gather(1, mask.order.argsort(1)[..., None].expand_as(together)), x)


def test_every_position_is_hidden_equally_often() -> None:
    draws = 10_000
    share = RandomMasking(0.75)(Key.of(0, torch.arange(draws)), (8, 8)).hidden.double().mean(0)
    deviation = (share - 0.75) / (0.75 * 0.25 / draws) ** 0.5
    assert (deviation.abs() < 3).sum() >= 63  # of 64, 0.17 are expected outside
    assert deviation.abs().max() < 4


def test_hidden_pixels_do_not_reach_encoder_or_answer() -> None:
    model, batch, plan = make()
    latent = model.encoder.forward_visible(batch.images, plan.mask.visible_indices)
    answer = model.predict(batch, plan)
    for value in (batch.images.roll(1, 0) * 7, torch.full_like(batch.images, float("nan"))):
        changed = torch.where(hidden_pixels(plan), value, batch.images)
        assert torch.equal(model.encoder.forward_visible(changed, plan.mask.visible_indices), latent)
        assert torch.equal(model.predict(ImageBatch(changed, IDS), plan), answer)


def test_visible_patches_get_no_answer_and_no_loss() -> None:
    """Only hidden tokens reach the prediction head, so the gradient on visible patches is not small but absent."""
    model, batch, plan = make(norm_pix=False)
    rows = []
    model.decoder_pred.register_forward_hook(lambda _m, _i, out: rows.append(out.shape[:2]))
    images = batch.images.clone().requires_grad_()
    target = plan.mask.hidden_indices.take(patchify(images, 4))
    prediction = model.predict(batch, plan).detach()
    (prediction - target).square().mean(-1).mean().backward()
    assert rows == [(4, 48)]
    assert images.grad[~hidden_pixels(plan).expand_as(images)].eq(0).all()
    torch.testing.assert_close(model(batch, plan).loss, (prediction - target).square().mean())


@pytest.mark.parametrize("class_token", [True, False])
def test_order_of_the_kept_tokens_does_not_matter(class_token: bool) -> None:
    model, batch, plan = make(class_token=class_token)
    shuffled = torch.cat([plan.mask.order[:, :16].flip(1), plan.mask.order[:, 16:].roll(5, 1)], dim=1)
    other = Plan(Mask.from_order(shuffled, 16))
    assert torch.equal(other.mask.hidden, plan.mask.hidden)
    torch.testing.assert_close(model(batch, other).loss, model(batch, plan).loss)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_closed_form_of_an_answer_of_zeros(channels: int) -> None:
    """With n values per patch: (n - 1) / n * mean(var / (var + 1e-6)), the variance being unbiased."""
    model, batch, plan = make(channels=channels)
    torch.nn.init.zeros_(model.decoder_pred.weight)
    n = 16 * channels
    var = plan.mask.hidden_indices.take(patchify(batch.images, 4)).var(-1)
    expected = (n - 1) / n * (var / (var + 1e-6)).mean()
    torch.testing.assert_close(model(batch, plan).loss, expected)


def test_targets_are_normalised_with_the_unbiased_variance() -> None:
    model, batch, plan = make()
    target = model.target(batch, plan)
    assert not target.requires_grad
    torch.testing.assert_close(target.var(-1), torch.ones(4, 48), rtol=1e-4, atol=1e-4)
    assert torch.equal(target, plan.mask.hidden_indices.take(normalize_patches(patchify(batch.images, 4))))


@pytest.mark.parametrize("class_token", [True, False])
def test_ragged_masks_equal_each_sample_on_its_own(class_token: bool) -> None:
    model, batch, _ = make(class_token=class_token)
    mask = BernoulliMasking(0.6)(Key.of(2, IDS), (8, 8))
    counts = mask.hidden.sum(1)
    assert len(set(counts.tolist())) > 1
    loss = model(batch, Plan(mask)).loss
    alone = []
    for i in range(4):
        own = Mask.from_hidden(mask.hidden[i : i + 1], num_visible=int(64 - counts[i]))
        alone.append(model(ImageBatch(batch.images[i : i + 1], IDS[i : i + 1]), Plan(own)).loss)
    assert loss.isfinite()
    torch.testing.assert_close(loss, (torch.stack(alone) * counts).sum() / counts.sum())
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_encode_never_masks_and_keeps_order() -> None:
    model, batch, _ = make()
    expected = model.eval().encode(batch)
    assert torch.equal(model.train().encode(batch).tokens, expected.tokens)
    assert expected.grid == (8, 8)
    everything = Mask.from_hidden(torch.zeros(4, 64, dtype=torch.bool), num_visible=64).visible_indices
    torch.testing.assert_close(model.encoder.forward_visible(batch.images, everything)[:, 1:], expected.tokens)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_picture(norm_pix: bool) -> None:
    model, batch, plan = make(norm_pix)
    picture = model.picture(batch, plan)
    hidden = hidden_pixels(plan).expand_as(batch.images)
    assert torch.equal(picture["input"], batch.images)
    assert picture["masked"][hidden].eq(0).all()
    assert torch.equal(picture["masked"][~hidden], batch.images[~hidden])
    assert torch.equal(picture["reconstruction"][~hidden], batch.images[~hidden])


def test_build() -> None:
    model = build(Settings(ENCODER, DECODER), DataSettings(source="unused", image_size=(32, 48), channels=1))
    assert model.encoder.grid == (8, 12)
    with pytest.raises(ValueError, match=r"5 pixels does not divide .* 32 x 32; patch sizes that do: 2, 4, 8, 16, 32"):
        build(Settings(ViTSettings(5)), DataSettings(source="unused", image_size=(32, 32), channels=3))
    with pytest.raises(ValueError, match="mask ratio 1.2"):
        build(Settings(ENCODER, mask_ratio=1.2), DataSettings(source="unused", image_size=(32, 32), channels=3))
