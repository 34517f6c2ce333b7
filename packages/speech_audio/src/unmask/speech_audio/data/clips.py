"""Recordings for training and evaluation: what to read, which split it belongs to, how clips become a batch.

A clip is a recording, or a segment of a long one. A dataset is asked for ``(index, visit)``; where a long clip is
cropped is a function of (seed, sample id, visit) alone, so it does not depend on the batch, the worker or a resume. The
parts, beside this module: `sources` finds the recordings, `segments` cuts the long ones, `decode` reads them, `batches`
pads and aligns, `labels` holds what is predicted; `unmask.core.data.splits` divides them. Cropping, dropping of short
clips, normalisation and the alignment of labels follow HuBERT's released recipe (Hsu et al., arXiv 2106.07447; its data
set in fairseq), except that by default long recordings are cut into segments, not cropped, and a batch is padded, not
cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from unmask.core.data.dataset import SplitDataset
from unmask.core.data.kinds import CorruptSampleError, SourceError
from unmask.core.data.sources import Split, absolute, members_of
from unmask.core.data.splits import SPLITS
from unmask.core.errors import Problem, UnmaskError
from unmask.core.randomness import SampleKey, stable_id
from unmask.speech_audio.data.batches import AudioBatch, Sample, collate
from unmask.speech_audio.data.decode import CLIPPED_SHARE, Sound
from unmask.speech_audio.data.frames import RECEPTIVE_FIELD, SAMPLE_RATE
from unmask.speech_audio.data.labels import PLANNED, LabelSet, Target
from unmask.speech_audio.data.segments import Segments, cut, describe, whole
from unmask.speech_audio.data.sources import CLIPS, open_source

__all__ = [
    "AudioBatch", "Clips", "Problem", "Sample", "Settings", "SourceError", "Target", "collate", "open_split", "resolve",
]  # fmt: skip

_CROP, _CUT = stable_id("crop"), stable_id("cut to the shortest")
_EPSILON = 1e-5  # torch's layer_norm, which the released recipe normalises with


@dataclass(frozen=True)
class Settings:
    """Which recordings, and how they are given to a model.

    Args:
        source: a folder of wav, flac, ogg or mp3 files (LibriSpeech, LibriLight and Common Voice are recognised), of
            tar shards or of manifests; a manifest (``.tsv``) as fairseq writes it; or an embedded set: ``notes``,
            ``syllables``, ``prompts``, or several joined: ``prompts+syllables``. An embedded set's name wins over a
            folder's: write ``./notes`` then.
        min_seconds: shorter recordings are left out, counted and named.
        max_seconds: longest clip that a model is given.
        long: of recordings longer than that, ``segments`` makes several clips, so that an epoch hears all of them (see
            `unmask.speech_audio.data.segments`); ``crop`` takes `max_seconds` of each, as the released recipe does: at
            a random position in training and at the start otherwise.
        batching: ``pad`` fills a batch's clips up to the longest with zeros; ``crop`` cuts them to the shortest, as
            the released recipe does. What a clip shows then depends on the batch that it is in.
        normalise: each clip (with ``segments``, each segment) to mean 0 and variance 1 over all its samples, before it
            is cropped (LARGE).
        corrupt: ``skip`` counts and names unreadable clips and goes on without them; ``fatal`` stops at them.
        val_share: share of the training clips set aside where the data have no val split (and again for test where
            they have labels or speakers and no test split). Embedded sets have fixed splits.
        label_sets: folders of label sets; their targets are concatenated.
        targets: of the label sets; filled in by `resolve`, never written by hand. Those of a dry run, before any labels
            are made, are marked as planned, and all their labels are 0.
    """

    source: str
    min_seconds: Annotated[float, Field(ge=0)] = 2.0
    max_seconds: Annotated[float, Field(gt=0)] = 15.625
    long: Literal["segments", "crop"] = "segments"
    batching: Literal["pad", "crop"] = "pad"
    normalise: bool = False
    corrupt: Literal["skip", "fatal"] = "skip"
    val_share: Annotated[float, Field(ge=0, lt=1)] = 0.05
    label_sets: tuple[str, ...] = ()
    targets: tuple[Target, ...] | None = None

    free_to_change: ClassVar[frozenset[str]] = frozenset({"source", "label_sets", "corrupt"})
    filled_in: ClassVar[frozenset[str]] = frozenset({"targets"})

    def __post_init__(self) -> None:
        if self.max_seconds < self.min_seconds:
            raise ValueError(f"max_seconds is {self.max_seconds:g}, less than min_seconds={self.min_seconds:g}")
        if self.max_samples < RECEPTIVE_FIELD:
            raise ValueError(f"max_seconds is {self.max_seconds:g}; one frame of a model takes 0.025 s")

    @property
    def min_samples(self) -> int:
        """`min_seconds` in samples; at least the 400 that one frame of a model takes."""
        return max(round(self.min_seconds * SAMPLE_RATE), RECEPTIVE_FIELD)

    @property
    def max_samples(self) -> int:
        """`max_seconds` in samples."""
        return round(self.max_seconds * SAMPLE_RATE)


class Clips(SplitDataset[Sample]):
    """One split of a source: ``dataset[index, visit]`` is a `Sample`, a list of (index, visit) an `AudioBatch`.

    See `unmask.core.data.dataset.SplitDataset`. A clip's labels are looked up by its own id or, in a label set that
    does not have all clips, by its recording's: a segment then has the labels from floor(its start in seconds x labels
    per second) on.

    Args:
        segments: where the clips are.
        members: which of them belong to the split, all of them long enough.
        settings: resolved, where there are label sets.
        seed: of the crops.
        augment: crop long clips at random positions; else at the start.
    """

    kind = CLIPS
    settings: Settings
    labels: dict[str, Int[Tensor, "n"]]
    classes: dict[str, list[str]]

    def __init__(
        self, segments: Segments, members: Int[Tensor, "n"], settings: Settings, *, seed: int = 0, augment: bool = False
    ) -> None:
        source = segments.source
        super().__init__(source, members, settings, seed=seed, augment=augment)
        self.segments = segments
        self.whole_lengths: Int[Tensor, "n"] = source.lengths[members]
        self.lengths: Int[Tensor, "n"] = self.whole_lengths.clamp(max=settings.max_samples)
        self.labels = {key: indices[members] for key, indices in source.attributes.items()}
        self.classes = source.values
        self.texts: list[str | None] = [source.texts[i] if source.texts else None for i in members.tolist()]
        sets = [LabelSet.open(folder) for folder in settings.label_sets]
        if sets and settings.targets is not None:
            _check_targets(sets, settings)
        self._sets = [(labels, not labels.has_all(self.ids)) for labels in sets]  # and whether by recording
        self._clipped = torch.zeros(len(members)).share_memory_()

    def view(self, rows: Int[Tensor, "m"] | slice = slice(None), *, seed: int = 0, augment: bool = False) -> Clips:
        """Some clips of this split; the source is not opened again."""
        return Clips(self.segments, self._members[rows], self.settings, seed=seed, augment=augment)

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        index, visit = item
        return self.first_good(index, lambda at: self._sample(at, SampleKey.of(self.seed, int(self.ids[at]), visit)))

    def _always_damaged(self, index: int) -> bool:
        """Of a clip that is cropped at random, another visit may read a part that is whole, and a resumed run must."""
        cropped = self.augment and bool(self.whole_lengths[index] > self.lengths[index])
        return self.settings.normalise or not cropped

    def read_plain(self, index: int) -> Sound:
        """A whole clip as it is stored."""
        sound: Sound = self._source.read(int(self._members[index]), 0, int(self.whole_lengths[index]))
        return sound

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> AudioBatch:
        """The batch of several (index, visit): what `collate` makes of them one by one."""
        return collate([self[item] for item in items])

    def _sample(self, index: int, key: SampleKey) -> Sample:
        total, length = int(self.whole_lengths[index]), int(self.lengths[index])
        start = 0
        if self.augment and total > length:
            start = int(key.stream(_CROP).uniform(1)[0] * (total - length + 1))
        if self.settings.normalise:
            audio = self.waveform(index)[start : start + length]
        else:
            audio = self._read(index, start, start + length)
        labels = tuple(self._labels(index, labels, whole) for labels, whole in self._sets)
        rates = tuple(labels.rate for labels, _ in self._sets)
        planned = [target for target in self.settings.targets or () if target.digest == PLANNED]
        if planned and not self._sets:
            rates = tuple(target.rate for target in planned)
            labels = tuple(np.zeros((int(total * rate / SAMPLE_RATE) + 1, 1), np.int32) for rate in rates)
        cut = key.stream(_CUT) if self.augment else None
        return Sample(audio, int(self.ids[index]), start, labels, rates, cut, self.settings.batching)

    def _labels(self, index: int, labels: LabelSet, by_recording: bool) -> Int[np.ndarray, "frames streams"]:
        if not by_recording:
            return labels.get(int(self.ids[index]))
        member = self._members[index]
        start = int(self.segments.starts[member]) * labels.rate / SAMPLE_RATE
        return labels.get(int(self.segments.recordings.ids[self.segments.recording[member]]))[int(start) :]

    def waveform(self, index: int) -> Float[Tensor, "samples"]:
        """A whole clip at 16 kHz, however long, normalised if the settings say so.

        Raises:
            CorruptSampleError: it cannot be decoded.
        """
        try:
            audio = self._read(index, 0, int(self.whole_lengths[index]))
        except CorruptSampleError as error:
            self._damaged[index] = True
            raise CorruptSampleError(error.reason, self._name(index)) from error
        if not self.settings.normalise:
            return audio
        return torch.nn.functional.layer_norm(audio, audio.shape, eps=_EPSILON)

    def _read(self, index: int, start: int, stop: int) -> Float[Tensor, "samples"]:
        sound: Sound = self._source.read(int(self._members[index]), start, stop)
        if sound.clipped > CLIPPED_SHARE:
            self._clipped[index] = sound.clipped
        return sound.audio

    @property
    def problems(self) -> list[Problem]:
        """Clips that are left out: unreadable or too short on opening (any split), or not decodable (this split)."""
        source, least = self.segments.source, self.settings.min_samples
        seconds = {i: int(source.lengths[i]) / SAMPLE_RATE for i in (source.lengths < least).nonzero()[:, 0].tolist()}
        wanted = f"less than {least / SAMPLE_RATE:g} s"
        short = [Problem(source.names[i], f"too short: {length:.2f} s, {wanted}") for i, length in seconds.items()]
        return [*short, *super().problems]

    @property
    def warnings(self) -> list[Problem]:
        """Clips of this split that were used and may not be what was meant: those that are clipped, as far as read."""
        return [
            Problem(self._name(index), f"clipped: {100 * float(self._clipped[index]):.1f} % of samples at full scale")
            for index in self._clipped.nonzero()[:, 0].tolist()
        ]

    def notes(self, batch_size: int) -> list[str]:
        """What to say before training: what there is, and how much of it an epoch in batches of `batch_size` hears."""
        text = describe(
            self.segments, self._members, self.lengths, longest=self.settings.max_seconds, batch_size=batch_size,
            to_shortest=self.settings.batching == "crop",
        )  # fmt: skip
        return [f"to train on: {text}", *super().notes(batch_size)]

    @property
    def recordings(self) -> Int[Tensor, "n"]:
        """Each clip's recording, as an index into ``segments.recordings``."""
        return self.segments.recording[self._members]


