"""The s3prl upstream: its signature, padded batches, the same number of states always, what its featurizer expects."""

from __future__ import annotations

from pathlib import Path

import pytest
import speech
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.core.errors import UnmaskError
from unmask.speech_audio.data.frames import num_frames
from unmask.speech_audio.interop.s3prl import UpstreamExpert, customized_upstream, unmask_local


@pytest.fixture(scope="module", params=["base", "large"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"base": {}, "large": {"encoder": speech.LARGE, "normalise": True}}[request.param]
    shape = {**shape, "encoder": {**shape.get("encoder", {}), "layer_drop": 0.9}}
    return speech.fabricate(tmp_path_factory.mktemp("s3prl") / "run", **shape)


@pytest.fixture
def upstream(run: Path) -> UpstreamExpert:
    return UpstreamExpert(str(run)).eval()


def wave(seconds: float, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(round(16_000 * seconds), generator=torch.Generator().manual_seed(seed))


def test_the_call_that_run_downstream_makes(run: Path) -> None:
    for entry in (customized_upstream, unmask_local, UpstreamExpert):
        expert = entry(ckpt=str(run), model_config=None, refresh=False)
        assert isinstance(expert, nn.Module)
        assert expert.get_downsample_rates("hidden_states") == 320


def test_states_have_one_shape(upstream: UpstreamExpert) -> None:
    found = upstream([wave(1.0), wave(0.63, 1), wave(0.9, 2)])
    states = found["hidden_states"]
    assert [tuple(s.shape) for s in states] == [(3, 49, 32)] * 3
    assert torch.equal(found["last_hidden_state"], states[-1])
    assert all(s.dtype == torch.float32 and s.isfinite().all() for s in states)


def test_a_clip_has_the_same_states_alone_and_in_a_batch(upstream: UpstreamExpert) -> None:
    waves = [wave(1.0), wave(0.4, 1), wave(0.75, 2)]
    together = upstream(waves)["hidden_states"]
    for i, one in enumerate(waves):
        frames = num_frames(len(one))
        for alone, batch in zip(upstream([one])["hidden_states"], together, strict=True):
            torch.testing.assert_close(batch[i, :frames], alone[0], rtol=0, atol=1e-4)
            assert (batch[i, frames:] == batch[i, frames - 1]).all()


def test_the_number_of_states_never_changes(upstream: UpstreamExpert) -> None:
    """In training too, where the recipe drops nine layers in ten; and every layer does something."""
    for training in (True, False):
        upstream.train(training)
        for _ in range(3):
            states = upstream([wave(0.5)])["hidden_states"]
            assert len(states) == 3
            assert all(not torch.equal(a, b) for a, b in zip(states, states[1:], strict=False))


@pytest.mark.parametrize("samples", [1, 399, 400, 16_000, 16_319, 31_999, 48_123])
def test_the_frames_are_those_that_s3prl_tolerates(upstream: UpstreamExpert, samples: int) -> None:
    states = upstream([wave(1)[:1].repeat(samples) if samples < 400 else wave(samples / 16_000)])["hidden_states"]
    assert abs(states[0].shape[1] - round(samples / 320)) < 5
    assert states[0].shape[1] == max(1, num_frames(samples)) and states[-1].isfinite().all()


def test_it_trains_behind_a_weighted_sum(upstream: UpstreamExpert) -> None:
    """s3prl's featurizer: one weight per state, softmax; fine-tuning leaves the waveform convolutions alone."""
    weights = nn.Parameter(torch.zeros(3))
    upstream.train()
    states = torch.stack(upstream([wave(0.5), wave(0.3, 1)])["hidden_states"])
    assert states.requires_grad
    (F.softmax(weights, 0)[:, None, None, None] * states).sum(0).square().mean().backward()
    encoder = upstream.model.encoder
    assert weights.grad is not None and all(p.grad is None for p in encoder.waveform.parameters())
    assert all(p.grad is not None for p in encoder.blocks.parameters())


def test_waveforms_are_normalised_where_the_model_was_trained_so(upstream: UpstreamExpert) -> None:
    """Each over its own samples, before padding."""
    waves = [3 * wave(0.6) + 0.1, wave(0.4, 1)]
    prepared = [F.layer_norm(one, one.shape) for one in waves] if upstream.model.normalise else waves
    found = upstream(waves)["last_hidden_state"]
    for i, one in enumerate(prepared):
        expected = upstream.model.encoder(one[None])[0]
        torch.testing.assert_close(found[i, : len(expected)], expected, rtol=0, atol=1e-4)


def test_wrong_input_is_named(upstream: UpstreamExpert) -> None:
    with pytest.raises(UnmaskError, match="no weights are shipped"):
        UpstreamExpert()
    for wrong in ([], [torch.zeros(2, 800)], [torch.zeros(0)]):
        with pytest.raises(UnmaskError, match="a list of waveforms"):
            upstream(wrong)
