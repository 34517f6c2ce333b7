"""Images as sequences of patch vectors: any number of channels, any rectangle, both layouts."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

Layout = Literal["channels_last", "channels_first"]


def patchify(
    images: Float[Tensor, "batch channels height width"],
    patch_size: int | tuple[int, int],
    layout: Layout = "channels_last",
) -> Float[Tensor, "batch tokens values"]:
    """Cut images into non-overlapping patches, in raster order.

    Args:
        images: any number of channels, any height and width that the patch divides.
        patch_size: pixels, or (height, width).
        layout: order inside a patch vector: ``channels_last`` is (row, column, channel), as in MAE;
            ``channels_first`` is (channel, row, column), as in a convolution's weight or a pixel shuffle.

    Raises:
        ValueError: the patch does not divide the image.
    """
    ph, pw = _pair(patch_size)
    b, c, height, width = images.shape
    if height % ph or width % pw:
        raise ValueError(f"patches of {ph} x {pw} pixels do not divide an image of {height} x {width}")
    x = images.reshape(b, c, height // ph, ph, width // pw, pw)
    x = x.permute(0, 2, 4, 3, 5, 1) if layout == "channels_last" else x.permute(0, 2, 4, 1, 3, 5)
    return x.reshape(b, (height // ph) * (width // pw), ph * pw * c)


def unpatchify(
    patches: Float[Tensor, "batch tokens values"],
    patch_size: int | tuple[int, int],
    grid: tuple[int, int],
    layout: Layout = "channels_last",
) -> Float[Tensor, "batch channels height width"]:
    """The inverse of `patchify`.

    Args:
        patches: one vector per patch, in raster order.
        patch_size: as given to `patchify`.
        grid: patches along (height, width).
        layout: as given to `patchify`.
    """
    (ph, pw), (rows, columns) = _pair(patch_size), grid
    b, _, values = patches.shape
    c = values // (ph * pw)
    if layout == "channels_last":
        x = patches.reshape(b, rows, columns, ph, pw, c).permute(0, 5, 1, 3, 2, 4)
    else:
        x = patches.reshape(b, rows, columns, c, ph, pw).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(b, c, rows * ph, columns * pw)


def normalize_patches(
    patches: Float[Tensor, "batch tokens values"], eps: float = 1e-6
) -> Float[Tensor, "batch tokens values"]:
    """Per-patch normalised targets of MAE: ``(x - mean) / sqrt(var + eps)``, with the **unbiased** variance.

    Mean and variance are taken over all values of a patch, channels mixed (arXiv 2111.06377, section 4.1; the unbiased
    estimate is the released code's).
    """
    var, mean = _statistics(patches)
    return (patches - mean) / (var + eps).sqrt()


def denormalize_patches(
    normalized: Float[Tensor, "batch tokens values"],
    patches: Float[Tensor, "batch tokens values"],
    eps: float = 1e-6,
) -> Float[Tensor, "batch tokens values"]:
    """Undo `normalize_patches` with the statistics of the true `patches`, to show predictions as images."""
    var, mean = _statistics(patches)
    return normalized * (var + eps).sqrt() + mean


def _statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    return patches.var(dim=-1, keepdim=True, unbiased=True), patches.mean(dim=-1, keepdim=True)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size
