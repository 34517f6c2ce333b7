"""Statistics follow the data: what is measured, what is said before training, and that each remedy helps."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from unmask.core import cli
from unmask.core.data.kinds import CorruptSampleError
from unmask.core.errors import UnmaskError
from unmask.core.evaluation.embedding import embed
from unmask.core.evaluation.encoding import say_notes
from unmask.core.evaluation.rankme import rankme
from unmask.vision.data import statistics
from unmask.vision.data.decode import ChannelsError
from unmask.vision.data.images import Images, Settings, open_split, resolve
from unmask.vision.data.preprocess import Preprocess
from unmask.vision.data.statistics import IMAGENET_MEAN, IMAGENET_STD, measure
from unmask.vision.encoders.vit import VisionTransformer, ViTSettings

IMAGENET: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
RECIPE = """
method: vision/mae
model: {encoder: {patch_size: 4, dim: 16, depth: 1, heads: 2}, decoder: {dim: 16, depth: 1, heads: 2}}
data: {source: digits, image_size: 16, channels: 3, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}
schedule: {steps: 2}
training: {batch_size: 4, precision: 32-true}
"""


def scenes(n: int = 24, size: int = 16) -> np.ndarray:
    """Waves of several directions, one image each, in [0, 1]: [n, size, size]."""
    rows, columns = np.mgrid[:size, :size] / size
    turn = 2 * np.pi * np.random.default_rng(0).random((n, 3))[..., None, None]
    wave = np.sin(6 * (np.cos(turn[:, 0]) * rows + np.sin(turn[:, 0]) * columns) + turn[:, 1])
    return (0.5 + 0.25 * wave + 0.25 * np.sin(9 * columns + turn[:, 2])).clip(0, 1)


def infrared(scene: np.ndarray) -> np.ndarray:
    """14-bit counts of a thermal camera in a 16-bit container."""
    return (7000 + 2000 * scene).astype(np.uint16)


def write_all(folder: Path, kind: str) -> Path:
    folder.mkdir()
    for i, scene in enumerate(scenes()):
        write(folder / f"{i:02}", scene, kind)
    return folder


def write(path: Path, scene: np.ndarray, kind: str) -> None:
    if kind == "16-bit png":
        Image.fromarray(infrared(scene)).save(path.with_suffix(".png"))
    elif kind == "dark 8-bit jpeg":
        colour = np.stack([scene, scene**2, 1 - scene], -1)
        Image.fromarray((12 + 20 * colour).astype(np.uint8)).save(path.with_suffix(".jpg"), quality=95)
    elif kind == "16-bit colour tiff":
        pixels = np.stack([infrared(scene), infrared(scene**2), infrared(1 - scene)], -1)
        tifffile.imwrite(path.with_suffix(".tif"), pixels, photometric="rgb")
    elif kind == "32-bit tiff":
        tifffile.imwrite(path.with_suffix(".tif"), infrared(scene).astype(np.uint32), photometric="minisblack")
    else:  # float tiff: kelvin
        tifffile.imwrite(path.with_suffix(".tif"), (280 + 30 * scene).astype(np.float32), photometric="minisblack")


def batch_of(images: Images) -> torch.Tensor:
    return images.__getitems__([(i, 0) for i in range(len(images))]).images


def warnings_of(images: Images) -> list[str]:
    return [note for note in images.notes(1) if note.startswith("warning: ")]


KINDS = ["16-bit png", "16-bit colour tiff", "32-bit tiff", "float tiff", "dark 8-bit jpeg"]


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_any_range_reach_the_model_with_deviation_1(tmp_path: Path, kind: str) -> None:
    settings = resolve(Settings(str(write_all(tmp_path / "data", kind)), (16, 16)))
    train = open_split(settings, "train")
    batch = batch_of(train).double()
    torch.testing.assert_close(batch.mean((0, 2, 3)), torch.zeros(3).double(), atol=0.01, rtol=0)
    torch.testing.assert_close(batch.std((0, 2, 3), correction=0), torch.ones(3).double(), atol=0.01, rtol=0)
    assert resolve(settings) == settings
    (said,) = train.notes(1)
    assert re.match(r"images are normalised by the data's own mean .* and std ", said)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_that_do_not_suit_are_said_with_the_numbers(tmp_path: Path, kind: str) -> None:
    source = str(write_all(tmp_path / "data", kind))
    own = measure(open_split(Settings(source, (16, 16)), "train")).mean
    (said,) = warnings_of(open_split(Settings(source, (16, 16), **IMAGENET), "train"))
    numbers = re.search(r"have deviation \(?([\d.e-]+)", said)
    assert numbers and not 0.3 < float(numbers[1]) < 3
    assert f"their own mean is {statistics._numbers(own)}, their std" in said


def test_the_remedy_ends_in_features_that_tell_images_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_all(tmp_path / "thermal", "16-bit png")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    command = ["unmask", "train", "--recipe", str(tmp_path / "recipe.yaml"), "--data", str(source)]
    remedy = ["--set", "data.mean=null", "--set", "data.std=null"]

    def said(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", [*command, *options])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 0
        return capsys.readouterr().err

    for how in (["--dry-run"], ["--out", str(tmp_path / "flat")]):
        assert f"learn little from them. Normalise by the data's own mean and std: {' '.join(remedy)}" in said(*how)
    for how in (["--dry-run"], ["--out", str(tmp_path / "run")]):
        text = said(*remedy, *how)
        assert "the data's own mean 0.1" in text and "warning" not in text
    embed(tmp_path / "run", str(source), tmp_path / "same.parquet", device="cpu")
    assert "warning" not in capsys.readouterr().err
    embed(tmp_path / "run", str(write_all(tmp_path / "kelvin", "float tiff")), tmp_path / "x.parquet", device="cpu")
    assert "not on the scale of those that the run was trained on" in capsys.readouterr().err

    torch.manual_seed(0)
    encoder = VisionTransformer(ViTSettings(patch_size=4, dim=32, depth=2, heads=2), (16, 16), 3).eval()
    flat, right = (open_split(Settings(str(source), (16, 16), **given), "train") for given in (IMAGENET, {}))
    with torch.no_grad():
        ranks = [rankme(encoder(batch_of(images)).pooled) for images in (flat, right)]
    assert ranks[0] < 1.5 and ranks[1] > 3 * ranks[0]


@pytest.mark.parametrize(
    ("change", "own"),
    [
        (lambda x: x, False),
        (lambda x: 0.6 * x + 0.1, False),
        (lambda x: 0.25 * x, True),
        (lambda x: 0.3 * x + 0.3, True),
    ],
)
def test_imagenets_statistics_are_taken_where_they_are_near(
    tmp_path: Path, change: Callable[[np.ndarray], np.ndarray], own: bool
) -> None:
    for i, scene in enumerate(scenes()):
        colour = change(np.stack([scene, np.roll(scene, 3), scene.T], -1))
        Image.fromarray((255 * colour).astype(np.uint8)).save(tmp_path / f"{i}.png")
    found = resolve(Settings(str(tmp_path), (16, 16)))
    assert (found.mean != IMAGENET_MEAN) == (found.std != IMAGENET_STD) == own
    images = open_split(found, "train")
    assert images.notes(1)[0].startswith(f"images are normalised by {'the data' if own else 'ImageNet'}'s")
    assert not warnings_of(images)


def test_measuring_repeats_and_reads_fewer_images_where_they_are_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = open_split(Settings(str(write_all(tmp_path / "data", "16-bit png")), (8, 8), **IMAGENET), "all")
    found = measure(images)
    assert found == measure(images) and found.images == 24
    assert measure(images, at_most=10).images == 10
    monkeypatch.setattr(statistics, "_PIXELS", 0.12)  # 1000 times that is less than half of the 256 pixels of an image
    assert measure(images).images == statistics._LEAST == 8


# Pixels that cannot be used


def test_a_pixel_that_is_no_number_is_named(tmp_path: Path) -> None:
    source = write_all(tmp_path / "data", "float tiff")
    holes = (280 + 30 * scenes()[3]).astype(np.float32)
    holes[:2, :4] = np.nan
    holes[5, 5] = np.inf
    tifffile.imwrite(source / "03.tif", holes, photometric="minisblack")
    reason = "9 of 256 pixels are NaN or infinite; fill them first (numpy.nan_to_num)"
    images = open_split(resolve(Settings(str(source), (16, 16))), "all")
    assert bool(batch_of(images).isfinite().all()) and images.problems == [("03.tif", reason)]
    with pytest.raises(UnmaskError, match=r"03.tif: 9 of 256 pixels.*data.corrupt=skip"):
        batch_of(open_split(Settings(str(source), (16, 16), corrupt="fatal", **IMAGENET), "all"))
    tifffile.imwrite(source / "03.tif", np.nan_to_num(holes, nan=290, posinf=310), photometric="minisblack")
    again = open_split(Settings(str(source), (16, 16), corrupt="fatal"), "all")
    assert batch_of(again).shape[0] == 24 and again.problems == []


def test_a_set_without_one_usable_image_says_why(tmp_path: Path) -> None:
    for i in range(3):
        tifffile.imwrite(tmp_path / f"{i}.tif", np.full((16, 16), np.nan, np.float32), photometric="minisblack")
    with pytest.raises(UnmaskError, match=r"none of the . images .* can be used \(..tif: 256 of 256 pixels are NaN"):
        resolve(Settings(str(tmp_path), (16, 16)))


@pytest.mark.parametrize("value", [0, 117])
def test_a_set_of_one_value_is_refused(tmp_path: Path, value: int) -> None:
    def fill(last: int) -> None:
        for i in range(12):
            Image.fromarray(np.full((20, 16), last if i % 2 else value, np.uint8)).save(tmp_path / f"{i}.png")

    fill(value)
    with pytest.raises(UnmaskError, match=rf"same value .*{value / 255:.6g}.*nothing to learn.*--data$"):
        resolve(Settings(str(tmp_path), (16, 16)))
    given = open_split(Settings(str(tmp_path), (16, 16), **IMAGENET), "train")
    assert any("warning: every pixel has the same value" in note for note in given.notes(1))
    fill(value + 9)
    assert min(resolve(Settings(str(tmp_path), (16, 16))).std) > 0


def test_a_channel_of_one_value_is_named_and_the_others_are_measured(tmp_path: Path) -> None:
    for i, scene in enumerate(scenes()):
        planes = np.stack([infrared(scene), np.full((16, 16), 500, np.uint16)])
        tifffile.imwrite(tmp_path / f"{i}.tif", planes, photometric="minisblack", metadata={"axes": "CYX"})
    settings = resolve(Settings(str(tmp_path), (16, 16), channels=2))
    assert settings.std is not None and settings.std[0] < 0.02 and settings.std[1] == 1
    (said,) = warnings_of(open_split(settings, "train"))
    assert "every pixel of channel 1 (from 0) has the same value" in said


@pytest.mark.parametrize("checked", [100, 3])  # the latter without the image that is wrong
@pytest.mark.parametrize("fault", ["dead pixel", "another scale"])
def test_a_few_images_that_flatten_the_rest_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, checked: int
) -> None:
    monkeypatch.setattr(statistics, "_CHECKED", checked)
    source = write_all(tmp_path / "data", "float tiff")
    train = open_split(Settings(str(source), (16, 16), **IMAGENET), "train")
    victim = source / train.name_of(int(train.ids[5]))
    whole = tifffile.imread(victim)
    wrong = whole.copy()
    if fault == "dead pixel":
        wrong[3, 3] = -9999
    else:
        wrong = 100 * wrong
    tifffile.imwrite(victim, wrong, photometric="minisblack")
    (said,) = warnings_of(open_split(Settings(str(source), (16, 16)), "train"))
    assert "nearly flat beside the others" in said and f"most extreme pixel is in {victim.name}. " in said
    tifffile.imwrite(victim, whole, photometric="minisblack")
    assert not warnings_of(open_split(Settings(str(source), (16, 16)), "train"))


# Other data than the run's


def test_evaluating_on_another_scale_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = resolve(Settings(str(write_all(tmp_path / "kelvin", "float tiff")), (16, 16)))
    run: Any = SimpleNamespace(recipe=SimpleNamespace(method="vision/mae", data=data))  # what is read of a run

    def said(source: Path) -> str:
        say_notes(open_split(replace(data, source=str(source)), "all"), str(source), run)
        return capsys.readouterr().err

    celsius, kelvin = tmp_path / "celsius", tmp_path / "again"
    for folder, offset in ((celsius, -273.15), (kelvin, 0.0)):
        folder.mkdir()
        for path in (tmp_path / "kelvin").iterdir():
            tifffile.imwrite(folder / path.name, tifffile.imread(path) + np.float32(offset), photometric="minisblack")
    assert re.match(rf"warning: {celsius}: .* mean -[\d.]+ .*not on the scale .* Bring them to it", said(celsius))
    assert said(kelvin) == ""


# Pictures from memory


def test_an_array_is_read_as_the_file_of_the_same_type_is(tmp_path: Path) -> None:
    scene = scenes()[0]
    for kind, array in (
        ("16-bit png", infrared(scene)),
        ("float tiff", (280 + 30 * scene).astype(np.float32)),
        ("16-bit colour tiff", np.stack([infrared(scene), infrared(scene**2), infrared(1 - scene)], -1)),
    ):
        folder = write_all(tmp_path / kind, kind)
        preprocess = Preprocess.of_data(resolve(Settings(str(folder), (16, 16))))
        first = min(folder.iterdir())
        expected = preprocess(first)
        assert torch.equal(preprocess(array), expected) and 0.2 < float(expected.std()) < 2
        assert torch.equal(preprocess([array, first]), preprocess([first, array]))


@pytest.mark.parametrize(
    ("kind", "full_scale"),
    [("dark 8-bit jpeg", 255), ("16-bit png", 65535), ("16-bit colour tiff", 65535), ("float tiff", 1)],
)
def test_transformers_is_told_the_scale_of_the_pixels(tmp_path: Path, kind: str, full_scale: int) -> None:
    """What its image processor computes from the stored pixels is what the model was trained on."""
    folder = write_all(tmp_path / "data", kind)
    preprocess = Preprocess.of_data(resolve(Settings(str(folder), scenes()[0].shape)))
    preprocess.save(tmp_path)
    told = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert told["do_rescale"] == (full_scale != 1) and told["rescale_factor"] == pytest.approx(1 / full_scale)
    path = min(folder.iterdir())
    stored = tifffile.imread(path) if "tiff" in kind else np.array(Image.open(path))
    stored = stored.astype(np.float64) if stored.ndim == 3 else stored.astype(np.float64)[..., None].repeat(3, -1)
    theirs = (stored * told["rescale_factor"] - told["image_mean"]) / told["image_std"]
    np.testing.assert_allclose(preprocess(path)[0].permute(1, 2, 0).numpy(), theirs, atol=1e-3)
    again = Preprocess.of_directory(tmp_path, preprocess.size, 3)
    assert again.full_scale == pytest.approx(full_scale) and again.mean == preprocess.mean


def test_an_array_on_another_scale_is_said() -> None:
    preprocess = Preprocess((16, 16), **IMAGENET)
    eight_bit = (255 * scenes()[0]).round()[..., None].repeat(3, -1)
    with pytest.warns(UserWarning, match=r"pictures reach \d+ .*divide 8-bit values by 255 first"):
        preprocess(eight_bit)
    torch.testing.assert_close(preprocess(eight_bit / 255), preprocess(eight_bit.astype(np.uint8)))


@pytest.mark.parametrize(
    ("array", "error", "message"),
    [
        (np.zeros((3, 16, 16), np.float32), CorruptSampleError, r"shape \(3, 16, 16\).*\[height, width, channels\]"),
        (np.zeros(5), CorruptSampleError, "expected numbers of shape"),
        (np.zeros((4, 4), complex), CorruptSampleError, "type complex128"),
        (np.full((4, 4), np.inf), CorruptSampleError, "16 of 16 pixels are NaN or infinite"),
        (np.zeros((4, 4, 2), np.uint8), None, ""),
        (np.zeros((4, 4, 5), np.uint8), ChannelsError, "has 5 channels, expected 6"),
    ],
)
def test_arrays_that_are_no_pictures(array: np.ndarray, error: type[Exception] | None, message: str) -> None:
    if error is None:  # grey with alpha, laid on white
        assert Preprocess((4, 4), **IMAGENET)(array).shape == (1, 3, 4, 4)
        return
    channels = 6 if error is ChannelsError else 3
    with pytest.raises(error, match=message):
        Preprocess((4, 4), (0.5,) * channels, (0.2,) * channels)(array)
