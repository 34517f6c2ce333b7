"""What the headers of many files say, looked at once.

It is kept in the cache with each file's size and time of change, one index per folder: a million headers on network
storage take an hour.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from unmask.core.data.carriers import CarrierError, cache_dir, say, staging
from unmask.core.data.kinds import CorruptSampleError, Kind
from unmask.core.progress import progress_bar

_THREADS = 16  # opening files is waiting, above all on network storage
_CHUNK = 64

Facts = dict[str, Any]
Entry = list[Any]  # size, time of change in ns, then facts or a reason


def scan(root: Path, names: Sequence[str], kind: Kind) -> list[Facts | str]:
    """What `Kind.examine` found in each file below `root`, or the reason why it cannot be used."""
    identity = f"{root.resolve()}|{kind.name}|{kind.version}"
    place = cache_dir() / "headers" / f"{hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()}.json"
    known = _load(place)
    chunks = [names[i : i + _CHUNK] for i in range(0, len(names), _CHUNK)]
    found: dict[str, Entry] = {}
    new = 0
    bar = progress_bar(f"reading the headers of {len(names)} files", len(names))
    with bar as advance, ThreadPoolExecutor(_THREADS) as pool:
        for part in pool.map(lambda chunk: [_look(root, name, kind, known.get(name)) for name in chunk], chunks):
            for name, entry in part:
                found[name] = entry
                new += entry is not known.get(name)
            advance(len(part))
    if new:
        _save(place, known | {name: entry for name, entry in found.items() if entry[0] is not None})
    return [found[name][2] for name in names]


def _look(root: Path, name: str, kind: Kind, known: Entry | None) -> tuple[str, Entry]:
    path = root / name
    try:
        name.encode()  # sample ids are made of names
        stat = path.stat()
        if known is not None and known[:2] == [stat.st_size, stat.st_mtime_ns]:
            return name, known
        with path.open("rb") as file:
            return name, [stat.st_size, stat.st_mtime_ns, examine(kind, file, name)]
    except OSError as error:  # not remembered: it may pass
        return name, [None, None, error.strerror or str(error)]
    except UnicodeEncodeError:
        return name, [None, None, "its name is not UTF-8: rename it"]
    except ValueError as error:  # a NUL in a list of files
        return name, [None, None, f"no file can have this name ({error})"]


def examine(kind: Kind, file: Any, name: str) -> Facts | str:
    """The facts of an open file, or what is wrong with it."""
    try:
        return kind.examine(file, name)
    except CorruptSampleError as error:
        return error.reason


def _load(place: Path) -> dict[str, Entry]:
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):  # not there yet, or damaged
        return {}


def _save(place: Path, files: dict[str, Entry]) -> None:
    try:
        with staging(place) as folder:
            (folder / "index.json").write_text(json.dumps(files), encoding="utf-8")
            os.replace(folder / "index.json", place)
    except (CarrierError, OSError) as error:  # a full or read-only cache costs time, not the run
        say(f"the index of headers cannot be kept ({error}); every file will be looked at again next time")
