"""HEAR's interface: what its validator checks, long clips, layers, input normalisation."""

from __future__ import annotations

from pathlib import Path

import pytest
import speech
import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.core.errors import UnmaskError
from unmask.speech_audio.data.frames import num_frames
from unmask.speech_audio.interop import hear
from unmask.speech_audio.interop.hear import HearModel, get_scene_embeddings, get_timestamp_embeddings, load_model
from unmask.speech_audio.interop.model import PretrainedEncoder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speech.fabricate(tmp_path_factory.mktemp("hear") / "run")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speech.fabricate(tmp_path_factory.mktemp("hear") / "large", encoder=speech.LARGE, normalise=True)


@pytest.fixture(scope="module")
def model(run: Path) -> HearModel:
    return load_model(str(run))


def noise(sounds: int, seconds: float) -> Tensor:
    return torch.rand(sounds, round(16_000 * seconds), generator=torch.Generator().manual_seed(1)) * 2 - 1


# --- the validator ---


def test_the_model_declares_plain_numbers(model: HearModel) -> None:
    sizes = (model.sample_rate, model.scene_embedding_size, model.timestamp_embedding_size)
    assert sizes == (16_000, 32, 32) and all(type(size) is int for size in sizes)
    assert isinstance(model, torch.nn.Module) and not any(part.training for part in model.modules())


@pytest.mark.parametrize("seconds", [1.0, 1.07, 1.98, 4.0, 30.0])
def test_timestamps(model: HearModel, seconds: float) -> None:
    embeddings, times = get_timestamp_embeddings(noise(2, seconds), model)
    frames = num_frames(round(16_000 * seconds))
    assert embeddings.shape == (2, frames, 32) and times.shape == (2, frames)
    assert embeddings.dtype == times.dtype == torch.float32 and embeddings.isfinite().all()
    gaps = times.diff(dim=1)
    assert (gaps > 0).all() and (gaps - gaps.mean()).abs().max() == 0 and gaps[0, 0] == 20
    assert times[0, 0] == 12.5 and 1000 * seconds - 50 < times[0, -1] <= 1000 * seconds
    assert not embeddings.requires_grad


def test_scenes_are_means_of_timestamps(model: HearModel) -> None:
    audio = noise(4, 2.74)
    scene = get_scene_embeddings(audio, model)
    assert scene.shape == (4, 32) and scene.dtype == torch.float32
    torch.testing.assert_close(scene, get_timestamp_embeddings(audio, model)[0].mean(1), rtol=0, atol=1e-5)
    assert torch.equal(scene, get_scene_embeddings(audio, model))  # no dropout
    torch.testing.assert_close(get_scene_embeddings(audio[1:2], model), scene[1:2], rtol=0, atol=1e-5)


def test_double_precision_audio_gives_float32(model: HearModel) -> None:
    assert get_scene_embeddings(noise(1, 1.0).double(), model).dtype == torch.float32


# --- long clips ---


