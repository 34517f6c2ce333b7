"""Point clouds for training and evaluation: what to read, how to normalise and augment it, which split it belongs to.

A dataset is asked for ``(index, visit)``; the augmentation of a sample is a function of (seed, sample id, visit) alone,
so it does not depend on the batch, the worker or a resume. The parts, beside this module: `sources` finds the clouds,
`readers` reads them, `augment` turns, scales and flips them; `unmask.core.data.splits` divides them. Points outside
``range`` are not cut off here but when a batch is voxelised.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from unmask.core.data.dataset import SplitDataset
from unmask.core.data.kinds import SourceError
from unmask.core.data.sources import Split, absolute, members_of
from unmask.core.errors import Problem
from unmask.core.randomness import Key, SampleKey, stable_id
from unmask.pointcloud.data.augment import draw_transform, prepare, subset
from unmask.pointcloud.data.batches import PointBatch, Sample, collate
from unmask.pointcloud.data.extent import choose_pillar, choose_range, holds_origin, inside
from unmask.pointcloud.data.kind import CLOUDS, Source
from unmask.pointcloud.data.readers import WIDTHS, Cloud
from unmask.pointcloud.data.settings import Settings
from unmask.pointcloud.data.sources import open_source

__all__ = ["PointClouds", "Settings", "collate", "open_split", "resolve"]

_AUGMENT = stable_id("augment")
_MEASURED = 32  # training clouds that range and pillar are chosen from


class PointClouds(SplitDataset[Sample]):
    """One split of a source: ``dataset[index, visit]`` is a `Sample`, a list of (index, visit) a `PointBatch`.

    See `unmask.core.data.dataset.SplitDataset`; a cloud without points in the range counts as damaged.

    Args:
        source: where the clouds are.
        members: which of them belong to the split.
        settings: resolved; only `resolve` itself leaves the range open.
        seed: of the augmentation, and of which points are kept where there are more than ``max_points``.
        augment: turn, scale and mirror.
    """

    kind = CLOUDS
    settings: Settings
    labels: Int[Tensor, "n"] | None
    classes: list[str] | None

    def __init__(
        self, source: Source, members: Int[Tensor, "n"], settings: Settings, *, seed: int = 0, augment: bool = False
    ) -> None:
        super().__init__(source, members, settings, seed=seed, augment=augment)
        self.point_classes: list[str] | None = source.point_classes
        self._dropped = torch.zeros(len(members), dtype=torch.int64).share_memory_()

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        index, visit = item
        return self.first_good(index, lambda at: self._sample(at, visit))

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> PointBatch:
        """The batch of several (index, visit): what `collate` makes of them one by one."""
        return collate([self[item] for item in items])

    def read_plain(self, index: int) -> tuple[Cloud, np.ndarray, np.ndarray | None]:
        """A cloud, and the points and labels that `prepare` makes of it."""
        cloud: Cloud = self._source.read(int(self._members[index]))
        return cloud, *prepare(cloud, self.settings, self._name(index))

    def _sample(self, index: int, visit: int) -> Sample:
        cloud, points, labels = self.read_plain(index)
        self._dropped[index] = cloud.dropped + len(cloud.xyz) - len(points)
        sample_id = int(self.ids[index])
        visit = visit if self.augment else 0
        if self.augment:
            points = self._augmented(points, SampleKey.of(self.seed, sample_id, visit).stream(_AUGMENT))
        rows = subset(points, self.settings, Key.of(self.seed, self.ids[index : index + 1], visit))
        label = None if self.labels is None else int(self.labels[index])
        if self.point_classes is None:
            return Sample(torch.from_numpy(points[rows]), sample_id, label)
        labels = np.full(len(points), -1, np.int64) if labels is None else labels
        return Sample(torch.from_numpy(points[rows]), sample_id, label, torch.from_numpy(labels[rows]))

    def _augmented(self, points: Float[np.ndarray, "points c"], key: SampleKey) -> Float[np.ndarray, "points c"]:
        settings = self.settings
        transform = draw_transform(key, settings.rotate, settings.scale, settings.flip)
        moved = points.copy()
        moved[:, :3] = transform.positions(points[:, :3])
        start = 3
        for name in settings.features:
            if name == "normal":
                moved[:, start : start + 3] = transform.normals(points[:, start : start + 3])
            start += WIDTHS[name]
        # A cloud at the border may lose all its points: then it stays as it is.
        return moved if inside(moved, settings.range).any() else points

    @property
    def warnings(self) -> list[Problem]:
        """Clouds of this split, as far as read, that are used without those of their points that are not finite."""
        return [
            Problem(self._name(index), f"{int(self._dropped[index])} points with NaN or infinite values left out")
            for index in self._dropped.nonzero()[:, 0].tolist()
        ]


def open_split(settings: Settings, split: Split, *, seed: int = 0, augment: bool = False) -> PointClouds:
    """The clouds of one split.

    Args:
        settings: what to read; what is left open in them is chosen if that was not done yet (`resolve` does it once).
        split: ``all`` is every cloud.
        seed: of the augmentation.
        augment: turn, scale and mirror.

    Raises:
        SourceError: there are no clouds, or none in this split.
    """
    if settings.normalize is None or settings.range is None or settings.pillar is None:
        settings = resolve(settings)
    return _split(settings, split, seed=seed, augment=augment)


def _split(settings: Settings, split: Split, *, seed: int = 0, augment: bool = False) -> PointClouds:
    source = open_source(settings.source, settings.corrupt, settings.sweeps)
    members = members_of(source, split, settings.val_share, settings.source, CLOUDS)
    return PointClouds(source, members, settings, seed=seed, augment=augment)


def resolve(settings: Settings) -> Settings:
    """The same settings with an absolute path, normalize, range and pillar filled in: what a run records.

    Fetches an embedded set where needed and reads at least one training cloud. What is left open is chosen from up to
    32 evenly spaced training clouds: ``normalize`` is ``none`` where at least half of them contain their own origin (as
    sweeps around a vehicle do) and ``center`` otherwise (as for georeferenced tiles); for range and pillar see
    `unmask.pointcloud.data.extent`.

    Raises:
        SourceError: there are no clouds to train on, or there is one pillar only.
        FeatureError: a cloud lacks a feature that `settings` asks for.
    """
    open_source(settings.source, settings.corrupt, settings.sweeps)  # errors name it as it was given
    settings = absolute(settings, CLOUDS.sets)
    if settings.normalize is None:
        plain = replace(settings, normalize="none", range=None, pillar=None, max_points=None)
        around = [holds_origin(xyz) for xyz in _some(_split(plain, "train"))]
        settings = replace(settings, normalize="none" if 2 * sum(around) >= len(around) else "center")
    train = _split(settings, "train", augment=True)
    if settings.range is not None and settings.pillar is not None:
        if settings.grid_shape == (1, 1):
            raise SourceError(f"one pillar of {settings.pillar} m is the whole of data.range: nothing could be hidden")
        train[0, 0]
        return settings
    clouds = list(_some(train))
    bounds = settings.range or choose_range(clouds, settings.pillar)
    return replace(settings, range=bounds, pillar=settings.pillar or choose_pillar(clouds, bounds))


def _some(train: PointClouds) -> Iterator[Float[np.ndarray, "points 3"]]:
    """Positions of evenly spaced clouds."""
    for index in torch.linspace(0, len(train) - 1, min(len(train), _MEASURED)).long().tolist():
        yield train[index, 0].points[:, :3].numpy()
