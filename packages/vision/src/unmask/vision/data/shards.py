"""Images in tar shards, see `unmask.core.data.shards`. Labels: ``.cls``, or ``label`` or ``cls`` in ``.json``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Shaped
from torch import Tensor

from unmask.core.data import shards
from unmask.core.data.shards import Member, Window
from unmask.vision.data.decode import HEAD, SUFFIXES, CorruptImageError, complaint, decode


def _examine(image: Window) -> tuple[str | None, dict[str, Any]]:
    return complaint(image.read(HEAD) or b""), {}


_IMAGES = shards.Kind("image", SUFFIXES, _examine)


def index(path: Path, shard: str) -> tuple[list[Member], list[tuple[str, str]]]:
    """The images of a shard in tar order, and (name, reason) of those that cannot be read.

    Args:
        path: the shard.
        shard: what to call it: its path below the data folder.

    Raises:
        UnmaskError: it is not an uncompressed tar.
    """
    return shards.index(path, shard, _IMAGES)


class ShardReader:
    """Reads images out of shards. Holds no open file, so it can go to any number of workers."""

    def __init__(self, root: Path, members: Sequence[Member]) -> None:
        self.root, self.members = root, members

    def __call__(self, index: int, channels: int) -> Shaped[Tensor, "c h w"]:
        member = self.members[index]
        try:
            with member.open(self.root) as image:
                data = image.read()
        except (FileNotFoundError, PermissionError) as error:
            raise CorruptImageError(f"{member.name}: {error.strerror}") from error
        return decode(data, channels, member.name)
