"""Features to quantise into labels: MFCC, log-mel, pitch and energy, or the outputs of a trained encoder's layers.

A feature is a callable from a waveform at 16 kHz to frames, with ``rate`` (frames per second), ``dim``, ``name`` and
``parts``: the names of equal column groups, each of which gets a codebook of its own.

All spectral ones follow Kaldi's framing (torchaudio.compliance.kaldi): frames of 25 ms every 10 ms, only whole ones,
(samples - 400) // 160 + 1 of them. Waveforms are in [-1, 1] and are not scaled to 16-bit integers, as in
HuBERT's own recipe: with use_energy off the scale moves only the first cepstrum by a constant, and Kaldi's floor of
1.2e-7 on each mel energy lies near the rounding noise of 16-bit audio. Dither is 0, so that the same audio gets the
same labels every time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from unmask.core.errors import UnmaskError
from unmask.speech_audio.data.frames import FRAME_RATE, HOP, RECEPTIVE_FIELD, SAMPLE_RATE, num_frames

SHIFT = 160  # samples between frames at 100 Hz
WINDOW = 400  # samples of a frame
RATE = SAMPLE_RATE / SHIFT
_PIECE = 3000  # frames computed at once, so that an hour needs no more memory than half a minute
_SILENCE = 1e-10  # mean square below which log-energy does not fall: -100 dB

F0_LOW, F0_HIGH = 50.0, 500.0
_SHORTEST, _LONGEST = round(SAMPLE_RATE / F0_HIGH), round(SAMPLE_RATE / F0_LOW)  # lags in samples
_APERIODIC = 0.2  # a frame is voiced if its YIN dip is below this
_UNVOICED = math.log(math.sqrt(F0_LOW * F0_HIGH))  # log-F0 of clips without a voiced frame


def kaldi_frames(samples: int) -> int:
    """The number of frames at 100 Hz of a clip with `samples` samples; 0 below 400."""
    return max((samples - WINDOW) // SHIFT + 1, 0)


def _in_pieces(
    compute: Callable[[Tensor], Tensor], waveform: Float[Tensor, "samples"], dim: int, margin: int = 0
) -> Float[Tensor, "frames dim"]:
    """Apply `compute` to pieces of a clip, where a frame depends on its 400 samples and `margin` on both sides."""
    frames = kaldi_frames(len(waveform))
    padded = F.pad(waveform, (margin, margin))
    out = waveform.new_empty(frames, dim)
    for start in range(0, frames, _PIECE):
        stop = min(start + _PIECE, frames)
        out[start:stop] = compute(padded[start * SHIFT : (stop - 1) * SHIFT + WINDOW + 2 * margin])
    return out


def delta(x: Float[Tensor, "frames dim"]) -> Float[Tensor, "frames dim"]:
    """Slope of the regression line over 5 frames: sum_n n (x[t+n] - x[t-n]) / 10, n = 1, 2; end frames repeat."""
    if not len(x):
        return x
    padded = F.pad(x.T[None], (2, 2), mode="replicate")[0].T
    near, far = padded[3:-1] - padded[1:-3], padded[4:] - padded[:-4]
    return (near + 2 * far) / 10


def mfcc(waveform: Float[Tensor, "samples"]) -> Float[Tensor, "frames 39"]:
    """HuBERT's first target: 13 cepstra with their delta and delta-delta.

    Kaldi's MFCC with its defaults (23 mel bins, 20 Hz to 8 kHz, pre-emphasis .97, Povey window, lifter 22) and
    use_energy off; no mean or variance normalisation.
    """
    from torchaudio.compliance import kaldi

    def cepstra(piece: Tensor) -> Tensor:
        return kaldi.mfcc(piece[None], sample_frequency=SAMPLE_RATE, num_ceps=13, use_energy=False, dither=0.0)

    x = _in_pieces(cepstra, waveform, 13)  # [frames, 13]
    slope = delta(x)
    return torch.cat([x, slope, delta(slope)], dim=1)


def log_mel(waveform: Float[Tensor, "samples"], bins: int = 80) -> Float[Tensor, "frames bins"]:
    """Log mel energies of Kaldi's fbank (power spectrum, Povey window, 20 Hz to 8 kHz).

    Args:
        waveform: at 16 kHz.
        bins: mel bins; 80 resolve the harmonics of the voice, 40 do not.
    """
    from torchaudio.compliance import kaldi

    def fbank(piece: Tensor) -> Tensor:
        return kaldi.fbank(piece[None], sample_frequency=SAMPLE_RATE, num_mel_bins=bins, dither=0.0)

    return _in_pieces(fbank, waveform, bins)


def prosody(waveform: Float[Tensor, "samples"]) -> Float[Tensor, "frames 4"]:
    """Pitch and loudness only: log-F0, its delta, log-energy and a voicing flag.

    Log-F0 is interpolated over unvoiced frames (see `log_f0`), so that k-means does not split on voicing alone. The
    four have different units: standardise them before clustering.
    """
    pitch, voiced = log_f0(waveform)
    return torch.stack([pitch, delta(pitch[:, None])[:, 0], log_energy(waveform), voiced.float()], dim=1)


def mfcc_prosody(waveform: Float[Tensor, "samples"]) -> Float[Tensor, "frames 42"]:
    """`mfcc` and log-F0, voicing flag and log-energy. Standardise them before clustering."""
    pitch, voiced = log_f0(waveform)
    return torch.cat([mfcc(waveform), torch.stack([pitch, voiced.float(), log_energy(waveform)], dim=1)], dim=1)


@dataclass(frozen=True)
class WaveformFeature:
    """A feature that is computed from the waveform alone, at 100 Hz, and quantised as one part.

    Args:
        name: what it is called.
        dim: values per frame.
        compute: the frames of a waveform, such as `mfcc`.
    """

    name: str
    dim: int
    compute: Callable[[Tensor], Float[Tensor, "frames dim"]]
    rate: ClassVar[float] = RATE

    @property
    def parts(self) -> tuple[str, ...]:
        """One codebook."""
        return (self.name,)

    def __call__(self, waveform: Float[Tensor, "samples"]) -> Float[Tensor, "frames dim"]:
        """The frames of one clip."""
        return self.compute(waveform)


MFCC = WaveformFeature("mfcc", 39, mfcc)
FIXED = {  # without settings of their own, by name
    feature.name: feature
    for feature in (MFCC, WaveformFeature("prosody", 4, prosody), WaveformFeature("mfcc_prosody", 42, mfcc_prosody))
}


def log_energy(waveform: Float[Tensor, "samples"]) -> Float[Tensor, "frames"]:
    """Natural logarithm of each frame's mean square, at least log 1e-10."""

    def energy(piece: Tensor) -> Tensor:
        return piece.unfold(0, WINDOW, SHIFT).square().mean(1, keepdim=True).clamp(min=_SILENCE).log()

    return _in_pieces(energy, waveform, 1)[:, 0]


