"""Every reader against a file with known content, and every way in which a file can be wrong."""

from __future__ import annotations

import builtins
import warnings
from pathlib import Path

import laspy
import numpy as np
import pytest
import torch

from unmask.core.data.kinds import CorruptSampleError, SourceError
from unmask.core.errors import UnmaskError
from unmask.pointcloud.data import readers
from unmask.pointcloud.data.las import LAS_CLASSES, index_points
from unmask.pointcloud.data.readers import Cloud, head_problem, read_cloud, suffix_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import open3d

XYZ = np.array([[1.5, 2.0, 3.0], [4.0, 5.0, 6.25], [4.0, 5.0, 6.25], [-1.0, 0.0, 8.0]])  # one point is there twice
INTENSITY = np.array([[0.5], [0.25], [0.75], [0.0]], np.float32)
NORTH = np.array([448_262.25, 5_411_932.125, 100.5])  # metres in a national grid: float32 would be off by 0.25 m

PCD = """# .PCD v0.7 - Point Cloud Data file format
VERSION 0.7
FIELDS x y z intensity
SIZE 4 4 4 4
TYPE F F F F
COUNT 1 1 1 1
WIDTH 3
HEIGHT 1
VIEWPOINT 0 0 0 1 0 0 0
POINTS 3
DATA ascii
"""
PLY = """ply
format ascii 1.0
comment by hand
element vertex 3
property double x
property double y
property double z
property uchar red
property uchar green
property uchar blue
property uchar intensity
property float nx
property float ny
property float nz
element face 1
property list uchar int vertex_indices
end_header
448262.25 5411932.125 100.5 255 0 51 51 0 0 1
1 2 3 0 255 0 0 0 1 0
4 5 6 0 0 255 255 1 0 0
3 0 1 2
"""


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def las_file(path: Path, xyz: np.ndarray, *, point_format: int = 3, **dimensions: np.ndarray) -> Path:
    header = laspy.LasHeader(point_format=point_format, version="1.2" if point_format < 6 else "1.4")
    header.scales, header.offsets = np.full(3, 0.001), np.floor(xyz.min(0))
    file = laspy.LasData(header)
    file.x, file.y, file.z = xyz.T
    for name, values in dimensions.items():
        file[name] = values
    path.parent.mkdir(parents=True, exist_ok=True)
    file.write(path)
    return path


# What is in a file comes out


@pytest.mark.parametrize("how", [{"write_ascii": True}, {"write_ascii": False}, {"compressed": True}])
@pytest.mark.parametrize("suffix", ["pcd", "ply"])
def test_open3d_files_keep_positions_and_intensity(tmp_path, suffix, how):
    cloud = open3d.t.geometry.PointCloud(open3d.core.Tensor(XYZ.astype(np.float32)))
    cloud.point["intensity"] = open3d.core.Tensor(INTENSITY)
    place = str(tmp_path / f"cloud.{suffix}")
    assert open3d.t.io.write_point_cloud(place, cloud, **how)
    found = read_cloud(place)
    assert found.xyz.dtype == np.float64 and found.dropped == 0 and found.labels is None
    np.testing.assert_array_equal(found.xyz, XYZ)  # the point that is there twice stays twice
    np.testing.assert_array_equal(found.features["intensity"], INTENSITY)


def test_pcd_by_hand_loses_nan_points_and_counts_them(tmp_path):
    place = write(tmp_path / "a.pcd", PCD + "1 2 3 0.5\nnan nan nan 0\n4 5 6 0.25\n")
    found = read_cloud(place)
    assert found.xyz.tolist() == [[1, 2, 3], [4, 5, 6]] and found.dropped == 1
    assert found.features["intensity"].tolist() == [[0.5], [0.25]]


def test_ply_vertices_colours_normals_and_digits(tmp_path):
    found = read_cloud(write(tmp_path / "a.ply", PLY))
    assert found.xyz[0].tolist() == NORTH.tolist() and len(found.xyz) == 3
    np.testing.assert_allclose(found.features["color"], [[1, 0, 0.2], [0, 1, 0], [0, 0, 1]])
    np.testing.assert_allclose(found.features["intensity"], [[0.2], [0], [1]])  # 8-bit integers: 51 / 255
    assert found.features["normal"].tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("separator", [" ", "\t", ", ", ";"])
