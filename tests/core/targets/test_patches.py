"""Patch vectors: layouts, rectangles, round trips, normalisation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from unmask.core.targets import denormalize_patches, normalize_patches, patchify, unpatchify

SHAPES = [((3, 8, 8), 4), ((1, 6, 10), 2), ((4, 8, 12), (4, 3)), ((5, 4, 6), (2, 6))]


@pytest.mark.parametrize("layout", ["channels_last", "channels_first"])
@pytest.mark.parametrize(("shape", "patch"), SHAPES)
def test_round_trip(shape: tuple[int, int, int], patch: int | tuple[int, int], layout: str) -> None:
    images = torch.randn(2, *shape)
    ph, pw = (patch, patch) if isinstance(patch, int) else patch
    grid = (shape[1] // ph, shape[2] // pw)
    patches = patchify(images, patch, layout)
    assert patches.shape == (2, grid[0] * grid[1], ph * pw * shape[0])
    assert torch.equal(unpatchify(patches, patch, grid, layout), images)


def test_order_by_hand() -> None:
    """Values name their (channel, row, column): raster patches; inside, the layout's axes."""
    c, y, x = torch.meshgrid(torch.arange(2), torch.arange(4), torch.arange(6), indexing="ij")
    image = (100 * c + 10 * y + x).float()[None]
    second_row_first_patch = 3
    last = patchify(image, 2)[0, second_row_first_patch]
    assert last.tolist() == [20, 120, 21, 121, 30, 130, 31, 131]
    first = patchify(image, 2, "channels_first")[0, second_row_first_patch]
    assert first.tolist() == [20, 21, 30, 31, 120, 121, 130, 131]


def test_channels_first_is_what_unfold_and_pixel_shuffle_use() -> None:
    images = torch.randn(2, 3, 8, 12)
    patches = patchify(images, 4, "channels_first")
    assert torch.equal(patches, F.unfold(images, 4, stride=4).transpose(1, 2))
    folded = patches.transpose(1, 2).reshape(2, 48, 2, 3)
    assert torch.equal(F.pixel_shuffle(folded, 4), images)


def test_a_patch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="5 x 5 pixels do not divide an image of 8 x 8"):
        patchify(torch.zeros(1, 1, 8, 8), 5)


def test_normalisation_is_unbiased_with_its_closed_form() -> None:
    """With the unbiased variance, the mean square of a normalised patch is (n - 1) / n * var / (var + eps)."""
    patches = torch.randn(4, 9, 48, dtype=torch.float64) * 0.3 + 2
    normalized = normalize_patches(patches)
    var = patches.var(-1, unbiased=True)
    torch.testing.assert_close(normalized.mean(-1), torch.zeros_like(var))
    torch.testing.assert_close(normalized.square().mean(-1), 47 / 48 * var / (var + 1e-6))


def test_denormalise_undoes_normalise_and_constants_are_safe() -> None:
    patches = torch.randn(2, 3, 16)
    torch.testing.assert_close(denormalize_patches(normalize_patches(patches), patches), patches)
    assert torch.equal(normalize_patches(torch.full((1, 1, 16), 0.5)), torch.zeros(1, 1, 16))
