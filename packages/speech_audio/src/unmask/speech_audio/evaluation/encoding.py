"""Features of whole clips: every layer of encoders beside MFCC and log-mel, in one pass over the audio."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmask.core.data.lengths import by_length
from unmask.core.evaluation.features import FeatureSplit, stand_ins
from unmask.core.evaluation.weighted import layer_of
from unmask.core.method import to_device
from unmask.core.progress import Advance
from unmask.core.randomness import Key
from unmask.core.training.position import batches
from unmask.speech_audio.data.clips import AudioBatch, Clips, Settings, collate
from unmask.speech_audio.data.frames import SAMPLE_RATE
from unmask.speech_audio.encoders.wav2vec2 import frame_mask
from unmask.speech_audio.evaluation.detail import Detail, Moments
from unmask.speech_audio.targets.features import log_mel, mfcc

SHORTEST = 0.1  # seconds; shorter clips than those that are trained on are probed too
BATCH_SECONDS = 30.0  # of padded audio encoded at a time


@dataclass(frozen=True)
class ClipFeatures:
    """One split, encoded.

    Args:
        x: means over each clip's frames, all layers side by side.
        index: of the clips in their dataset; unreadable ones are missing.
        ids: their sample ids.
        layers: how many.
        detail: sums for the probe of acoustic detail, where it was asked for.
    """

    x: Float[Tensor, "n values"]
    index: Int[Tensor, "n"]
    ids: Int[Tensor, "n"]
    layers: int
    detail: Moments | None = None

    @property
    def last(self) -> Float[Tensor, "n dim"]:
        """The last layer."""
        return layer_of(FeatureSplit(self.x, self.ids), -1, self.layers).x


def length_sorted(lengths: Int[Tensor, "n"]) -> Iterator[list[int]]:
    """Indices of clips in batches of about the same length, at most `BATCH_SECONDS` of padded audio in each."""
    return by_length(lengths, int(BATCH_SECONDS * SAMPLE_RATE))


def encode_clips(
    encoders: Mapping[str, Any],
    clips: Clips,
    index: Int[Tensor, "n"],
    *,
    device: torch.device,
    detail: Detail | None = None,
    seed: int = 0,
    workers: int = 0,
    baselines: bool = True,
    advance: Advance | None = None,
) -> dict[str, ClipFeatures]:
    """Every layer of every encoder, and the baselines ``mfcc`` and ``logmel``, in one pass over the audio.

    Baselines are the mean and the standard deviation over a clip's frames of MFCC-39 and of 80 log-mel energies.

    Args:
        encoders: `SpeechEncoder`s by name, in eval mode on `device`.
        clips: a split.
        index: which clips of it.
        device: where to compute; the result is on the CPU.
        detail: also collect frames for this probe, of the encoders.
        seed: of the choice of those frames.
        workers: data loading processes.
        baselines: compute them, too.
        advance: told after each batch how many clips are done.
    """
    chunks = [index[torch.tensor(chunk)].tolist() for chunk in length_sorted(clips.lengths[index])]
    per_clip = math.ceil(detail.frames / max(len(index), 1)) if detail else 0
    pooled: dict[str, list[Tensor]] = {}
    moments: dict[str, Moments] = {}
    kept_rows, ids = [], []
    loader = batches(clips, [[(i, 0) for i in chunk] for chunk in chunks], collate, workers, pin=False)
    for batch, chunk in zip(loader, chunks, strict=True):
        wrong = stand_ins(batch, clips, chunk)
        keep = torch.ones(len(chunk), dtype=torch.bool) if wrong is None else ~wrong
        kept_rows.append(torch.tensor(chunk)[keep])
        ids.append(batch.ids[keep])
        spectra = _baselines(batch) if baselines or detail is not None else {}
        for name, waves in spectra.items() if baselines else ():
            rows = torch.stack([torch.cat([x.mean(0), x.std(0, correction=0)]) for x in waves])
            pooled.setdefault(name, []).append(rows[keep])
        moved = to_device(batch, device)
        valid = frame_mask(moved.audio.shape[1], moved.lengths)
        chosen = _choose_frames(moved, valid & keep.to(device)[:, None], per_clip, seed)
        for name, encoder in encoders.items():
            states = _states(encoder, moved)
            pooled.setdefault(name, []).append(_pool(states, valid).cpu()[keep])
            if detail is not None:
                if name not in moments:
                    moments[name] = Moments(len(states), states.shape[-1], detail.bins, device)
                moments[name].add(states[:, chosen], _spectra_of(spectra["logmel"], moved, chosen.cpu()))
        if advance is not None:
            advance(len(chunk))
    kept, order = torch.cat(kept_rows).sort()
    kept_ids = torch.cat(ids)[order]
    layers = {name: encoder.depth + 1 for name, encoder in encoders.items()}
    return {
        name: ClipFeatures(torch.cat(rows)[order], kept, kept_ids, layers.get(name, 1), moments.get(name))
        for name, rows in pooled.items()
    }


@torch.inference_mode()
def _states(encoder: Any, batch: AudioBatch) -> Float[Tensor, "layers batch frames dim"]:
    return torch.stack(encoder.states(batch.audio, batch.lengths)).float()


def _pool(
    states: Float[Tensor, "layers batch frames dim"], valid: Bool[Tensor, "batch frames"]
) -> Float[Tensor, "batch values"]:
    """Each layer's mean over a clip's own frames, layers side by side."""
    total = torch.where(valid[..., None], states, 0.0).sum(2)
    means = total / valid.sum(1).clamp(min=1)[:, None]
    return means.transpose(0, 1).flatten(1)


def _baselines(batch: AudioBatch) -> dict[str, list[Float[Tensor, "frames dim"]]]:
    waves = [audio[:length] for audio, length in zip(batch.audio, batch.lengths.tolist(), strict=True)]
    return {"mfcc": [mfcc(wave) for wave in waves], "logmel": [log_mel(wave) for wave in waves]}


def _choose_frames(
    batch: AudioBatch, valid: Bool[Tensor, "batch frames"], count: int, seed: int
) -> Bool[Tensor, "batch frames"]:
    """`count` frames of every clip, or all where it has fewer, by (seed, clip id) alone."""
    draws = Key.of(seed, batch.ids).stream("detail frames").uniform(valid.shape[1])
    rank = draws.masked_fill(~valid, 2.0).argsort(1).argsort(1)
    return valid & (rank < count)


def _spectra_of(
    logmel: list[Tensor], batch: AudioBatch, chosen: Bool[Tensor, "batch frames"]
) -> Float[Tensor, "n bins"]:
    """The spectrum of each chosen frame, row by row: frame t of 20 ms begins where frame 2 t of 10 ms does."""
    parts = [x[::2][row.nonzero()[:, 0]] for x, row in zip(logmel, chosen, strict=True)]
    return torch.cat(parts).to(batch.audio.device)


def audio_settings(settings: Settings, data: str | None = None) -> Settings:
    """A run's data settings for encoding: at `data`, whole recordings, padded batches, no labels of frames."""
    return replace(
        settings,
        source=settings.source if data is None else data,
        min_seconds=min(settings.min_seconds, SHORTEST),
        long="crop",
        batching="pad",
        corrupt="skip",
        label_sets=(),
        targets=None,
    )