def open_split(settings: Settings, split: Split, *, seed: int = 0, augment: bool = False) -> Clips:
    """The clips of one split that are long enough.

    Args:
        settings: what to read; label sets are looked up if that was not done yet (`resolve` does it once).
        split: all segments of a recording are in one; ``all`` is every clip, also those that were dropped because they
            are twice in the set.
        seed: of the crops.
        augment: crop long clips at random positions; else at the start.

    Raises:
        SourceError: there are no clips, or none in this split.
    """
    if settings.label_sets and settings.targets is None:
        settings = resolve(settings)
    recordings = open_source(settings.source, settings.corrupt)
    if settings.long == "crop":
        segments = whole(recordings)
    else:
        segments = cut(recordings, settings.min_samples, settings.max_samples, settings.val_share)
    source = segments.source
    long_enough = source.lengths >= settings.min_samples
    if not long_enough.any():
        longest = float(source.lengths.max()) / SAMPLE_RATE
        raise SourceError(
            f"{settings.source}: all {len(source.names)} clips are shorter than data.min_seconds="
            f"{settings.min_seconds:g}; the longest lasts {longest:.2f} s. Set data.min_seconds lower, or give longer "
            "recordings."
        )
    short = f"Those of this split are all shorter than data.min_seconds={settings.min_seconds:g}: set it lower."
    members = members_of(source, split, settings.val_share, settings.source, CLIPS, long_enough, short)
    return Clips(segments, members, settings, seed=seed, augment=augment)