def test_xyz_text(tmp_path, separator):
    rows = [[*NORTH, 7], [1, 2, 3, 4]]
    text = "# x y z i\n" + "\n".join(separator.join(map(repr, map(float, row))) for row in rows)
    found = read_cloud(write(tmp_path / "a.xyz", text))
    assert found.xyz.tolist() == [NORTH.tolist(), [1, 2, 3]] and found.features["intensity"].tolist() == [[7], [4]]
    assert read_cloud(write(tmp_path / "b.xyz", "1 2 3\n4 5 6")).features == {}


def test_npy_columns(tmp_path):
    table = np.arange(24, dtype=np.float64).reshape(4, 6)
    for columns in (3, 4, 6):
        np.save(tmp_path / "a.npy", table[:, :columns])
        found = read_cloud(tmp_path / "a.npy")
        np.testing.assert_array_equal(found.xyz, table[:, :3])
        assert list(found.features) == (["intensity"] if columns > 3 else [])
    np.testing.assert_array_equal(found.features["intensity"], table[:, 3:4])
    np.save(tmp_path / "i.npy", np.array([[1, 2, 3, 65535], [4, 5, 6, 0]], np.uint16))
    assert read_cloud(tmp_path / "i.npy").features["intensity"].tolist() == [[1.0], [0.0]]


@pytest.mark.parametrize("suffix", ["las", "laz"])
def test_las_is_georeferenced_with_classes_and_scaled_intensity(tmp_path, suffix):
    xyz = NORTH + np.array([[0, 0, 0], [10.5, 3.25, -1], [1, 1, 1]])
    place = las_file(
        tmp_path / f"tile.{suffix}",
        xyz,
        intensity=np.array([65535, 0, 13107], np.uint16),
        classification=np.array([2, 6, 1], np.uint8),
        red=np.array([65535, 0, 0], np.uint16),
        green=np.array([0, 65535, 0], np.uint16),
        blue=np.array([0, 0, 13107], np.uint16),
    )
    found = read_cloud(place)
    np.testing.assert_allclose(found.xyz, xyz, atol=1e-6, rtol=0)
    np.testing.assert_allclose(found.features["intensity"], [[1], [0], [0.2]], atol=1e-6)
    np.testing.assert_allclose(found.features["color"], [[1, 0, 0], [0, 1, 0], [0, 0, 0.2]], atol=1e-6)
    assert found.labels.tolist() == [2, 6, 1]
    known = index_points(found).labels.tolist()
    assert [LAS_CLASSES[i] for i in known[:2]] == ["ground", "building"] and known[2] == -1  # 1 is unclassified


def test_las_with_8_bit_colours_and_own_classes(tmp_path):
    whole = np.array([255, 0], np.uint16)
    place = las_file(
        tmp_path / "a.las",
        XYZ[:2],
        point_format=7,
        red=whole,
        green=whole,
        blue=whole,
        classification=np.array([200, 30], np.uint8),
    )
    found = read_cloud(place)
    assert found.features["color"].tolist() == [[1, 1, 1], [0, 0, 0]]
    first, second = index_points(found).labels.tolist()
    assert LAS_CLASSES[first] == "class 200" and second == -1  # 30 is reserved


def test_bin_of_kitti_and_nuscenes(tmp_path):
    rows = np.arange(80, dtype=np.float32).reshape(-1, 5)  # 16 rows of 5, or 20 of 4
    rows[:, 4] = np.arange(16) % 32  # rings
    content = rows.tobytes()
    for name, columns in (("a.pcd.bin", None), ("a.bin", None), ("a.bin", 5)):
        found = read_cloud(write(tmp_path / name, content), columns)
        np.testing.assert_array_equal(found.xyz, rows[:, :3])
        np.testing.assert_array_equal(found.features["intensity"], rows[:, 3:4])
    assert len(read_cloud(write(tmp_path / "a.bin", content), 4).xyz) == 20
    rows[:, 4] += 0.5
    assert len(read_cloud(write(tmp_path / "a.bin", rows.tobytes())).xyz) == 20  # no rings: four columns
    assert len(read_cloud(write(tmp_path / "a.bin", rows[:15].tobytes())).xyz) == 15  # only five columns fit
    assert readers.bin_columns([16, 32, 80]) == 4 and readers.bin_columns([20, 80]) == 5
    assert readers.bin_columns([80]) is None


