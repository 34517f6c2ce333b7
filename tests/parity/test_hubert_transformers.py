"""The speech encoder against transformers' ``HubertModel``: same weights, same hidden states and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import HubertConfig, HubertModel

from unmask.core.errors import UnmaskError
from unmask.speech_audio.data.frames import num_frames
from unmask.speech_audio.encoders.wav2vec2 import EncoderSettings, SpeechEncoder
from unmask.speech_audio.interop.convert import (
    from_transformers,
    settings_from_transformers,
    settings_to_transformers,
    to_transformers,
)

TOLERANCE = 1e-5
SAMPLES = 9_000
KINDS = [(extractor, stable) for extractor in ("group", "layer") for stable in (False, True)]
pytestmark = pytest.mark.parametrize(("extractor", "stable"), KINDS)


def difference(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def transformers_(extractor: str, stable: bool) -> HubertModel:
    torch.manual_seed(0)
    config = HubertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, conv_dim=[16] * 7,
        feat_extract_norm=extractor, do_stable_layer_norm=stable, conv_bias=extractor == "layer",
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, hidden_dropout=0.0, activation_dropout=0.0,
        attention_dropout=0.0, feat_proj_dropout=0.0, layerdrop=0.0, mask_time_prob=0.05,
    )  # fmt: skip
    model = HubertModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def pair(extractor: str, stable: bool) -> tuple[SpeechEncoder, HubertModel]:
    theirs = transformers_(extractor, stable)
    ours = SpeechEncoder(settings_from_transformers(theirs.config.to_dict())).eval()
    ours.load_state_dict(encoder_part(from_transformers(theirs.state_dict())))
    return ours, theirs


def encoder_part(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("encoder."): t for name, t in state.items() if name.startswith("encoder.")}


def test_every_hidden_state_and_gradient(extractor: str, stable: bool) -> None:
    ours, theirs = pair(extractor, stable)
    audio = torch.randn(2, SAMPLES)
    expected = theirs(audio, output_hidden_states=True)
    states = ours.states(audio, final_norm=False)
    assert len(states) == len(expected.hidden_states)
    errors = [difference(a, b) for a, b in zip(states, expected.hidden_states, strict=True)]
    assert max(errors) <= TOLERANCE, errors
    top = ours(audio)
    assert difference(top, expected.last_hidden_state) <= TOLERANCE
    assert torch.equal(ours.states(audio)[-1], top)

    weight = torch.randn_like(top)
    (top * weight).sum().backward()
    (expected.last_hidden_state * weight).sum().backward()
    given = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    expected_grad = encoder_part(from_transformers(given))
    scale = ours.settings.feature_grad  # transformers does not scale the waveform encoder's gradients
    for name, parameter in ours.named_parameters():
        factor = scale if name.startswith("waveform.") else 1.0
        assert difference(parameter.grad, factor * expected_grad[name]) <= TOLERANCE, name


def test_padded_batch(extractor: str, stable: bool) -> None:
    """With LayerNorm. With GroupNorm transformers lets padding into the statistics: there ours equals clips alone."""
    ours, theirs = pair(extractor, stable)
    lengths = [SAMPLES, 6000, 2500]
    audio = torch.zeros(3, SAMPLES)
    for row, length in zip(audio, lengths, strict=True):
        row[:length] = torch.randn(length)
    states = ours.states(audio, torch.tensor(lengths), final_norm=False)
    if extractor == "layer":
        attention = (torch.arange(SAMPLES) < torch.tensor(lengths)[:, None]).long()
        together = theirs(audio, attention_mask=attention, output_hidden_states=True).hidden_states
    for i, length in enumerate(lengths):
        frames = num_frames(length)
        alone = theirs(audio[i : i + 1, :length], output_hidden_states=True).hidden_states
        for layer, state in enumerate(states):
            assert difference(state[i, :frames], alone[layer][0]) <= TOLERANCE
            if extractor == "layer":
                assert difference(state[i, :frames], together[layer][i, :frames]) <= TOLERANCE


@pytest.mark.parametrize("spelling", ["parametrizations", "weight_g"])
def test_weights_convert_there_and_back(extractor: str, stable: bool, spelling: Any) -> None:
    state = transformers_(extractor, stable).state_dict()
    ours = from_transformers(to_transformers(from_transformers(state), spelling))
    assert "mask_embedding" in ours
    shapes = {"label_embeddings": (2, 3), "final_proj.weight": (3, 32), "final_proj.bias": (3,)}
    back = to_transformers(ours | {name: torch.ones(shape) for name, shape in shapes.items()})
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    with pytest.raises(UnmaskError, match=r"unknown: lm_head.weight; missing: feature_projection.projection.bias$"):
        wrong = {name: t for name, t in state.items() if name != "feature_projection.projection.bias"}
        from_transformers(wrong | {"lm_head.weight": torch.ones(1)})


def test_settings_convert_there_and_back(extractor: str, stable: bool) -> None:
    config = transformers_(extractor, stable).config
    settings = settings_from_transformers(config.to_dict())
    assert settings.mlp_ratio == 3.0 and settings.norm == ("pre" if stable else "post")
    assert settings_from_transformers(HubertConfig(**settings_to_transformers(settings)).to_dict()) == settings
    base, ours = settings_from_transformers({}), EncoderSettings()  # transformers' defaults: BASE, other dropouts
    assert (base.dim, base.depth, base.heads) == (ours.dim, ours.depth, ours.heads)
    with pytest.raises(UnmaskError, match="hidden_act is 'relu', not 'gelu'; conv_dim has different widths"):
        settings_from_transformers({"hidden_act": "relu", "conv_dim": [8, 16]})
