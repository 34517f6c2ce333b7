"""HuBERT against torchaudio's ``hubert_pretrain_model``: same weights, mask and labels, same numbers and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor

from unmask.core.errors import UnmaskError
from unmask.core.mask import Mask
from unmask.core.method import Clock
from unmask.core.randomness import Key
from unmask.speech_audio.data.clips import AudioBatch
from unmask.speech_audio.data.frames import num_frames
from unmask.speech_audio.data.labels import Target
from unmask.speech_audio.encoders.wav2vec2 import EncoderSettings
from unmask.speech_audio.interop.convert import from_torchaudio, to_torchaudio
from unmask.speech_audio.methods.hubert import HeadSettings, HuBERT, HuBERTPlan, Settings

TOLERANCE = 1e-5
CLASSES, SAMPLES = 11, 12_000
KINDS = {"base": ("group_norm", "post", 0.1), "large": ("layer_norm", "pre", 1.0)}


class Given:
    """A masking that always hides the same frames."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden

    def __call__(self, key: Key, grid: tuple[int, ...], valid: Tensor | None = None) -> Mask:
        return Mask.from_hidden(self.hidden, valid)


def difference(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def torchaudios(kind: str) -> Any:
    extractor, norm, feature_grad = KINDS[kind]
    return torchaudio.models.hubert_pretrain_model(
        extractor_mode=extractor,
        extractor_conv_layer_config=[(16, 10, 5)] + [(16, 3, 2)] * 4 + [(16, 2, 2)] * 2,
        extractor_conv_bias=False, encoder_embed_dim=32, encoder_projection_dropout=0.0, encoder_pos_conv_kernel=16,
        encoder_pos_conv_groups=4, encoder_num_layers=3, encoder_num_heads=4, encoder_attention_dropout=0.0,
        encoder_ff_interm_features=128, encoder_ff_interm_dropout=0.0, encoder_dropout=0.0,
        encoder_layer_norm_first=norm == "pre", encoder_layer_drop=0.0, mask_prob=0.8, mask_selection="static",
        mask_other=0.0, mask_length=10, no_mask_overlap=False, mask_min_space=1, mask_channel_prob=0.0,
        mask_channel_selection="static", mask_channel_other=0.0, mask_channel_length=10, no_mask_channel_overlap=False,
        mask_channel_min_space=1, skip_masked=False, skip_nomask=False, num_classes=CLASSES, final_dim=8,
        feature_grad_mult=feature_grad if feature_grad < 1 else None,
    )  # fmt: skip


def pair(kind: str, hidden: Tensor, **options: Any) -> tuple[HuBERT, Any]:
    """Both models at equal, random weights (biases and norms too), hiding `hidden`."""
    extractor, norm, feature_grad = KINDS[kind]
    theirs = torchaudios(kind)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs.mask_generator.forward = lambda x, padding: (
        torch.where(hidden[..., None], theirs.mask_generator.mask_embedding, x),
        hidden,
    )
    settings = EncoderSettings(
        channels=16, extractor=extractor, norm=norm, feature_grad=feature_grad, dim=32, depth=3, heads=4,
        positional_kernel=16, positional_groups=4, input_dropout=0.0, dropout=0.0, attention_dropout=0.0,
        layer_drop=0.0,
    )  # fmt: skip
    target = Target("mfcc", CLASSES, 100.0, "")
    ours = HuBERT(Settings(settings, HeadSettings(dim=8), **options), [target], Given(hidden))
    ours.load_state_dict(from_torchaudio(theirs.state_dict()))
    return ours, theirs


def make_batch(lengths: list[int]) -> AudioBatch:
    count = torch.tensor(lengths)
    audio = torch.randn(len(lengths), SAMPLES) * (torch.arange(SAMPLES) < count[:, None])
    frames, grid = num_frames(count), num_frames(SAMPLES)
    labels = torch.randint(0, CLASSES, (len(lengths), grid, 1))
    labels[torch.arange(grid) >= frames[:, None]] = -1
    return AudioBatch(audio, count, frames, torch.arange(len(lengths)), labels)


def random_mask(batch: AudioBatch) -> Tensor:
    grid = torch.arange(num_frames(SAMPLES))
    return (torch.rand(len(batch.ids), len(grid)) < 0.5) & (grid < batch.frames[:, None])


def plan_of(ours: HuBERT, batch: AudioBatch) -> HuBERTPlan:
    return ours.draw(batch, Clock(), Key.of(0, batch.ids))


def with_positive_first(logits: Tensor, labels: Tensor) -> Tensor:
    """The released layout: the label's logit in front, and minus infinity where it stands among the classes."""
    return torch.cat([logits.gather(1, labels), logits.scatter(1, labels, float("-inf"))], dim=1)


def their_loss(masked: Tensor, unmasked: Tensor, penalty: Tensor, weights: tuple[float, float]) -> Tensor:
    """The released criterion: sums over frames, the penalty times the number of frames, all divided by that number."""
    total, size = masked.new_zeros(()), 0
    for logits, weight in zip((masked, unmasked), weights, strict=True):
        if weight > 0:
            first = torch.zeros(len(logits), dtype=torch.int64)
            total, size = total + weight * F.cross_entropy(logits, first, reduction="sum"), size + len(logits)
    return (total + 10.0 * penalty * size) / size


def assert_equal_gradients(ours: HuBERT, theirs: Any) -> None:
    expected = from_torchaudio({name: p.grad for name, p in theirs.named_parameters()})
    errors = {name: difference(p.grad, expected[name]) for name, p in ours.named_parameters()}
    assert errors.keys() == expected.keys()
    assert max(errors.values()) <= TOLERANCE, max(errors.items(), key=lambda item: item[1])


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.7, 0.3), (0.0, 1.0)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_loss_and_every_gradient(kind: str, weights: tuple[float, float], training: bool) -> None:
    batch = make_batch([SAMPLES] * 3)
    hidden = random_mask(batch)
    ours, theirs = pair(kind, hidden, masked_weight=weights[0], unmasked_weight=weights[1])
    ours.train(training), theirs.train(training)

    masked, unmasked, penalty = theirs(batch.audio, batch.labels[..., 0])
    expected = their_loss(masked, unmasked, penalty, weights)
    expected.backward()
    plan = plan_of(ours, batch)
    output = ours(batch, plan)
    output.loss.backward()

    finite = masked.isfinite()
    logits = with_positive_first(ours.predict(batch, plan), ours.target(batch, plan))
    assert torch.equal(logits.isfinite(), finite)
    assert difference(logits[finite], masked[finite]) <= TOLERANCE
    assert difference(output.terms["feature_penalty"].mean, penalty) <= TOLERANCE
    assert difference(output.loss, expected) <= TOLERANCE
    assert_equal_gradients(ours, theirs)


