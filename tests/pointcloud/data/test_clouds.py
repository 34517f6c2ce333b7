"""Samples: settings, keyed augmentation, normalising, damaged clouds in workers, and what `resolve` chooses."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import laspy
import numpy as np
import pydantic
import pytest
import torch
from torch.utils.data import DataLoader

from unmask.core.data.kinds import SourceError
from unmask.core.errors import UnmaskError
from unmask.core.randomness import SampleKey
from unmask.pointcloud.data.augment import FeatureError, draw_transform, normalise
from unmask.pointcloud.data.batches import PointBatch
from unmask.pointcloud.data.clouds import PointClouds, Settings, collate, open_split, resolve
from unmask.pointcloud.data.extent import choose_pillar, choose_range, holds_origin, inside
from unmask.pointcloud.data.readers import Cloud
from unmask.pointcloud.data.sources import Source

BOX = (-2.0, -2.0, -2.0, 2.0, 2.0, 2.0)


def points(seed: int, n: int = 60, columns: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (n, columns)).astype(np.float32)


def npy(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)
    return path


def folder(root: Path, n: int = 12, columns: int = 4) -> Path:
    for i in range(n):
        npy(root / f"{i:02}.npy", points(i, 40 + i, columns))
    return root


def zoo(root: Path, n: int = 10) -> Path:
    for label, name in enumerate(("ant", "bee")):
        for i in range(n):
            npy(root / name / f"{i}.npy", points(100 * label + i))
    return root


def settings(source: Path | str, **changes: object) -> Settings:
    return Settings(str(source), **{"range": BOX, "pillar": (0.5, 0.5), "normalize": "none", **changes})


def load(clouds: PointClouds, workers: int, batch: int, visit: int = 0) -> PointBatch:
    """All samples of a split, in order, as one batch, through a loader."""
    items = [(i, visit) for i in range(len(clouds))]
    batches = [items[i : i + batch] for i in range(0, len(items), batch)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking a process that has threads
        parts = list(DataLoader(clouds, batch_sampler=batches, collate_fn=collate, num_workers=workers))
    lengths = torch.cat([part.offsets.diff() for part in parts])
    return PointBatch(
        torch.cat([part.points for part in parts]),
        torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        torch.cat([part.ids for part in parts]),
    )


# Settings


def test_settings_from_a_recipe():
    read = pydantic.TypeAdapter(Settings).validate_python
    parsed = read({"source": "shapes", "range": [-51.2, -51.2, -5, 51.2, 51.2, 3], "pillar": [0.256, 0.256]})
    assert parsed.grid_shape == (400, 400) and parsed.channels == 3
    parsed = read({"source": "x", "features": ["intensity", "normal", "time"], "range": [0, 0, 0, 4, 2, 1]})
    assert parsed.channels == 8
    with pytest.raises(UnmaskError, match=r"data.range and data.pillar are not known yet"):
        _ = parsed.grid_shape
    assert read({"source": "x", "range": [0, 0, 0, 4, 2, 1], "pillar": [0.5, 0.5]}).grid_shape == (4, 8)  # rows: y
    with pytest.raises(pydantic.ValidationError) as caught:
        read({"source": "x", "sweeps": 0, "flip": 2, "features": ["rgb"], "normalize": "unit", "rotate": -1})
    assert {error["loc"][0] for error in caught.value.errors()} == {"sweeps", "flip", "features", "normalize", "rotate"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"features": ("time", "time")}, "features names one twice"),
        ({"scale": (1.1, 0.9)}, "scale is .*0 < least <= largest"),
        ({"range": (0.0, 0.0, 0.0, 1.0, -1.0, 1.0), "pillar": None}, "y0 < y1"),
        ({"pillar": (0.5, 0.0)}, "pillar is .*positive sizes"),
        ({"pillar": (0.5, 0.3)}, r"range is 13.3333 pillars of 0.3 m along y; expected a whole number"),
    ],
)
def test_settings_that_make_no_sense(wrong, message):
    with pytest.raises(ValueError, match=message):
        settings("shapes", **wrong)


# Splits and samples


def test_samples_of_each_split(tmp_path):
    found = {split: open_split(settings(zoo(tmp_path), val_share=0.2), split) for split in ("train", "val", "test")}
    assert {split: clouds.labels.bincount().tolist() for split, clouds in found.items()} == {
        "train": [6, 6],
        "val": [2, 2],
        "test": [2, 2],
    }
    assert len(set(torch.cat([clouds.ids for clouds in found.values()]).tolist())) == 20
    sample = found["val"][3, 0]
    assert found["val"].classes == ["ant", "bee"] and found["val"].point_classes is None
    assert found["val"].name_of(sample.id).startswith(found["val"].classes[sample.label])
    np.testing.assert_array_equal(sample.points, np.load(tmp_path / found["val"].name_of(sample.id)))
    batch = found["val"].__getitems__([(i, 0) for i in (3, 0)])
    assert batch.labels.tolist() == [1, 0] and batch.offsets.tolist() == [0, 60, 120]
    assert torch.equal(batch.points[:60], sample.points) and batch.point_labels is None


def test_splits_that_are_empty_say_what_to_do(tmp_path):
    root = folder(tmp_path / "clouds")
    assert len(open_split(settings(root), "train")) == 11 and len(open_split(settings(root), "val")) == 1
    for split, message in (("test", "one folder a class, or in a folder test/"), ("val", "Raise data.val_share")):
        with pytest.raises(SourceError, match=f"no {split} clouds.*{message}"):
            open_split(settings(root, val_share=0.0), split)


def test_points_without_labels_stand_beside_those_with_some(tmp_path):
    header = laspy.LasHeader(point_format=1, version="1.2")
    file = laspy.LasData(header)
    file.x, file.y, file.z = points(0, 4).T
    file.classification = np.array([2, 1, 6, 2], np.uint8)
    file.write(tmp_path / "a.las")
    npy(tmp_path / "b.npy", points(1, 3))
    clouds = open_split(settings(tmp_path), "all")
    batch = clouds.__getitems__([(1, 0), (0, 0)])
    assert batch.point_labels.tolist() == [-1, -1, -1, 0, -1, 4, 0] and batch.labels is None
    assert (clouds.point_classes[0], clouds.point_classes[4]) == ("ground", "building")


# Features


def test_features_follow_the_positions_in_the_order_asked_for(tmp_path):
    clouds = open_split(settings(folder(tmp_path), features=("time", "intensity")), "all")
    sample = clouds[2, 0]
    expected = points(2, 42, 4)
    assert sample.points.shape == (42, 5) == (42, clouds.settings.channels)
    np.testing.assert_array_equal(sample.points[:, [0, 1, 2, 4]], expected)
    assert not sample.points[:, 3].any()  # a single sweep


def test_a_feature_that_is_missing_is_named_and_never_skipped(tmp_path):
    clouds = open_split(settings(folder(tmp_path), features=("normal",)), "all")
    with pytest.raises(FeatureError, match=r"00.npy: has no normal \(it has intensity\); take it out of data.features"):
        clouds[0, 0]
    with pytest.raises(FeatureError, match=r"has no color"):
        resolve(settings(tmp_path, features=("color",)))


def test_points_with_values_that_are_not_finite_are_left_out_and_counted(tmp_path):
    table = points(0, 10, 4)
    table[3, 3], table[5, 0] = np.nan, np.inf
    npy(tmp_path / "a.npy", table)
    npy(tmp_path / "b.npy", points(1, columns=4))
    clouds = open_split(settings(tmp_path, features=("intensity",)), "all")
    np.testing.assert_array_equal(clouds[0, 0].points, np.delete(table, (3, 5), 0))
    assert clouds[1, 0].points.shape and clouds.problems == []
    assert clouds.warnings == [("a.npy", "2 points with NaN or infinite values left out")]
    assert len(open_split(settings(tmp_path), "all")[0, 0].points) == 9  # the intensity was not asked for
    table[:, 3] = np.nan
    npy(tmp_path / "a.npy", table)
    clouds = open_split(settings(tmp_path, features=("intensity",)), "all")
    assert clouds[0, 0].id == clouds[1, 0].id
    assert clouds.problems == [("a.npy", "no point has finite intensity")]


# Normalising and augmentation


def test_normalising():
    far = points(0).astype(np.float64) + [448_262.25, 5_411_932.125, 100.5]
    np.testing.assert_array_equal(normalise(far, "none"), far)
    centred = normalise(far, "center")
    np.testing.assert_allclose(centred[:, :2].min(0), -centred[:, :2].max(0), atol=1e-9)
    assert centred[:, 2].min() == 0
    np.testing.assert_allclose(np.diff(centred, axis=0), np.diff(points(0).astype(np.float64), axis=0), atol=1e-8)
    ball = normalise(far, "sphere")
    np.testing.assert_allclose(ball.mean(0), 0, atol=1e-8)  # of millions of metres
    np.testing.assert_allclose(np.linalg.norm(ball, axis=1).max(), 1)


def test_georeferenced_tiles_keep_their_millimetres(tmp_path):
    near = points(0, 50).astype(np.float64).round(3)
    npy(tmp_path / "a.npy", near + [448_262.0, 5_411_932.0, 100.0])
    found = open_split(settings(tmp_path, normalize="center"), "all")[0, 0].points
    assert found.dtype == torch.float32
    expected = near - [*(near[:, :2].min(0) + near[:, :2].max(0)) / 2, near[:, 2].min()]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_turns_stay_within_their_limits_and_take_each_of_them():
    keys = [SampleKey.of(0, i).stream("x") for i in range(400)]
    turns = [draw_transform(key, 0.3925, (0.95, 1.05), 0.5) for key in keys]
    for turn in turns:
        np.testing.assert_allclose(turn.matrix @ turn.matrix.T, np.eye(3), atol=1e-12)
        assert turn.matrix[2].tolist() == turn.matrix[:, 2].tolist() == [0, 0, 1] and 0.95 <= turn.factor < 1.05
    signs = [(np.sign(turn.matrix[0, 0]), np.sign(turn.matrix[1, 1])) for turn in turns]
    assert all(80 < signs.count(each) < 120 for each in set(signs)) and len(set(signs)) == 4
    angles = np.array(
        [math.atan2(turn.matrix[1, 0] * s[1], turn.matrix[0, 0] * s[0]) for turn, s in zip(turns, signs, strict=True)]
    )
    assert 0.37 < angles.max() < 0.3925 and -0.3925 < angles.min() < -0.37
    still = draw_transform(keys[0], 0.0, (1.0, 1.0), 0.0)
    assert np.array_equal(still.matrix, np.eye(3)) and still.factor == 1


def test_normals_turn_with_the_points_but_are_not_scaled():
    rows = points(0, 30)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)  # on a sphere the normals are the positions
    source = Source(["ball"], lambda _: Cloud(rows.astype(np.float64), {"normal": rows}))
    wanted = settings("balls", features=("normal",), scale=(1.5, 1.5))
    clouds = PointClouds(source, torch.arange(1), wanted, seed=0, augment=True)
    found = clouds[0, 3].points
    torch.testing.assert_close(found[:, :3], 1.5 * found[:, 3:])
    assert not torch.allclose(found[:, 3:], torch.from_numpy(rows), atol=0.01)


@pytest.mark.parametrize("most", [None, 20])
def test_a_sample_is_the_same_in_every_batch_and_worker(tmp_path, most):
    root = folder(tmp_path)

    def fresh(seed: int = 0) -> PointClouds:
        return open_split(settings(root, features=("intensity",), max_points=most), "all", seed=seed, augment=True)

    alone = load(fresh(), workers=0, batch=1)
    for workers, batch in ((0, 8), (2, 1), (2, 8)):
        found = load(fresh(), workers, batch)
        assert torch.equal(found.points, alone.points) and torch.equal(found.ids, alone.ids)
    for other in (load(fresh(), 0, 8, visit=1), load(fresh(seed=1), 0, 8)):
        assert not torch.equal(other.points, alone.points) and torch.equal(other.ids, alone.ids)
    plain = open_split(settings(root, features=("intensity",), max_points=most), "all")
    assert torch.equal(plain[3, 0].points, plain[3, 7].points)  # nothing random without augmentation


def test_a_subset_is_of_points_in_the_range_and_keeps_their_order(tmp_path):
    table = points(0, 100, 4)
    table[:60, 0] += 50  # outside
    npy(tmp_path / "a.npy", table)
    for most, count in ((30, 30), (40, 40), (99, 40), (100, 100)):
        clouds = open_split(settings(tmp_path, features=("intensity",), max_points=most), "all")
        found = clouds[0, 0].points.numpy()
        rows = [int((table == row).all(1).argmax()) for row in found]
        assert len(found) == count and rows == sorted(rows) and (most == 100 or min(rows) >= 60)


# Damaged clouds


def test_a_damaged_cloud_is_replaced_by_the_next_good_one_in_any_worker(tmp_path):
    root = folder(tmp_path)
    for i in (4, 5):
        place = root / f"{i:02}.npy"
        place.write_bytes(place.read_bytes()[:-7])
    npy(root / "08.npy", points(8) + 10)  # nothing in the range
    clouds = open_split(settings(root), "all", augment=True)
    third, fourth, fifth = (clouds[i, 0] for i in (4, 5, 6))
    assert third.id == fourth.id == fifth.id and torch.equal(third.points, fifth.points)
    fresh = open_split(settings(root), "all", augment=True)
    loaded = load(fresh, workers=2, batch=5)
    assert torch.equal(loaded.points, load(clouds, workers=0, batch=5).points)
    assert [problem.name for problem in fresh.problems] == ["04.npy", "05.npy", "08.npy"]  # found by the workers
    assert fresh.problems[0].reason.startswith("damaged") and fresh.problems[2].reason == "no points inside data.range"
    fatal = open_split(settings(root, corrupt="fatal"), "all")
    with pytest.raises(UnmaskError, match=r"08.npy: no points inside data.range. Remove.*corrupt=skip"):
        fatal[8, 0]


def test_a_split_of_nothing_but_damaged_clouds_ends(tmp_path):
    for i in range(3):
        npy(tmp_path / f"{i}.npy", np.zeros((4, 3)))
    with pytest.raises(SourceError, match=r"none of the 3 clouds.*\(0.npy: fewer than two distinct points\)"):
        open_split(settings(tmp_path), "all")[0, 0]


def test_a_turn_that_would_leave_nothing_is_not_made(tmp_path):
    npy(tmp_path / "a.npy", np.array([[1.999, 1.999, 0], [1.998, 1.999, 0]]))
    clouds = open_split(settings(tmp_path, scale=(1.05, 1.05)), "all", augment=True)
    for visit in range(5):
        assert inside(clouds[0, visit].points.numpy(), BOX).any()
    assert clouds.problems == []


# What `resolve` chooses


def resolved(root: Path, **changes: object) -> Settings:
    found = resolve(Settings(str(root), **changes))
    assert found == resolve(found)  # nothing is left open
    return found


def check_range(found: Settings, share: float = 0.98) -> float:
    """That the range holds the training clouds, as augmented; returns points a pillar of a median cloud."""
    clouds = open_split(found, "train", seed=5, augment=True)
    ratios = []
    for i in range(min(len(clouds), 10)):
        xyz = clouds[i, 1].points.numpy()
        kept = xyz[inside(xyz, found.range)]
        assert len(kept) >= share * len(xyz)
        cells = np.floor((kept[:, :2] - found.range[:2]) / found.pillar)
        ratios.append(len(kept) / len(np.unique(cells, axis=0)))
    return float(np.median(ratios))


def test_object_scans(tmp_path):
    for i in range(12):
        ball = points(i, 2000)
        npy(tmp_path / f"{i}.npy", 0.5 * ball / np.linalg.norm(ball, axis=1, keepdims=True))
    found = resolved(tmp_path)
    assert found.normalize == "none" and Path(found.source).is_absolute()
    assert all(0.5 <= value <= 0.6 for value in (-found.range[0], *found.range[3:]))
    assert 5 < check_range(found) < 12 and 8 <= max(found.grid_shape) <= 64
    assert resolved(tmp_path, normalize="sphere").range[3] == pytest.approx(2 * found.range[3], rel=0.02)


def test_objects_that_lie_beside_their_origin_are_centred(tmp_path):
    for i in range(6):
        npy(tmp_path / f"{i}.npy", points(i, 500) + [1, 1, 1])  # 0..2
    found = resolved(tmp_path)
    assert found.normalize == "center" and found.range[2] <= 0 and found.range[5] >= 1.98
    check_range(found)


def test_sweeps_around_a_vehicle(tmp_path):
    for i in range(4):
        rng = np.random.default_rng(i)
        distance, angle = rng.exponential(12, 20_000).clip(1, 90), rng.uniform(-np.pi, np.pi, 20_000)
        rows = np.stack([distance * np.cos(angle), distance * np.sin(angle), rng.normal(0, 1, 20_000), angle], 1)
        (tmp_path / f"{i}.bin").write_bytes(rows.astype("<f4").tobytes())
    found = resolved(tmp_path)
    assert found.normalize == "none" and 40 < found.range[3] < 90 and found.range[0] == -found.range[3]
    assert 5 < check_range(found) < 12


def test_georeferenced_tiles(tmp_path):
    for i in range(5):
        tile = points(i, 4000).astype(np.float64) * [50, 20, 5] + [448_000 + 100 * i, 5_411_000, 230]
        npy(tmp_path / f"{i}.npy", tile)
    found = resolved(tmp_path)
    assert found.normalize == "center"
    x0, y0, z0, x1, y1, z1 = found.range
    assert -x0 == x1 and 45 < x1 < 62 and -y0 == y1 and 20 < y1 < 45 and -1 <= z0 <= 0 and 9.5 < z1 < 12
    rows, columns = found.grid_shape
    assert rows < columns and 5 < check_range(found) < 12
    assert found.pillar[0] == pytest.approx(found.pillar[1], rel=0.2)


def test_what_is_given_is_kept(tmp_path):
    root = folder(tmp_path)
    wide = resolved(root, range=(-3.0, -3.0, -2.0, 3.0, 3.0, 2.0))
    assert wide.range == (-3, -3, -2, 3, 3, 2) and min(wide.grid_shape) >= 8
    coarse = resolved(root, pillar=(0.3, 0.4))
    assert coarse.pillar == (0.3, 0.4) and 1.0 <= coarse.range[3] <= 1.7
    assert resolve(settings(root)) == settings(root.resolve())
    assert resolve(settings("shapes")).source == "shapes"
    with pytest.raises(SourceError, match=r"one pillar of .* is the whole of data\.range: nothing could be hidden"):
        resolve(settings(root, range=(-1.0, -1.0, -1.0, 1.0, 1.0, 1.0), pillar=(2.0, 2.0)))
    assert open_split(Settings(str(root)), "train").settings == resolve(Settings(str(root)))


def test_pillars_have_limits():
    bounds = (-1.0, -1.0, 0.0, 1.0, 1.0, 1.0)
    few, many = points(0, 5), points(0, 3)
    assert choose_pillar([few], bounds) == (0.25, 0.25)  # 8 a side, however few the points
    same = np.repeat(many, 2000, 0)
    assert choose_pillar([same], bounds) == (2 / 512, 2 / 512)  # and no more than 512
    assert choose_pillar([few], (-4.0, -1.0, 0.0, 4.0, 1.0, 1.0)) == (1.0, 0.25)  # at least 8 along the shorter side


def test_ranges_of_flat_and_tiny_clouds():
    flat = points(0, 500) * [1, 1, 0]
    low, high = np.split(np.array(choose_range([flat], None)), 2)
    assert (low < high).all() and high[2] - low[2] < 0.1 and inside(flat, (*low, *high)).mean() > 0.98
    line = points(0, 500) * [0, 0, 1e-4]
    assert inside(line, choose_range([line], None)).all()
    x0, _, _, x1, y1, _ = choose_range([points(0, 500)], (0.3, 0.7))
    assert round((x1 - x0) / 0.3, 6) % 1 == 0 and round(2 * y1 / 0.7, 6) % 1 == 0


def test_the_origin_of_a_cloud():
    assert holds_origin(points(0, 500)) and not holds_origin(points(0, 500) + [1, 0, 0])
    assert holds_origin(points(0, 500) + [0, 0, 9])  # seen from above
    stray = np.concatenate([points(0, 500) + 1000, -np.ones((1, 3))])
    assert not holds_origin(stray)
