"""nuScenes trees made by the test: ego motion in closed form, tables, splits, and everything that can be wrong."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from unmask.core.data.kinds import CorruptSampleError, SourceError
from unmask.core.errors import UnmaskError
from unmask.pointcloud.data import nuscenes
from unmask.pointcloud.data.clouds import Settings, open_split
from unmask.pointcloud.data.nuscenes import SweepReader, find, move
from unmask.pointcloud.data.sources import open_source

STEP = 50_000  # microseconds between sweeps
MOUNT = (0.9, 0.1, 1.8)  # the lidar on the vehicle, turned by 90 degrees as it is on nuScenes' cars
MOUNT_YAW = -math.pi / 2


def yaw(angle: float) -> list[float]:
    """The quaternion w, x, y, z of a turn about z."""
    return [math.cos(angle / 2), 0.0, 0.0, math.sin(angle / 2)]


def turned(xyz: np.ndarray, angle: float) -> np.ndarray:
    """Points turned about z."""
    cos, sin = math.cos(angle), math.sin(angle)
    return np.stack([cos * xyz[:, 0] - sin * xyz[:, 1], sin * xyz[:, 0] + cos * xyz[:, 1], xyz[:, 2]], 1)


@dataclass
class Tree:
    """A nuScenes folder that is written scene by scene."""

    root: Path
    version: str = "v1.0-test-made"
    tables: dict[str, list[dict]] = field(default_factory=dict)

    def add(self, table: str, **row: object) -> None:
        self.tables.setdefault(table, []).append(row)

    def scene(self, name: str, poses: list[tuple[np.ndarray, float]], points: list[np.ndarray], keys: set[int]) -> None:
        """Sweeps at these poses (position on the map, heading) that see these points (in the sensor's frame)."""
        self.add("scene", token=f"scene {name}", name=name)
        for i, ((where, heading), seen) in enumerate(zip(poses, points, strict=True)):
            token = f"{name}-{i}"
            kind = "samples" if i in keys else "sweeps"
            file = f"{kind}/LIDAR_TOP/{name}__LIDAR_TOP__{i:03}.pcd.bin"
            rows = np.concatenate([seen, np.full((len(seen), 1), 100 + i), np.zeros((len(seen), 1))], 1)
            place = self.root / file
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(rows.astype("<f4").tobytes())
            self.add("sample", token=f"sample {token}", scene_token=f"scene {name}")
            self.add("ego_pose", token=f"pose {token}", rotation=yaw(heading), translation=list(where), timestamp=0)
            self.add(
                "sample_data",
                token=token,
                sample_token=f"sample {token}",
                ego_pose_token=f"pose {token}",
                calibrated_sensor_token="mount",
                filename=file,
                timestamp=1_500_000_000_000_000 + i * STEP,
                is_key_frame=i in keys,
                prev=f"{name}-{i - 1}" if i else "",
                next="",
            )

    def write(self) -> Path:
        self.add("sensor", token="lidar", channel="LIDAR_TOP", modality="lidar")
        self.add("sensor", token="camera", channel="CAM_FRONT", modality="camera")
        self.add("calibrated_sensor", token="mount", sensor_token="lidar", rotation=yaw(MOUNT_YAW), translation=MOUNT)
        self.add(
            "calibrated_sensor", token="other", sensor_token="camera", rotation=[1, 0, 0, 0], translation=[0, 0, 0]
        )
        self.add("sample_data", token="photo", calibrated_sensor_token="other", filename="samples/CAM_FRONT/0.jpg")
        self.add("ego_pose", token="pose of the camera", rotation=None)
        for name, rows in self.tables.items():
            place = self.root / self.version / f"{name}.json"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(json.dumps(rows))
        return self.root

    def label(self, name: str, i: int, numbers: list[int]) -> None:
        """Point classes of a key frame."""
        file = f"lidarseg/{self.version}/{name}-{i}_lidarseg.bin"
        (self.root / file).parent.mkdir(parents=True, exist_ok=True)
        (self.root / file).write_bytes(bytes(numbers))
        self.add("lidarseg", token=f"labels {name}-{i}", sample_data_token=f"{name}-{i}", filename=file)


STATIC = np.array([[1010.0, 2003.0, 0.5], [1030.0, 1990.0, 2.0], [990.0, 2020.0, 6.0], [1012.0, 2030.0, -0.5]])


def drive(n: int) -> list[tuple[np.ndarray, float]]:
    """A vehicle on a curve, far from the map's origin as nuScenes' are."""
    return [(np.array([1000 + 0.5 * i, 2000 + 0.1 * i, 0.0]), 0.3 + 0.05 * i) for i in range(n)]


def seen(where: np.ndarray, heading: float, world: np.ndarray = STATIC) -> np.ndarray:
    """What of the world the lidar measures at a pose: the closed form of all that the reader has to undo."""
    vehicle = turned(world - where, -heading)
    return turned(vehicle - np.array(MOUNT), -MOUNT_YAW)


def two_scenes(root: Path, sweeps: int = 12) -> Path:
    tree = Tree(root)
    for name, world in (("a", STATIC), ("b", STATIC + 3)):
        poses = drive(sweeps)
        tree.scene(name, poses, [seen(*pose, world) for pose in poses], keys={2, sweeps - 1})
    return tree.write()


def reader(root: Path, sweeps: int = 1) -> SweepReader:
    found = open_source(str(root), "fatal", sweeps).read
    assert isinstance(found, SweepReader)
    return found


# Ego motion


@pytest.mark.parametrize("axis", range(3))
def test_poses_turn_by_their_quaternion_and_then_shift(axis):
    pose = np.array([math.cos(0.35), 0.0, 0.0, 0.0, 5.0, 6.0, 7.0])
    pose[1 + axis] = math.sin(0.35)
    along, across, up = (np.eye(3)[(axis + i) % 3] for i in range(3))
    expected = np.stack([along, math.cos(0.7) * across + math.sin(0.7) * up]) + [5, 6, 7]
    found = move(np.stack([along, across]), pose)
    np.testing.assert_allclose(found, expected, atol=1e-15, rtol=1e-15)
    np.testing.assert_allclose(move(found, pose, back=True), [along, across], atol=1e-14)
    cycle = np.array([0.5, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0])  # x to y, y to z, z to x
    np.testing.assert_allclose(move(np.array([[1.0, 2.0, 3.0]]), cycle), [[3.0, 1.0, 2.0]], atol=1e-15)


def test_points_that_stand_still_come_together(tmp_path):
    cloud = reader(two_scenes(tmp_path), sweeps=10)(1)  # the last key frame of scene a, and nine sweeps before it
    where, heading = drive(12)[-1]
    expected = turned(STATIC - where, -heading)  # in the key frame's ego frame
    assert cloud.xyz.shape == (40, 3) and cloud.xyz.dtype == np.float64
    np.testing.assert_allclose(cloud.xyz.reshape(10, 4, 3), np.broadcast_to(expected, (10, 4, 3)), atol=1e-5)
    np.testing.assert_allclose(cloud.features["time"].reshape(10, 4), np.arange(10)[:, None] * 0.05 * np.ones(4))
    assert cloud.features["intensity"].reshape(10, 4)[:, 0].tolist() == [111 - i for i in range(10)]
    assert cloud.labels is None


def test_straight_ahead_by_hand(tmp_path):
    """Half a second at 10 m/s: what was 21 m ahead of the rear axle is 16 m ahead now."""
    tree = Tree(tmp_path)
    poses = [(np.array([0.0, 0.0, 0.0]), 0.0), (np.array([5.0, 0.0, 0.0]), 0.0)]
    ahead = turned(np.array([[21.0, 0.0, 2.0], [21.0, 3.0, 2.0]]) - np.array(MOUNT), -MOUNT_YAW)
    tree.scene("a", poses, [ahead, ahead], keys={1})
    cloud = reader(tree.write(), sweeps=2)(0)
    np.testing.assert_allclose(cloud.xyz, [[21, 0, 2], [21, 3, 2], [16, 0, 2], [16, 3, 2]], atol=1e-6)


def test_fewer_sweeps_at_the_start_of_a_scene(tmp_path):
    root = two_scenes(tmp_path)
    assert len(reader(root, sweeps=10)(0).xyz) == 3 * len(STATIC)  # the key frame 2, and 1 and 0 before it
    assert len(reader(root, sweeps=10)(2).xyz) == 3 * len(STATIC)  # none from scene a
    assert len(reader(root, sweeps=1)(0).xyz) == len(STATIC)


def test_the_vehicle_itself_is_left_out_of_earlier_sweeps(tmp_path):
    tree = Tree(tmp_path)
    near = np.array([[0.9, -0.9, 0.0], [0.9, 1.0, 0.0], [-1.5, 0.0, 0.0], [0.0, 0.0, 5.0]])
    pose = (np.zeros(3), 0.0)
    tree.scene("a", [pose, pose], [near, near], keys={1})
    cloud = reader(tree.write(), sweeps=2)(0)
    assert len(cloud.xyz) == 4 + 2  # all of the key frame; of the sweep, what is 1 m away in x or y
    np.testing.assert_allclose(cloud.xyz[4:], cloud.xyz[1:3], atol=1e-9)


# Point classes


def test_lidarseg_labels_with_noise_and_sweeps_unlabelled(tmp_path):
    tree = Tree(tmp_path)
    poses = drive(2)
    tree.scene("a", poses, [seen(*pose) for pose in poses], keys={0, 1})
    tree.label("a", 1, [24, 0, 17, 99])
    for index, name in ((24, "flat.road"), (0, "noise"), (17, "vehicle.car")):
        tree.add("category", token=name, name=name, index=index)
    source = open_source(str(tree.write()), "fatal", 2)
    assert source.point_classes == ["vehicle.car", "flat.road"]
    assert source.read(1).labels.tolist() == [1, -1, 0, -1, *[-1] * 4]
    assert source.read(0).labels.tolist() == [-1] * 4  # a key frame without labels
    (tmp_path / tree.tables["lidarseg"][0]["filename"]).write_bytes(bytes(3))
    with pytest.raises(CorruptSampleError, match=r"a__LIDAR_TOP__001.pcd.bin: lidarseg/.* has 3 labels for 4 points"):
        source.read(1)


# Splits, through the data set


def many_scenes(root: Path, n: int = 10, keys: int = 3) -> Path:
    tree = Tree(root)
    for k in range(n):
        poses = drive(keys)
        tree.scene(f"scene-{k:04}", poses, [seen(*pose) for pose in poses], keys=set(range(keys)))
    return tree.write()


def settings(root: Path, **changes: object) -> Settings:
    fixed = {
        "range": (-64.0, -64.0, -4.0, 64.0, 64.0, 12.0),
        "pillar": (2.0, 2.0),
        "normalize": "none",
        "val_share": 0.2,
    }
    return Settings(str(root), **{**fixed, **changes})


def test_no_scene_is_in_two_splits(tmp_path):
    root = many_scenes(tmp_path)
    found = {}
    for split in ("train", "val"):
        clouds = open_split(settings(root), split)
        found[split] = {clouds.name_of(i).split("/")[-1].split("__")[0] for i in clouds.ids.tolist()}
        assert len(clouds) == 3 * len(found[split])
    assert len(found["train"]) == 8 and len(found["val"]) == 2 and not found["train"] & found["val"]
    with pytest.raises(SourceError, match=r"no test clouds. Without labels"):
        open_split(settings(root), "test")


def test_one_scene_alone_is_not_divided(tmp_path):
    root = many_scenes(tmp_path, n=1)
    assert len(open_split(settings(root), "train")) == 3
    with pytest.raises(SourceError, match=r"no val clouds. Those of one scene or recording stay together.*are 1: add"):
        open_split(settings(root), "val")


def test_samples_have_the_channels_asked_for(tmp_path):
    root = two_scenes(tmp_path)
    clouds = open_split(settings(root, features=("intensity", "time"), sweeps=3), "all")
    sample = clouds[1, 0]
    assert sample.points.shape == (12, 5) and sample.points.dtype == torch.float32 and sample.label is None
    assert sample.points[:, 3].tolist() == [111.0] * 4 + [110.0] * 4 + [109.0] * 4
    torch.testing.assert_close(sample.points[:, 4], torch.tensor([0.0, 0.05, 0.1]).repeat_interleave(4))


# What is wrong


def test_several_versions_are_asked_about(tmp_path):
    many_scenes(tmp_path, n=2)
    other = Tree(tmp_path, "v1.0-mini")
    other.scene("c", drive(1), [STATIC], keys={0})
    other.write()
    with pytest.raises(SourceError, match=r"holds the tables v1.0-mini, v1.0-test-made; give one of them"):
        open_source(str(tmp_path), "skip")
    assert find(tmp_path / "v1.0-mini") == tmp_path / "v1.0-mini"
    assert open_source(str(tmp_path / "v1.0-mini"), "skip").names == ["samples/LIDAR_TOP/c__LIDAR_TOP__000.pcd.bin"]


def test_tables_are_read_once_and_again_when_they_change(tmp_path, monkeypatch):
    folder = many_scenes(tmp_path, n=2) / "v1.0-test-made"
    first = open_source(str(folder), "skip")
    with monkeypatch.context() as patched:
        patched.setattr(nuscenes, "_join", lambda _: pytest.fail("read again"))
        assert open_source(str(folder), "skip") is first
    (folder / "scene.json").write_text(
        (folder / "scene.json").read_text().replace('"name": "scene-0001"', '"name": "renamed"')
    )
    assert set(open_source(str(folder), "skip").groups) == {"scene-0000", "renamed"}


def broken(rows: list[dict], **changes: object) -> str:
    return json.dumps([{**rows[0], **changes}, *rows[1:]])


@pytest.mark.parametrize(
    ("table", "changes", "message"),
    [
        ("ego_pose", {"token": "elsewhere"}, r"do not fit together: nothing has the name 'pose a-0'"),
        ("sample_data", {"prev": "lost"}, r"nothing has the name 'lost'"),
        ("scene", {"token": "lost"}, r"nothing has the name 'scene a'"),
        ("ego_pose", {"rotation": [0, 0, 0, 0]}, r"expected a unit quaternion w, x, y, z"),
        ("ego_pose", {"rotation": [1, 0, 0]}, r"the tables are not nuScenes'"),
        ("sensor", {"channel": "OTHER"}, r"no sweeps of LIDAR_TOP"),
    ],
)
def test_tables_that_do_not_fit_together(tmp_path, table, changes, message):
    place = two_scenes(tmp_path) / "v1.0-test-made" / f"{table}.json"
    place.write_text(broken(json.loads(place.read_text()), **changes))
    with pytest.raises(SourceError, match=message) as caught:
        open_source(str(tmp_path), "skip")
    assert "v1.0-test-made" in str(caught.value) and "\n" not in str(caught.value)


def test_tables_that_are_missing_or_damaged(tmp_path):
    folder = two_scenes(tmp_path) / "v1.0-test-made"
    (folder / "ego_pose.json").rename(folder / "gone")
    with pytest.raises(SourceError, match=r"v1.0-test-made has no ego_pose.json; nuScenes' tables are sensor,"):
        open_source(str(tmp_path), "skip")
    (folder / "ego_pose.json").write_text("[{")
    with pytest.raises(SourceError, match=r"ego_pose.json: not json"):
        open_source(str(tmp_path), "skip")
    (folder / "ego_pose.json").write_text("{}")
    with pytest.raises(SourceError, match="do not fit together|not nuScenes'"):
        open_source(str(tmp_path), "skip")


def test_missing_and_cut_off_files_are_named(tmp_path):
    root = two_scenes(tmp_path)
    key = root / "samples/LIDAR_TOP/a__LIDAR_TOP__002.pcd.bin"
    key.write_bytes(key.read_bytes()[:-3])
    (root / "samples/LIDAR_TOP/b__LIDAR_TOP__002.pcd.bin").unlink()
    source = open_source(str(root), "skip", 2)
    assert source.names == [f"samples/LIDAR_TOP/{scene}__LIDAR_TOP__011.pcd.bin" for scene in "ab"]
    assert source.problems == (
        (key.relative_to(root).as_posix(), "77 bytes are no whole number of rows of 5 float32 (cut off?)"),
        ("samples/LIDAR_TOP/b__LIDAR_TOP__002.pcd.bin", "No such file or directory"),
    )
    (root / "sweeps/LIDAR_TOP/a__LIDAR_TOP__010.pcd.bin").unlink()
    with pytest.raises(CorruptSampleError, match=r"^samples/.*011.pcd.bin: sweep sweeps/.*010.pcd.bin: No such file"):
        source.read(0)
    assert len(source.read(1).xyz) == 8
    clouds = open_split(settings(root, sweeps=2), "all")
    assert clouds[0, 0].id == clouds[1, 0].id and len(clouds.problems) == 3
    with pytest.raises(UnmaskError, match=r"cannot be read: samples/.*corrupt=skip"):
        open_source(str(root), "fatal")


def test_sweeps_of_anything_else_are_refused(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.bin").write_bytes(np.arange(8, dtype=np.float32).tobytes())
    with pytest.raises(SourceError, match=r"data.sweeps=10 needs poses of the vehicle.*set data.sweeps=1"):
        open_source(str(tmp_path), "skip", 10)
