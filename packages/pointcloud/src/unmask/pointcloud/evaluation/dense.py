"""The dense probe: a linear classifier of points on frozen features, fitted on a sample and scored on all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from unmask.core.errors import UnmaskError
from unmask.core.evaluation.features import stand_ins
from unmask.core.evaluation.linear import LinearProbe, fit_logistic
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
    numbers keyed by (seed, sample id, place in the cloud) are taken; where a split has more than `train_clouds` or
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
    """How the clouds of all splits are read.

    Args:
        grid: the encoder's pillars.
        device: where to compute.
        batch_size: clouds per forward pass.
        workers: data loading processes.
        seed: of the choice of clouds and points.
    """

    grid: VoxelGrid
    device: torch.device
    batch_size: int
    workers: int = 0
    seed: int = 0


@dataclass(frozen=True)
class PointClassifier:
    """A fitted probe: logits are ``(x - mean) * scale`` times `weight`, whose last column is the bias.

    Args:
        mean: of the training points.
        scale: one over their deviation; 0 where they do not vary.
        weight: of each class, its bias in the last column.
        classes: what each row of `weight` stands for: the classes that the training points have.
        strength: the C that was chosen.
        val_accuracy: what it was chosen by, in [0, 1].
    """

    mean: Float[Tensor, "dim"]
    scale: Float[Tensor, "dim"]
    weight: Float[Tensor, "classes dim_plus_1"]
    classes: Int[Tensor, "classes"]
    strength: float
    val_accuracy: float

    def __call__(self, x: Float[Tensor, "n dim"]) -> Int[Tensor, "n"]:
        """The class of each row."""
        return self.classes[_predict(self.weight, (x - self.mean) * self.scale)]


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
        ``outside`` (labelled test points out of range, not scored), ``majority`` (accuracy of answering the commonest
        class everywhere) and ``ceiling`` (the scores when every point gets its pillar's commonest label: the most that
        a read-out of pillars can reach in accuracy, and a mark for its mean IoU).

    Raises:
        NoPointLabels: a split has no labelled point inside the range, or the training points are all of one class.
    """
    protocol = protocol or DenseProbe()
    train = _sample(readouts, splits["train"], protocol.train_clouds, protocol.train_points, "train", reading)
    val = _sample(readouts, splits["val"], protocol.val_clouds, protocol.val_points, "val", reading)
    if len(train.y.unique()) < 2:
        raise NoPointLabels(f"all labelled training points are of one class, {classes[int(train.y[0])]}")
    fitted = {name: fit_points(train.x[name], train.y, val.x[name], val.y, protocol.linear) for name in readouts}
    counted = _score(readouts, fitted, splits["test"], len(classes), reading)
    rows = {
        name: scores(counted.confusion[name], classes)
        | {
            "val_accuracy": probe.val_accuracy,
            "strength": probe.strength,
            "dim": len(probe.mean),
        }
        for name, probe in fitted.items()
    }
    truth = counted.ceiling.sum(1)
    points = {"train": len(train.y), "val": len(val.y), "test": int(truth.sum())}
    ceiling = scores(counted.ceiling, classes)
    about = {
        "points": points,
        "classes": [name for i, name in enumerate(classes) if truth[i] or (train.y == i).any()],
        "outside": counted.outside,
        "majority": float(truth.max() / truth.sum()),
        "ceiling": {name: ceiling[name] for name in ("accuracy", "mean_iou")},
    }
    return rows, about


# ---- the points to fit on ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Points:
    """Chosen points: their class, the number that decided, and their features by row."""

    y: Int[Tensor, "n"]
    rank: Int[Tensor, "n"]
    x: dict[str, Tensor]

    def smallest(self, most: int) -> _Points:
        """The points with the smallest numbers of every class, at most so many of each."""
        kept = smallest_of_each(self.y, self.rank, most)
        return _Points(self.y[kept], self.rank[kept], {name: x[kept] for name, x in self.x.items()})

    def __add__(self, other: _Points) -> _Points:
        x = {name: torch.cat([own, other.x[name]]) for name, own in self.x.items()}
        return _Points(torch.cat([self.y, other.y]), torch.cat([self.rank, other.rank]), x)


def smallest_of_each(y: Int[Tensor, "n"], rank: Int[Tensor, "n"], most: int) -> Int[Tensor, "m"]:
    """Rows with the `most` smallest `rank` of each class in `y`, by class and rank."""
    order = rank.argsort(stable=True)
    order = order[y[order].argsort(stable=True)]
    _, count = y.unique(return_counts=True)
    first = (count.cumsum(0) - count).repeat_interleave(count)
    return order[torch.arange(len(y), device=y.device) - first < most]


@torch.no_grad()
def _sample(
    readouts: Mapping[str, Readout], clouds: PointClouds, most_clouds: int, most: int, split: str, reading: Reading
) -> _Points:
    rank = Key.of(reading.seed, clouds.ids).stream("probed clouds").bits(1)[:, 0]
    index = rank.argsort()[:most_clouds].sort().values
    found: _Points | None = None
    with progress_bar(f"points, {split}", len(index)) as advance:
        for batch, voxels in _batches(clouds, index, reading, advance):
            chosen = _chosen(batch, voxels, most, reading.seed)
            points = voxels.order[chosen]
            x = {}
            for name, read in readouts.items():
                values, row = read(batch, voxels)
                x[name] = values[row[chosen]].float()
            new = _Points(_labels(batch)[points], _ranks(batch, reading.seed)[points], x)
            found = new if found is None else (found + new).smallest(most)
    if found is None or not len(found.y):
        raise NoPointLabels(f"none of {len(index)} {split} clouds has a labelled point inside data.range")
    return found


