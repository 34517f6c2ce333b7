"""The speech encoder: padding changes nothing, hidden frames stay hidden, gradients and LayerDrop as described."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from unmask.core.errors import UnmaskError
from unmask.speech_audio.data.frames import num_frames
from unmask.speech_audio.encoders.wav2vec2 import (
    EncoderSettings,
    LayerDrop,
    PositionalConvolution,
    SpeechEncoder,
    _normalise_clips,
    frame_mask,
)

TINY = EncoderSettings(
    channels=16, dim=32, depth=3, heads=2, positional_kernel=8, positional_groups=4, input_dropout=0.0, dropout=0.0,
    attention_dropout=0.0, layer_drop=0.0,
)  # fmt: skip
VARIANTS = [
    replace(TINY, extractor=extractor, norm=norm, conv_bias=bias)
    for extractor, norm, bias in [("group_norm", "post", False), ("layer_norm", "pre", True)]
]
both = pytest.mark.parametrize("settings", VARIANTS, ids=["base", "large"])


def clips(lengths: list[int], padding: float = 0.0) -> tuple[Tensor, Tensor]:
    audio = torch.full((len(lengths), max(lengths)), padding)
    for row, length in zip(audio, lengths, strict=True):
        row[:length] = torch.randn(length) + 0.3
    return audio, torch.tensor(lengths)


@both
@pytest.mark.parametrize("samples", [400, 719, 720, 5000])
def test_number_of_frames(settings: EncoderSettings, samples: int) -> None:
    encoder = SpeechEncoder(settings)
    audio = torch.randn(2, samples)
    assert encoder(audio).shape == (2, num_frames(samples), 32)
    assert encoder.waveform_features(audio).shape == (2, num_frames(samples), 16)
    states = encoder.states(audio)
    assert len(states) == encoder.depth + 1 == 4 and torch.equal(states[-1], encoder(audio))
    last = encoder.states(audio, final_norm=False)[-1]
    assert torch.equal(encoder.norm(last) if settings.norm == "pre" else last, states[-1])


@both
@pytest.mark.parametrize("padding", [0.0, 5.0, float("nan")])
def test_padding_never_changes_a_clip(settings: EncoderSettings, padding: float) -> None:
    encoder = SpeechEncoder(settings).eval()
    audio, lengths = clips([6000, 4100, 2000], padding)
    together = encoder.states(audio, lengths)
    assert all(state.isfinite().all() for state in together)
    for i, length in enumerate(lengths.tolist()):
        alone = encoder.states(audio[i : i + 1, :length])
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[i : i + 1, : num_frames(length)], b, rtol=1e-4, atol=2e-5)


def test_group_norm_over_valid_frames() -> None:
    norm = nn.GroupNorm(6, 6)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = torch.randn(2, 6, 50) * 3 + 100  # a large mean: the variance must not lose digits to it
    torch.testing.assert_close(_normalise_clips(x, torch.tensor([50, 50]), norm), norm(x), rtol=1e-4, atol=1e-4)
    short = _normalise_clips(x, torch.tensor([50, 20]), norm)[1:, :, :20]
    torch.testing.assert_close(short, norm(x[1:, :, :20]), rtol=1e-4, atol=1e-4)


def test_a_frame_sees_its_400_samples() -> None:
    """With LayerNorm nothing else enters; with GroupNorm the statistics do."""
    audio = torch.randn(1, 3000, requires_grad=True)
    SpeechEncoder(VARIANTS[1]).waveform_features(audio)[0, 3].square().sum().backward()
    seen = (audio.grad[0] != 0).nonzero()[:, 0]
    assert (int(seen.min()), int(seen.max())) == (960, 1359)


@both
def test_feature_grad_scales_the_waveform_encoders_gradients_only(settings: EncoderSettings) -> None:
    encoders = [SpeechEncoder(replace(settings, feature_grad=factor)) for factor in (1.0, 0.25)]
    encoders[1].load_state_dict(encoders[0].state_dict())
    audio = torch.randn(1, 3000)
    outputs = [encoder(audio) for encoder in encoders]
    assert torch.equal(*outputs)
    weight = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weight).sum().backward()
    for (name, p), q in zip(encoders[0].named_parameters(), encoders[1].parameters(), strict=True):
        factor = 0.25 if name.startswith("waveform.") else 1.0
        assert torch.equal(p.grad * factor, q.grad), name


@both
def test_hidden_frames_do_not_pass(settings: EncoderSettings) -> None:
    encoder, embedding = SpeechEncoder(settings).eval(), torch.rand(32)
    features = torch.randn(2, 12, 16)
    hidden = torch.rand(2, 12) < 0.5
    expected = encoder.contextualise(features, None, hidden, embedding)
    for value in (100.0, float("nan")):
        changed = features.masked_fill(hidden[..., None], value)
        assert torch.equal(expected, encoder.contextualise(changed, None, hidden, embedding))
    assert not torch.equal(expected, encoder.contextualise(features))


def test_layer_drop() -> None:
    encoder = SpeechEncoder(replace(TINY, layer_drop=1.0)).train()
    states = encoder.states(torch.randn(1, 3000))
    assert all(torch.equal(state, states[0]) for state in states)
    states[-1].square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters()), "a rank that drops a layer still has its gradients"
    assert not any(p.grad.any() for p in encoder.blocks.parameters())
    states = encoder.eval().states(torch.randn(1, 3000))
    assert not any(torch.equal(a, b) for a, b in zip(states[1:], states[:-1], strict=True))

    drop, before, after = LayerDrop(0.3).train(), torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    kept = torch.stack([drop(before, after) for _ in range(3000)])
    assert abs(float(kept.mean()) - 0.7) < 0.03
    assert drop.eval()(before, after) is after


@pytest.mark.parametrize("name", ["input_dropout", "dropout", "attention_dropout", "activation_dropout"])
def test_dropouts_act_in_training_only(name: str) -> None:
    encoder, audio = SpeechEncoder(replace(TINY, **{name: 0.5})), torch.randn(1, 3000)  # type: ignore[arg-type]
    assert not torch.equal(encoder(audio), encoder(audio))
    encoder.eval()
    assert torch.equal(encoder(audio), encoder(audio))


@pytest.mark.parametrize("kernel", [7, 8])
def test_positional_convolution(kernel: int) -> None:
    positions, x = PositionalConvolution(8, kernel, 2), torch.randn(1, 20, 8)
    assert positions(x).shape == x.shape
    impulse = torch.zeros(1, 20, 8)
    impulse[0, 10] = 1.0
    reached = positions(impulse)[0].abs().sum(1).nonzero()[:, 0]
    assert len(reached) == kernel and 10 in reached


def test_initial_weights() -> None:
    encoder = SpeechEncoder(replace(TINY, channels=64, dim=128, positional_kernel=32)).requires_grad_(False)
    assert abs(float(encoder.waveform[1].conv.weight.std()) / math.sqrt(2 / (64 * 3)) - 1) < 0.05
    assert abs(float(encoder.positions.conv.weight.std()) / math.sqrt(4 / (32 * 128)) - 1) < 0.05
    block: Any = encoder.blocks[0]
    assert abs(float(block.attn.qkv.weight.std()) - 0.02) < 1e-3 and not block.mlp.fc1.bias.any()
    assert not encoder.positions.conv.bias.any()


@both
def test_copies_and_files(settings: EncoderSettings) -> None:
    encoder, audio = SpeechEncoder(settings).eval(), torch.randn(2, 3000)
    twin = copy.deepcopy(encoder)
    assert torch.equal(twin(audio), encoder(audio))
    other = SpeechEncoder(settings).eval()
    assert not torch.equal(other(audio), encoder(audio))
    other.load_state_dict(load(save({name: t.contiguous() for name, t in encoder.state_dict().items()})))
    assert torch.equal(other(audio), encoder(audio))
    with torch.no_grad():  # a copy shares nothing
        twin.positions.conv.parametrizations.weight.original0.add_(1)
    assert torch.equal(other(audio), encoder(audio))


def test_frame_mask() -> None:
    mask = frame_mask(2000, torch.tensor([2000, 1039, 400, 399]))
    assert mask.sum(1).tolist() == [6, 2, 1, 0]


def test_mistakes_are_named() -> None:
    with pytest.raises(UnmaskError, match="clips of 399 samples are shorter than one frame"):
        SpeechEncoder(TINY)(torch.randn(1, 399))
    with pytest.raises(ValueError, match=r"feature_grad 0.0 is not in \(0, 1\].*requires_grad"):
        replace(TINY, feature_grad=0.0)
    with pytest.raises(ValueError, match="positional_groups 5 do not divide dim 32"):
        replace(TINY, positional_groups=5)
    with pytest.raises(ValueError, match="dim 32 is not divisible by 3 heads"):
        SpeechEncoder(replace(TINY, heads=3))
