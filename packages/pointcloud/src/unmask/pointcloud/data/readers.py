"""Point-cloud files to arrays: .pcd, .ply, .xyz, .npy, .las, .laz and .bin.

* Positions are float64 metres, because georeferenced files need it (float32 steps are 0.5 m at a northing of 5,000 km).
* Points with a coordinate that is NaN, infinite or beyond 1e18 m are removed and counted. Points that occur several
  times stay: density is data. A cloud of fewer than two distinct points is corrupt.
* ``intensity``: 8- and 16-bit integers, those of LAS files too, are scaled to 0..1 by their type's largest value;
  floating point is taken as it is (KITTI writes 0..1, nuScenes 0..255). ``color`` is in 0..1, whatever the file uses.
* Of a mesh (.ply) the vertices are the points.
* .npy arrays, never pickled, and .xyz text hold a point a row: x, y, z, then intensity, then columns that are not read.
* .bin files are rows of little-endian float32: x, y, z, intensity (KITTI) and, in files of five columns (nuScenes,
  ``.pcd.bin``), a ring number.
* LAS files hold a class per point (``classification``).
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from unmask.core.data.kinds import CorruptSampleError, naming
from unmask.core.errors import UnmaskError

SUFFIXES = (".pcd", ".ply", ".xyz", ".npy", ".las", ".laz", ".bin")
_FARTHEST = 1e18  # metres: what is farther is no position, and its square is beyond float32
WIDTHS = {"intensity": 1, "time": 1, "color": 3, "normal": 3}  # channels of each feature


@dataclass(frozen=True)
class Cloud:
    """What one file holds.

    Args:
        xyz: positions in metres.
        features: by name, as far as the file has them: ``intensity``, ``time`` (seconds before the key frame),
            ``color`` (0..1) and ``normal``.
        labels: the class of each point as the file writes it, or None.
        dropped: points that were removed because a coordinate was NaN, infinite or beyond 1e18 m.
    """

    xyz: Float[np.ndarray, "points 3"]
    features: dict[str, Float[np.ndarray, "points k"]] = field(default_factory=dict)
    labels: Int[np.ndarray, "points"] | None = None
    dropped: int = 0


def read_cloud(path: str | Path, columns: int | None = None, name: str | None = None) -> Cloud:
    """Read one point-cloud file.

    Args:
        path: the file; its suffix says what it is.
        columns: of a .bin file, 4 or 5. None: 5 if it is called ``.pcd.bin``, else what its size is a multiple of; if
            of both, 5 if all values of the fifth column could be ring numbers.
        name: what to call the file in errors; its path by default.

    Raises:
        CorruptSampleError: not such a file, damaged, or of fewer than two distinct points.
        UnmaskError: no reader for this suffix, or the package that reads it is not installed.
        SourceError: the file cannot be read for a reason that lies in the storage.
    """
    path = Path(path)
    name = name or str(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UnmaskError(f"{name}: no reader for {suffix or 'files without a suffix'}; expected {' '.join(SUFFIXES)}")
    with naming(name):
        with path.open("rb") as file:
            problem = head_problem(file.read(HEAD), suffix)
        if problem:
            raise CorruptSampleError(problem)
        if suffix != ".bin":
            return clean(*_READERS[suffix](path))
        rows = bin_rows(path, columns)
        return clean(rows[:, :3], {"intensity": rows[:, 3:4]})


def clean(
    xyz: Shaped[np.ndarray, "points 3"],
    features: dict[str, np.ndarray] | None = None,
    labels: Int[np.ndarray, "points"] | None = None,
) -> Cloud:
    """A cloud of the points whose coordinates are finite and no farther than 1e18 m.

    Raises:
        CorruptSampleError: fewer than two distinct points are left.
    """
    xyz = np.asarray(xyz, np.float64)
    good = (np.abs(xyz) <= _FARTHEST).all(1)  # false for NaN, too
    dropped = int(len(xyz) - good.sum())
    if dropped:
        xyz, labels = xyz[good], None if labels is None else labels[good]
        features = {key: values[good] for key, values in (features or {}).items()}
    if len(xyz) < 2 or not (xyz != xyz[0]).any():
        left = f" after {dropped} with NaN or infinite coordinates were removed" if dropped else ""
        what = "no points" if len(xyz) == 0 else "fewer than two distinct points"
        raise CorruptSampleError(f"{what}{left}")
    return Cloud(xyz, features or {}, labels, dropped)


def head_problem(head: bytes, suffix: str) -> str | None:
    """Why a file with these first `HEAD` bytes cannot be a point cloud; None where it may be one."""
    if not head:
        return "empty file"
    if suffix == ".xyz":
        return "not a text file" if b"\0" in head else None
    if suffix in _BEGINS and not _BEGINS[suffix].match(head):
        return f"not a {suffix} file (wrong first bytes)"
    return None


HEAD = 512  # bytes that `head_problem` looks at
_BEGINS = {
    ".pcd": re.compile(rb"(?:#[^\n]*\n|\s)*(?:VERSION|FIELDS|COLUMNS)\b", re.IGNORECASE),
    ".ply": re.compile(rb"ply\s"),
    ".npy": re.compile(rb"\x93NUMPY"),
    ".las": re.compile(rb"LASF"),
    ".laz": re.compile(rb"LASF"),
}


def suffix_of(head: bytes) -> str:
    """The suffix of the kind of cloud that begins with these `HEAD` bytes; .bin files may begin with anything."""
    is_text = all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head)
    known = (suffix for suffix, begin in _BEGINS.items() if begin.match(head))
    return next(known, ".xyz" if is_text else ".bin")


Raw = tuple[np.ndarray, dict[str, np.ndarray], np.ndarray | None]  # positions, features, labels


def bin_rows(path: Path, columns: int | None = None) -> Float[np.ndarray, "points columns"]:
    """The rows of a .bin file, without any check of what is in them; see `read_cloud`.

    Raises:
        CorruptSampleError: the size is no multiple of such rows.
        OSError: the file cannot be read.
    """
    data = path.read_bytes()
    if columns is None:
        columns = 5 if has_rings(path.name) else bin_columns([len(data)])
    if columns is None and len(data) % 80 == 0:
        rings = np.frombuffer(data, "<f4").reshape(-1, 5)[:, 4]
        columns = 5 if ((rings >= 0) & (rings < 256) & (rings == np.floor(rings))).all() else 4
    columns = columns or 4
    problem = size_problem(len(data), columns)
    if problem:
        raise CorruptSampleError(problem)
    return np.frombuffer(data, "<f4").reshape(-1, columns)


def read_numbers(path: Path, name: str, dtype: str, points: int) -> Int[np.ndarray, "points"]:
    """The class numbers of a file that holds one per point, as integers of this type.

    Raises:
        CorruptSampleError: it holds more or fewer; the message calls it `name`.
        OSError: it cannot be read.
    """
    labels = path.stat().st_size / np.dtype(dtype).itemsize
    if labels != points:
        raise CorruptSampleError(f"{name} has {labels:g} labels for {points} points")
    return np.fromfile(path, dtype)


def has_rings(name: str) -> bool:
    """Whether a .bin file's name says that its rows have a ring number."""
    return name.lower().endswith(".pcd.bin")


