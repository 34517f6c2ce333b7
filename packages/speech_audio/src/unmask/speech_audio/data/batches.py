"""Clips as batches: padded to the longest or cut to the shortest, with their labels on the frame grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from unmask.core.randomness import SampleKey
from unmask.speech_audio.data.frames import FRAME_RATE, SAMPLE_RATE, num_frames


class Sample(NamedTuple):
    """One clip, cropped to max_seconds, and what `collate` needs to make batches of it.

    Attributes:
        audio: 16 kHz mono.
        id: its stable id.
        start: where the crop begins in the whole clip, in samples.
        labels: of the whole clip, one array per label set; empty where there are none.
        rates: labels per second of each of them.
        key: where a cut to the batch's shortest clip is drawn from; None cuts at the start.
        batching: see `Settings`.
    """

    audio: Float[Tensor, "samples"]
    id: int
    start: int
    labels: tuple[Int[np.ndarray, "frames streams"], ...]
    rates: tuple[float, ...]
    key: SampleKey | None
    batching: Literal["pad", "crop"]


@dataclass(frozen=True)
class AudioBatch:
    """What an audio method trains on.

    Args:
        audio: 16 kHz mono, about [-1, 1], zero after each clip's end.
        lengths: real samples of each clip.
        frames: 50 Hz frames of each clip that count: those it has samples for, and fewer where its labels end earlier.
        ids: the samples' stable ids (see `unmask.core.randomness`).
        labels: at the 50 Hz frame grid, all label sets' streams side by side; -1 after each clip's `frames`. The
            frames axis is num_frames(audio.shape[1]) long. None without label sets.
    """

    audio: Float[Tensor, "batch samples"]
    lengths: Int[Tensor, "batch"]
    frames: Int[Tensor, "batch"]
    ids: Int[Tensor, "batch"]
    labels: Int[Tensor, "batch frames targets"] | None = None


def collate(samples: Sequence[Sample] | AudioBatch) -> AudioBatch:
    """Samples of one dataset as a batch; a batch that the dataset made itself passes through.

    In ``crop`` mode every clip is cut to the batch's shortest, at a position that its key and that length decide.
    """
    if isinstance(samples, AudioBatch):
        return samples
    if samples[0].batching == "crop":
        shortest = min(len(sample.audio) for sample in samples)
        samples = [_cut(sample, shortest) for sample in samples]
    lengths = [len(sample.audio) for sample in samples]
    audio = torch.zeros(len(samples), max(lengths))
    for row, sample in zip(audio, samples, strict=True):
        row[: len(sample.audio)] = sample.audio
    frames = [num_frames(length) for length in lengths]
    labels = None
    if samples[0].labels:
        parts = [_on_grid(sample, count) for sample, count in zip(samples, frames, strict=True)]
        frames = [len(part) for part in parts]
        labels = torch.full((len(samples), num_frames(max(lengths)), parts[0].shape[1]), -1, dtype=torch.int64)
        for row, part in zip(labels, parts, strict=True):
            row[: len(part)] = torch.from_numpy(part)
    ids = torch.tensor([sample.id for sample in samples])
    return AudioBatch(audio, torch.tensor(lengths), torch.tensor(frames), ids, labels)


def _cut(sample: Sample, length: int) -> Sample:
    spare = len(sample.audio) - length
    start = 0 if sample.key is None else int(sample.key.uniform(1)[0] * (spare + 1))
    return sample._replace(audio=sample.audio[start : start + length], start=sample.start + start)


def _on_grid(sample: Sample, frames: int) -> Int[np.ndarray, "kept streams"]:
    """The labels of a crop's 50 Hz frames; fewer frames than asked for where a label set ends earlier.

    A set of R labels a second starts at label round(start * R / 16000) of the clip; frame t takes the label
    floor(t * R / 50) after that one.
    """
    streams = []
    for labels, rate in zip(sample.labels, sample.rates, strict=True):
        first, step = round(sample.start * rate / SAMPLE_RATE), rate / FRAME_RATE
        frames = max(min(frames, int((len(labels) - first) / step)), 0)
        streams.append((labels, first, step))
    grid = np.arange(frames)
    kept = [labels[first + np.floor(grid * step).astype(np.int64)] for labels, first, step in streams]
    return np.concatenate(kept, axis=1).astype(np.int64)
