"""Pictures from normalised images: generated samples, and maps over what they explain."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from unmask.core.errors import UnmaskError
from unmask.core.networks import Network
from unmask.vision.data.augment import denormalise
from unmask.vision.data.statistics import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from unmask.vision.data.images import Settings

_MAP_SHARE = 0.6  # of a picture's colour; the rest is the image
_SMALLEST = 224  # pixels of a map's picture, so that small images can be seen


def write_samples(
    samples: Float[Tensor, "count channels rows columns"], settings: Settings, folder: Path
) -> list[Path]:
    """Generated images, normalised as `settings` says, as PNG; of other channels than 1 and 3 as .npy, 0 to 1."""
    paths = []
    for i, image in enumerate(to_unit_scale(samples, settings)):
        path = folder / f"{i:04d}"
        if len(image) in (1, 3):
            path = path.with_suffix(".png")
            Image.fromarray(_bytes_of(image)).save(path)
        else:
            path = path.with_suffix(".npy")
            np.save(path, image.numpy())
        paths.append(path)
    return paths


def draw_map(
    inputs: Float[Tensor, "channels rows columns"], map: Float[Tensor, "rows columns"], settings: Settings, path: Path
) -> Path:
    """A heat map over a grey image: dark is the least of the map, bright the most."""
    from matplotlib import colormaps

    grey = to_unit_scale(inputs[None], settings)[0].mean(0)[..., None]
    heat = (map - map.min()) / (map.max() - map.min()).clamp(min=1e-12)
    colour = torch.from_numpy(colormaps["inferno"](heat.numpy())[..., :3]).float()
    mixed = _MAP_SHARE * colour + (1 - _MAP_SHARE) * grey
    picture = Image.fromarray(_bytes_of(mixed.permute(2, 0, 1)))
    factor = max(1, -(-_SMALLEST // min(picture.size)))
    path = path.with_name(f"{path.name}.png")
    picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST).save(path)
    return path


def to_unit_scale(
    images: Float[Tensor, "batch channels rows columns"], settings: Settings
) -> Float[Tensor, "batch channels rows columns"]:
    """Normalised images back on the scale 0 to 1."""
    assert settings.mean is not None and settings.std is not None
    return denormalise(images.float(), settings.mean, settings.std).clamp(0, 1)


def _bytes_of(image: Float[Tensor, "channels rows columns"]) -> np.ndarray:
    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def size_of(network: Network) -> tuple[int, int]:
    """Rows and columns of the images that a network takes.

    Raises:
        UnmaskError: neither the network nor its directory says.
    """
    embedding = getattr(network.module, "patch_embed", None)  # timm's configuration keeps the size of the published one
    facts = network.facts
    said = (getattr(embedding, "img_size", None), facts.get("crop_size"), facts.get("size"), facts.get("input_size"))
    for size in (*said, getattr(getattr(network.module, "config", None), "image_size", None)):
        if isinstance(size, dict):
            size = [size[name] for name in ("height", "width") if name in size] or list(size.values())[:1] * 2
        if size is not None:
            numbers = [size, size] if isinstance(size, int) else list(size)
            return int(numbers[-2]), int(numbers[-1])
    raise UnmaskError(
        f"{network.source}: neither the network nor its directory says what size of image it takes; add a "
        "preprocessor_config.json (transformers.ViTImageProcessor(...).save_pretrained)"
    )


def statistics_of(network: Network) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation that a network's images are normalised with.

    Those of its directory; where that says nothing, ImageNet's for three channels.

    Raises:
        UnmaskError: its directory says nothing, and it does not take three channels.
    """
    if network.mean is not None and network.std is not None:
        return network.mean, network.std
    channels = getattr(getattr(network.module, "config", None), "num_channels", 3)
    if channels != 3:
        raise UnmaskError(
            f"{network.source}: the mean and deviation of its {channels} channels are not known; add a "
            "preprocessor_config.json (transformers.ViTImageProcessor(...).save_pretrained)"
        )
    return IMAGENET_MEAN, IMAGENET_STD
