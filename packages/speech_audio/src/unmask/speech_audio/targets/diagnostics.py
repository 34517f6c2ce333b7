"""Statistics of labels: their use, and their information about content, speaker and pitch. Nothing is trained.

Logarithms are natural. z is a frame's label and y a known class of the frame or its clip. Definitions as in HuBERT
(arXiv 2106.07447, section IV-F), without the 1e-8 that its script adds inside the logarithm:

* phone purity = sum_z max_y p(y, z): the accuracy of naming each cluster after its most frequent y;
* cluster purity = sum_y max_z p(y, z); grows when one cluster takes all, so read it beside phone purity;
* PNMI = I(y; z) / H(y): the share of y's uncertainty that z removes, 0 to 1; grows with the number of clusters, and
  with few frames even where z and y are independent.

A clip-level y (a word, a language) counts at every frame of the clip. Speaker information is I(z; speaker) / H(speaker)
with every clip counted as one, whatever its length: p(z, s) is the sum over the clips of speaker s of their normalised
label histograms, divided by the number of clips. F0 predictability is R^2 of the least-squares fit of log-F0 by
one-hot labels over voiced frames, which is the between-label share of its variance; it is not corrected for the
number of labels, so it needs many more frames than labels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from unmask.core.progress import progress_bar
from unmask.core.randomness import Key
from unmask.speech_audio.data.labels import LabelSet
from unmask.speech_audio.targets.features import RATE, log_f0

_SPEAKER = "speaker"  # the clip-level label that says who speaks


def joint_table(
    y: Int[np.ndarray, "n"], z: Int[np.ndarray, "n"], values: int, labels: int
) -> Float[np.ndarray, "values labels"]:
    """The number of frames for each pair of y and z."""
    pairs = y.astype(np.int64) * labels + z
    return np.bincount(pairs, minlength=values * labels).reshape(values, labels).astype(np.float64)


def phone_purity(table: Float[np.ndarray, "values labels"]) -> float:
    """sum_z max_y p(y, z) of a joint table of counts."""
    return float(table.max(axis=0).sum() / table.sum())


def cluster_purity(table: Float[np.ndarray, "values labels"]) -> float:
    """sum_y max_z p(y, z) of a joint table of counts."""
    return float(table.max(axis=1).sum() / table.sum())


def entropy(counts: Float[np.ndarray, "..."]) -> float:
    """Entropy in nats of counts or of a joint table of counts."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def pnmi(table: Float[np.ndarray, "values labels"]) -> float:
    """I(y; z) / H(y) of a joint table of counts; NaN where y takes a single value, so that H(y) is 0."""
    known = entropy(table.sum(axis=1))
    if known == 0:
        return float("nan")
    # I = H(y) + H(z) - H(y, z) and not the sum over log ratios: exact 0 and 1 stay within rounding of fp64.
    shared = known + entropy(table.sum(axis=0)) - entropy(table)
    return min(max(shared / known, 0.0), 1.0)


def runs(labels: Int[np.ndarray, "frames"]) -> int:
    """The number of runs of equal labels in one clip."""
    return int(len(labels) > 0) + int((labels[1:] != labels[:-1]).sum())


class PitchShare:
    """R^2 of a value regressed on one-hot labels, accumulated clip by clip.

    Args:
        labels: number of classes.
    """

    def __init__(self, labels: int) -> None:
        self.count, self.sum, self.square = np.zeros(labels), np.zeros(labels), 0.0

    def add(self, z: Int[np.ndarray, "n"], value: Float[np.ndarray, "n"]) -> None:
        """Add frames, given their labels and values."""
        value = value.astype(np.float64)
        self.count += np.bincount(z, minlength=len(self.count))
        self.sum += np.bincount(z, value, minlength=len(self.count))
        self.square += float((value**2).sum())

    def result(self) -> float:
        """Between-label variance / variance; NaN where the value does not vary."""
        n = self.count.sum()
        if not n:
            return float("nan")
        level = self.sum.sum() ** 2 / n
        total = self.square - level
        between = float((self.sum**2 / self.count.clip(min=1)).sum() - level)
        return float(between / total) if total > 1e-12 * self.square else float("nan")


