"""The augmentation of the masked-image papers: a random crop, resized, and a flip; keyed by sample.

MAE (arXiv 2111.06377) and SimMIM (arXiv 2111.09886) use nothing else: no colour jitter. A crop follows torchvision's
``RandomResizedCrop``: up to ten tries for a box of the wanted share and shape, then the largest centred one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional

from unmask.core.randomness import SampleKey

Interpolation = Literal["bilinear", "bicubic"]
_TRIES = 10


class Box(NamedTuple):
    """A crop in pixels."""

    top: int
    left: int
    height: int
    width: int


def draw_crop(
    key: SampleKey, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[Box, float]:
    """A random box, and a uniform in [0, 1) for the flip.

    Args:
        key: the sample's key of the stream ``augment``.
        height: rows of the image.
        width: columns of the image.
        scale: least and largest share of the image's area.
        ratio: least and largest width / height; the logarithm is uniform.
    """
    draws = key.uniform(5)  # nearly always the first try fits; the rest is drawn when it does not
    for attempt in range(_TRIES):
        if attempt == 1:
            draws = key.uniform(1 + 4 * _TRIES)
        box = _try_box(draws[1 + 4 * attempt : 5 + 4 * attempt], height, width, scale, ratio)
        if box is not None:
            return box, draws[0]
    return _centre_box(height, width, ratio), draws[0]


def _try_box(
    draws: Sequence[float], height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box | None:
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    shape = math.exp(low + (high - low) * draws[1])
    w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
    if not (0 < w <= width and 0 < h <= height):
        return None
    return Box(int(draws[2] * (height - h + 1)), int(draws[3] * (width - w + 1)), h, w)


def _centre_box(height: int, width: int, ratio: tuple[float, float]) -> Box:
    """The largest centred box whose width / height is within `ratio`."""
    h, w = height, width
    if width / height < ratio[0]:
        h = min(height, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = min(width, round(height * ratio[1]))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def crop(
    image: Shaped[Tensor, "c h w"], box: Box, size: tuple[int, int], interpolation: Interpolation
) -> Shaped[Tensor, "c rows columns"]:
    """The box resized to `size` with antialiasing, in the image's dtype: what torchvision's ``resized_crop`` gives."""
    top, left, height, width = box
    part = image[:, top : top + height, left : left + width]
    if (height, width) == size:
        return part
    return functional.interpolate(part[None], size, mode=interpolation, antialias=True)[0]


def fit(
    image: Shaped[Tensor, "c h w"], size: tuple[int, int], interpolation: Interpolation
) -> Shaped[Tensor, "c rows columns"]:
    """The image without randomness: the largest centred part of the shape of `size`, resized to it.

    An image that has the size already is returned as it is.
    """
    height, width = image.shape[-2:]
    if (height, width) == size:
        return image
    scale = min(height / size[0], width / size[1])
    h, w = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    return crop(image, Box((height - h) // 2, (width - w) // 2, h, w), size, interpolation)


def to_unit(image: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
    """uint8 0..255 as float32 0..1; floating point stays as it is."""
    return image.float() / 255 if image.dtype == torch.uint8 else image


def normalise(
    images: Float[Tensor, "*batch c h w"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Tensor, "*batch c h w"]:
    """(image - mean) / std per channel; `mean` and `std` on the scale of `to_unit`."""
    return (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def denormalise(
    images: Float[Tensor, "*batch c h w"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Tensor, "*batch c h w"]:
    """The inverse of `normalise`, for pictures."""
    return images * images.new_tensor(std)[:, None, None] + images.new_tensor(mean)[:, None, None]
