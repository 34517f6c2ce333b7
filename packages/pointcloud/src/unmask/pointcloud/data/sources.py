"""Where clouds come from: folders, KITTI, nuScenes, tar shards, embedded sets; all seen as the same `Source`."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

from unmask.core.data import headers, shards, sources
from unmask.core.data.carriers import cache_dir
from unmask.core.data.folders import Place, suffix
from unmask.core.data.kinds import SourceError
from unmask.core.data.shards import Window
from unmask.core.data.sources import FileReader, sift, source_of_files, source_of_shards, take
from unmask.core.errors import Problem
from unmask.pointcloud.data import kitti, nuscenes
from unmask.pointcloud.data.embedded.carriers import EMBEDDED
from unmask.pointcloud.data.embedded.sets import load_embedded
from unmask.pointcloud.data.kind import CLOUDS, Source
from unmask.pointcloud.data.las import LAS_CLASSES, index_points
from unmask.pointcloud.data.readers import Cloud, bin_columns, has_rings, read_cloud, size_problem


def open_source(source: str, corrupt: str, sweeps: int = 1) -> Source:
    """Find a source's clouds without reading them (first bytes and sizes are looked at).

    Args:
        source: see ``data.source``.
        corrupt: ``skip`` or ``fatal``.
        sweeps: lidar sweeps in one cloud; more than one in nuScenes only.

    Raises:
        SourceError: see `unmask.core.data.sources.open_source`; or several sweeps are asked of data that do not tell
            how the sensor moved.
    """
    if source in EMBEDDED:
        opened = _embedded(source, cache_dir())
    else:
        opener = partial(_open_place, sweeps=sweeps)
        opened = sources.open_source(source, CLOUDS, opener, corrupt=corrupt, options=(sweeps,))
    if sweeps > 1 and not isinstance(opened.read, nuscenes.SweepReader):
        raise SourceError(
            f"{source}: data.sweeps={sweeps} needs poses of the vehicle, which are read from nuScenes' tables only; "
            "set data.sweeps=1"
        )
    return opened


@lru_cache(maxsize=2)
def _embedded(name: str, cache: Path) -> Source:
    return load_embedded(name)


def _open_place(place: Place, sweeps: int) -> Source:
    tables = nuscenes.find(place.root) if place.is_folder else None
    if tables is not None:
        return _open_nuscenes(place, tables, sweeps)
    pack, names = place.pick(CLOUDS)
    if pack:
        return _open_shards(place, names)
    layout = kitti.layout_of(names, set(place.files))
    return _open_folder(place.root, names) if layout is None else _open_kitti(place.root, layout)


def _examine_files(
    root: Path, names: Sequence[str], columns: int | None = None
) -> tuple[list[int], tuple[Problem, ...], int | None]:
    """Which files can be clouds, what is wrong with the others, and the columns of .bin files not called .pcd.bin."""
    facts = headers.scan(root, names, CLOUDS)
    sizes = {i: known["size"] for i, known in enumerate(facts) if isinstance(known, dict) and known["suffix"] == ".bin"}
    columns = columns or bin_columns([size for i, size in sizes.items() if not has_rings(names[i])])
    for i, size in sizes.items():
        facts[i] = size_problem(size, 5 if has_rings(names[i]) else columns) or facts[i]
    return (*sift(names, facts), columns)


def _open_folder(root: Path, names: list[str]) -> Source:
    good, problems, columns = _examine_files(root, names)
    names = take(names, good)
    points = LAS_CLASSES if any(suffix(name) in (".las", ".laz") for name in names) else None
    return source_of_files(Source, root, names, problems, partial(_read_file, columns), point_classes=points)


def _read_file(columns: int | None, path: Path, name: str) -> Cloud:
    return index_points(read_cloud(path, None if has_rings(name) else columns, name))


def _open_kitti(root: Path, layout: kitti.Layout) -> Source:
    good, problems, _ = _examine_files(root, layout.names, columns=4)
    names = take(layout.names, good)
    return Source(
        names,
        FileReader(root, names, partial(kitti.read_sweep, layout.labelled)),
        given=None if layout.given is None else take(layout.given, good),
        groups=None if layout.groups is None else take(layout.groups, good),
        problems=problems,
        point_classes=kitti.POINT_CLASSES if layout.labelled else None,
    )


def _open_nuscenes(place: Place, tables: Path, sweeps: int) -> Source:
    place.watched += sorted(tables.glob("*.json"))
    drives = nuscenes.open_drives(tables)
    place.watch(drives.names, drives.root)
    good, problems, _ = _examine_files(drives.root, drives.names)
    kept = replace(drives, frames=take(drives.frames, good))
    reader, scenes = nuscenes.SweepReader(kept, sweeps), [frame.scene for frame in kept.frames]
    return Source(kept.names, reader, groups=scenes, problems=problems, point_classes=kept.point_classes)


def _open_shards(place: Place, names: list[str]) -> Source:
    members, problems = shards.index_all(place, names, CLOUDS)
    suffixes = Counter(member.facts["suffix"] for member in members)
    most = max(suffixes, key=lambda suffix: suffixes[suffix], default=".bin")
    problems += tuple(Problem(m.name, f"not a {most} file, as most are") for m in members if m.facts["suffix"] != most)
    members = [member for member in members if member.facts["suffix"] == most]
    decode = partial(_read_member, most, bin_columns([member.size for member in members]))
    points = LAS_CLASSES if most in (".las", ".laz") else None
    return source_of_shards(Source, place.root, members, problems, decode, point_classes=points)


def _read_member(suffix: str, columns: int | None, file: Window, name: str) -> Cloud:
    with tempfile.NamedTemporaryFile(suffix=suffix) as copy:  # open3d wants a file of its own
        copy.write(file.read_bytes())
        copy.flush()
        return index_points(read_cloud(copy.name, columns, name))
