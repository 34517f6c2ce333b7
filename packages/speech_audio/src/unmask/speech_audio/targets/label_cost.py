"""The cost of making labels, measured on a few clips and a small k-means, for ``unmask train --dry-run``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unmask.core.training.measure import peak_bytes
from unmask.core.training.stages import Bench, Cost
from unmask.speech_audio.data.frames import SAMPLE_RATE
from unmask.speech_audio.targets.clustering import fit_residual, readable
from unmask.speech_audio.targets.features import log_f0
from unmask.speech_audio.targets.make import TargetSettings, make_feature

_CLIPS, _SECONDS = 8, 0.5  # most clips to measure, and most seconds
_ROWS = 2_000  # frames of the small k-means
_STEPS = 350  # mini-batches after which k-means stops by itself, as seen with 170,000 frames
_PITCH_CLIPS = 200  # of `unmask.speech_audio.targets.diagnostics.diagnose`
_FLOAT = 4  # bytes


def label_cost(targets: Sequence[TargetSettings]) -> Callable[[Bench], Cost]:
    """Time and memory of the stage that makes these labels, one target after the other."""

    def measure(bench: Bench) -> Cost:
        costs = [_target(target, bench) for target in targets]
        return Cost(sum(cost.seconds for cost in costs), max(cost.memory_bytes for cost in costs))

    return measure


def _target(target: TargetSettings, bench: Bench) -> Cost:
    clips = bench.train_set
    encoder = bench.method.encoder if target.kind == "layer" else None
    feature = make_feature(target, encoder, bench.device)
    longest = int(clips.whole_lengths.argmax())
    beside, _ = peak_bytes(bench.device, lambda: _process(clips, longest, feature))
    per_second = _seconds_per_second(clips, feature)
    pitch = _seconds_per_second(clips, log_f0)

    audio = _seconds(clips.lengths) * target.share
    frames = round(min(target.max_frames, audio * feature.rate))
    codebooks = 1 if target.average else len(feature.parts)
    width = feature.dim // len(feature.parts)
    start, batch = _kmeans(target, width)
    rows = min(frames, 3 * max(target.kmeans.batch, target.clusters))
    batches = min(_STEPS, target.kmeans.max_iter * frames // target.kmeans.batch)
    fit = start * rows * target.kmeans.n_init + batch * target.kmeans.batch * batches
    labelled = sum(_seconds(split.whole_lengths) for split in (clips, bench.val_set) if split is not None)
    seconds = (
        frames / feature.rate * per_second
        + codebooks * target.stages * fit
        + labelled * (per_second + feature.rate * batch * codebooks * target.stages)
        + min(_PITCH_CLIPS, len(clips)) * _seconds(clips.whole_lengths) / len(clips) * pitch
    )
    return Cost(seconds, frames * (feature.dim + width) * _FLOAT + beside)


def _seconds(lengths: Any) -> float:
    return float(lengths.sum()) / SAMPLE_RATE


def _process(clips: Any, index: int, work: Callable[[Tensor], Any]) -> float:
    """Read a clip and process it; the seconds of audio in it, 0 where it is damaged."""
    waveform = readable(clips, index)
    if waveform is None:
        return 0.0
    work(waveform)
    return len(waveform) / SAMPLE_RATE


def _seconds_per_second(clips: Any, work: Callable[[Tensor], Any]) -> float:
    """Seconds to read and process a second of audio, measured on a few clips after one to warm up."""
    first, *rest = torch.linspace(0, len(clips) - 1, _CLIPS).long().tolist()
    _process(clips, first, work)
    audio, began = 0.0, time.perf_counter()
    for index in rest:
        audio += _process(clips, index, work)
        if time.perf_counter() - began > _SECONDS:
            break
    return (time.perf_counter() - began) / audio if audio else 0.0


def _kmeans(target: TargetSettings, width: int) -> tuple[float, float]:
    """Seconds per frame of one initialisation of k-means, and of one mini-batch, from two short fits."""
    rows = max(_ROWS, target.clusters)
    frames = torch.randn(rows, width)
    times = []
    for passes in (3, 3, 8):  # the first warms up
        settings = replace(target.kmeans, n_init=1, batch=rows, max_iter=passes, max_no_improvement=passes)
        began = time.perf_counter()
        fit_residual(frames, target.clusters, seed=0, settings=settings)
        times.append(time.perf_counter() - began)
    batch = max(times[2] - times[1], 0.0) / 5
    return max(times[1] - 3 * batch, 0.0) / rows, batch / rows
