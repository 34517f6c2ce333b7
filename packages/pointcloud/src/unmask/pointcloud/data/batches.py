"""Clouds as ragged batches: points concatenated, with offsets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unmask.core.nn.ragged import rows_of, take_ragged


class Sample(NamedTuple):
    """One cloud.

    Attributes:
        points: x, y, z in metres, then the features that the data settings ask for.
        id: its stable id (see `unmask.core.randomness`).
        label: class index of the whole cloud, or None.
        point_labels: class index of every point, -1 where it has none; None for data without them.
    """

    points: Float[Tensor, "points channels"]
    id: int
    label: int | None = None
    point_labels: Int[Tensor, "points"] | None = None


@dataclass(frozen=True)
class PointBatch:
    """What a point-cloud method trains on.

    Args:
        points: of all clouds, one cloud after another: x, y, z in metres, then features.
        offsets: the row where each cloud starts, and the number of rows at the end.
        ids: the clouds' stable ids (see `unmask.core.randomness`).
        labels: class indices of whole clouds, or None.
        point_labels: class indices of points, -1 where a point has none; None for data without them.
    """

    points: Float[Tensor, "total channels"]
    offsets: Int[Tensor, "batch_plus_1"]
    ids: Int[Tensor, "batch"]
    labels: Int[Tensor, "batch"] | None = None
    point_labels: Int[Tensor, "total"] | None = None

    @property
    def sample_of(self) -> Int[Tensor, "total"]:
        """The cloud that each point belongs to."""
        return rows_of(self.offsets, len(self.points))

    def take(self, rows: Sequence[int]) -> PointBatch:
        """The batch of these clouds, in this order; one may come several times."""
        where, offsets = take_ragged(self.offsets, rows)
        chosen = torch.as_tensor(rows, device=self.ids.device)
        return PointBatch(
            self.points[where],
            offsets,
            self.ids[chosen],
            None if self.labels is None else self.labels[chosen],
            None if self.point_labels is None else self.point_labels[where],
        )


def collate(samples: Sequence[Sample] | PointBatch) -> PointBatch:
    """Samples of one dataset as a batch; a batch that the dataset made itself passes through."""
    if isinstance(samples, PointBatch):
        return samples
    labels = [sample.label for sample in samples if sample.label is not None]
    point_labels = [sample.point_labels for sample in samples if sample.point_labels is not None]
    lengths = torch.tensor([0, *(len(sample.points) for sample in samples)])
    return PointBatch(
        torch.cat([sample.points for sample in samples]),
        lengths.cumsum(0),
        torch.tensor([sample.id for sample in samples]),
        torch.tensor(labels) if labels else None,
        torch.cat(point_labels) if point_labels else None,
    )