def test_points_that_are_nowhere_are_dropped_with_all_that_belongs_to_them():
    xyz = np.array([[0, 0, 0], [np.nan, 0, 0], [1, np.inf, 0], [1e30, 0, 0], [1, 2, 3]])
    found = readers.clean(xyz, {"intensity": np.arange(5.0)[:, None]}, np.arange(5))
    assert found.xyz.tolist() == [[0, 0, 0], [1, 2, 3]] and found.dropped == 3
    assert found.features["intensity"].tolist() == [[0], [4]] and found.labels.tolist() == [0, 4]


@pytest.mark.parametrize(
    ("head", "suffix"),
    [
        (b"\x93NUMPY\x01", ".npy"),
        (b"LASF\0\0", ".las"),
        (b"ply\nformat", ".ply"),
        (PCD.encode(), ".pcd"),
        (b"1.0 2.0 3.0\n", ".xyz"),
        (np.float32([1, 2, 3, 4]).tobytes(), ".bin"),
    ],
)
def test_the_kind_is_known_from_the_first_bytes(head, suffix):
    assert suffix_of(head) == suffix


# What is wrong is said


def pcd_of(rows: int, kind: str, content: bytes) -> bytes:
    head = PCD.replace("WIDTH 3", f"WIDTH {rows}").replace("POINTS 3", f"POINTS {rows}").replace("ascii", kind)
    return head.encode() + content


FLOATS = np.arange(12, dtype=np.float32).tobytes()
WRONG = {
    "empty.pcd": (b"", "empty file"),
    "binary.pcd": (b"\0\1\2" * 50, "not a .pcd file"),
    "cut.pcd": (PCD + "1 2 3 0.5\n4 5", r"1 whole lines of points, the header says 3"),
    "short line.pcd": (PCD + "1 2 3 0.5\n4 5\n7 8 9 1\n", "2 whole lines"),
    "cut2.pcd": (pcd_of(3, "binary", FLOATS[:-4]), "damaged"),
    "huge.pcd": (pcd_of(4_000_000_000, "binary", FLOATS), "damaged"),
    "none.pcd": (pcd_of(0, "ascii", b""), "no points|damaged"),
    "cut.ply": (PLY[:-60], "damaged"),
    "text.ply": ("hello", "not a .ply file"),
    "header.ply": ("ply\nnonsense", "damaged"),
    "huge.ply": (PLY.replace("vertex 3", "vertex 3000000000"), "damaged"),
    "words.xyz": ("1 2 3\nfour five six\n", "not rows of numbers"),
    "ragged.xyz": ("1 2 3\n4 5\n", "not rows of numbers"),
    "flat.xyz": ("1 2\n3 4\n", r"shape \[2, 2\]; expected \[points, 3 or more\]"),
    "blank.xyz": (" \n ", "no points"),
    "comment.xyz": ("# nothing\n", r"shape \[0"),
    "text.npy": ("hello", "not a .npy file"),
    "text.las": ("hello, this is no LAS file", "not a .las file"),
    "zeros.las": (b"LASF" + b"\0" * 500, "damaged"),
    "cut.bin": (FLOATS[:-3], "45 bytes are no whole number of rows of 4 float32"),
    "cut.pcd.bin": (FLOATS, "48 bytes are no whole number of rows of 5 float32"),
    "empty.bin": (b"", "empty file"),
    "one.bin": (FLOATS[:16], "fewer than two distinct points"),
    "same.bin": (FLOATS[:16] * 3, "fewer than two distinct points"),
    "nan.bin": (np.full(8, np.nan, np.float32).tobytes(), "no points after 2 with NaN"),
}


@pytest.mark.parametrize("name", WRONG)
def test_corrupt_files_are_named_with_what_is_wrong(tmp_path, name, capfd):
    content, reason = WRONG[name]
    place = write(tmp_path / name, content)
    with pytest.raises(CorruptSampleError, match=reason) as caught:
        read_cloud(place)
    assert str(caught.value).startswith(f"{place}: ") and "\n" not in str(caught.value)
    assert capfd.readouterr().out == ""  # open3d's warnings are not left on the screen
    with pytest.raises(CorruptSampleError, match="^my cloud: "):
        read_cloud(place, name="my cloud")


