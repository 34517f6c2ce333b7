"""The frame grid of the wav2vec 2.0 waveform encoder, which every model of this domain shares.

Seven unpadded convolutions with kernels (10, 3, 3, 3, 3, 2, 2) and strides (5, 2, 2, 2, 2, 2, 2): one frame every 320
samples (20 ms at 16 kHz), each of which sees 400 samples (25 ms).
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

SAMPLE_RATE = 16_000
HOP = 320
RECEPTIVE_FIELD = 400
FRAME_RATE = SAMPLE_RATE / HOP  # 50 Hz

T = TypeVar("T", int, Tensor)


def num_frames(samples: T) -> T:
    """Frames of a clip of so many samples: ``(samples - 400) // 320 + 1``, and 0 below 400 samples.

    Frame t sees samples ``320 t`` to ``320 t + 399``, so a frame counts only if all that it sees is there.
    """
    frames = (samples - RECEPTIVE_FIELD) // HOP + 1
    return frames.clamp(min=0) if isinstance(frames, Tensor) else max(frames, 0)
