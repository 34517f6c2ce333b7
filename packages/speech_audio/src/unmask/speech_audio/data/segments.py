"""Long recordings as several samples: cut into segments that together are the whole recording.

A recording of more than `max_samples` becomes as few segments of about the same length as will cover it, see
`unmask.core.data.lengths`: 60 s are 4 segments of 15 s where 15.6 are allowed. They begin on the frame grid (every 320
samples), where labels of 50 and 100 a second have a label beginning, too.

A shorter recording stays one sample, with the id that its name gives it; a segment's id follows from the recording's id
and the segment's number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from unmask.core.data.lengths import cut_lengths
from unmask.core.randomness import Key
from unmask.speech_audio.data.decode import Sound
from unmask.speech_audio.data.frames import HOP, SAMPLE_RATE
from unmask.speech_audio.data.readers import Reader
from unmask.speech_audio.data.sources import Source

_POSITIVE = (1 << 63) - 1


@dataclass(frozen=True)
class Segments:
    """A source's samples and the recordings they are parts of.

    Args:
        source: the samples.
        recordings: the source that was cut.
        recording: each sample's recording, as an index.
        starts: each sample's first sample in its recording.
    """

    source: Source
    recordings: Source
    recording: Int[Tensor, "n"]
    starts: Int[Tensor, "n"]


def whole(recordings: Source) -> Segments:
    """Every recording as one sample."""
    index = torch.arange(len(recordings.names))
    return Segments(recordings, recordings, index, torch.zeros_like(index))


def cut(recordings: Source, min_samples: int, max_samples: int, val_share: float) -> Segments:
    """Recordings longer than `max_samples` as segments; all segments of a recording are in its split.

    Args:
        recordings: what to cut; nothing is decoded.
        min_samples: no segment is shorter.
        max_samples: no segment is longer; at least `min_samples`.
        val_share: see `Source.splits`.
    """
    if not (recordings.lengths > max_samples).any():
        return whole(recordings)
    parts = cut_lengths(recordings.lengths, min_samples, max_samples, HOP)
    recording, starts, stops = parts.sample, parts.starts, parts.stops
    long = recordings.lengths[recording] > max_samples
    ids = recordings.ids[recording]
    own = Key.of(0, ids, parts.number).stream("segment").bits(1)[:, 0] & _POSITIVE
    known = zip(recording.tolist(), long.tolist(), strict=True)
    source = Source(
        names=_Names(recordings.names, recording, starts, stops, long),
        lengths=stops - starts,
        read=_Reader(recordings.read, recording, starts),
        attributes={key: labels[recording] for key, labels in recordings.attributes.items()},
        values=recordings.values,
        texts=[None if part else recordings.texts[i] for i, part in known] if recordings.texts else (),
        problems=recordings.problems,
        codes=recordings.splits(val_share)[recording],
        left=recordings.left,
        own_ids=torch.where(long, own, ids),
    )
    return Segments(source, recordings, recording, starts)


@dataclass(frozen=True)
class _Names(Sequence[str]):
    """Names such as ``a.wav[120.0-135.0s]``, made when they are asked for: there may be millions."""

    recordings: Sequence[str]
    recording: Int[Tensor, "n"]
    starts: Int[Tensor, "n"]
    stops: Int[Tensor, "n"]
    long: Bool[Tensor, "n"]

    def __len__(self) -> int:
        return len(self.recording)

    def __getitem__(self, index: Any) -> Any:
        name = self.recordings[int(self.recording[index])]
        if not self.long[index]:
            return name
        return f"{name}[{int(self.starts[index]) / SAMPLE_RATE:.1f}-{int(self.stops[index]) / SAMPLE_RATE:.1f}s]"


@dataclass(frozen=True)
class _Reader:
    """Reads a part of a segment out of its recording."""

    read: Reader
    recording: Int[Tensor, "n"]
    starts: Int[Tensor, "n"]

    def __call__(self, index: int, start: int, stop: int) -> Sound:
        offset = int(self.starts[index])
        return self.read(int(self.recording[index]), offset + start, offset + stop)


def describe(
    segments: Segments,
    members: Int[Tensor, "n"],
    lengths: Int[Tensor, "n"],
    *,
    longest: float,
    batch_size: int,
    to_shortest: bool,
) -> str:
    """How many recordings, minutes and segments a split holds, and how much of that an epoch hears, and why.

    Args:
        segments: the source.
        members: which of its samples are in the split.
        lengths: samples that are given of each of them.
        longest: seconds that are given of one at most.
        batch_size: an epoch is made of whole batches.
        to_shortest: batches are cut to their shortest clip.
    """
    rows = segments.recording[members].unique()
    recorded, cut_up, given = (
        int(x.sum()) for x in (segments.recordings.lengths[rows], segments.source.lengths[members], lengths)
    )
    text = f"{len(rows):,} recordings, {recorded / SAMPLE_RATE / 60:,.1f} min"
    if segments.source is not segments.recordings:
        text += f", in {len(members):,} segments of up to {longest:g} s"
    rest = len(members) % batch_size if len(members) >= batch_size else 0
    causes = {
        f"of longer ones a crop of {longest:g} s; data.long=segments takes all": given < cut_up,
        "ends shorter than data.min_seconds are left out": cut_up < recorded,
        f"{rest} of {len(members):,} do not fill a batch of {batch_size}, others in each epoch": rest > 0,
        "batches are cut to their shortest clip; data.batching=pad does not": to_shortest,
    }
    why = [cause for cause, applies in causes.items() if applies]
    if not why:
        return f"{text}; an epoch hears all of it"
    share = given / recorded * (1 - rest / len(members))
    percent = f"{min(100 * share, 99.9):.3g}" if share < 1 else "100"
    return f"{text}; an epoch hears {'at most' if to_shortest else 'about'} {percent} % of it ({'; '.join(why)})"