@pytest.mark.parametrize("suffix", ["las", "laz", "npy"])
def test_any_cut_of_a_binary_file_is_found(tmp_path, suffix):
    xyz = np.random.default_rng(0).uniform(0, 100, (50, 3))
    place = tmp_path / f"a.{suffix}"
    np.save(place, xyz) if suffix == "npy" else las_file(place, xyz)
    whole = place.read_bytes()
    assert len(read_cloud(place).xyz) == 50
    for size in (20, 100, 240, len(whole) // 2, len(whole) - 34, len(whole) - 1):
        place.write_bytes(whole[:size])
        with pytest.raises(CorruptSampleError, match="damaged"):
            read_cloud(place)


def test_arrays_that_are_no_clouds(tmp_path):
    for array, reason in (
        (np.array([{}, 1], object), "pickled Python objects, which are never read"),
        (np.zeros((5, 2)), r"shape \[5, 2\]; expected \[points, 3 or more\]: x, y, z, then intensity"),
        (np.zeros((2, 5, 3)), r"shape \[2, 5, 3\]"),
        (np.zeros(9), r"shape \[9\]"),
        (np.zeros((4, 3), complex), "complex128; expected one array of numbers"),
        (np.array([["a", "b", "c"]]), "<U1; expected"),
    ):
        np.save(tmp_path / "a.npy", array, allow_pickle=True)
        with pytest.raises(CorruptSampleError, match=reason):
            read_cloud(tmp_path / "a.npy")


def test_files_that_are_not_there_or_not_clouds(tmp_path, monkeypatch):
    for suffix in readers.SUFFIXES:
        with pytest.raises(CorruptSampleError, match=f"gone{suffix}: No such file"):
            read_cloud(tmp_path / f"gone{suffix}")
    with pytest.raises(UnmaskError, match=r"a.txt: no reader for .txt; expected .pcd .ply"):
        read_cloud(tmp_path / "a.txt")

    write(tmp_path / "a.bin", FLOATS)

    def fails(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fails)
    with pytest.raises(SourceError, match=r"a.bin: Input/output error. Put the storage right"):
        read_cloud(tmp_path / "a.bin")


def test_without_open3d_the_remedy_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name: str, *rest: object, **more: object) -> object:
        if name == "open3d":
            raise ImportError("No module named 'open3d'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UnmaskError, match=r"read with open3d.*No module named.*convert the files to .npy") as caught:
        read_cloud(write(tmp_path / "a.ply", PLY))
    assert not isinstance(caught.value, CorruptSampleError)


def test_first_bytes_tell_what_cannot_be_a_cloud():
    for name, content, expected in (
        ("a.ply", PLY, None),
        ("a.pcd", PCD, None),
        ("b.pcd", "VERSION .7\nFIELDS x y z", None),
        ("a.xyz", "1 2 3", None),
        ("a.bin", FLOATS, None),
        ("c.ply", "", "empty file"),
        ("d.ply", "PK\3\4", "not a .ply file (wrong first bytes)"),
        ("d.pcd", " \n" * 400, "not a .pcd file (wrong first bytes)"),
        ("d.npy", "hello", "not a .npy file (wrong first bytes)"),
        ("d.las", "hello", "not a .las file (wrong first bytes)"),
        ("d.xyz", b"\0\0", "not a text file"),
    ):
        head = content if isinstance(content, bytes) else content.encode()
        assert head_problem(head, Path(name).suffix) == expected, name


def test_clouds_are_plain_values():
    assert Cloud(XYZ).features == {} and Cloud(XYZ).labels is None and Cloud(XYZ).dropped == 0


class Files(torch.utils.data.Dataset):
    """Read where a loader's worker runs, which was divided from a process that has open3d already."""

    def __init__(self, places: list[Path]) -> None:
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> torch.Tensor | str:
        try:
            return torch.from_numpy(read_cloud(self.places[index], name=f"cloud {index}").xyz)
        except CorruptSampleError as error:
            return str(error)


def test_files_for_open3d_are_read_in_workers(tmp_path):
    places = [write(tmp_path / "a.ply", PLY), write(tmp_path / "b.ply", PLY[:-60])]
    places.append(write(tmp_path / "c.pcd", pcd_of(3, "binary", FLOATS)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking a process that has threads
        found = list(torch.utils.data.DataLoader(Files(places), batch_size=None, num_workers=2))
    assert found[0][0].tolist() == NORTH.tolist() and found[2].tolist() == [[0, 1, 2], [4, 5, 6], [8, 9, 10]]
    assert found[1].startswith("cloud 1: damaged")
