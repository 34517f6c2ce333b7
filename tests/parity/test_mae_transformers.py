"""MAE against transformers' ``ViTMAEForPreTraining``: same weights and noise, same numbers and gradients."""

from __future__ import annotations

import pytest
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from unmask.core.errors import UnmaskError
from unmask.core.mask import Mask
from unmask.core.method import Plan
from unmask.core.targets import patchify
from unmask.vision.data.images import ImageBatch
from unmask.vision.encoders.vit import VisionTransformer, ViTSettings
from unmask.vision.interop.convert import VITMAE
from unmask.vision.methods.mae import MAE, DecoderSettings

TOLERANCE = 1e-5
BATCH = 3


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b| / max |b|."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def pair(channels: int = 3, patch: int = 4, norm_pix: bool = True) -> tuple[MAE, ViTMAEForPreTraining]:
    """The two models at equal, random weights (biases and norms too, so that none of them is trivially right)."""
    torch.manual_seed(0)
    config = ViTMAEConfig(
        image_size=32, patch_size=patch, num_channels=channels, hidden_size=48, num_hidden_layers=3,
        num_attention_heads=4, intermediate_size=192, layer_norm_eps=1e-6, mask_ratio=0.75, norm_pix_loss=norm_pix,
        decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
        decoder_intermediate_size=128,
    )  # fmt: skip
    theirs = ViTMAEForPreTraining(config).train()
    _fill_position_tables(theirs)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    encoder = VisionTransformer(ViTSettings(patch, dim=48, depth=3, heads=4), (32, 32), channels)
    ours = MAE(encoder, DecoderSettings(dim=32, depth=2, heads=2), norm_pix=norm_pix).train()
    ours.load_state_dict(VITMAE.to_ours(theirs.state_dict()))
    return ours, theirs


def _fill_position_tables(theirs: ViTMAEForPreTraining) -> None:
    """In transformers 5.23 a model that is made rather than loaded has zeros there: ask for the published tables."""
    embeddings = theirs.vit.embeddings
    embeddings.patch_embeddings.projection._is_hf_initialized = False
    embeddings.initialize_weights()
    theirs.decoder.initialize_weights(embeddings.patch_embeddings.num_patches)


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize(("channels", "patch"), [(1, 4), (3, 4), (4, 4), (3, 8), (2, 2)])
def test_loss_prediction_and_every_gradient(channels: int, patch: int, norm_pix: bool) -> None:
    ours, theirs = pair(channels, patch, norm_pix)
    images = torch.randn(BATCH, channels, 32, 32)
    noise = torch.rand(BATCH, (32 // patch) ** 2)

    expected = theirs(pixel_values=images, noise=noise)
    expected.loss.backward()
    mask = Mask.from_scores(noise, int(noise.shape[1] * (1 - 0.75)))
    batch = ImageBatch(images, torch.arange(BATCH))
    prediction = ours.predict(batch, Plan(mask))
    loss = ours(batch, Plan(mask)).loss
    loss.backward()

    assert torch.equal(mask.hidden, expected.mask.bool())
    assert torch.equal(mask.order.argsort(1), expected.ids_restore)
    assert difference(prediction, mask.hidden_indices.take(expected.logits)) <= TOLERANCE
    assert difference(loss, expected.loss) <= TOLERANCE
    theirs_grad = VITMAE.to_ours({n: p.grad for n, p in theirs.named_parameters() if p.grad is not None})
    ours_grad = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert ours_grad.keys() == theirs_grad.keys()
    errors = {name: difference(ours_grad[name], theirs_grad[name]) for name in ours_grad}
    assert max(errors.values()) <= TOLERANCE, max(errors.items(), key=lambda item: item[1])


def test_position_tables_and_targets() -> None:
    ours, theirs = pair()
    fresh = MAE(VisionTransformer(ViTSettings(4, dim=48, depth=1, heads=4), (32, 32)), DecoderSettings(32, 1, 2))
    torch.testing.assert_close(fresh.encoder.pos_embed, theirs.vit.embeddings.position_embeddings, rtol=0, atol=1e-6)
    torch.testing.assert_close(fresh.decoder_pos_embed, theirs.decoder.decoder_pos_embed, rtol=0, atol=1e-6)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(patchify(images, 4), theirs.patchify(images))


def test_features_equal() -> None:
    ours, theirs = pair()
    images = torch.randn(2, 3, 32, 32)
    features = ours.eval().encode(ImageBatch(images, torch.arange(2)))
    order = torch.arange(64).expand(2, -1) / 64.0  # ascending noise keeps the order; ratio 0 keeps every patch
    theirs.vit.config.mask_ratio = 0.0
    expected = theirs.eval().vit(images, noise=order).last_hidden_state
    assert difference(features.tokens, expected[:, 1:]) <= TOLERANCE
    assert difference(features.cls, expected[:, 0]) <= TOLERANCE


def test_weights_convert_there_and_back() -> None:
    ours, theirs = pair()
    state = theirs.state_dict()
    back = VITMAE.to_theirs(VITMAE.to_ours(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    with pytest.raises(UnmaskError, match=r"not those of transformers' ViTMAEForPreTraining; unknown: vit\.surprise$"):
        VITMAE.to_ours({"vit.surprise": torch.zeros(1)})
    with pytest.raises(UnmaskError, match=r"can hold; unknown: encoder\.blocks\.0\.ls1\.gamma$"):
        VITMAE.to_theirs({"encoder.blocks.0.ls1.gamma": torch.zeros(1)})
