"""Features against Kaldi's frame grid, closed forms and tones whose pitch is known."""

from __future__ import annotations

import math

import pytest
import torch
from clips import tone
from torch import Tensor, nn

from unmask.core.errors import UnmaskError
from unmask.speech_audio.data.frames import HOP, num_frames
from unmask.speech_audio.targets import features
from unmask.speech_audio.targets.features import LayerFeatures, delta, f0, log_f0, mfcc
from unmask.speech_audio.targets.make import TargetSettings, make_feature

SPECTRAL = [make_feature(TargetSettings(kind)) for kind in ("mfcc", "log_mel", "prosody", "mfcc_prosody")]
SPECTRAL.append(make_feature(TargetSettings("log_mel", bins=40)))


@pytest.mark.parametrize("feature", SPECTRAL, ids=lambda f: f.name)
@pytest.mark.parametrize(("samples", "frames"), [(0, 0), (399, 0), (400, 1), (559, 1), (560, 2), (16_000, 98)])
def test_frames_are_those_of_kaldi(feature: features.Feature, samples: int, frames: int) -> None:
    assert features.kaldi_frames(samples) == frames
    assert feature(0.1 * torch.randn(samples)).shape == (frames, feature.dim)
    assert feature.rate == 100.0 and len(feature.parts) == 1


@pytest.mark.parametrize("feature", SPECTRAL, ids=lambda f: f.name)
def test_features_repeat_and_do_not_depend_on_the_pieces(
    feature: features.Feature, monkeypatch: pytest.MonkeyPatch
) -> None:
    wave = tone(150, 1.0, noise=0.1)
    whole = feature(wave)
    assert torch.isfinite(whole).all() and torch.isfinite(feature(torch.zeros(4000))).all()
    torch.testing.assert_close(feature(wave), whole, rtol=0, atol=0)
    monkeypatch.setattr(features, "_PIECE", 13)
    torch.testing.assert_close(feature(wave), whole, rtol=1e-4, atol=1e-3)


def test_mfcc_is_torchaudios_kaldi_with_its_two_deltas() -> None:
    from torchaudio import functional
    from torchaudio.compliance import kaldi

    wave = tone(200, 0.7, noise=0.1)
    cepstra = kaldi.mfcc(wave[None], num_ceps=13, use_energy=False)
    first = functional.compute_deltas(cepstra.T).T
    expected = torch.cat([cepstra, first, functional.compute_deltas(first.T).T], dim=1)
    torch.testing.assert_close(mfcc(wave), expected, rtol=1e-4, atol=1e-4)


def test_the_scale_of_the_audio_moves_only_the_first_cepstrum() -> None:
    wave = tone(200, 0.3, noise=0.1)
    moved = (mfcc(wave * 32768) - mfcc(wave)).abs().amax(0)
    assert moved[0] > 10 and moved[1:].max() < 1e-2


def test_delta_is_the_slope_of_the_regression_line() -> None:
    t = torch.arange(20.0)
    x = torch.stack([3 * t + 1, torch.full_like(t, 5.0), t**2], dim=1)
    slope = delta(x)
    torch.testing.assert_close(slope[2:-2], torch.stack([torch.full_like(t, 3.0), 0 * t, 2 * t], dim=1)[2:-2])
    assert slope[0, 0].item() == pytest.approx(3 * (1 + 2 * 2) / 10)  # to the left the first frame repeats
    assert delta(torch.randn(1, 3)).eq(0).all() and delta(torch.empty(0, 3)).shape == (0, 3)


# ---- pitch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hertz", [60, 75, 97.3, 130, 200, 261.6, 333, 400])
@pytest.mark.parametrize("harmonics", [1, 2, 10])
def test_the_pitch_of_tones_is_found(hertz: float, harmonics: int) -> None:
    found = f0(tone(hertz, 0.6, harmonics, noise=0.01))[1:-1]  # the outer frames look beyond the clip's ends
    assert (found / hertz - 1).abs().max() < 0.01