def size_problem(size: int, columns: int | None) -> str | None:
    """What is wrong with the size in bytes of a .bin file of 4 or 5 columns (None: either)."""
    if not size:
        return "empty file"
    if any(size % (4 * n) == 0 for n in ((columns,) if columns else (4, 5))):
        return None
    return f"{size} bytes are no whole number of rows of {columns or '4 or 5'} float32 (cut off?)"


def bin_columns(sizes: Sequence[int]) -> int | None:
    """Columns of the .bin files of one data set, from their sizes in bytes; None where the sizes fit both equally."""
    four, five = (sum(size % (4 * n) == 0 for size in sizes) for n in (4, 5))
    return None if four == five else 4 if four > five else 5


def _read_npy(path: Path) -> Raw:
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a wrong header cannot ask for memory
    except (ValueError, EOFError) as error:
        if "Python objects" in str(error):
            raise CorruptSampleError("holds pickled Python objects, which are never read; expected numbers") from error
        raise CorruptSampleError(f"damaged ({error})") from error
    if not isinstance(table, np.ndarray) or table.dtype.kind not in "fiu":
        kind = table.dtype if isinstance(table, np.ndarray) else "several arrays"
        raise CorruptSampleError(f"holds {kind}; expected one array of numbers")
    return _columns(table)


def _read_xyz(path: Path) -> Raw:
    text = path.read_bytes().replace(b",", b" ").replace(b";", b" ")
    if not text.strip():
        raise CorruptSampleError("no points")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a file of comments only, which is told below
            return _columns(np.loadtxt(io.BytesIO(text), np.float64, comments=("#", "//"), ndmin=2))
    except ValueError as error:
        if isinstance(error, CorruptSampleError):
            raise
        raise CorruptSampleError(f"not rows of numbers ({str(error).splitlines()[0]})") from error


