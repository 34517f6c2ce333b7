"""The text sets that come by name, as documents."""

from __future__ import annotations

import lzma
from collections.abc import Iterable
from pathlib import Path

from unmask.core.data.carriers import cache_dir, staging
from unmask.language.data.embedded.carriers import MOBYDICK

_PACKED = {MOBYDICK: "mobydick.txt.xz"}


def folder_of(name: str) -> Path:
    """The folder that holds the files of a set, in the cache; it is unpacked there first."""
    folder = cache_dir() / "texts" / name
    target = folder / _PACKED[name].removesuffix(".xz")
    if not target.is_file():
        packed = Path(__file__).with_name(_PACKED[name])
        with staging(target) as place:
            (place / "text").write_bytes(lzma.decompress(packed.read_bytes()))
            (place / "text").replace(target)
    return folder


def names() -> Iterable[str]:
    """The sets there are."""
    return _PACKED