def test_padded_batches_with_layer_norm() -> None:
    """Without the penalty, which torchaudio takes over padded frames too (with GroupNorm, padding enters there)."""
    batch = make_batch([SAMPLES, 8000, 5000])
    hidden = random_mask(batch)
    ours, theirs = pair("large", hidden, feature_penalty=0.0, unmasked_weight=0.5)

    masked, unmasked, _ = theirs(batch.audio, batch.labels[..., 0], batch.lengths)
    their_loss(masked, unmasked, torch.zeros(()), (1.0, 0.5)).backward()
    plan = plan_of(ours, batch)
    assert plan.padded
    output = ours(batch, plan)
    output.loss.backward()

    finite = masked.isfinite()
    logits = with_positive_first(ours.predict(batch, plan), ours.target(batch, plan))
    assert difference(logits[finite], masked[finite]) <= TOLERANCE
    assert_equal_gradients(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer(kind: str) -> None:
    audio = torch.randn(2, SAMPLES)
    ours, theirs = pair(kind, torch.zeros(2, num_frames(SAMPLES), dtype=torch.bool))
    expected, _ = theirs.wav2vec2.extract_features(audio)
    states = ours.encoder.states(audio, final_norm=False)
    assert len(states) == len(expected) + 1
    assert all(difference(a, b) <= TOLERANCE for a, b in zip(states[1:], expected, strict=True))
    top, _ = theirs.wav2vec2(audio)
    assert difference(ours.encoder(audio), top) <= TOLERANCE


@pytest.mark.parametrize("spelling", ["parametrizations", "weight_g"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_convert_there_and_back(kind: str, spelling: Any) -> None:
    theirs = torchaudios(kind)
    state = theirs.state_dict()
    spelled = to_torchaudio(from_torchaudio(state), spelling)
    assert ("wav2vec2.encoder.transformer.pos_conv_embed.conv.weight_g" in spelled) == (spelling == "weight_g")
    back = to_torchaudio(from_torchaudio(spelled))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    encoder = theirs.wav2vec2.state_dict()
    back = to_torchaudio(from_torchaudio(encoder))
    assert back.keys() == encoder.keys() and all(torch.equal(back[name], encoder[name]) for name in encoder)


def test_weights_too_many_or_too_few_are_listed() -> None:
    state = from_torchaudio(torchaudios("base").state_dict())
    wrong = {name: t for name, t in state.items() if name != "encoder.norm.bias"} | {"encoder.new": torch.ones(1)}
    with pytest.raises(UnmaskError, match=r"unknown: encoder.new; missing: encoder.norm.bias$"):
        to_torchaudio(wrong)
    gone = ["logit_generator.final_proj.bias", "wav2vec2.encoder.transformer.layers.1.attention.k_proj.bias"]
    with pytest.raises(UnmaskError, match=f"missing: {', '.join(gone)}$"):
        from_torchaudio({name: t for name, t in to_torchaudio(state).items() if name not in gone})
    with pytest.raises(UnmaskError, match="has one head and this one has 2"):
        to_torchaudio(state | {"final_proj.weight": torch.zeros(16, 32)})