def test_ten_minutes(model: HearModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 30 s at most; times do not drift."""
    seen = []

    def count(self: HearModel, audio: Tensor) -> Tensor:
        seen.append(audio.shape[1])
        return audio[:, ::320][:, : num_frames(audio.shape[1]), None].expand(-1, -1, 32)

    monkeypatch.setattr(HearModel, "forward", count)
    audio = noise(1, 600.0)
    embeddings, times = get_timestamp_embeddings(audio, model)
    frames = num_frames(600 * 16_000)
    assert len(seen) == 22 and len(set(seen[:-1])) == 1 and max(seen) < 30 * 16_000 + 320
    assert torch.equal(embeddings[0, :, 0], audio[0, ::320][:frames])  # each frame once, in its place
    expected = (torch.arange(frames, dtype=torch.float64) * 320 + 200) / 16
    assert torch.equal(times[0].double(), expected)


def test_windows_agree_with_one_pass_in_the_frame_grid(run: Path) -> None:
    audio = noise(2, 13.3)
    short, whole = load_model(str(run), window_seconds=5.0), load_model(str(run))
    parts, times = get_timestamp_embeddings(audio, short)
    once, same_times = get_timestamp_embeddings(audio, whole)
    assert torch.equal(times, same_times) and parts.shape == once.shape
    assert F.cosine_similarity(parts, once, dim=2).mean() > 0.97
    torch.testing.assert_close(get_scene_embeddings(audio, short), parts.mean(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("frames", [1, 249, 250, 251, 400, 401, 1499, 3000, 29_999])
def test_windows_cover_every_frame_once_away_from_their_edges(frames: int) -> None:
    windows = hear._windows(frames, 250)
    taken = [frame for _, first, end in windows for frame in range(first, end)]
    assert taken == list(range(frames))
    for start, first, end in windows:
        assert start >= 0 and end <= start + 250 and (frames <= 250 or start + 250 <= frames)
        assert first == 0 or first - start >= 49
        assert end == frames or start + 250 - end >= 49


# --- options ---


def test_layers(run: Path, model: HearModel) -> None:
    audio = noise(2, 1.0)
    states = [state.detach() for state in model.pretrained.encoder.states(audio)]
    for layer in (0, 1, 2):
        chosen = get_timestamp_embeddings(audio, load_model(str(run), layer=layer))[0]
        torch.testing.assert_close(chosen, states[layer], rtol=0, atol=1e-5)
    torch.testing.assert_close(get_timestamp_embeddings(audio, model)[0], states[2], rtol=0, atol=1e-5)
    both = load_model(str(run), layer="all")
    assert both.scene_embedding_size == both.timestamp_embedding_size == 96
    torch.testing.assert_close(get_timestamp_embeddings(audio, both)[0], torch.cat(states, 2), rtol=0, atol=1e-5)
    assert get_scene_embeddings(audio, both).shape == (2, 96)


def test_input_is_normalised_as_in_training(large: Path) -> None:
    """Over the whole clip, however it is cut into windows."""
    audio, normalised = noise(2, 7.2), load_model(str(large), window_seconds=5.0)
    by_hand = HearModel(PretrainedEncoder(normalised.pretrained.encoder, normalise=False), window_seconds=5.0)
    expected = get_timestamp_embeddings(F.layer_norm(audio, audio.shape[1:]), by_hand)[0]
    torch.testing.assert_close(get_timestamp_embeddings(0.1 * audio + 0.2, normalised)[0], expected, rtol=0, atol=1e-3)
    assert (get_timestamp_embeddings(0.1 * audio + 0.2, by_hand)[0] - expected).abs().max() > 1e-2


def test_the_last_layer_is_the_models_output(large: Path) -> None:
    """With the final LayerNorm of a pre-norm model, by either name."""
    audio, last = noise(1, 0.7), load_model(str(large))
    output = last.pretrained.encoder(F.layer_norm(audio, audio.shape[1:])).detach()
    for model in (last, load_model(str(large), layer=2)):
        torch.testing.assert_close(get_timestamp_embeddings(audio, model)[0], output, rtol=0, atol=1e-5)


def test_a_run_is_found_by_its_weights_too(run: Path, model: HearModel) -> None:
    audio = noise(1, 0.5)
    again = load_model(str(run / "model.safetensors"))
    assert torch.equal(get_scene_embeddings(audio, again), get_scene_embeddings(audio, model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 3}, "a number from 0 .* to 2"),
        ({"layer": -1}, "a number from 0"),
        ({"layer": "first"}, '"last", "all"'),
        ({"window_seconds": 4.0}, "need more than 4"),
    ],
)
def test_wrong_options_are_named(run: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UnmaskError, match=message):
        load_model(str(run), **options)  # type: ignore[arg-type]


def test_wrong_input_is_named(model: HearModel, tmp_path: Path) -> None:
    with pytest.raises(UnmaskError, match="no weights are shipped"):
        load_model()
    with pytest.raises(UnmaskError, match="neither a run"):
        load_model(str(tmp_path))
    for wrong in (torch.zeros(16_000), torch.zeros(2, 399)):
        with pytest.raises(UnmaskError, match="at least 400 samples"):
            get_scene_embeddings(wrong, model)
    with pytest.raises(UnmaskError, match="load_model returned; got Linear"):
        get_scene_embeddings(torch.zeros(1, 800), torch.nn.Linear(1, 1))
