"""nuScenes, read from its tables without its development kit: lidar key frames, with earlier sweeps moved along.

A sample is a key frame of the roof lidar (``LIDAR_TOP``). Earlier sweeps of the scene are found through ``prev`` and
moved from their sensor's frame to the vehicle's, to the map's and to the vehicle's frame at the time of the key frame,
in float64 (Caesar et al., CVPR 2020, arXiv 1903.11027). So points are in the ego frame of the key frame: x forward, y
left, z up, on the ground below the rear axle. Loaders of detection frameworks may keep the sensor's frame instead,
whose origin is at the roof: compare before weights go from here to there (not checked). Customs kept from the loaders
that GeoMAE was trained with: a point's ``time`` is the key frame's less its sweep's in seconds; of earlier sweeps,
points closer than 1 m to the sensor in both x and y, which are the vehicle itself, are left out, while the key frame
keeps all its points. At the start of a scene there are fewer earlier sweeps, and then fewer are used.

Point classes come from nuScenes-lidarseg, where its tables are there: ``noise`` counts as unlabelled, and so do the
points of earlier sweeps. The official lists of training and validation scenes are not in the tables and are not used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int64

from unmask.core.data.kinds import SourceError, naming
from unmask.pointcloud.data.readers import Cloud, bin_rows, clean, read_numbers

_CHANNEL = "LIDAR_TOP"
_NEAR = 1.0  # metres
_TABLES = ("sensor", "calibrated_sensor", "sample_data", "ego_pose", "sample", "scene")
_NOISE = "noise"


class Frame(NamedTuple):
    """A key frame: its row among the sweeps, its scene, and the file of its point classes, if it has one."""

    row: int
    scene: str
    labels: str | None


@dataclass(frozen=True)
class Drives:
    """All lidar sweeps of a set, and which of them are key frames. Poses are quaternions (w, x, y, z) and metres."""

    root: Path  # the folder that file names are relative to
    files: list[str]
    times: Int64[np.ndarray, "sweeps"]  # microseconds
    previous: Int64[np.ndarray, "sweeps"]  # the row of the sweep before each, -1 at a scene's start
    mounts: Float64[np.ndarray, "sweeps 7"]  # sensor to vehicle
    poses: Float64[np.ndarray, "sweeps 7"]  # vehicle to map
    frames: list[Frame]  # the key frames, by file name
    point_classes: list[str] | None
    index: Int64[np.ndarray, "256"]  # class index of each number in the files of labels; -1 for noise and unused ones

    @property
    def names(self) -> list[str]:
        """The files of the key frames."""
        return [self.files[frame.row] for frame in self.frames]


def find(root: Path) -> Path | None:
    """The folder of tables that `root` is or holds, or None where there is none.

    Raises:
        SourceError: there are several.
    """
    if (root / "sample_data.json").is_file():
        return root
    folders = sorted(folder for folder in root.glob("v1.0-*") if (folder / "sample_data.json").is_file())
    if len(folders) > 1:
        names = ", ".join(folder.name for folder in folders)
        raise SourceError(f"{root} holds the tables {names}; give one of them, for example {folders[0]}")
    return folders[0] if folders else None


def open_drives(folder: Path) -> Drives:
    """The lidar sweeps that a folder of tables describes.

    Raises:
        SourceError: a table is missing or damaged, or they do not fit together.
    """
    try:
        return _join(folder)
    except KeyError as error:
        raise SourceError(f"{folder}: the tables do not fit together: nothing has the name {error}") from error
    except (TypeError, AttributeError, ValueError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{folder}: the tables are not nuScenes' ({error})") from error


def _join(folder: Path) -> Drives:
    lidars = {row["token"] for row in _table(folder, "sensor") if row["channel"] == _CHANNEL}
    mounts = {row["token"]: _pose(row) for row in _table(folder, "calibrated_sensor", "sensor_token", lidars)}
    sweeps = _table(folder, "sample_data", "calibrated_sensor_token", mounts)
    if not sweeps:
        raise SourceError(f"{folder}: no sweeps of {_CHANNEL} in the tables")
    wanted = {row["ego_pose_token"] for row in sweeps}
    poses = {row["token"]: _pose(row) for row in _table(folder, "ego_pose", "token", wanted)}
    rows = {row["token"]: i for i, row in enumerate(sweeps)}
    samples = {row["token"]: row["scene_token"] for row in _table(folder, "sample")}
    scenes = {row["token"]: row["name"] for row in _table(folder, "scene")}
    labels, point_classes, index = _lidarseg(folder)
    frames = [
        Frame(i, scenes[samples[row["sample_token"]]], labels.get(row["token"]))
        for i, row in sorted(enumerate(sweeps), key=lambda numbered: numbered[1]["filename"])
        if row["is_key_frame"]
    ]
    return Drives(
        folder.parent,
        [row["filename"] for row in sweeps],
        np.array([row["timestamp"] for row in sweeps], np.int64),
        np.array([rows[row["prev"]] if row["prev"] else -1 for row in sweeps], np.int64),
        np.array([mounts[row["calibrated_sensor_token"]] for row in sweeps]),
        np.array([poses[row["ego_pose_token"]] for row in sweeps]),
        frames,
        point_classes,
        index,
    )


def _table(folder: Path, name: str, column: str = "", wanted: Collection[str] = ()) -> list[dict[str, Any]]:
    """The rows of a table, where a column is named only those with a wanted value there.

    The others are forgotten while it is parsed: those of the cameras are most of it.
    """

    def keep(row: dict[str, Any]) -> dict[str, Any] | None:
        return row if not column or row[column] in wanted else None

    path = folder / f"{name}.json"
    try:
        with path.open(encoding="utf-8") as file:
            rows = json.load(file, object_hook=keep)
    except FileNotFoundError as error:
        raise SourceError(f"{folder} has no {path.name}; nuScenes' tables are {', '.join(_TABLES)} (.json)") from error
    except ValueError as error:
        raise SourceError(f"{path}: not json ({error})") from error
    return [row for row in rows if row is not None]


def _pose(row: dict[str, Any]) -> tuple[float, ...]:
    w, x, y, z = map(float, row["rotation"])
    if not 0.99 < math.hypot(w, x, y, z) < 1.01:
        raise ValueError(f"{row['token']} has the rotation {row['rotation']}; expected a unit quaternion w, x, y, z")
    tx, ty, tz = map(float, row["translation"])
    return w, x, y, z, tx, ty, tz


def _lidarseg(folder: Path) -> tuple[dict[str, str], list[str] | None, Int64[np.ndarray, "256"]]:
    """Label files by key frame, class names, and class indices by number in the files."""
    index = np.full(256, -1, np.int64)
    if not (folder / "lidarseg.json").is_file():
        return {}, None, index
    files = {row["sample_data_token"]: row["filename"] for row in _table(folder, "lidarseg")}
    categories = [row for row in _table(folder, "category") if "index" in row and row["name"] != _NOISE]
    categories.sort(key=lambda row: row["index"])
    for i, row in enumerate(categories):
        index[row["index"]] = i
    return files, [row["name"] for row in categories], index


class SweepReader:
    """Reads key frames with earlier sweeps. Holds no open file, so it can go to any number of workers."""

    def __init__(self, drives: Drives, sweeps: int) -> None:
        self.drives, self.sweeps = drives, sweeps

    def __call__(self, index: int) -> Cloud:
        frame = self.drives.frames[index]
        with naming(self.drives.files[frame.row]):
            parts = [self._sweep(row, frame.row) for row in self._earlier(frame.row)]
            xyz, intensity, time = (np.concatenate(columns) for columns in zip(*parts, strict=True))
            labels = self._labels(frame, len(parts[0][0]), len(xyz))
            return clean(xyz, {"intensity": intensity, "time": time}, labels)

    def _earlier(self, key: int) -> list[int]:
        """Rows of the key frame and of the sweeps before it."""
        rows = [key]
        while len(rows) < self.sweeps and self.drives.previous[rows[-1]] >= 0:
            rows.append(int(self.drives.previous[rows[-1]]))
        return rows

    def _sweep(self, row: int, key: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions in the key frame's ego frame, intensities and times of one sweep."""
        drives = self.drives
        with nullcontext() if row == key else naming(f"sweep {drives.files[row]}"):
            points = bin_rows(drives.root / drives.files[row], 5)
        if row != key:
            points = points[(np.abs(points[:, :2]) >= _NEAR).any(1)]
        xyz = move(points[:, :3].astype(np.float64), drives.mounts[row])
        if row != key:
            xyz = move(move(xyz, drives.poses[row]), drives.poses[key], back=True)
        seconds = 1e-6 * float(drives.times[key] - drives.times[row])
        return xyz, points[:, 3:4], np.full((len(points), 1), seconds, np.float32)

    def _labels(self, frame: Frame, own: int, points: int) -> Int64[np.ndarray, "points"] | None:
        """Class indices: those of the key frame's own points, then -1."""
        if self.drives.point_classes is None:
            return None
        labels = np.full(points, -1, np.int64)
        if frame.labels is not None:
            numbers = read_numbers(self.drives.root / frame.labels, frame.labels, "u1", own)
            labels[:own] = self.drives.index[numbers]
        return labels


def move(
    xyz: Float[np.ndarray, "points 3"], pose: Float64[np.ndarray, "7"], back: bool = False
) -> Float64[np.ndarray, "points 3"]:
    """Points out of the frame that has this pose (quaternion w, x, y, z and translation), or `back` into it."""
    from scipy.spatial.transform import Rotation

    rotation = Rotation.from_quat(pose[:4], scalar_first=True)
    return rotation.apply(xyz - pose[4:], inverse=True) if back else rotation.apply(xyz) + pose[4:]
