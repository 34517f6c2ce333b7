"""Where clouds are found, what their places say about classes and splits, and what is said when it goes wrong."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import laspy
import numpy as np
import pytest
import torch

from unmask.core.data import splits
from unmask.core.data.kinds import CorruptSampleError, SourceError
from unmask.core.errors import UnmaskError
from unmask.core.randomness import stable_id
from unmask.pointcloud.data import kitti
from unmask.pointcloud.data.las import LAS_CLASSES
from unmask.pointcloud.data.sources import Source, open_source


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))


def points(seed: int, n: int = 20, columns: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (n, columns)).astype(np.float32)


def npy(path: Path, seed: int, n: int = 20) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, points(seed, n))
    return path


def binary(path: Path, seed: int, n: int = 20, columns: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(points(seed, n, columns).tobytes())
    return path


def zoo(root: Path, n: int = 10) -> Path:
    for label, name in enumerate(("ant", "bee", "cat")):
        for i in range(n):
            npy(root / name / f"{i}.npy", 100 * label + i)
    return root


def opened(root: Path, corrupt: str = "skip") -> Source:
    return open_source(str(root), corrupt)


def by_split(source: Source, share: float = 0.2) -> dict[str, list[str]]:
    codes = source.splits(share)
    return {
        split: [source.names[i] for i in (codes == code).nonzero()[:, 0].tolist()]
        for split, code in splits.SPLITS.items()
    }


# Folders


def test_any_nesting_and_any_mixture_of_formats(tmp_path):
    npy(tmp_path / "a" / "deep" / "1.npy", 0)
    (tmp_path / "b.xyz").write_text("1 2 3\n4 5 6\n")
    (tmp_path / "notes.txt").write_text("not a cloud")
    npy(tmp_path / ".hidden" / "2.npy", 0)
    os.symlink(tmp_path, tmp_path / "a" / "back up")
    source = opened(tmp_path)
    assert source.names == ["a/deep/1.npy", "b.xyz"] and source.labels is None and source.classes is None
    np.testing.assert_array_equal(source.read(0).xyz, points(0))
    assert source.ids.tolist() == [stable_id("a/deep/1.npy"), stable_id("b.xyz")]
    assert opened(tmp_path / "b.xyz").names == ["b.xyz"]


def test_class_folders_are_split_class_by_class(tmp_path):
    source = opened(zoo(tmp_path))
    assert source.classes == ["ant", "bee", "cat"] and source.labels.bincount().tolist() == [10, 10, 10]
    codes = source.splits(0.2)
    for code, count in ((splits.TRAIN, 6), (splits.VAL, 2), (splits.TEST, 2)):
        assert source.labels[codes == code].bincount().tolist() == [count] * 3
    (tmp_path / "moved").mkdir()
    for name in ("ant", "bee", "cat"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    assert torch.equal(opened(tmp_path / "moved").splits(0.2), codes)  # from names below the folder


def test_split_folders_outside_and_inside_classes(tmp_path):
    for outer in (True, False):
        root = tmp_path / str(outer)
        for split in ("train", "validation", "test"):
            for name in ("ant", "bee"):
                for i in range(2):
                    npy(root / (f"{split}/{name}" if outer else f"{name}/{split}") / f"{i}.npy", i)
        source = opened(root)
        assert source.classes == ["ant", "bee"] and source.labels.bincount().tolist() == [6, 6]
        for split, names in by_split(source).items():
            assert len(names) == 4 and all(("validation" if split == "val" else split) in name for name in names)


def test_numbered_class_folders_are_in_order_of_number(tmp_path):
    for name in ("10", "9", "1"):
        npy(tmp_path / name / "a.npy", 0)
    assert opened(tmp_path).classes == ["1", "9", "10"]


def test_a_cloud_beside_the_folders_means_no_classes(tmp_path):
    npy(zoo(tmp_path, n=1) / "stray.npy", 0)
    assert opened(tmp_path).labels is None


def test_bad_files_are_named_and_skipped_or_fatal(tmp_path):
    npy(tmp_path / "good.npy", 0)
    (tmp_path / "empty.ply").write_bytes(b"")
    (tmp_path / "text.las").write_text("hello")
    source = opened(tmp_path)
    assert source.names == ["good.npy"]
    assert source.problems == (("empty.ply", "empty file"), ("text.las", "not a .las file (wrong first bytes)"))
    with pytest.raises(SourceError, match=r"2 of 3 clouds cannot be read: empty.ply \(empty file\); text.las.*skip"):
        opened(tmp_path, "fatal")


def test_columns_of_bin_files_follow_from_all_sizes(tmp_path):
    for i in range(4):
        binary(tmp_path / f"{i}.bin", i, n=16 + i, columns=5)  # the first would fit 20 rows of 4, too
    (tmp_path / "cut.bin").write_bytes(bytes(16 * 7))
    binary(tmp_path / "velo.pcd.bin", 9, n=12, columns=5)
    source = opened(tmp_path)
    assert [len(source.read(i).xyz) for i in range(5)] == [16, 17, 18, 19, 12]
    np.testing.assert_array_equal(source.read(0).features["intensity"], points(0, 16, 5)[:, 3:4])
    assert source.problems == (("cut.bin", "112 bytes are no whole number of rows of 5 float32 (cut off?)"),)


def test_names_that_are_not_utf8_are_a_problem(tmp_path):
    npy(tmp_path / "good.npy", 0)
    np.save(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.npy"), points(1))
    source = opened(tmp_path)
    assert source.names == ["good.npy"]
    assert source.problems == (("caf\\udce9.npy", "its name is not UTF-8: rename it"),)


def test_sources_that_are_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "zips").mkdir()
    (tmp_path / "zips" / "all.tar.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "a.tar").write_bytes(b"")
    npy(tmp_path / "both" / "b.npy", 0)
    for name, message in {
        "empty": r"no clouds in .*looked for .pcd .ply .*any depth.*ldraw, lidar, shapes",
        "nowhere": r"does not exist.*folder of point clouds",
        "zips": r"all.tar.gz is compressed: unpack it first",
        "both": r"holds 1 .tar and 1 cloud files; give a folder with one kind",
    }.items():
        with pytest.raises(SourceError, match=message) as caught:
            opened(tmp_path / name)
        assert "\n" not in str(caught.value)
    for address in ("pipe:cat x.tar", "https://example.org/x.tar"):
        with pytest.raises(SourceError, match="never opened"):
            open_source(address, "skip")


def test_an_embedded_set_wins_over_a_folder_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    npy(tmp_path / "shapes" / "a.npy", 0)
    source = open_source("shapes", "skip")
    assert source.classes and source.codes is not None and source.names[0].startswith("shapes:")
    assert torch.equal(source.splits(0.5), source.codes)  # fixed, whatever the share
    assert open_source("./shapes", "skip").names == ["a.npy"]


# LAS


def las(path: Path, classes: list[int]) -> Path:
    header = laspy.LasHeader(point_format=1, version="1.2")
    file = laspy.LasData(header)
    file.x, file.y, file.z = np.random.default_rng(0).uniform(0, 9, (3, len(classes)))
    file.classification = np.array(classes, np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    file.write(path)
    return path


def test_las_folders_have_point_classes(tmp_path):
    las(tmp_path / "a.las", [2, 6, 1, 0])
    npy(tmp_path / "b.npy", 0)
    source = opened(tmp_path)
    assert source.point_classes == LAS_CLASSES
    labels = source.read(0).labels
    assert [LAS_CLASSES[i] for i in labels[:2]] == ["ground", "building"] and labels[2:].tolist() == [-1, -1]
    assert source.read(1).labels is None
    assert set(source.splits(0.3).tolist()) <= {splits.TRAIN, splits.VAL, splits.TEST}


# KITTI


def semantic_kitti(root: Path, sequences: list[int], frames: int = 2, labelled: bool = True) -> Path:
    for sequence in sequences:
        folder = root / "dataset" / "sequences" / f"{sequence:02}"
        for i in range(frames):
            binary(folder / "velodyne" / f"{i:06}.bin", 100 * sequence + i, n=4)
            binary(folder / "voxels" / f"{i:06}.bin", 0, n=1)  # the completion benchmark's grids: no clouds
            if labelled and sequence <= 10:
                numbers = np.array([10 | 7 << 16, 252, 0, 40], "<u4")  # the upper 16 bits are the instance
                (folder / "labels").mkdir(parents=True, exist_ok=True)
                (folder / "labels" / f"{i:06}.label").write_bytes(numbers.tobytes())
    return root


def test_semantic_kitti_has_its_official_split_and_classes(tmp_path):
    source = opened(semantic_kitti(tmp_path, list(range(22))))
    assert len(source.names) == 44 and source.labels is None and source.point_classes == kitti.POINT_CLASSES
    found = {split: {int(name.split("/")[2]) for name in names} for split, names in by_split(source).items()}
    assert found == {"train": {*range(8), 9, 10}, "val": {8}, "test": set(range(11, 22))}
    cloud = source.read(0)
    np.testing.assert_array_equal(cloud.xyz, points(0, 4, 4)[:, :3])
    assert cloud.labels.tolist() == [0, 0, -1, 8]  # car, moving car, unlabelled, road
    assert [kitti.POINT_CLASSES[i] for i in (0, 8)] == ["car", "road"] and len(kitti.POINT_CLASSES) == 19
    assert source.read(43).labels is None  # sequence 21


def test_a_part_of_semantic_kitti_is_split_by_sequence(tmp_path):
    source = opened(semantic_kitti(tmp_path, [0, 1, 2, 3, 4], labelled=False))
    assert source.point_classes is None
    found = {split: {name.split("/")[2] for name in names} for split, names in by_split(source).items()}
    assert not found["test"] and len(found["val"]) == 1 and len(found["train"]) == 4
    assert not found["train"] & found["val"]


def test_kitti_labels_that_do_not_fit(tmp_path):
    source = opened(semantic_kitti(tmp_path, [0]))
    label = tmp_path / "dataset/sequences/00/labels/000001.label"
    label.write_bytes(label.read_bytes()[:-4])
    with pytest.raises(CorruptSampleError, match=r"000001.bin: 000001.label has 3 labels for 4 points"):
        source.read(1)


def test_kitti_objects_and_raw_drives(tmp_path):
    for i in range(20):
        binary(tmp_path / "objects" / "training" / "velodyne" / f"{i:06}.bin", i)
    binary(tmp_path / "objects" / "testing" / "velodyne" / "000000.bin", 99)
    found = by_split(opened(tmp_path / "objects"), share=0.1)
    assert found["test"] == ["testing/velodyne/000000.bin"] and [len(names) for names in found.values()] == [18, 2, 1]
    for drive in range(5):
        for i in range(4):
            place = tmp_path / "raw" / "2011_09_26" / f"drive_{drive:04}_sync" / "velodyne_points" / "data"
            binary(place / f"{i:010}.bin", i)
    found = by_split(opened(tmp_path / "raw"))
    drives = {split: {name.split("/")[1] for name in names} for split, names in found.items()}
    assert len(drives["val"]) == 1 and len(found["val"]) == 4 and not drives["train"] & drives["val"]
    with pytest.raises(SourceError, match=r"1 of 21 clouds cannot be read: .*000003.bin \(50 bytes.*rows of 4"):
        (tmp_path / "objects/training/velodyne/000003.bin").write_bytes(bytes(50))
        opened(tmp_path / "objects", "fatal")


# Tar shards


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def npy_bytes(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def shard(path: Path, first: int, n: int, suffix: str = "npy") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i in range(first, first + n):
            content = npy_bytes(points(i)) if suffix == "npy" else points(i, 20 + i, 5).tobytes()
            add(tar, f"{i:04}.{suffix}", content)
            add(tar, f"{i:04}.json", json.dumps({"label": f"kind {i % 2}"}).encode())
    return path


def test_shards_are_read_by_offset(tmp_path):
    for k in range(2):
        shard(tmp_path / "s" / f"part-{k}.tar", 10 * k, 10)
    source = opened(tmp_path / "s")
    assert len(source.names) == 20 and source.classes == ["kind 0", "kind 1"]
    assert source.names[13] == "part-1.tar/0013" and source.labels[13] == 1
    np.testing.assert_array_equal(source.read(13).xyz, points(13))


def test_shards_of_sweeps_and_of_las(tmp_path):
    place = shard(tmp_path / "s" / "train-0.tar", 0, 5, "pcd.bin")
    source = opened(place)
    np.testing.assert_array_equal(source.read(3).xyz, points(3, 23, 5)[:, :3])
    assert by_split(source, share=0.0)["train"] == list(source.names)
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        add(tar, "a.laz", las(tmp_path / "a.laz", [2, 1]).read_bytes())
    source = opened(tmp_path / "t.tar")
    assert source.point_classes == LAS_CLASSES and source.read(0).labels.tolist() == [0, -1]


def test_shards_named_after_splits(tmp_path):
    for split, first, n in (("train", 0, 6), ("val", 6, 2), ("test", 8, 3)):
        shard(tmp_path / "s" / f"{split}-000.tar", first, n)
    assert [len(names) for names in by_split(opened(tmp_path / "s")).values()] == [6, 2, 3]


def test_what_is_wrong_in_shards(tmp_path):
    place = shard(tmp_path / "s" / "a.tar", 0, 3)
    with tarfile.open(place, "a") as tar:
        add(tar, "deep/0009.npy", b"not an array")
        add(tar, "deep/0010.npy", b"")
        add(tar, "deep/0011.npy", npy_bytes(points(0))[:-5])
    source = opened(place)
    assert [name for name in source.names] == [f"a.tar/{name}" for name in ("0000", "0001", "0002", "deep/0011")]
    assert dict(source.problems) == {
        "a.tar/deep/0009": "not a .npy file, as most are",
        "a.tar/deep/0010": "empty file",
    }
    with pytest.raises(CorruptSampleError, match=r"^a.tar/deep/0011: damaged"):
        source.read(3)
    place.unlink()
    with pytest.raises(CorruptSampleError, match=r"^a.tar/0000: No such file"):
        source.read(0)
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "b.tar").write_bytes(b"\x1f\x8b not a tar")
    with pytest.raises(UnmaskError, match=r"b.tar: not an uncompressed tar"):
        opened(tmp_path / "t")
