"""What a cloud is to `unmask.core.data`: the files that can be one, and the `Source` that knows classes of points."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, BinaryIO

from unmask.core.data import sources
from unmask.core.data.folders import suffix
from unmask.core.data.kinds import CorruptSampleError, Kind
from unmask.pointcloud.data.embedded.carriers import EMBEDDED
from unmask.pointcloud.data.readers import HEAD, SUFFIXES, head_problem, suffix_of


def _examine(file: BinaryIO, name: str) -> dict[str, Any]:
    """The size, and the suffix of what it is, which the names of shards' members do not tell."""
    head = file.read(HEAD)
    problem = head_problem(head, suffix(name))
    if problem:
        raise CorruptSampleError(problem)
    return {"size": file.seek(0, io.SEEK_END), "suffix": suffix(name) or suffix_of(head)}


CLOUDS = Kind(
    name="cloud",
    suffixes=SUFFIXES,
    examine=_examine,
    expected="Give a folder of point clouds, of nuScenes tables or of .tar shards, or one of the embedded sets: "
    + ", ".join(sorted(EMBEDDED)),
    sets=EMBEDDED,
    groups="scene or recording",
)


@dataclass(frozen=True)
class Source(sources.Source):
    """All clouds of a data set, whatever it is kept in.

    Args:
        point_classes: names of the classes of points, or None where the data have none. The labels of a cloud that is
            read are indices into them, -1 where a point has none.
    """

    point_classes: list[str] | None = None

    @property
    def labelled(self) -> bool:
        """Whether there are labels to report on, of clouds or points."""
        return self.labels is not None or self.point_classes is not None
