"""A trained encoder as people use it: from recordings to features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from unmask.core.data.kinds import CorruptSampleError
from unmask.core.errors import UnmaskError
from unmask.core.method import Features, to_device
from unmask.core.randomness import stable_id
from unmask.speech_audio.data.clips import AudioBatch
from unmask.speech_audio.data.decode import examine, read
from unmask.speech_audio.data.frames import RECEPTIVE_FIELD, num_frames
from unmask.speech_audio.encoders.wav2vec2 import SpeechEncoder, encode

Recording = str | Path | Tensor | np.ndarray


class PretrainedEncoder(nn.Module):
    """An encoder with the preparation of its input.

    Args:
        encoder: the network.
        normalise: whether clips go in with zero mean and unit variance.
    """

    def __init__(self, encoder: SpeechEncoder, normalise: bool = False) -> None:
        super().__init__()
        self.encoder, self.normalise = encoder, normalise
        self.dim, self.depth = encoder.dim, encoder.depth

    def preprocess(self, recordings: Recording | Sequence[Recording]) -> AudioBatch:
        """A padded batch from recordings of any length, on the encoder's device.

        Args:
            recordings: one or several: file names (wav, flac, ogg, mp3; any rate, any channels) or mono waveforms at
                16 kHz in about [-1, 1].

        Raises:
            UnmaskError: a file that cannot be read, or a waveform that is not 1-d, not finite, or shorter than a frame
                (25 ms).
        """
        many = [recordings] if isinstance(recordings, str | Path | Tensor | np.ndarray) else list(recordings)
        if not many:
            raise UnmaskError("no recordings to encode")
        names = [str(one) if isinstance(one, str | Path) else f"recording {i}" for i, one in enumerate(many)]
        waves = [self._prepare(one, name) for one, name in zip(many, names, strict=True)]
        lengths = torch.tensor([len(wave) for wave in waves])
        ids = torch.tensor([stable_id(name) for name in names])
        audio = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
        return to_device(AudioBatch(audio, lengths, num_frames(lengths), ids), next(self.parameters()).device)

    def _prepare(self, recording: Recording, name: str) -> Float[Tensor, "samples"]:
        wave = _read(recording) if isinstance(recording, str | Path) else torch.as_tensor(recording).cpu()
        if not wave.is_floating_point():
            raise UnmaskError(f"{name}: samples of type {wave.dtype}; expected floating point in [-1, 1]")
        wave = wave.float()
        if wave.dim() != 1 or len(wave) < RECEPTIVE_FIELD:
            raise UnmaskError(
                f"{name}: a waveform of shape {tuple(wave.shape)}; expected one channel of at least {RECEPTIVE_FIELD} "
                "samples (25 ms) at 16 kHz"
            )
        if not wave.isfinite().all():
            raise UnmaskError(f"{name}: has NaN or infinite samples")
        return F.layer_norm(wave, wave.shape) if self.normalise else wave

    def forward(self, batch: AudioBatch) -> Features:
        """One vector per 20 ms; ``valid`` is False past a clip's end, and ``pooled`` leaves that out."""
        return encode(self.encoder, batch.audio, batch.lengths)

    def states(self, batch: AudioBatch) -> list[Float[Tensor, "batch frames dim"]]:
        """The Transformer's input and the output of every layer; see `SpeechEncoder.states`."""
        return self.encoder.states(batch.audio, batch.lengths)


def _read(path: str | Path) -> Float[Tensor, "samples"]:
    try:
        return read(Path(path), examine(Path(path))).audio
    except CorruptSampleError as error:
        raise UnmaskError(f"{path}: {error}") from None
    except OSError as error:
        raise UnmaskError(f"{path}: cannot be read ({error.strerror or error})") from None
