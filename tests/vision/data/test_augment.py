"""Crops and flips: the torchvision operation, its statistics, and draws that belong to the sample."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import RandomResizedCrop, functional

from unmask.core.randomness import SampleKey
from unmask.vision.data.augment import Box, crop, denormalise, draw_crop, fit, normalise, to_unit

RATIO = (3 / 4, 4 / 3)


def keys(n: int) -> list[SampleKey]:
    return [SampleKey.of(0, i, 3).stream("augment") for i in range(n)]


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_crop_is_torchvisions_resized_crop(channels, mode):
    image = torch.rand(channels, 40, 50)
    box = Box(3, 7, 21, 30)
    expected = functional.resized_crop(image, *box, [16, 24], InterpolationMode(mode), antialias=True)
    torch.testing.assert_close(crop(image, box, (16, 24), mode), expected)
    pixels = (image * 255).to(torch.uint8)
    expected = functional.resized_crop(pixels, *box, [16, 24], InterpolationMode(mode), antialias=True)
    assert (crop(pixels, box, (16, 24), mode).int() - expected.int()).abs().max() <= 1


def test_boxes_have_the_wanted_areas_and_shapes():
    boxes = [draw_crop(key, 200, 200, (0.2, 1.0), RATIO)[0] for key in keys(4000)]
    area = torch.tensor([box.height * box.width / 200**2 for box in boxes])
    shape = torch.tensor([math.log(box.width / box.height) for box in boxes])
    assert area.min() > 0.19 and area.max() <= 1
    assert shape.min() > math.log(0.74) and shape.max() < math.log(1.36) and abs(shape.mean()) < 0.01
    theirs = RandomResizedCrop(32, (0.2, 1.0), RATIO)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [theirs.make_params([torch.empty(3, 200, 200)]) for _ in range(4000)]
    their_area = torch.tensor([box["height"] * box["width"] / 200**2 for box in drawn])
    assert abs(area.mean() - their_area.mean()) < 0.015 and abs(area.std() - their_area.std()) < 0.015
    assert all(box.top + box.height <= 200 and box.left + box.width <= 200 for box in boxes)
    tops = torch.tensor([box.top / (200 - box.height) for box in boxes if box.height < 150])
    assert abs(tops.mean() - 0.5) < 0.03 and tops.min() < 0.02 and tops.max() > 0.98


def test_half_of_the_coins_flip():
    coins = torch.tensor([draw_crop(key, 32, 32, (0.2, 1.0), RATIO)[1] for key in keys(4000)])
    assert abs((coins < 0.5).float().mean() - 0.5) < 0.03


@pytest.mark.parametrize(("height", "width", "expected"), [(10, 100, (10, 13)), (100, 10, (13, 10)), (1, 1, (1, 1))])
def test_images_too_elongated_for_any_try_fall_back_to_the_centre(height, width, expected):
    box, _ = draw_crop(keys(1)[0], height, width, (1.0, 1.0), RATIO)
    assert (box.height, box.width) == expected
    assert box.top == (height - box.height) // 2 and box.left == (width - box.width) // 2


def test_whole_image_crop_is_the_image():
    image = torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8)
    box, _ = draw_crop(keys(1)[0], 28, 28, (1.0, 1.0), (1.0, 1.0))
    assert box == (0, 0, 28, 28)
    assert torch.equal(crop(image, box, (28, 28), "bicubic"), image)


def test_fit_does_not_touch_an_image_of_the_size():
    image = torch.randint(0, 256, (1, 28, 28), dtype=torch.uint8)
    assert fit(image, (28, 28), "bicubic") is image


@pytest.mark.parametrize(("size", "wanted"), [((60, 40), (20, 20)), ((40, 60), (20, 20)), ((30, 90), (10, 20))])
def test_fit_keeps_proportions_and_the_centre(size, wanted):
    rows, columns = torch.meshgrid(torch.arange(size[0]) * 1.0, torch.arange(size[1]) * 1.0, indexing="ij")
    fitted = fit(torch.stack([rows, columns]), wanted, "bilinear")
    assert fitted.shape[1:] == wanted
    torch.testing.assert_close(fitted.mean((1, 2)), torch.tensor([(size[0] - 1) / 2, (size[1] - 1) / 2]))
    step = (fitted[:, -2, -2] - fitted[:, 1, 1]) / torch.tensor([wanted[0] - 3.0, wanted[1] - 3.0])
    torch.testing.assert_close(step[0], step[1], rtol=0.02, atol=0)


def test_normalise_and_back():
    images = torch.rand(2, 3, 4, 4)
    there = normalise(images, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    torch.testing.assert_close(there[:, 1], (images[:, 1] - 0.2) / 0.6)
    torch.testing.assert_close(denormalise(there, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)), images)
    assert to_unit(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [0, 1]
