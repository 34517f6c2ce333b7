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


def phone_purity(table: Float[np.ndarray, "values labels"]) -> float:
    """sum_z max_y p(y, z) of a joint table of counts."""
    return float(table.max(axis=0).sum() / table.sum())


def cluster_purity(table: Float[np.ndarray, "values labels"]) -> float:
    """sum_y max_z p(y, z) of a joint table of counts."""
    return float(table.max(axis=1).sum() / table.sum())


def entropy(counts: Float[np.ndarray, "..."]) -> float:
    """Entropy in nats of counts or of a joint table of counts."""
    from scipy import stats

    return float(stats.entropy(counts.ravel()))


def pnmi(table: Float[np.ndarray, "values labels"]) -> float | None:
    """I(y; z) / H(y) of a joint table of counts; None where y takes a single value, so that H(y) is 0."""
    from sklearn.metrics import mutual_info_score

    total = entropy(table.sum(axis=1))
    return min(mutual_info_score(None, None, contingency=table) / total, 1.0) if total else None


def runs(labels: Int[np.ndarray, "frames"]) -> int:
    """The number of runs of equal labels in one clip."""
    return int(len(labels) > 0) + int((labels[1:] != labels[:-1]).sum())


def label_r2(labels: Int[np.ndarray, "n"], values: Float[np.ndarray, "n"]) -> float | None:
    """R^2 of values regressed on one-hot labels: between-label variance / variance; None where they do not vary."""
    values = values.astype(np.float64)
    if not len(values) or values.var() <= 1e-12 * np.square(values).mean():
        return None
    means = np.bincount(labels, values) / np.bincount(labels).clip(min=1)
    return float(1 - np.square(values - means[labels]).mean() / values.var())


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
    voiced_labels, pitch = _pitch(label_set, clips, indices, pitch_clips, seed)
    streams, frames = [], 0
    for s, target in enumerate(label_set.targets):
        used, run_count, tables = _count(label_set, s, clips, indices)
        frames = int(used.sum())
        run = frames / max(run_count, 1)
        contents = {what: table for what, table in tables.items() if what != _SPEAKER}
        streams.append(
            {
                "name": target.name,
                "classes": target.classes,
                "entropy": entropy(used) if frames else None,
                "perplexity": float(np.exp(entropy(used))) if frames else None,
                "used": int((used > 0).sum()),
                "empty": int((used == 0).sum()),
                "run": run,
                "run_seconds": run / target.rate,
                "explained_variance": None if explained is None else explained[s],
                "f0_predictability": label_r2(voiced_labels[:, s], pitch),
                "information": {what: pnmi(table) for what, table in tables.items()},
                "phone_purity": {what: phone_purity(table) for what, table in contents.items()},
                "cluster_purity": {what: cluster_purity(table) for what, table in contents.items()},
            }
        )
    seconds, missing = frames / label_set.rate, len(ids) - len(indices)
    return {"clips": len(indices), "missing": missing, "frames": frames, "seconds": seconds, "streams": streams}


def _count(
    label_set: LabelSet, stream: int, clips: Any, indices: list[int]
) -> tuple[Float[np.ndarray, "classes"], int, dict[str, Float[np.ndarray, "values classes"]]]:
    """Of one stream: how often each label is used, the runs, and a joint table for each kind of clip-level label."""
    classes = label_set.targets[stream].classes
    known = {what: names for what, names in clips.classes.items() if len(names) > 1 and what in clips.labels}
    used, run_count = np.zeros(classes), 0
    tables = {what: np.zeros((len(names), classes)) for what, names in known.items()}
    for index in indices:
        labels = label_set.get(int(clips.ids[index]))[:, stream]
        frequency = np.bincount(labels, minlength=classes)
        used += frequency
        run_count += runs(labels)
        for what, table in tables.items():
            value = int(clips.labels[what][index])
            if value >= 0:
                table[value] += frequency / len(labels) if what == _SPEAKER else frequency
    return used, run_count, {what: table for what, table in tables.items() if table.any()}


def _pitch(
    label_set: LabelSet, clips: Any, indices: list[int], most: int, seed: int
) -> tuple[Int[np.ndarray, "n streams"], Float[np.ndarray, "n"]]:
    """The labels and the log-F0 of the voiced frames of `most` clips, chosen by seed and sample id."""
    rank = Key.of(seed, clips.ids[indices].cpu()).stream("pitch clips").bits(1)[:, 0]
    chosen = [indices[i] for i in rank.argsort()[:most].tolist()]
    labels, values = [np.empty((0, len(label_set.targets)), np.int32)], [np.empty(0, np.float32)]
    with progress_bar("pitch for diagnostics", len(chosen)) as advance:
        for index in chosen:
            own = label_set.get(int(clips.ids[index]))
            pitch, voiced = log_f0(clips.waveform(index))
            # Label t and F0 frame t * 100 / rate have the same centre: both are windows of 25 ms.
            frame = (torch.arange(len(own)) * (RATE / label_set.rate)).long()
            frame = frame[frame < len(pitch)]
            keep = voiced[frame].numpy()
            labels.append(own[: len(frame)][keep])
            values.append(pitch[frame].numpy()[keep])
            advance(1)
    return np.concatenate(labels), np.concatenate(values)