def f0(waveform: Float[Tensor, "samples"]) -> Float[Tensor, "frames"]:
    """Fundamental frequency in Hz at 100 Hz, 0 where unvoiced.

    YIN (de Cheveigne and Kawahara, JASA 2002, doi 10.1121/1.1458024), steps 1 to 5, between 50 and 500 Hz: a window of
    25 ms is compared with the one 2 to 20 ms later, both centred on the frame. Differences from the paper: all frames
    are computed at once by FFT; among the lags below the threshold of 0.2 the first is taken whose dip is within 0.05
    of the deepest, which avoids choosing a strong second harmonic; there is no search among neighbouring frames
    (step 6). torchaudio's `detect_pitch_frequency` has no voicing decision and jumps to its upper end below 85 Hz.
    """
    return _in_pieces(_yin, waveform, 1, margin=_LONGEST // 2)[:, 0]


def _yin(piece: Float[Tensor, "samples"]) -> Float[Tensor, "frames 1"]:
    x = piece.unfold(0, WINDOW + _LONGEST, SHIFT)
    x = x - x.mean(1, keepdim=True)
    # Cross-correlation of the first 400 samples with all 720: no lag wraps around within 1024.
    spectrum = torch.fft.rfft(x[:, :WINDOW], 1024).conj() * torch.fft.rfft(x, 1024)
    correlation = torch.fft.irfft(spectrum, 1024)[:, : _LONGEST + 1]
    energy = F.pad(x.square().cumsum(1), (1, 0))
    energy = energy[:, WINDOW:] - energy[:, : _LONGEST + 1]  # of the window at each lag
    difference = (energy[:, :1] + energy - 2 * correlation).clamp(min=0)[:, 1:]
    lags = torch.arange(1, _LONGEST + 1, device=x.device)
    total = difference.cumsum(1)
    dips = torch.where(total > 1e-9, difference * lags / total.clamp(min=1e-9), 1.0)
    return _first_dip(dips)


def _first_dip(dips: Float[Tensor, "frames lags"]) -> Float[Tensor, "frames 1"]:
    """F0 from the normalised difference at lags 1, 2, ...: the first dip that is nearly the deepest."""
    inner = dips[:, _SHORTEST - 2 :]  # one lag more on the short side, to see whether the first is a dip
    before, here, after = inner[:, :-2], inner[:, 1:-1], inner[:, 2:]
    low = (here < _APERIODIC) & (here <= before) & (here < after)
    deepest = here.masked_fill(~low, math.inf).amin(1, keepdim=True)
    low &= here <= deepest + 0.05
    first = low.to(torch.uint8).argmax(1, keepdim=True)
    left, middle, right = (part.gather(1, first) for part in (before, here, after))
    shift = (left - right) / (2 * (left - 2 * middle + right)).clamp(min=1e-9)  # vertex of the parabola
    hertz = SAMPLE_RATE / (first + _SHORTEST + shift.clamp(-0.5, 0.5))
    return torch.where(low.any(1, keepdim=True), hertz, 0.0)


def log_f0(
    waveform: Float[Tensor, "samples"],
) -> tuple[Float[Tensor, "frames"], Bool[Tensor, "frames"]]:
    """Log-F0 without gaps, and which frames are voiced.

    Unvoiced frames are interpolated linearly between their voiced neighbours; before the first and after the last the
    value is held. A clip without voiced frames has the middle of the range, log 158 Hz.
    """
    hertz = f0(waveform)
    voiced = hertz > 0
    known = voiced.nonzero()[:, 0]
    if not len(known):
        return torch.full_like(hertz, _UNVOICED), voiced
    values = np.interp(np.arange(len(hertz)), known.cpu(), hertz[known].log().cpu())
    return torch.from_numpy(values).to(hertz), voiced


class LayerFeatures:
    """Outputs of Transformer layers of an encoder at 50 Hz, several layers in one pass.

    Nothing is masked, dropout and LayerDrop are off, and layers of pre-norm encoders are taken before the final
    LayerNorm. Clips must be normalised as in the encoder's training, which the data settings do. Long clips are
    processed in pieces of 1.6 M samples, as in HuBERT's scripts; ours overlap by 80 samples so that the pieces' frames
    join without a gap (there, each piece lost a frame, and labels drifted by 20 ms in 100 s).

    Args:
        encoder: a `SpeechEncoder`; it is put into eval mode and moved to `device`.
        layers: 1-based; the columns of the result have this order.
        device: the device to compute on.
        piece: samples per forward pass, a multiple of 320.

    Raises:
        UnmaskError: a layer that the encoder does not have, a layer given twice, or none.
    """

    rate = FRAME_RATE

    def __init__(
        self, encoder: Any, layers: Sequence[int], device: torch.device | str = "cpu", piece: int = 1_600_000
    ) -> None:
        wrong = [layer for layer in layers if not 1 <= layer <= encoder.depth]
        if wrong or not layers or len(set(layers)) < len(layers):
            raise UnmaskError(
                f"layers are {list(layers)}; expected one or more different ones of 1 to {encoder.depth}, the encoder's"
            )
        self._encoder = encoder.to(device).eval()
        self._layers, self._device, self._piece = tuple(layers), device, piece
        self.parts: tuple[str, ...] = tuple(f"layer {layer}" for layer in layers)
        self.name, self.dim = ", ".join(self.parts), encoder.dim * len(self.parts)

    @torch.inference_mode()
    def __call__(self, waveform: Float[Tensor, "samples"]) -> Float[Tensor, "frames dim"]:
        """The frames of one clip, in fp32 and on the device: num_frames(samples) of them."""
        pieces = []
        for start in range(0, HOP * num_frames(len(waveform)), self._piece):
            piece = waveform[start : start + self._piece + RECEPTIVE_FIELD - HOP]
            states = self._encoder.states(piece[None].to(self._device), final_norm=False)
            pieces.append(torch.cat([states[layer][0].float() for layer in self._layers], dim=1))
        return torch.cat(pieces) if pieces else torch.empty(0, self.dim, device=self._device)


Feature = WaveformFeature | LayerFeatures
