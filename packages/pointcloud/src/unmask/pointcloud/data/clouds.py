"""Point clouds for training and evaluation: what to read, how to normalise and augment it, which split it belongs to.

A dataset is asked for ``(index, visit)``; the augmentation of a sample is a function of (seed, sample id, visit) alone,
so it does not depend on the batch, the worker or a resume. The parts, beside this module: `sources` finds the clouds,
`readers` reads them, `augment` turns, scales and flips them; `unmask.core.data.splits` divides them. Points outside
``range`` are not cut off here but when a batch is voxelised.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from unmask.core.data.splits import SPLITS
from unmask.core.errors import Problem, UnmaskError
from unmask.core.randomness import Key, SampleKey, stable_id
from unmask.pointcloud.data.augment import FeatureError, draw_turn, prepare, subset
from unmask.pointcloud.data.batches import PointBatch, Sample, collate
from unmask.pointcloud.data.embedded.carriers import CARRIERS
from unmask.pointcloud.data.extent import choose_pillar, choose_range, holds_origin, inside
from unmask.pointcloud.data.readers import WIDTHS, CorruptCloudError, SourceError
from unmask.pointcloud.data.settings import Settings
from unmask.pointcloud.data.sources import Source, open_source

__all__ = [
    "CARRIERS",
    "FeatureError",
    "PointBatch",
    "PointClouds",
    "Problem",
    "Sample",
    "Settings",
    "SourceError",
    "collate",
    "open_split",
    "prepare",
    "resolve",
]

Split = Literal["train", "val", "test", "all"]
_AUGMENT = stable_id("augment")
_MEASURED = 32  # training clouds that range and pillar are chosen from


class PointClouds(Dataset[Sample]):
    """One split of a source: ``dataset[index, visit]`` is a `Sample`, a list of (index, visit) a `PointBatch`.

    A cloud that turns out to be damaged, or to have no points in the range, is replaced by the next good one of the
    split, the same in every worker and run, and then shows in `problems`.

    Args:
        source: where the clouds are.
        members: which of them belong to the split.
        settings: resolved; only `resolve` itself leaves the range open.
        seed: of the augmentation, and of which points are kept where there are more than ``max_points``.
        augment: turn, scale and mirror.
    """

    def __init__(
        self, source: Source, members: Int[Tensor, "n"], settings: Settings, *, seed: int, augment: bool
    ) -> None:
        self.settings, self.seed, self.augment = settings, seed, augment
        self._source, self._members = source, members
        self.ids: Int[Tensor, "n"] = source.ids[members]
        self.labels: Int[Tensor, "n"] | None = None if source.labels is None else source.labels[members]
        self.classes: list[str] | None = source.classes
        self.point_classes: list[str] | None = source.point_classes
        # Shared memory, so that the main process learns what its workers found.
        self._damaged = torch.zeros(len(members), dtype=torch.bool).share_memory_()
        self._dropped = torch.zeros(len(members), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self._members)

    def view(
        self, rows: Int[Tensor, "m"] | slice = slice(None), *, seed: int = 0, augment: bool = False
    ) -> PointClouds:
        """Some clouds of this split, with or without augmentation; the source is not opened again."""
        return PointClouds(self._source, self._members[rows], self.settings, seed=seed, augment=augment)

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        index, visit = item
        for step in range(len(self)):
            place = (index + step) % len(self)
            if self._damaged[place]:
                continue
            try:
                return self._sample(place, visit)
            except CorruptCloudError as error:
                if self.settings.corrupt == "fatal":
                    raise UnmaskError(f"{error}. Remove or replace it, or set data.corrupt=skip.") from error
                self._damaged[place] = True
        first = f"{self._name(0)}: {self._reason(0)}"
        raise SourceError(f"{self.settings.source}: none of the {len(self)} clouds of this split can be used ({first})")

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> PointBatch:
        """The batch of several (index, visit): what `collate` makes of them one by one."""
        return collate([self[item] for item in items])

    def _sample(self, place: int, visit: int) -> Sample:
        cloud = self._source.read(int(self._members[place]))
        points, labels = prepare(cloud, self.settings, self._name(place))
        self._dropped[place] = cloud.dropped + len(cloud.xyz) - len(points)
        if self.point_classes is not None and labels is None:
            labels = np.full(len(points), -1, np.int64)
        sample_id = int(self.ids[place])
        visit = visit if self.augment else 0
        if self.augment:
            points = self._turned(points, SampleKey.of(self.seed, sample_id, visit).stream(_AUGMENT))
        rows = subset(points, self.settings, Key.of(self.seed, self.ids[place : place + 1], visit))
        if rows is not None:
            points, labels = points[rows], None if labels is None else labels[rows]
        return Sample(
            torch.from_numpy(points),
            sample_id,
            None if self.labels is None else int(self.labels[place]),
            None if labels is None or self.point_classes is None else torch.from_numpy(labels),
        )

    def _turned(self, points: Float[np.ndarray, "points c"], key: SampleKey) -> Float[np.ndarray, "points c"]:
        settings = self.settings
        turn = draw_turn(key, settings.rotate, settings.scale, settings.flip)
        moved = points.copy()
        moved[:, :3] = turn.positions(points[:, :3])
        start = 3
        for name in settings.features:
            if name == "normal":
                moved[:, start : start + 3] = turn.normals(points[:, start : start + 3])
            start += WIDTHS[name]
        # Of a cloud at the very border the turn may take all points out of the range: then it stays as it is.
        return moved if inside(moved, settings.range).any() else points

    @property
    def problems(self) -> list[Problem]:
        """The clouds of the source that are left out: found on opening (any split), or when read (this split)."""
        found = list(self._source.problems)
        for place in self._damaged.nonzero()[:, 0].tolist():
            found.append(Problem(self._name(place), self._reason(place)))
        return found

    @property
    def warnings(self) -> list[Problem]:
        """Clouds of this split, as far as read, that are used without those of their points that are not finite."""
        return [
            Problem(self._name(place), f"{int(self._dropped[place])} points with NaN or infinite values left out")
            for place in self._dropped.nonzero()[:, 0].tolist()
        ]

    def _reason(self, place: int) -> str:
        """What is wrong with a damaged cloud: a worker can only pass on that something is."""
        name = self._name(place)
        try:
            prepare(self._source.read(int(self._members[place])), self.settings, name)
        except CorruptCloudError as error:
            return str(error).removeprefix(f"{name}: ")
        return "could not be read at first"

    def name_of(self, sample_id: int) -> str:
        """The name of a sample of this split: its path, shard key, or ``set:name``."""
        return self._names[sample_id]

    def _name(self, place: int) -> str:
        return self._source.names[int(self._members[place])]

    @cached_property
    def _names(self) -> dict[int, str]:
        return {sample_id: self._name(place) for place, sample_id in enumerate(self.ids.tolist())}


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
    return _split(open_source(settings.source, settings.corrupt, settings.sweeps), settings, split, seed, augment)


def _split(source: Source, settings: Settings, split: Split, seed: int, augment: bool) -> PointClouds:
    if split == "all":
        return PointClouds(source, torch.arange(len(source.names)), settings, seed=seed, augment=augment)
    members = (source.splits(settings.val_share) == SPLITS[split]).nonzero()[:, 0]
    if len(members) == 0:
        raise SourceError(f"{settings.source} has no {split} clouds. {_how_to_split(source, split)}")
    return PointClouds(source, members, settings, seed=seed, augment=augment)


def _how_to_split(source: Source, split: str) -> str:
    if split == "test" and source.labels is None and source.point_classes is None:
        return "Without labels none are set aside for testing: put clouds in one folder a class, or in a folder test/."
    if source.groups is not None:
        count = len(set(source.groups))
        return f"Those of one scene or recording stay together, and there are {count}: add more of them."
    if split == "train":
        return "Put some in the folder train/."
    return f"Raise data.val_share, add clouds, or put some in a folder {split}/."


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
    from unmask.pointcloud.data.embedded.sets import EMBEDDED

    source = open_source(settings.source, settings.corrupt, settings.sweeps)
    if settings.source not in EMBEDDED:
        settings = replace(settings, source=str(Path(settings.source).expanduser().resolve()))
    if settings.normalize is None:
        plain = replace(settings, normalize="none", range=None, pillar=None, max_points=None)
        found = [holds_origin(xyz) for xyz in _some(_split(source, plain, "train", 0, augment=False))]
        settings = replace(settings, normalize="none" if 2 * sum(found) >= len(found) else "center")
    train = _split(source, settings, "train", 0, augment=True)
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