def _columns(table: np.ndarray) -> Raw:
    if table.ndim != 2 or table.shape[1] < 3:
        shape = list(table.shape)
        raise CorruptSampleError(f"has shape {shape}; expected [points, 3 or more]: x, y, z, then intensity")
    features = {"intensity": _unit(np.asarray(table[:, 3:4]))} if table.shape[1] > 3 else {}
    return np.asarray(table[:, :3], np.float64), features, None


def _unit(values: np.ndarray) -> Float[np.ndarray, "points k"]:
    """8- and 16-bit integers as 0..1 by their type's largest value; everything else as it is."""
    scale = np.iinfo(values.dtype).max if values.dtype in (np.uint8, np.uint16) else 1
    return (values / scale).astype(np.float32)


def _colour(values: np.ndarray) -> Float[np.ndarray, "points 3"]:
    """Colours in 0..1: from 0..1 (floating point), 0..255, or 0..65535 where there is a value above 255."""
    most = values.max(initial=0)
    whole = values.dtype.kind in "iu"
    scale = 65535 if most > 255 else 255 if whole or most > 1 else 1
    return (values / scale).astype(np.float32)


def _read_open3d(path: Path) -> Raw:
    if path.suffix.lower() == ".pcd":
        _check_pcd(path)
    open3d = _open3d()
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):  # where open3d warns of a damaged file and then returns what it has
            point = open3d.t.io.read_point_cloud(str(path)).point
            values = {str(key).lower(): np.array(value.numpy()) for key, value in point.items()}
    except RuntimeError as error:
        raise CorruptSampleError(f"damaged ({_message(str(error))})") from error
    if "WARNING" in output.getvalue():
        raise CorruptSampleError(f"damaged ({_message(output.getvalue())})")
    if "positions" not in values:
        raise CorruptSampleError("no points")
    intensities = [values[key] for key in _INTENSITIES if key in values]
    features = {"intensity": _unit(intensities[0].reshape(-1, 1))} if intensities else {}
    if "colors" in values:
        features["color"] = _colour(values["colors"])
    if "normals" in values:
        features["normal"] = values["normals"].astype(np.float32)
    return values["positions"], features, None


_INTENSITIES = ("intensity", "intensities", "scalar_intensity", "reflectance")  # names in .pcd and .ply files


def _open3d() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a missing GPU
            import open3d
    except ImportError as error:
        raise UnmaskError(
            f".pcd and .ply files are read with open3d, which cannot be imported ({error}). It is made for Python up "
            "to 3.12: pip install open3d, or convert the files to .npy."
        ) from error
    return open3d


def _message(text: str) -> str:
    """open3d's message without colours, line ends and its own source paths."""
    text = re.sub(r"\x1b\[[0-9;]*m|\[Open3D \w+\]|\([^()]*\([^()]*\)[^()]*\)|/\S+", " ", text)
    return " ".join(text.split())[:200].strip(" .:") or "open3d cannot read it"


def _check_pcd(path: Path) -> None:
    """Refuse text .pcd files of too few or too short lines: open3d fills up with whatever is in memory."""
    head, is_text, body = path.read_bytes().partition(b"DATA ascii")
    if not is_text:
        return
    entries = {words[0].upper(): words[1:] for words in map(bytes.split, head.splitlines()) if words}
    width = sum(map(int, entries.get(b"COUNT", []))) or len(entries.get(b"FIELDS", []))
    points = int(entries.get(b"POINTS", [b"0"])[0])
    lines = [line for line in body.splitlines() if line.strip()]
    short = sum(len(line.split()) < width for line in lines[:points])
    if len(lines) < points or short:
        raise CorruptSampleError(f"damaged ({len(lines) - short} whole lines of points, the header says {points})")


def _read_las(path: Path) -> Raw:
    import laspy

    try:
        file = laspy.read(path)
        raw = {key: np.asarray(file[key]) for key in file.point_format.dimension_names}
        xyz = np.asarray(file.xyz, np.float64)
    except OSError:
        raise
    except Exception as error:  # laspy and its decompressor raise whatever they like on damaged files
        raise CorruptSampleError(f"damaged ({str(error)[:200] or type(error).__name__})") from error
    if len(xyz) != file.header.point_count:
        raise CorruptSampleError(f"damaged ({len(xyz)} points, the header says {file.header.point_count})")
    features = {"intensity": _unit(raw["intensity"].reshape(-1, 1))}
    if "red" in raw:
        features["color"] = _colour(np.stack([raw["red"], raw["green"], raw["blue"]], 1))
    return xyz, features, raw["classification"].astype(np.int64)


_READERS: dict[str, Callable[[Path], Raw]] = {
    ".pcd": _read_open3d,
    ".ply": _read_open3d,
    ".xyz": _read_xyz,
    ".npy": _read_npy,
    ".las": _read_las,
    ".laz": _read_las,
}
