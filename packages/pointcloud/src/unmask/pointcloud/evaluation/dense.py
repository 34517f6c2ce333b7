"""The dense probe: a linear classifier of points on frozen features, fitted on a sample and scored on all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from unmask.core.errors import UnmaskError
from unmask.core.evaluation.dense import (
    LinearClassifier,
    Positions,
    confusion_matrix,
    fit_classifier,
    scores,
    smallest_of_each,
)
from unmask.core.evaluation.features import stand_ins
from unmask.core.evaluation.linear import LinearProbe
from unmask.core.method import to_device
from unmask.core.progress import Advance, progress_bar
from unmask.core.randomness import Key
from unmask.core.training.position import batches
from unmask.pointcloud.data.batches import PointBatch
from unmask.pointcloud.data.clouds import PointClouds, collate
from unmask.pointcloud.evaluation.features import Readout
from unmask.pointcloud.geometry.voxels import VoxelGrid, Voxels, voxelise


@dataclass(frozen=True)
class DenseProbe:
    """Logistic regression on the features of single points, as `LinearProbe` does it on those of whole samples.

    It is fitted on a sample of at most `train_points` points of every class, so that classes count alike, and its
    strength is the one with the best accuracy on at most `val_points` of every class. The points with the smallest
    numbers keyed by (seed, sample id, row in the cloud) are taken; where a split has more than `train_clouds` or
    `val_clouds` clouds, only so many, keyed by (seed, sample id), are looked at. The test split is scored whole: every
    labelled point inside the range. Points without a label (-1) count nowhere.

    Args:
        train_points: of each class.
        val_points: of each class.
        train_clouds: that training points are taken from.
        val_clouds: that validation points are taken from.
        linear: grid of strengths and limits of the fit.
    """

    train_points: int = 1000
    val_points: int = 500
    train_clouds: int = 1000
    val_clouds: int = 500
    linear: LinearProbe = field(default_factory=LinearProbe)


class NoPointLabels(UnmaskError):
    """Data whose points have too few labels to probe anything."""


@dataclass(frozen=True)
class Reading:
    """How the clouds of all splits are read."""

    grid: VoxelGrid  # the encoder's pillars
    device: torch.device
    batch_size: int  # clouds per forward pass
    workers: int = 0  # data loading processes
    seed: int = 0  # of the choice of clouds and points


def dense_probe(
    readouts: Mapping[str, Readout],
    splits: Mapping[str, PointClouds],
    classes: list[str],
    reading: Reading,
    protocol: DenseProbe | None = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Fit and score one probe per read-out, on the same points.

    Args:
        readouts: by row of the result.
        splits: ``train``, ``val`` and ``test``, with point labels.
        classes: names of the point classes.
        reading: how to go through the splits.
        protocol: the hyper-parameters.

    Returns:
        Of each row, ``accuracy`` and ``mean_iou`` in [0, 1], ``iou`` by class (both over classes that the test split
        has), ``val_accuracy``, ``strength`` and ``dim``; and of the task: numbers of ``points`` by split,
        ``outside`` (labelled test points out of range, not scored), ``majority`` (accuracy of predicting the most
        frequent class everywhere) and ``ceiling`` (the scores when every point gets its pillar's most frequent label:
        the most that a read-out of pillars can reach in accuracy, and a mark for its mean IoU).

    Raises:
        NoPointLabels: a split has no labelled point inside the range, or the training points are all of one class.
    """
    protocol = protocol or DenseProbe()
    train = _sample(readouts, splits["train"], protocol.train_clouds, protocol.train_points, "train", reading)
    val = _sample(readouts, splits["val"], protocol.val_clouds, protocol.val_points, "val", reading)
    if len(train.y.unique()) < 2:
        raise NoPointLabels(f"all labelled training points are of one class, {classes[int(train.y[0])]}")
    fitted = {name: fit_classifier(train.x[name], train.y, val.x[name], val.y, protocol.linear) for name in readouts}
    confusion, pillars, outside = _count(readouts, fitted, splits["test"], len(classes), reading)
    rows = {
        name: scores(confusion[name], classes)
        | {"val_accuracy": probe.val_accuracy, "strength": probe.strength, "dim": len(probe.mean)}
        for name, probe in fitted.items()
    }
    of_class, ceiling = pillars.sum(1), scores(pillars, classes)
    about = {
        "points": {"train": len(train.y), "val": len(val.y), "test": int(of_class.sum())},
        "classes": [name for i, name in enumerate(classes) if of_class[i] or (train.y == i).any()],
        "outside": outside,
        "majority": float(of_class.max() / of_class.sum()),
        "ceiling": {name: ceiling[name] for name in ("accuracy", "mean_iou")},
    }
    return rows, about


