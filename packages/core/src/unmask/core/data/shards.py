"""Tar shards in the webdataset layout, read by offset.

A shard is an ordinary uncompressed tar in which files with the same name up to the first dot are one sample:
``0001.jpg``, ``0001.cls``, ``0001.json``. Each shard is walked once; where its samples lie is kept in the cache, so
any sample can be read at any time and a reader has no position to lose. A `Kind` says which files are samples. Beside
them are read ``.cls`` (a number or a name), ``.txt`` (a text) and the entries ``label``, ``cls``, ``speaker`` and
``text`` of ``.json``. Nothing else is decoded: no pickle, no commands.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from unmask.core.data.carriers import cache_dir, staging
from unmask.core.data.folders import Place
from unmask.core.data.headers import examine
from unmask.core.data.kinds import Kind, SourceError, naming, printable
from unmask.core.errors import Problem, UnmaskError

_FORMAT = 4  # raise when the index changes
_ENTRIES = ("label", "cls", "speaker", "text")


class Window(io.RawIOBase):
    """One file inside a shard, as a file of its own: read-only, seekable, and only what is asked for is read."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._at = file, offset, size, 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to `offset` from the start, from here or from the end; returns the new position."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def tell(self) -> int:
        """The position."""
        return self._at

    def read_bytes(self) -> bytes:
        """All of it, as `pathlib.Path.read_bytes`."""
        self._at = 0
        return self.readall() or b""

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as there are bytes; returns how many."""
        view = memoryview(buffer).cast("B")
        self._file.seek(self._offset + self._at)
        content = self._file.read(max(min(len(view), self._size - self._at), 0))
        view[: len(content)] = content
        self._at += len(content)
        return len(content)


@dataclass(frozen=True)
class Member:
    """A sample inside a shard.

    Args:
        name: ``shard.tar/key``, the sample's name.
        shard: the shard's path below the data folder.
        offset: where its bytes start in the shard.
        size: how many there are.
        about: what lies beside it: ``label``, ``cls``, ``speaker``, ``text``, as far as they are there.
        facts: what `Kind.examine` found.
    """

    name: str
    shard: str
    offset: int
    size: int
    about: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str | None:
        """The class that the shard gives, or None."""
        return self.about.get("label", self.about.get("cls"))

    @contextmanager
    def open(self, root: Path) -> Iterator[Window]:
        """The sample's bytes.

        Raises:
            OSError: the shard is not there any more.
        """
        with (root / self.shard).open("rb") as file:
            yield Window(file, self.offset, self.size)


def index(path: Path, shard: str, kind: Kind) -> tuple[list[Member], list[tuple[str, str]]]:
    """The samples of a shard in tar order, and (name, reason) of those that cannot be read.

    Args:
        path: the shard.
        shard: what to call it: its path below the data folder.
        kind: what a sample is.

    Raises:
        UnmaskError: it is not an uncompressed tar.
    """
    stat = path.stat()
    identity = f"{path.resolve()}|{stat.st_mtime_ns}|{stat.st_size}|{kind.name}|{kind.version}|{_FORMAT}"
    place = cache_dir() / "shards" / f"{hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()}.json"
    try:
        entries = json.loads(place.read_text())
    except (OSError, ValueError):  # not there yet, or damaged
        entries = _scan(path, shard, kind)
        with staging(place) as folder:
            (folder / "index.json").write_text(json.dumps(entries))
            os.replace(folder / "index.json", place)
    members = [Member(f"{shard}/{key}", shard, *where) for key, *where in entries["members"]]
    return members, [(f"{shard}/{key}" if key else shard, reason) for key, reason in entries["problems"]]


def index_all(place: Place, names: Sequence[str], kind: Kind) -> tuple[list[Member], tuple[Problem, ...]]:
    """The samples of several shards, and those that cannot be read.

    Raises:
        SourceError: there are none.
        UnmaskError: one is no uncompressed tar.
    """
    members: list[Member] = []
    problems: list[Problem] = []
    for name in names:
        found, bad = index(place.root / name, name, kind)
        members += found
        problems += [Problem(*entry) for entry in bad]
    if not members and not problems:
        looked = " ".join(kind.suffixes)
        raise SourceError(f"no {kind.plural} in the {len(names)} tar shards of {place.root} (looked for {looked})")
    return members, tuple(problems)


class ShardReader:
    """Reads samples out of shards. Holds no open file, so it can go to any number of workers.

    Args:
        root: the folder of the shards.
        members: the samples.
        decode: makes a sample of an open file and the member's name; also given what the reader is called with.
    """

    def __init__(self, root: Path, members: Sequence[Member], decode: Callable[..., Any]) -> None:
        self.root, self.members, self.decode = root, members, decode

    def __call__(self, index: int, *how: Any) -> Any:
        member = self.members[index]
        with naming(member.name), member.open(self.root) as file:
            return self.decode(file, member.name, *how)


def _scan(path: Path, shard: str, kind: Kind) -> dict[str, list[Any]]:
    """Walk a shard: ``members`` as [key, offset, size, about, facts] and ``problems`` as [key, reason]."""
    samples: dict[str, tuple[int, int]] = {}
    beside: dict[str, dict[str, str]] = {}
    problems: list[tuple[str, str]] = []
    with path.open("rb") as file:
        for key, suffix, offset, size in _files(file, shard, problems):
            if f".{suffix.rsplit('.', 1)[-1]}" in kind.suffixes:
                if key in samples:
                    problems.append((key, f"a second {kind.name} of the same key (.{suffix})"))
                    continue
                samples[key] = (offset, size)
            elif suffix in ("cls", "json", "txt"):
                file.seek(offset)
                beside.setdefault(key, {}).update(_beside(file.read(size), suffix))
        members = []
        for key, (offset, size) in samples.items():
            facts = examine(kind, Window(file, offset, size), key)
            if isinstance(facts, str):
                problems.append((key, facts))
            else:
                members.append((key, offset, size, beside.get(key, {}), facts))
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
                if key != printable(key):
                    problems.append((printable(key), "its name is not UTF-8: rename it"))
                    continue
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


def _beside(data: bytes, suffix: str) -> dict[str, str]:
    """What a file beside a sample says about it."""
    if suffix != "json":
        text = data.decode("utf-8", "replace").strip()
        return {"cls" if suffix == "cls" else "text": text} if text else {}
    try:
        content = json.loads(data)
    except ValueError:
        return {}
    if not isinstance(content, dict):
        return {}
    return {name: str(content[name]) for name in _ENTRIES if isinstance(content.get(name), int | str)}
