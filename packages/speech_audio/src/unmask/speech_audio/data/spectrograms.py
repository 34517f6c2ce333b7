"""Spectrograms on the encoder's frame grid, for pictures of what a method hides."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unmask.speech_audio.data.frames import HOP, SAMPLE_RATE

MELS = 80


def frame_spectrograms(
    audio: Float[Tensor, "batch samples"], visible: Bool[Tensor, "batch frames"]
) -> Float[Tensor, "batch 1 mels frames"]:
    """Log mel energies of exactly the 400 samples that each frame of the encoder sees (Kaldi's fbank, low bins first).

    Every clip is shifted and scaled to mean 0 and deviation 1 over its visible part: nothing that is hidden changes
    what is shown of the rest.
    """
    from torchaudio.compliance import kaldi

    shift = 1000 * HOP / SAMPLE_RATE
    mels = torch.stack([
        kaldi.fbank(clip[None], sample_frequency=SAMPLE_RATE, frame_shift=shift, num_mel_bins=MELS, dither=0.0).T
        for clip in audio.float().cpu()
    ])[:, None].to(audio.device)  # fmt: skip
    shown = visible[:, None, None]
    count = (shown.sum((2, 3), keepdim=True) * MELS).clamp(min=1)
    centred = mels - torch.where(shown, mels, 0.0).sum((2, 3), keepdim=True) / count
    variance = torch.where(shown, centred, 0.0).square().sum((2, 3), keepdim=True) / count
    return centred / variance.sqrt().clamp(min=1e-3)