def _chosen(batch: PointBatch, voxels: Voxels, most: int, seed: int) -> Int[Tensor, "n"]:
    """Places in ``voxels.order`` of the points that a batch alone would give."""
    labels = _labels(batch)[voxels.order]
    known = (labels >= 0).nonzero()[:, 0]
    return known[smallest_of_each(labels[known], _ranks(batch, seed)[voxels.order[known]], most)]


def _ranks(batch: PointBatch, seed: int) -> Int[Tensor, "total"]:
    """A random number for every point, by the cloud's id and the point's place in the cloud."""
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


# ---- fitting and scoring -------------------------------------------------------------------------------------------


def fit_points(
    x: Float[Tensor, "n dim"],
    y: Int[Tensor, "n"],
    val_x: Float[Tensor, "m dim"],
    val_y: Int[Tensor, "m"],
    protocol: LinearProbe,
) -> PointClassifier:
    """Fit at every strength, choose on validation; the smallest of equal strengths."""
    mean, varies = x.mean(0), x.amax(0) != x.amin(0)
    scale = torch.where(varies, 1 / x.std(0, correction=0).clamp(min=1e-6), 0.0)
    train, val = (x - mean) * scale, (val_x - mean) * scale
    classes, y = y.unique(return_inverse=True)
    weight = torch.zeros(len(classes), x.shape[1] + 1, device=x.device)
    best: PointClassifier | None = None
    for strength in protocol.strengths:
        weight = fit_logistic(train, y, weight, strength, protocol)
        accuracy = float((classes[_predict(weight, val)] == val_y).float().mean())
        if best is None or accuracy > best.val_accuracy:
            best = PointClassifier(mean, scale, weight, classes, strength, accuracy)
    assert best is not None
    return best


def _predict(weight: Tensor, x: Tensor) -> Int[Tensor, "n"]:
    return F.linear(x, weight[:, :-1], weight[:, -1]).argmax(1)


@dataclass(frozen=True)
class _Counted:
    """Confusion matrices [true, answered] on the test split, and labelled points out of range."""

    confusion: dict[str, Int[Tensor, "classes classes"]]
    ceiling: Int[Tensor, "classes classes"]
    outside: int


@torch.no_grad()
def _score(
    readouts: Mapping[str, Readout],
    fitted: Mapping[str, PointClassifier],
    clouds: PointClouds,
    classes: int,
    reading: Reading,
) -> _Counted:
    empty = torch.zeros(classes, classes, dtype=torch.int64)
    confusion, ceiling, outside = {name: empty for name in readouts}, empty, 0
    with progress_bar("points, test", len(clouds)) as advance:
        for batch, voxels in _batches(clouds, torch.arange(len(clouds)), reading, advance):
            labels = _labels(batch)[voxels.order]
            known = labels >= 0
            outside += int((_labels(batch) >= 0).sum() - known.sum())
            for name, read in readouts.items():
                x, row = read(batch, voxels)
                answered = fitted[name](x.float())[row]
                confusion[name] = confusion[name] + confusion_matrix(labels[known], answered[known], classes)
            pillar, true = voxels.pillar_of[known], labels[known]
            ceiling = ceiling + confusion_matrix(true, majority(true, pillar, len(voxels.pillars), classes), classes)
    if not int(ceiling.sum()):
        raise NoPointLabels("no test point inside data.range has a label")
    return _Counted(confusion, ceiling, outside)


def majority(labels: Int[Tensor, "n"], group: Int[Tensor, "n"], groups: int, classes: int) -> Int[Tensor, "n"]:
    """The commonest label of each point's group; the first of equally common ones."""
    count = (group * classes + labels).bincount(minlength=groups * classes)
    return count.view(groups, classes).argmax(1)[group]


def confusion_matrix(
    true: Int[Tensor, "n"], answered: Int[Tensor, "n"], classes: int
) -> Int[Tensor, "classes classes"]:
    """How many points of each class (rows) got each answer (columns), on the CPU."""
    return (true * classes + answered).bincount(minlength=classes**2).view(classes, classes).cpu()


def scores(confusion: Int[Tensor, "classes classes"], classes: list[str]) -> dict[str, Any]:
    """Accuracy, and intersection over union of every class that occurs, with their mean; all in [0, 1]."""
    right, true, answered = confusion.diag(), confusion.sum(1), confusion.sum(0)
    iou = right / (true + answered - right).clamp(min=1)
    occurs = (true > 0).tolist()
    by_class = {name: float(value) for name, value, here in zip(classes, iou, occurs, strict=True) if here}
    return {
        "accuracy": float(right.sum() / true.sum()),
        "mean_iou": sum(by_class.values()) / len(by_class),
        "iou": by_class,
    }