def test_a_missing_fundamental_and_a_sweep_are_followed() -> None:
    t = torch.arange(16_000) / 16_000
    missing = sum(torch.sin(2 * math.pi * 120 * n * t) for n in (2, 3, 4, 5))
    assert isinstance(missing, Tensor)
    assert f0(missing).median().item() == pytest.approx(120, rel=0.01)
    hertz = 100 * 3**t  # 100 to 300 Hz in a second
    phase = 2 * math.pi * hertz.cumsum(0) / 16_000
    sweep = torch.sin(phase) + 0.5 * torch.sin(2 * phase)
    centre = hertz[torch.arange(98) * 160 + 200]
    found = f0(sweep)
    assert (found[1:-1] / centre[1:-1] - 1).abs().max() < 0.02


def test_noise_and_silence_have_no_pitch() -> None:
    assert f0(torch.randn(16_000)).eq(0).all() and f0(torch.zeros(4000)).eq(0).all()
    pitch, voiced = log_f0(torch.randn(8000))
    assert not voiced.any() and pitch.unique().tolist() == [pytest.approx(math.log(math.sqrt(50 * 500)))]


def test_pitch_is_interpolated_over_unvoiced_frames() -> None:
    low, high, gap = tone(100, 0.3), tone(200, 0.3), torch.zeros(4800)
    pitch, voiced = log_f0(torch.cat([gap, low, gap, high, gap]))
    first, *_, last = voiced.nonzero()[:, 0].tolist()
    assert pitch[:first].unique().tolist() == [pitch[first].item()] and pitch[last:].unique().numel() == 1
    middle = pitch[65:85]  # from 0.65 s to 0.85 s there is nothing to hear
    assert not voiced[65:85].any()
    torch.testing.assert_close(middle.diff(), middle.diff()[:1].expand(19), rtol=1e-2, atol=1e-5)
    assert math.log(100) < middle.min() < middle.max() < math.log(200)


# ---- layers --------------------------------------------------------------------------------------------------------


class FakeEncoder(nn.Module):
    """Layer l of frame t is l x the mean of the frame's samples, plus dropout's noise in training mode."""

    dim, depth = 3, 4

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def states(self, audio: Tensor, lengths: Tensor | None = None, final_norm: bool = True) -> list[Tensor]:
        assert not final_norm and not self.training and lengths is None
        self.calls.append(audio.shape[1])
        mean = audio.unfold(1, 400, HOP).mean(2)
        return [layer * mean[..., None].expand(-1, -1, self.dim) for layer in range(self.depth + 1)]


def test_several_layers_come_from_one_pass_in_the_order_asked_for() -> None:
    encoder, wave = FakeEncoder(), torch.randn(16_000)
    feature = LayerFeatures(encoder, (3, 1))
    x = feature(wave)
    assert feature.parts == ("layer 3", "layer 1") and feature.rate == 50.0
    assert x.shape == (num_frames(16_000), feature.dim) and len(encoder.calls) == 1
    torch.testing.assert_close(x[:, :3], 3 * x[:, 3:])
    assert feature(wave[:399]).shape == (0, 6)


@pytest.mark.parametrize("samples", [1600, 1679, 1680, 2000, 3199, 3279, 3280, 5000])
def test_pieces_of_long_clips_join_without_a_gap(samples: int) -> None:
    wave = torch.randn(samples)
    torch.testing.assert_close(
        LayerFeatures(FakeEncoder(), (1,), piece=1600)(wave), LayerFeatures(FakeEncoder(), (1,))(wave)
    )


@pytest.mark.parametrize("layers", [(), (0,), (5,), (1, 1)])
def test_layers_that_are_not_there_are_named(layers: tuple[int, ...]) -> None:
    with pytest.raises(UnmaskError, match="expected one or more different ones of 1 to 4"):
        LayerFeatures(FakeEncoder(), layers)
