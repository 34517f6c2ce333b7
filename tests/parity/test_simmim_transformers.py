"""SimMIM against transformers' ViT and Swin masked-image models: same weights and mask, same numbers and gradients."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from transformers import SwinConfig, SwinForMaskedImageModeling, ViTConfig, ViTForMaskedImageModeling

from unmask.core.mask import Mask
from unmask.core.masking import RandomMasking
from unmask.core.method import Plan
from unmask.core.randomness import Key
from unmask.core.targets import patchify
from unmask.vision.data.images import ImageBatch
from unmask.vision.encoders.timm import SwinSettings, swin
from unmask.vision.encoders.vit import VisionTransformer, ViTSettings
from unmask.vision.methods.simmim import SimMIM

TOLERANCE = 1e-5
BATCH = 3
IDS = torch.arange(BATCH)

COMMON = {
    ".layernorm_before.": ".norm1.", ".layernorm_after.": ".norm2.", ".attention.qkv.": ".attn.qkv.",
    ".attention.o_proj.": ".attn.proj.", ".patch_embeddings.projection.": ".patch_embed.proj.",
}  # fmt: skip
VIT = {
    **COMMON, "vit.embeddings.mask_token": "mask_token", "vit.embeddings.position_embeddings": "encoder.pos_embed",
    "vit.embeddings": "encoder", "vit.layers.": "encoder.blocks.", "vit.layernorm": "encoder.norm",
    "decoder.0.": "head.",
}  # fmt: skip
SWIN = {
    **COMMON, "swin.embeddings.mask_token": "mask_token", "swin.embeddings.norm": "encoder.patch_embed.norm",
    "swin.embeddings": "encoder", "swin.encoder.layers.": "encoder.layers.", "swin.layernorm": "encoder.norm",
    ".attention.relative_position_bias.relative_position_bias_table": ".attn.relative_position_bias_table",
    "decoder.0.": "head.",
}  # fmt: skip


def convert(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Our names and shapes for transformers' tensors."""
    converted = {}
    for name, tensor in state.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            tensor = torch.cat([state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            name = name.replace(".q_proj.", ".qkv.")
        if ".downsample." in name:  # transformers merges patches at the end of a stage, timm at the start of the next
            stage = int(name.split(".")[3])
            name = name.replace(f"layers.{stage}.", f"layers.{stage + 1}.")
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        converted[name] = tensor.flatten(1) if name == "head.weight" else tensor
    return converted


def roughen(model: nn.Module) -> nn.Module:
    """Move every weight off its initial value, so that none is trivially right."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


def vit_pair(channels: int, patch: int) -> tuple[SimMIM, nn.Module]:
    config = ViTConfig(
        image_size=32, patch_size=patch, encoder_stride=patch, num_channels=channels, hidden_size=48,
        num_hidden_layers=3, num_attention_heads=4, intermediate_size=192, layer_norm_eps=1e-6,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    theirs = roughen(ViTForMaskedImageModeling(config))
    settings = ViTSettings(patch, dim=48, depth=3, heads=4, positions="learned")
    ours = SimMIM(VisionTransformer(settings, (32, 32), channels)).train()
    ours.load_state_dict(convert(theirs.state_dict(), VIT))
    return ours, theirs


def swin_pair(channels: int) -> tuple[SimMIM, nn.Module]:
    """Three stages, so that shifted windows, two mergings and a map that is one window all occur."""
    config = SwinConfig(
        image_size=64, patch_size=4, num_channels=channels, embed_dim=16, depths=[2, 2, 1], num_heads=[2, 2, 4],
        window_size=4, encoder_stride=16, drop_path_rate=0.0, layer_norm_eps=1e-5,
    )  # fmt: skip
    theirs = roughen(SwinForMaskedImageModeling(config))
    settings = SwinSettings(4, dim=16, depths=(2, 2, 1), heads=(2, 2, 4), window=4)
    ours = SimMIM(swin(settings, (64, 64), channels)).train()
    ours.load_state_dict(convert(theirs.state_dict(), SWIN))
    return ours, theirs


def difference(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def check(ours: SimMIM, theirs: nn.Module, mask: Mask, names: Mapping[str, str]) -> None:
    """Loss, reconstruction of hidden pixels, and every gradient."""
    size = ours.encoder.image_size
    torch.manual_seed(2)
    batch = ImageBatch(torch.randn(BATCH, ours.encoder.channels, *size), IDS)
    expected = theirs(pixel_values=batch.images, bool_masked_pos=mask.hidden)
    expected.loss.backward()
    loss = ours(batch, Plan(mask)).loss
    loss.backward()

    hidden = mask.hidden_indices
    reconstruction = hidden.take(patchify(expected.reconstruction, ours.patch_size, "channels_first"))
    prediction = ours.predict(batch, Plan(mask))
    if hidden.valid is not None:
        prediction, reconstruction = prediction[hidden.valid], reconstruction[hidden.valid]
    assert difference(prediction, reconstruction) <= TOLERANCE
    assert difference(loss, expected.loss) <= TOLERANCE
    theirs_grad = convert({n: p.grad for n, p in theirs.named_parameters()}, names)
    ours_grad = {n: p.grad for n, p in ours.named_parameters()}
    assert ours_grad.keys() == theirs_grad.keys()
    errors = {name: difference(ours_grad[name], theirs_grad[name]) for name in ours_grad}
    print(
        "ERR",
        difference(prediction, reconstruction),
        difference(loss, expected.loss),
        max(errors.items(), key=lambda item: item[1]),
    )
    assert max(errors.values()) <= TOLERANCE, max(errors.items(), key=lambda item: item[1])


@pytest.mark.parametrize(("channels", "patch", "unit"), [(3, 4, 2), (1, 8, 1), (4, 4, 4), (3, 2, 4)])
def test_vit(channels: int, patch: int, unit: int) -> None:
    ours, theirs = vit_pair(channels, patch)
    mask = RandomMasking(0.6, "ceil_hide", unit)(Key.of(0, IDS), ours.encoder.grid)
    check(ours, theirs, mask, VIT)


@pytest.mark.parametrize(("channels", "unit"), [(3, 4), (1, 4), (4, 8), (3, 2), (3, 1)])
def test_swin(channels: int, unit: int) -> None:
    """Units of 4 tokens are the stride; smaller ones leave features that stand for hidden and visible pixels."""
    ours, theirs = swin_pair(channels)
    mask = RandomMasking(0.6, "ceil_hide", unit)(Key.of(0, IDS), ours.encoder.grid)
    check(ours, theirs, mask, SWIN)


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_ragged_masks(kind: str) -> None:
    ours, theirs = vit_pair(3, 4) if kind == "vit" else swin_pair(3)
    torch.manual_seed(3)
    mask = Mask.from_hidden(torch.rand(BATCH, ours.encoder.grid[0] ** 2) < 0.5)
    check(ours, theirs, mask, VIT if kind == "vit" else SWIN)


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_features(kind: str) -> None:
    """`encode` masks nothing: transformers' encoder without a mask gives the same map."""
    ours, theirs = vit_pair(3, 4) if kind == "vit" else swin_pair(3)
    images = torch.randn(2, 3, *ours.encoder.image_size)
    features = ours.eval().encode(ImageBatch(images, torch.arange(2)))
    backbone = theirs.eval().vit if kind == "vit" else theirs.eval().swin
    expected = backbone(images).last_hidden_state[:, 1 if kind == "vit" else 0 :]
    assert features.grid == ((8, 8) if kind == "vit" else (4, 4))
    assert difference(features.tokens, expected) <= TOLERANCE