# ---- the points to fit on ------------------------------------------------------------------------------------------


@torch.no_grad()
def _sample(
    readouts: Mapping[str, Readout], clouds: PointClouds, most_clouds: int, most: int, split: str, reading: Reading
) -> Positions:
    rank = Key.of(reading.seed, clouds.ids).stream("probed clouds").bits(1)[:, 0]
    index = rank.argsort()[:most_clouds].sort().values
    sample: Positions | None = None
    with progress_bar(f"points, {split}", len(index)) as advance:
        for batch, voxels in _batches(clouds, index, reading, advance):
            chosen = _chosen(batch, voxels, most, reading.seed)
            points = voxels.order[chosen]
            x = {}
            for name, read in readouts.items():
                values, row = read(batch, voxels)
                x[name] = values[row[chosen]].float()
            new = Positions(_labels(batch)[points], _ranks(batch, reading.seed)[points], x)
            sample = new if sample is None else (sample + new).smallest(most)
    if sample is None or not len(sample.y):
        raise NoPointLabels(f"none of {len(index)} {split} clouds has a labelled point inside data.range")
    return sample


def _chosen(batch: PointBatch, voxels: Voxels, most: int, seed: int) -> Int[Tensor, "n"]:
    """Indices into ``voxels.order`` of the points that a batch alone would give."""
    labels = _labels(batch)[voxels.order]
    known = (labels >= 0).nonzero()[:, 0]
    return known[smallest_of_each(labels[known], _ranks(batch, seed)[voxels.order[known]], most)]


def _ranks(batch: PointBatch, seed: int) -> Int[Tensor, "total"]:
    """A random number for every point, by the cloud's id and the point's row in the cloud."""
    state = Key.of(seed, batch.ids).stream("probed points").state
    bounds = batch.offsets.tolist()
    parts = [Key(state[i : i + 1]).bits(b - a)[0] for i, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False))]
    return torch.cat(parts)


def _labels(batch: PointBatch) -> Int[Tensor, "total"]:
    assert batch.point_labels is not None, "a dense probe needs point labels"
    return batch.point_labels


def _batches(
    clouds: PointClouds, index: Int[Tensor, "n"], reading: Reading, advance: Advance
) -> Iterator[tuple[PointBatch, Voxels]]:
    """The clouds at `index` in order, on the device; those that stand in for unreadable ones are left out."""
    chunks = [chunk.tolist() for chunk in index.split(reading.batch_size)]
    loader = batches(clouds, [[(i, 0) for i in chunk] for chunk in chunks], collate, reading.workers, pin=False)
    for batch, chunk in zip(loader, chunks, strict=True):
        wrong = stand_ins(batch, clouds, chunk)
        if wrong is not None:
            batch = batch.take((~wrong).nonzero()[:, 0].tolist())
        if len(batch.ids):
            moved = to_device(batch, reading.device)
            yield moved, voxelise(moved.points, moved.offsets, reading.grid)
        advance(len(chunk))


# ---- scoring -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _count(
    readouts: Mapping[str, Readout],
    fitted: Mapping[str, LinearClassifier],
    clouds: PointClouds,
    classes: int,
    reading: Reading,
) -> tuple[dict[str, Tensor], Tensor, int]:
    """Confusion matrices of the probes and of each pillar's most frequent label, and labelled points out of range."""
    empty = torch.zeros(classes, classes, dtype=torch.int64)
    confusion, pillars, outside = dict.fromkeys(readouts, empty), empty, 0
    with progress_bar("points, test", len(clouds)) as advance:
        for batch, voxels in _batches(clouds, torch.arange(len(clouds)), reading, advance):
            labels = _labels(batch)[voxels.order]
            known = labels >= 0
            outside += int((_labels(batch) >= 0).sum() - known.sum())
            true, pillar = labels[known], voxels.pillar_of[known]
            for name, read in readouts.items():
                x, row = read(batch, voxels)
                predicted = fitted[name](x.float())[row]
                confusion[name] = confusion[name] + confusion_matrix(true, predicted[known], classes)
            frequent = majority(true, pillar, len(voxels.pillars), classes)
            pillars = pillars + confusion_matrix(true, frequent, classes)
    if not int(pillars.sum()):
        raise NoPointLabels("no test point inside data.range has a label")
    return confusion, pillars, outside


def majority(labels: Int[Tensor, "n"], group: Int[Tensor, "n"], groups: int, classes: int) -> Int[Tensor, "n"]:
    """The most frequent label of each point's group; the first of equally frequent ones."""
    count = (group * classes + labels).bincount(minlength=groups * classes)
    return count.view(groups, classes).argmax(1)[group]