def resolve(settings: Settings) -> Settings:
    """The same settings with absolute paths and the targets of the label sets filled in: what a run records.

    Fetches an embedded set where needed, decodes a training clip, and checks that every label set has labels for every
    clip of train and val, as many as the clip is long.

    Raises:
        SourceError: there are no clips to train on.
        LabelError: a label set is missing, damaged, or of other clips or another rate.
        UnmaskError: a label set is not the one whose targets `settings` holds.
    """
    train = open_split(replace(settings, label_sets=()), "train")
    train[0, 0]
    if not all(part in CLIPS.sets for part in settings.source.split("+")):
        settings = absolute(settings)
    if not settings.label_sets:
        return settings
    folders = tuple(str(Path(folder).expanduser().resolve()) for folder in settings.label_sets)
    settings = replace(settings, label_sets=folders)
    sets = [LabelSet.open(folder) for folder in folders]
    if settings.targets is not None:
        _check_targets(sets, settings)
    clips = train.segments.source
    val = (clips.splits(settings.val_share) == SPLITS["val"]) & (clips.lengths >= settings.min_samples)
    members = torch.cat([train._members, val.nonzero()[:, 0]])
    for labels in sets:
        _check_covers(labels, train.segments, members, settings.source)
    return replace(settings, targets=tuple(target for labels in sets for target in labels.targets))


def _check_covers(labels: LabelSet, segments: Segments, members: Int[Tensor, "n"], name: str) -> None:
    """Check that these clips have their labels: their own, or else their recordings'."""
    source = segments.source
    if not labels.has_all(source.ids[members]):
        source, members = segments.recordings, segments.recording[members].unique()
    ids, lengths = source.ids[members], source.lengths[members]
    names = dict(zip(ids.tolist(), members.tolist(), strict=True))
    labels.check_covers(ids, lengths, name, lambda sample_id: source.names[names[sample_id]])


def _check_targets(sets: list[LabelSet], settings: Settings) -> None:
    given, wanted = [target for labels in sets for target in labels.targets], list(settings.targets or ())
    if given != wanted:
        texts = [", ".join(f"{t.name} ({t.classes} classes, codebook {t.digest})" for t in x) for x in (given, wanted)]
        raise UnmaskError(
            f"the label sets {', '.join(settings.label_sets)} hold {texts[0]}; the run was made with {texts[1]}. "
            "Put the old label sets back, or start a new run"
        )
