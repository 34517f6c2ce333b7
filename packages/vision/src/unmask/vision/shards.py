"""Tar shards in the webdataset layout, read by offset.

A shard is an ordinary uncompressed tar in which files with the same name up to the first dot are one sample:
``0001.jpg``, ``0001.cls``, ``0001.json``. Each shard is walked once; where its images lie is kept in the cache, so
any sample can be read at any time and a reader has no position to lose. Labels come from ``.cls`` (a number or a
name) or from ``label`` or ``cls`` in ``.json``. Nothing else is decoded: no pickle, no commands.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from jaxtyping import Shaped
from torch import Tensor

from unmask.core.carriers import cache_dir, staging
from unmask.core.errors import UnmaskError
from unmask.vision.decode import HEAD, SUFFIXES, CorruptImageError, complaint, decode

_FORMAT = 1  # raise when the index changes


@dataclass(frozen=True)
class Member:
    """An image inside a shard.

    Args:
        name: ``shard.tar/key``, the sample's name.
        shard: the shard's path below the data folder.
        offset: where its bytes start in the shard.
        size: how many there are.
        label: what its ``.cls`` or ``.json`` says, or None.
    """

    name: str
    shard: str
    offset: int
    size: int
    label: str | None


def index(path: Path, shard: str) -> tuple[list[Member], list[tuple[str, str]]]:
    """The images of a shard in tar order, and (name, reason) of those that cannot be read.

    Args:
        path: the shard.
        shard: what to call it: its path below the data folder.

    Raises:
        UnmaskError: it is not an uncompressed tar.
    """
    stat = path.stat()
    identity = f"{path.resolve()}|{stat.st_mtime_ns}|{stat.st_size}|{_FORMAT}"
    place = cache_dir() / "shards" / f"{hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()}.json"
    try:
        entries = json.loads(place.read_text())
    except (OSError, ValueError):  # not there yet, or damaged
        entries = _scan(path, shard)
        with staging(place) as folder:
            (folder / "index.json").write_text(json.dumps(entries))
            os.replace(folder / "index.json", place)
    members = [Member(f"{shard}/{key}", shard, *where) for key, *where in entries["members"]]
    return members, [(f"{shard}/{key}" if key else shard, reason) for key, reason in entries["problems"]]


def _scan(path: Path, shard: str) -> dict[str, list[Any]]:
    """Walk a shard: ``members`` as [key, offset, size, label] and ``problems`` as [key, reason]."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, str] = {}
    problems: list[tuple[str, str]] = []
    with path.open("rb") as file:
        for key, suffix, offset, size in _files(file, shard, problems):
            if f".{suffix.rsplit('.', 1)[-1]}" in SUFFIXES:
                if key in images:
                    problems.append((key, f"a second image of the same key (.{suffix})"))
                    continue
                images[key] = (offset, size)
            elif suffix in ("cls", "json"):
                label = _label(_read(file, offset, size), suffix)
                labels.update({key: label} if label is not None else {})
        members = []
        for key, (offset, size) in images.items():
            reason = complaint(_read(file, offset, min(size, HEAD)))
            if reason:
                problems.append((key, reason))
            else:
                members.append((key, offset, size, labels.get(key)))
    return {"members": members, "problems": problems}


def _files(file: BinaryIO, shard: str, problems: list[tuple[str, str]]) -> list[tuple[str, str, int, int]]:
    """(key, suffix, offset, size) of the regular files of a tar. A cut-off tar gives what is whole, and a problem."""
    end = os.fstat(file.fileno()).st_size
    found = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, _, base = member.name.removeprefix("./").rpartition("/")
                stem, dot, suffix = base.partition(".")
                if not member.isreg() or not stem or not dot:
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if member.offset_data + member.size > end:
                    problems.append((key, "the shard ends before the file does"))
                    continue
                found.append((key, suffix.lower(), member.offset_data, member.size))
    except tarfile.TarError as error:
        if not found and not problems:
            raise UnmaskError(
                f"{shard}: not an uncompressed tar ({error}). Shards are read by offset: gunzip it or make it anew."
            ) from error
        problems.append(("", f"the shard is cut off or damaged ({error})"))
    return found


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _label(data: bytes, suffix: str) -> str | None:
    if suffix == "cls":
        return data.decode("utf-8", "replace").strip() or None
    try:
        content = json.loads(data)
    except ValueError:
        return None
    if not isinstance(content, dict):
        return None
    value = content.get("label", content.get("cls"))
    return str(value) if isinstance(value, int | str) else None


class ShardReader:
    """Reads images out of shards. Holds no open file, so it can go to any number of workers."""

    def __init__(self, root: Path, members: Sequence[Member]) -> None:
        self.root, self.members = root, members

    def __call__(self, index: int, channels: int) -> Shaped[Tensor, "c h w"]:
        member = self.members[index]
        try:
            with (self.root / member.shard).open("rb") as file:
                data = _read(file, member.offset, member.size)
        except (FileNotFoundError, PermissionError) as error:
            raise CorruptImageError(f"{member.name}: {error.strerror}") from error
        return decode(data, channels, member.name)
