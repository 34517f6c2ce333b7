"""Airborne laser scans with a class per point, cut into square tiles: the files of `lidar`.

========  ======================================  =======  =====  ===========================
scan      what it shows                           tile     tiles  classes
========  ======================================  =======  =====  ===========================
france    fields, a ditch with trees, a bridge    8 m      22     all
nebraska  houses under trees                      3.048 m  24     all
oregon    a meadow, a river with trees, a bridge  20 m     96     ground; the rest has none
========  ======================================  =======  =====  ===========================

The scans differ in density, from 114 to about 3 points per square metre, so the tile's side is chosen for each: a tile
has about a thousand points. Tiles with fewer than 256 are left out. Coordinates are metres (the American files are in
feet) from the middle of the tile's square and from its lowest point.

Splits are areas: the rows of tiles at one end of a scan are val, those at the other end test, and what lies between is
train. Only at these two lines do tiles of different splits touch.

Classes are the files' own (ASPRS codes), with their mistakes, under four names; what a file calls unclassified is -1.
Low and medium vegetation are one class, and the French bridge is a structure like the American houses. Points classed
as noise or artefacts (codes 7, 18 and 65) are left out. Intensity is divided by the file's 99th percentile and cut off
at 1, since every scanner has its own scale.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from unmask.core.data.carriers import CarrierError
from unmask.core.data.splits import TEST, TRAIN, VAL

POINT_CLASSES = ("ground", "low vegetation", "high vegetation", "structure")
_CLASS_OF = {2: 0, 3: 1, 4: 1, 5: 2, 6: 3, 17: 3}
_NOISE = (7, 18, 65)
_FEWEST = 256
_VAL_SHARE, _TEST_SHARE = 0.1, 0.2
_FOOT, _SURVEY_FOOT = 0.3048, 1200 / 3937


@dataclass(frozen=True)
class Scan:
    """A file of the archive."""

    name: str  # what its tiles are called
    path: str  # in the archive
    unit: float  # of its coordinates in metres, from its coordinate system
    side: float  # of a tile, in metres
    axis: int  # 0 or 1, x or y: along which its split areas lie


_FOLDER = "laspy-2.7.0/tests/data"
SCANS = (
    Scan("france", f"{_FOLDER}/append-bug.laz", 1.0, 8.0, axis=1),
    Scan("nebraska", f"{_FOLDER}/file_with_both_wkt_and_geotiff_vlrs.las", _SURVEY_FOOT, 10 * _SURVEY_FOOT, axis=0),
    Scan("oregon", f"{_FOLDER}/autzen_trim.laz", _FOOT, 20.0, axis=0),
)


@dataclass(frozen=True)
class Tile:
    """A square of a scan."""

    name: str  # the scan's, and the tile's column and row in it
    xyz: Float[np.ndarray, "points 3"]  # metres from the middle of the square and from the lowest point
    intensity: Float[np.ndarray, "points 1"]  # 0..1
    labels: Int[np.ndarray, "points"]  # in POINT_CLASSES, or -1
    code: int  # its split


def tiles(scan: Scan, content: bytes) -> Iterator[Tile]:
    """The tiles of a file.

    Args:
        scan: what is known of it.
        content: the .las or .laz file.

    Raises:
        CarrierError: it cannot be read.
    """
    xyz, intensity, labels = _read(scan, content)
    corner = xyz[:, :2].min(0)
    squares = (xyz[:, :2] - corner) // scan.side  # column and row
    cells, tile_of, sizes = np.unique(squares, axis=0, return_inverse=True, return_counts=True)
    members = np.split(tile_of.argsort(kind="stable"), sizes.cumsum()[:-1])
    kept = np.flatnonzero(sizes >= _FEWEST)
    for tile, code in zip(kept, areas(cells[kept, scan.axis]), strict=True):
        rows, cell = members[tile], cells[tile]
        origin = [*(corner + (cell + 0.5) * scan.side), xyz[rows, 2].min()]
        name = f"{scan.name}/{cell[0]:.0f}-{cell[1]:.0f}"
        yield Tile(name, xyz[rows] - origin, intensity[rows], labels[rows], int(code))


def areas(rows: Float[np.ndarray, "tiles"]) -> Int[np.ndarray, "tiles"]:
    """Split codes of tiles by the row they lie in: whole rows from the lower end for val, from the upper end for test.

    The fewest rows that hold a tenth of the tiles (rounded) for val, and a fifth for test.
    """
    order = np.sort(rows)
    val_to = order[max(1, round(len(rows) * _VAL_SHARE)) - 1]
    test_from = order[-max(1, round(len(rows) * _TEST_SHARE))]
    return np.where(rows >= test_from, TEST, np.where(rows <= val_to, VAL, TRAIN))


def _read(
    scan: Scan, content: bytes
) -> tuple[Float[np.ndarray, "points 3"], Float[np.ndarray, "points 1"], Int[np.ndarray, "points"]]:
    """Positions in metres, scaled intensities and class indices, without noise."""
    import laspy

    try:
        with warnings.catch_warnings(action="ignore"):
            file = laspy.read(io.BytesIO(content))
    except (laspy.LaspyException, ValueError, RuntimeError) as error:
        raise CarrierError(f"{scan.path} cannot be read ({error}). Delete the archive and fetch it again.") from error
    codes = np.asarray(file.classification)
    good = ~np.isin(codes, _NOISE)
    table = np.full(256, -1, np.int64)
    table[list(_CLASS_OF)] = list(_CLASS_OF.values())
    intensity = np.asarray(file.intensity, np.float64)[good, None]
    scaled = np.minimum(intensity / max(np.percentile(intensity, 99), 1), 1)
    return np.asarray(file.xyz)[good] * scan.unit, scaled, table[codes[good]]
