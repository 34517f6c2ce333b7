"""The task ``representation`` of speech and sound.

Four things are measured in the same way: the trained encoder, the same encoder at random initialisation, MFCC and
log-mel energies. `unmask.core.evaluation.attributes` and `unmask.speech_audio.evaluation.detail` say how.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from unmask.core.errors import UnmaskError
from unmask.core.evaluation.attributes import SPLITS, Task, make_task, probe, probe_within
from unmask.core.evaluation.knn import KNN
from unmask.core.evaluation.linear import LinearProbe
from unmask.core.evaluation.run import Job
from unmask.core.evaluation.samples import spread
from unmask.core.evaluation.weighted import WeightedProbe
from unmask.core.progress import progress_bar
from unmask.core.randomness import Key
from unmask.speech_audio.data.clips import Clips, Settings, SourceError, open_split
from unmask.speech_audio.evaluation.detail import Detail, score
from unmask.speech_audio.evaluation.encoding import ClipFeatures, encode_clips
from unmask.speech_audio.evaluation.tables import ROWS
from unmask.speech_audio.evaluation.tables import measures as measures
from unmask.speech_audio.evaluation.tables import study_table as study_table
from unmask.speech_audio.evaluation.tables import table as table

SPEAKER = "speaker"
MOST_CLIPS = 10_000  # of each split; a larger one is thinned, by seed and clip id
_HELD_OUT = 0.1  # of the training clips, for each of val and test where the data have none

Features = dict[str, dict[str, ClipFeatures]]  # by row, then by split


@dataclass(frozen=True)
class _Part:
    """Clips of one split that are measured."""

    clips: Clips
    index: Int[Tensor, "n"]


@dataclass(frozen=True)
class _Tasks:
    """What is asked of the features: plain tasks by label, and by speaker within each label."""

    plain: dict[str, Task]
    within: dict[str, dict[str, Task]]
    skipped: dict[str, str]


def measure(job: Job) -> dict[str, Any]:
    """Probes of every label that the clips have (speaker, tone, language, instrument ...), and acoustic detail.

    For every label: a linear probe on a weighted sum of all layers, one on the last layer, and k-NN. Where speakers are
    known, other labels are probed within each speaker, too: across few speakers even good features may be at chance.
    Speakers that the splits keep apart are told apart on splits of the training clips. Also: how much of the log-mel
    spectrum a frame keeps, and RankMe; data without labels give these two only. `Job.quick` leaves acoustic detail and
    probes within speakers out. Clips longer than the run's ``max_seconds`` are measured by their beginning, and those
    above 0.1 s count also where training left them out.
    """
    parts, held_out = _parts(job.data, job.seed)
    protocol = None if job.quick else Detail()
    features = _encode(job, parts, protocol)
    job.name_left_out(*(part.clips for part in parts.values()))
    tasks = _tasks(parts, features["trained"], job.seed, within=not job.quick)
    note = {} if tasks.plain else {"note": _no_labels(job.data.source, tasks.skipped)}
    return {
        "labelled": bool(tasks.plain),
        "splits": {name: len(found.ids) for name, found in features["trained"].items()},
        "held_out_of_train": held_out,
        "tasks": {label: task.facts() for label, task in tasks.plain.items()},
        "speakers": {label: len(each) for label, each in tasks.within.items()},
        "skipped": tasks.skipped,
        "rows": _rows(features, tasks, protocol),
        "protocol": _protocol(tasks, protocol),
        **note,
    }


# ---- clips and features --------------------------------------------------------------------------------------------


def _parts(settings: Settings, seed: int) -> tuple[dict[str, _Part], list[str]]:
    """What is measured of each split, and which splits had to be held out of the training clips."""
    train = open_split(settings, "train")
    order = _ranked(train, seed)
    found: dict[str, Clips] = {}
    others: tuple[Literal["test", "val"], ...] = ("test", "val")
    for other in others:
        with contextlib.suppress(SourceError):  # data need not have either
            found[other] = open_split(settings, other)
    if "test" not in found and "val" in found:
        found["test"] = found.pop("val")
    held_out = [name for name in ("val", "test") if name not in found]
    count = min(int(len(train) * _HELD_OUT), MOST_CLIPS)
    parts: dict[str, _Part] = {}
    for name in held_out:
        parts[name], order = _Part(train, order[:count]), order[count:]
    parts |= {name: _Part(clips, _ranked(clips, seed)[:MOST_CLIPS].sort().values) for name, clips in found.items()}
    parts["train"] = _Part(train, order[:MOST_CLIPS].sort().values)
    empty = [name for name in SPLITS if not len(parts[name].index)]
    if empty:
        raise UnmaskError(
            f"{settings.source} has too few clips to measure features on: none is left for {', '.join(empty)}; "
            "give more recordings with --data"
        )
    return {name: parts[name] for name in SPLITS}, held_out


def _ranked(clips: Clips, seed: int) -> Int[Tensor, "n"]:
    """Indices of clips in an order that follows from seed and clip ids."""
    return Key.of(seed, clips.ids).stream("measured clips").bits(1)[:, 0].argsort()


def _encode(job: Job, parts: Mapping[str, _Part], protocol: Detail | None) -> Features:
    encoders: dict[str, Any] = {name: method.encoder for name, method in job.methods.items()}
    features: Features = {name: {} for name in ROWS if job.references or name in encoders}
    for split, part in parts.items():
        with progress_bar(f"encoding, {split}", len(part.index)) as advance:
            found = encode_clips(
                encoders, part.clips, part.index, device=job.device, detail=protocol, seed=job.seed,
                workers=job.workers, baselines=job.references, advance=advance,
            )  # fmt: skip
        for name, splits in features.items():
            splits[split] = found[name]
    return features


# ---- tasks and rows ------------------------------------------------------------------------------------------------


def _tasks(parts: Mapping[str, _Part], features: Mapping[str, ClipFeatures], seed: int, within: bool) -> _Tasks:
    """Every label that clips have as a task, and within every speaker where there are several."""
    split = torch.cat([torch.full((len(features[name].ids),), i) for i, name in enumerate(SPLITS)])
    ids = torch.cat([features[name].ids for name in SPLITS])
    first = parts["train"].clips
    labels = {
        label: torch.cat([parts[name].clips.labels[label][features[name].index] for name in SPLITS])
        for label in first.labels
        if all(label in parts[name].clips.labels for name in SPLITS)
    }
    plain, skipped = {}, {}
    for label, y in labels.items():
        task = make_task(y, split, ids, first.classes[label], seed=seed, own=label == SPEAKER)
        if isinstance(task, Task):
            plain[label] = task
        else:
            skipped[label] = task
    found: dict[str, dict[str, Task]] = {}
    if within and SPEAKER in labels:
        speakers = [int(s) for s in labels[SPEAKER].unique() if s >= 0]
        contents = [label for label in labels if label != SPEAKER and len(speakers) > 1]
        for label, s in product(contents, speakers):
            own = torch.where(labels[SPEAKER] == s, labels[label], -1)
            task = make_task(own, split, ids, first.classes[label], seed=seed, own=True)
            if isinstance(task, Task):
                found.setdefault(label, {})[first.classes[SPEAKER][s]] = task
    return _Tasks(plain, found, skipped)


def _rows(features: Features, tasks: _Tasks, protocol: Detail | None) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    with progress_bar("probing", len(features) * (len(tasks.plain) + len(tasks.within))) as advance:
        for name, found in features.items():
            layers = found["train"].layers
            x = torch.cat([found[s].x for s in SPLITS])
            ids = torch.cat([found[s].ids for s in SPLITS])
            row: dict[str, Any] = {"probes": {}}
            for label, task in tasks.plain.items():
                row["probes"][label] = probe(x, layers, ids, task)
                advance(1)
            for label, each in tasks.within.items():
                row["probes"].setdefault(label, {})["within_speaker"] = probe_within(x, layers, ids, each)
                advance(1)
            moments = [found[s].detail for s in SPLITS]
            if protocol is not None and all(m is not None for m in moments):
                train, val, test = (m for m in moments if m is not None)
                row["detail"] = score(train, val, test, protocol)
            rows[name] = row | spread(found["train"].last)
    return rows


def _protocol(tasks: _Tasks, detail: Detail | None) -> dict[str, Any]:
    probes = {"weighted": asdict(WeightedProbe()), "linear": asdict(LinearProbe()), "knn": asdict(KNN())}
    return (probes if tasks.plain or tasks.within else {}) | ({"detail": asdict(detail)} if detail else {})


def _no_labels(source: str, skipped: Mapping[str, str]) -> str:
    why = "; ".join(f"{label}: {reason}" for label, reason in skipped.items())
    return (
        f"{source} has no labels that can be probed{f' ({why})' if why else ''}, so there are no accuracies: only how "
        "many dimensions the features use and, unless --quick, how much acoustic detail they keep. For probes, give "
        "labelled clips with --data: an embedded set (unmask data list), or recordings in one folder per speaker."
    )


# Fine-tuning speech means CTC on transcripts, which transformers does from an export.
NO_FINE_TUNING = (
    "speech encoders are fine-tuned with transformers: export the run with `unmask export RUN --to transformers "
    "--out DIR` and load DIR as HubertForCTC (docs/tutorials/speech-ctc.md shows it) or as "
    "HubertForSequenceClassification. For frozen features: unmask evaluate RUN --data LABELLED"
)
