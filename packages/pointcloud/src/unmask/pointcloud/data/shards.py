"""Clouds in tar shards, see `unmask.core.data.shards`. Labels: ``.cls``, or ``label`` or ``cls`` in ``.json``."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unmask.core.data import shards
from unmask.core.data.shards import Member, Window
from unmask.pointcloud.data.las import index_points
from unmask.pointcloud.data.readers import HEAD, SUFFIXES, Cloud, bin_columns, naming, read_cloud, suffix_of


def _examine(cloud: Window) -> tuple[str | None, dict[str, Any]]:
    head = cloud.read(HEAD) or b""
    return (None if head else "empty file"), {"suffix": suffix_of(head)}


_CLOUDS = shards.Kind("cloud", SUFFIXES, _examine)


def index(path: Path, shard: str) -> tuple[list[Member], list[tuple[str, str]]]:
    """The clouds of a shard in tar order, and (name, reason) of those that cannot be read.

    Args:
        path: the shard.
        shard: what to call it: its path below the data folder.

    Raises:
        UnmaskError: it is not an uncompressed tar.
    """
    return shards.index(path, shard, _CLOUDS)


class ShardReader:
    """Reads clouds out of shards. Holds no open file, so it can go to any number of workers.

    Args:
        root: the folder of the shards.
        members: the clouds, all of one kind.
        suffix: which kind.
    """

    def __init__(self, root: Path, members: Sequence[Member], suffix: str) -> None:
        self.root, self.members, self.suffix = root, members, suffix
        self.columns = bin_columns([member.size for member in members])

    def __call__(self, index: int) -> Cloud:
        member = self.members[index]
        with naming(member.name), member.open(self.root) as window:
            content = window.read()
        with tempfile.NamedTemporaryFile(suffix=self.suffix) as copy:  # open3d wants a file of its own
            copy.write(content)
            copy.flush()
            return index_points(read_cloud(copy.name, self.columns, member.name))
