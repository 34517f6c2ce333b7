"""Where clouds come from: folders, KITTI, nuScenes, tar shards, embedded sets; all seen as the same `Source`."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, Int8
from torch import Tensor

from unmask.core.data.shards import Member, printable
from unmask.core.data.splits import assign, split_of
from unmask.core.errors import Problem
from unmask.core.randomness import stable_id
from unmask.pointcloud.data import kitti, nuscenes, shards
from unmask.pointcloud.data.las import LAS_CLASSES, index_points
from unmask.pointcloud.data.readers import (
    SUFFIXES,
    Cloud,
    SourceError,
    bin_columns,
    bin_complaint,
    complaint,
    read_cloud,
)

_PACKED = (".tar.gz", ".tgz", ".zip", ".tar.xz", ".tar.zst", ".7z")
_BAD_NAME = "its name is not UTF-8: rename it"

Reader = Callable[[int], Cloud]


@dataclass(frozen=True)
class Source:
    """All clouds of a data set, whatever it is kept in.

    Args:
        names: one per cloud: the path below the folder, the shard key, or ``set:name``.
        read: reads one cloud; its labels are indices into `point_classes`, -1 where a point has none.
        labels: class indices of clouds, or None.
        classes: names of the classes of clouds, or None.
        point_classes: names of the classes of points, or None where the data have none.
        groups: what stays together in one split: the scene or recording of each cloud; None where none is known.
        given: the split that the data themselves give to each cloud (see `unmask.core.data.splits`), None where none.
        problems: what was found to be unreadable and is not in `names`.
        codes: the final split of each cloud, for sets whose splits are fixed; else None.
    """

    names: Sequence[str]
    read: Reader
    labels: Int[Tensor, "n"] | None = None
    classes: list[str] | None = None
    point_classes: list[str] | None = None
    groups: Sequence[str] | None = None
    given: Sequence[int | None] | None = None
    problems: tuple[Problem, ...] = ()
    codes: Int8[Tensor, "n"] | None = None

    @cached_property
    def ids(self) -> Int[Tensor, "n"]:
        """Stable sample ids, from the names."""
        return torch.tensor([stable_id(name) for name in self.names], dtype=torch.int64)

    def splits(self, val_share: float) -> Int8[Tensor, "n"]:
        """The split of each cloud: whole groups where they are known, else class by class.

        A test split is only made where there are labels, of clouds or points, to report on.
        """
        if self.codes is not None:
            return self.codes
        test_share = 0.0 if self.labels is None and self.point_classes is None else val_share
        groups = None if self.groups is None else torch.tensor([stable_id(f"group {name}") for name in self.groups])
        return assign(self.ids, self.labels, self.given, val_share, test_share, groups)


def open_source(source: str, corrupt: str, sweeps: int = 1) -> Source:
    """Find a source's clouds without reading them (first bytes and sizes are looked at).

    Args:
        source: see ``data.source``.
        corrupt: ``skip`` or ``fatal``.
        sweeps: lidar sweeps in one cloud; more than one in nuScenes only.

    Raises:
        SourceError: nothing is there, or nothing that can be read; or something cannot and `corrupt` is ``fatal``; or
            several sweeps are asked of data that do not tell how the sensor moved.
    """
    from unmask.pointcloud.data.embedded.sets import EMBEDDED

    found = _embedded(source) if source in EMBEDDED else _open_place(source, sweeps)
    if sweeps > 1 and not isinstance(found.read, nuscenes.SweepReader):
        raise SourceError(
            f"{source}: data.sweeps={sweeps} needs poses of the vehicle, which are read from nuScenes' tables only; "
            "set data.sweeps=1"
        )
    if found.problems and (corrupt == "fatal" or not found.names):
        first = "; ".join(f"{p.name} ({p.reason})" for p in found.problems[:3])
        total = len(found.names) + len(found.problems)
        remedy = "Remove or replace them" + (", or set data.corrupt=skip." if found.names else ".")
        raise SourceError(f"{source}: {len(found.problems)} of {total} clouds cannot be read: {first}. {remedy}")
    return found


def _what_to_give() -> str:
    from unmask.pointcloud.data.embedded.sets import EMBEDDED

    sets = ", ".join(sorted(EMBEDDED))
    return f"Give a folder of point clouds, of nuScenes tables or of .tar shards, or one of the embedded sets: {sets}"


def _embedded(name: str) -> Source:
    from unmask.pointcloud.data.embedded.sets import load_embedded

    found = load_embedded(name)
    return Source(found.names, found.read, found.labels, found.classes, found.point_classes, codes=found.codes)


def _open_place(source: str, sweeps: int) -> Source:
    if source.startswith("pipe:") or "://" in source:
        raise SourceError(f"data source {source!r}: addresses and pipes are never opened. {_what_to_give()}")
    root = Path(source).expanduser()
    if not root.exists():
        raise SourceError(f"data source {source!r} does not exist. {_what_to_give()}")
    if root.is_file():
        return _open_files(root.parent, [root])
    tables = nuscenes.find(root)
    return _open_files(root, sorted(_walk(root))) if tables is None else _open_nuscenes(tables, sweeps)


def _open_files(root: Path, files: list[Path]) -> Source:
    tars = [file for file in files if file.suffix.lower() == ".tar"]
    clouds = [file for file in files if file.suffix.lower() in SUFFIXES]
    if tars and clouds:
        raise SourceError(f"{root} holds {len(tars)} .tar and {len(clouds)} cloud files; give a folder with one kind")
    if tars:
        return _open_shards(root, tars)
    if not clouds:
        packed = [file.name for file in files if file.name.lower().endswith(_PACKED)]
        hint = f"{packed[0]} is compressed: unpack it first. " if packed else ""
        looked = " ".join(SUFFIXES)
        raise SourceError(f"no clouds in {root} (looked for {looked} at any depth). {hint}{_what_to_give()}")
    names = [file.relative_to(root).as_posix() for file in clouds]
    layout = kitti.describe(names, {file.relative_to(root).as_posix() for file in files})
    return _open_folder(root, names) if layout is None else _open_kitti(root, layout)


def _walk(root: Path) -> list[Path]:
    """Every file below `root` that is not hidden."""
    found, seen = [], set()
    for parent, folders, names in os.walk(root, followlinks=True):
        place = os.path.realpath(parent)
        if place in seen:  # a link back up, or a second one to the same folder
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return found


def _examine(root: Path, names: Sequence[str], columns: int | None = None) -> tuple[list[str | None], int | None]:
    """What is wrong with each file, and how many columns the .bin files that are not called .pcd.bin have."""
    with ThreadPoolExecutor(8) as pool:  # opening files is waiting, above all on network storage
        reasons = list(pool.map(complaint, [root / name for name in names], chunksize=256))
    reasons = [r if n == printable(n) else _BAD_NAME for n, r in zip(names, reasons, strict=True)]
    bins = [i for i, name in enumerate(names) if name.lower().endswith(".bin") and not reasons[i]]
    sizes = {i: (root / names[i]).stat().st_size for i in bins}
    columns = columns or bin_columns([size for i, size in sizes.items() if not _has_rings(names[i])])
    for i, size in sizes.items():
        reasons[i] = bin_complaint(size, 5 if _has_rings(names[i]) else columns)
    return reasons, columns


def _has_rings(name: str) -> bool:
    return name.lower().endswith(".pcd.bin")


def _keep(values: Sequence[Any], reasons: list[str | None]) -> list[Any]:
    return [value for value, reason in zip(values, reasons, strict=True) if not reason]


def _problems(names: Sequence[str], reasons: list[str | None]) -> tuple[Problem, ...]:
    pairs = zip(names, reasons, strict=True)
    return tuple(Problem(printable(name), reason) for name, reason in pairs if reason)


def _open_folder(root: Path, names: list[str]) -> Source:
    reasons, columns = _examine(root, names)
    good = _keep(names, reasons)
    given, rest = _given_splits(good)
    labels, classes = _folder_classes(rest)
    if labels is not None and given is None:
        given, _ = _given_splits([name.split("/", 1)[1] for name in rest])  # CLASS/train/cloud, as ModelNet has it
    points = LAS_CLASSES if any(name.lower().endswith((".las", ".laz")) for name in good) else None
    reader = _FileReader(root, good, columns)
    return Source(good, reader, labels, classes, points, given=given, problems=_problems(names, reasons))


def _given_splits(names: list[str]) -> tuple[list[int | None] | None, list[str]]:
    """Splits from top folders named train, val and test, where there is nothing else; and the names below them."""
    tops = {name.split("/")[0] if "/" in name else "" for name in names}
    if not names or not all(split_of(top) is not None for top in tops):
        return None, names
    return [split_of(name.split("/")[0]) for name in names], [name.split("/", 1)[1] for name in names]


def _folder_classes(names: list[str]) -> tuple[Tensor | None, list[str] | None]:
    """Labels from the first-level folders, where there are several and no cloud lies beside them."""
    return _index_classes([name.split("/")[0] if "/" in name else None for name in names])


def _index_classes(values: Sequence[str | None]) -> tuple[Tensor | None, list[str] | None]:
    """Labels and class names from one value per cloud; none where a value is missing or all are the same."""
    known = {value for value in values if value is not None}
    if None in values or len(known) < 2:
        return None, None
    classes = sorted(known, key=int if all(name.isdecimal() for name in known) else None)
    index: dict[str | None, int] = {name: i for i, name in enumerate(classes)}
    return torch.tensor([index[value] for value in values]), classes


class _FileReader:
    """Reads the files of a folder."""

    def __init__(self, root: Path, names: Sequence[str], columns: int | None) -> None:
        self.root, self.names, self.columns = root, names, columns

    def __call__(self, index: int) -> Cloud:
        name = self.names[index]
        columns = None if _has_rings(name) else self.columns
        return index_points(read_cloud(self.root / name, columns, name))


def _open_kitti(root: Path, layout: kitti.Layout) -> Source:
    reasons, _ = _examine(root, layout.names, columns=4)
    good = _keep(layout.names, reasons)
    return Source(
        good,
        kitti.KittiReader(root, good, layout.labelled),
        point_classes=kitti.POINT_CLASSES if layout.labelled else None,
        groups=None if layout.groups is None else _keep(layout.groups, reasons),
        given=None if layout.given is None else _keep(layout.given, reasons),
        problems=_problems(layout.names, reasons),
    )


def _open_nuscenes(tables: Path, sweeps: int) -> Source:
    drives = nuscenes.open_drives(tables)
    reasons, _ = _examine(drives.root, drives.names)
    kept = replace(
        drives,
        keys=_keep(drives.keys, reasons),
        scenes=_keep(drives.scenes, reasons),
        labels=_keep(drives.labels, reasons),
    )
    return Source(
        kept.names,
        nuscenes.SweepReader(kept, sweeps),
        point_classes=kept.point_classes,
        groups=kept.scenes,
        problems=_problems(drives.names, reasons),
    )


def _open_shards(root: Path, files: list[Path]) -> Source:
    members: list[Member] = []
    problems: list[Problem] = []
    for file in files:
        found, bad = shards.index(file, file.relative_to(root).as_posix())
        members += found
        problems += [Problem(*entry) for entry in bad]
    if not members and not problems:
        raise SourceError(f"no clouds in the {len(files)} tar shards of {root} (looked for {' '.join(SUFFIXES)})")
    kinds = Counter(member.facts["suffix"] for member in members)
    suffix = max(kinds, key=lambda kind: kinds[kind], default=".bin")
    problems += [Problem(m.name, f"not a {suffix} file, as most are") for m in members if m.facts["suffix"] != suffix]
    members = [member for member in members if member.facts["suffix"] == suffix]
    names = [member.name for member in members]
    given, _ = _given_splits(names)
    if given is None:  # shards named like train-00000.tar
        stems = [re.split(r"[-_.]", member.shard.split("/")[-1])[0] for member in members]
        given = None if any(split_of(stem) is None for stem in stems) else [split_of(stem) for stem in stems]
    labels, classes = _index_classes([member.label for member in members])
    reader = shards.ShardReader(root, members, suffix)
    points = LAS_CLASSES if suffix in (".las", ".laz") else None
    return Source(names, reader, labels, classes, points, given=given, problems=tuple(problems))
