"""KITTI and SemanticKITTI: sweeps in ``velodyne`` folders, point classes in ``.label`` files beside them.

* KITTI's object benchmark: ``training/velodyne/*.bin`` and ``testing/velodyne/*.bin``, its test split.
* KITTI's recordings: ``DATE/DRIVE/velodyne_points/data/*.bin``.
* SemanticKITTI (Behley et al., ICCV 2019, arXiv 1904.01416): ``sequences/NN/velodyne/*.bin`` with
  ``sequences/NN/labels/*.label``, an unsigned 32-bit integer a point whose lower 16 bits are the class. As its
  benchmark does, moving and standing things are one class, and rare or unclear ones count as unlabelled. Sequences 00
  to 07, 09 and 10 are for training, 08 for validation, 11 to 21 for testing.

All sweeps of a recording (sequence, drive) stay in one split. Frames are the sensor's: x forward, y left, z up.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np

from unmask.core.data.splits import TEST, TRAIN, VAL
from unmask.pointcloud.data.readers import Cloud, bin_rows, clean, read_numbers

# The benchmark's 19 classes and the numbers in the files that mean them (semantic-kitti.yaml of its interface).
_CLASSES: dict[str, tuple[int, ...]] = {
    "car": (10, 252), "bicycle": (11,), "motorcycle": (15,), "truck": (18, 258),
    "other vehicle": (13, 16, 20, 256, 257, 259),
    "person": (30, 254), "bicyclist": (31, 253), "motorcyclist": (32, 255),
    "road": (40, 60), "parking": (44,), "sidewalk": (48,), "other ground": (49,),
    "building": (50,), "fence": (51,), "vegetation": (70,), "trunk": (71,), "terrain": (72,), "pole": (80,),
    "traffic sign": (81,),
}  # fmt: skip
POINT_CLASSES = list(_CLASSES)
_INDEX = np.full(1 << 16, -1, np.int64)
for _i, _numbers in enumerate(_CLASSES.values()):
    _INDEX[list(_numbers)] = _i

AnyPath = TypeVar("AnyPath", Path, PurePosixPath)
_SWEEP = re.compile(r"(?:(?P<recording>.*)/)?velodyne(?:_points/data)?/[^/]+\.bin$", re.IGNORECASE)
_SEQUENCE = re.compile(r"(?:.*/)?sequences/(\d\d)$")


@dataclass(frozen=True)
class Layout:
    """What the paths of KITTI's sweeps below a folder say about them."""

    names: list[str]
    groups: list[str] | None  # the recording of each; None for the object benchmark, which does not tell
    given: list[int | None] | None  # the official split of each
    labelled: bool  # whether any sweep has a .label file


def layout_of(names: Sequence[str], files: set[str]) -> Layout | None:
    """The sweeps among the .bin files of a folder, or None where it is not laid out like KITTI.

    Args:
        names: paths of the .bin files below the folder.
        files: paths of all files below it.
    """
    recording_of = {name: match["recording"] or "" for name in names if (match := _SWEEP.match(name))}
    if not recording_of:
        return None
    sweeps, recordings = list(recording_of), list(recording_of.values())
    given = [_official(recording) for recording in recordings]
    benchmark = all(PurePosixPath(recording).name in ("training", "testing") for recording in recordings)
    labelled = any(str(_label_file(PurePosixPath(name))) in files for name in sweeps)
    return Layout(sweeps, None if benchmark else recordings, given if any(given) else None, labelled)


def _official(recording: str) -> int | None:
    if PurePosixPath(recording).name == "testing":
        return TEST
    sequence = _SEQUENCE.match(recording)
    if sequence is None or int(sequence[1]) > 21:
        return None
    number = int(sequence[1])
    return VAL if number == 8 else TEST if number > 10 else TRAIN


def _label_file(sweep: AnyPath) -> AnyPath:
    return sweep.parents[1] / "labels" / f"{sweep.stem}.label"


def read_sweep(labelled: bool, path: Path, name: str) -> Cloud:
    """A sweep, with its point classes as indices into `POINT_CLASSES` and -1 where they are wanted.

    Those of the test sequences have no .label file, and then no labels.
    """
    rows, labels = bin_rows(path, 4), None
    if labelled and (file := _label_file(path)).exists():
        labels = _INDEX[read_numbers(file, file.name, "<u4", len(rows)) & 0xFFFF]
    return clean(rows[:, :3], {"intensity": rows[:, 3:4]}, labels)