def diagnose(
    label_set: LabelSet,
    clips: Any,
    *,
    explained: list[float] | None = None,
    pitch_clips: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """All diagnostics of the labels of some clips, as plain numbers for a JSON file; unknown ones are None.

    Per stream: ``entropy`` and ``perplexity`` of the labels' frequencies, ``used`` and ``empty`` clusters, ``run`` (the
    mean length of runs of equal labels, in frames) and ``run_seconds``, ``explained_variance`` where given,
    ``f0_predictability``, and for each clip-level label of the clips ``information`` (``speaker`` clip by clip, as the
    module says, the others frame by frame); for all but ``speaker`` also ``phone_purity`` and ``cluster_purity``.

    Args:
        label_set: the labels.
        clips: has ``ids``, ``labels``, ``classes`` and ``waveform(index)``; those without labels are left out, and
            counted in ``missing``.
        explained: per stream, measured while the labels were made.
        pitch_clips: number of clips that F0 is computed on, chosen by sample id; 0 leaves it out.
        seed: seed of that choice.
    """
    ids = clips.ids.tolist()
    indices = [i for i, sample_id in enumerate(ids) if sample_id in label_set and len(label_set.get(sample_id))]
    counts = _count(label_set, clips, indices)
    pitch = _pitch(label_set, clips, indices, pitch_clips, seed)
    streams = []
    for s, target in enumerate(label_set.targets):
        frames, table = counts.used[s].sum(), counts.tables[s]
        run = float(frames / max(counts.runs[s], 1))
        contents = {what: joint for what, joint in table.items() if what != _SPEAKER}
        streams.append(
            {
                "name": target.name,
                "classes": target.classes,
                "entropy": entropy(counts.used[s]) if frames else None,
                "perplexity": float(np.exp(entropy(counts.used[s]))) if frames else None,
                "used": int((counts.used[s] > 0).sum()),
                "empty": int((counts.used[s] == 0).sum()),
                "run": run,
                "run_seconds": run / target.rate,
                "explained_variance": None if explained is None else explained[s],
                "f0_predictability": _plain(pitch[s].result()),
                "information": {what: _plain(pnmi(joint)) for what, joint in table.items()},
                "phone_purity": {what: phone_purity(joint) for what, joint in contents.items()},
                "cluster_purity": {what: cluster_purity(joint) for what, joint in contents.items()},
            }
        )
    frames = int(counts.used[0].sum())
    seconds, missing = frames / label_set.rate, len(ids) - len(indices)
    return {"clips": len(indices), "missing": missing, "frames": frames, "seconds": seconds, "streams": streams}


def _plain(value: float) -> float | None:
    """The value, or None for NaN, which JSON does not have."""
    return None if np.isnan(value) else value


class _Counts:
    """Per stream: the frequency of each label, the runs, and a joint table for every kind of clip-level label."""

    def __init__(self, label_set: LabelSet, classes: dict[str, list[str]]) -> None:
        self.used = [np.zeros(target.classes) for target in label_set.targets]
        self.runs = [0 for _ in label_set.targets]
        self.tables: list[dict[str, Any]] = [
            {what: np.zeros((len(names), target.classes)) for what, names in classes.items()}
            for target in label_set.targets
        ]


def _count(label_set: LabelSet, clips: Any, indices: list[int]) -> _Counts:
    known = {what: names for what, names in clips.classes.items() if len(names) > 1 and what in clips.labels}
    counts = _Counts(label_set, known)
    for index in indices:
        labels = label_set.get(int(clips.ids[index]))
        for s, target in enumerate(label_set.targets):
            frequency = np.bincount(labels[:, s], minlength=target.classes)
            counts.used[s] += frequency
            counts.runs[s] += runs(labels[:, s])
            for what, table in counts.tables[s].items():
                value = int(clips.labels[what][index])
                if value >= 0:
                    table[value] += frequency / len(labels) if what == _SPEAKER else frequency
    for tables in counts.tables:
        for what in [what for what, table in tables.items() if not table.any()]:
            del tables[what]
    return counts


def _pitch(label_set: LabelSet, clips: Any, indices: list[int], most: int, seed: int) -> list[PitchShare]:
    shares = [PitchShare(target.classes) for target in label_set.targets]
    rank = Key.of(seed, clips.ids[indices].cpu()).stream("pitch clips").bits(1)[:, 0]
    chosen = [indices[i] for i in rank.argsort()[:most].tolist()]
    with progress_bar("pitch for diagnostics", len(chosen)) as advance:
        for index in chosen:
            labels = label_set.get(int(clips.ids[index]))
            pitch, voiced = log_f0(clips.waveform(index))
            # Label t and F0 frame t * 100 / rate have the same centre: both are windows of 25 ms.
            at = (torch.arange(len(labels)) * (RATE / label_set.rate)).long()
            at = at[at < len(pitch)]
            keep = voiced[at].numpy()
            for s, share in enumerate(shares):
                share.add(labels[: len(at), s][keep], pitch[at].numpy()[keep])
            advance(1)
    return shares
