"""`unmask.core.checks` for speech methods: hidden input is the samples that only hidden frames see."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from unmask.core import checks
from unmask.core.checks import hidden_tokens
from unmask.speech_audio.data.clips import AudioBatch
from unmask.speech_audio.data.frames import HOP, RECEPTIVE_FIELD, num_frames


def corrupt(batch: AudioBatch, plan: Any, value: float) -> AudioBatch:
    """The `corrupt` of waveforms: overwrites the samples that a hidden frame sees and no visible frame does.

    Neighbouring frames share 80 samples: of a span of n hidden frames between visible ones, ``320 n - 80`` samples are
    overwritten.
    """
    samples = batch.audio.shape[1]
    frames = num_frames(samples)
    hidden = hidden_tokens(plan, frames)
    valid = torch.arange(frames, device=hidden.device) < batch.frames[:, None]
    only_hidden = _seen(hidden & valid, samples) & ~_seen(~hidden & valid, samples)
    return replace(batch, audio=batch.audio.masked_fill(only_hidden, value))


def _seen(frames: Bool[Tensor, "batch frames"], samples: int) -> Bool[Tensor, "batch samples"]:
    """The samples that at least one of the frames sees."""
    start = torch.arange(frames.shape[1], device=frames.device) * HOP
    edges = torch.zeros(len(frames), samples + 1, dtype=torch.int32, device=frames.device)
    edges[:, start] += frames.int()
    edges[:, start + RECEPTIVE_FIELD] -= frames.int()
    return edges.cumsum(1)[:, :samples] > 0


def check_method(method: Any, batch: AudioBatch, **options: Any) -> None:
    """`unmask.core.checks.check_method` with this `corrupt`; options are passed on.

    A waveform encoder that normalises over time sees hidden samples in its statistics, in the released models as here:
    the method says so in `norms_over_all`. The penalty on waveform features is a term on features in its `loss_on`.
    """
    checks.check_method(method, batch, corrupt, **options)
