"""Images of a method at work: as they are, what the encoder sees, and what is answered."""

from __future__ import annotations

import io

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from unmask.core.mask import Mask
from unmask.core.report.gather import RunFacts
from unmask.core.report.parts import Picture, Pictures, data_address
from unmask.core.report.pictures import Shown, draw_with
from unmask.vision.data.augment import denormalise

SAMPLES = 8
TITLES = {"input": "original", "masked": "what the encoder sees", "reconstruction": "reconstruction"}
_HIDDEN = (0.45, 0.49, 0.55)  # a cool grey that neither black nor white images contain


def draw_pictures(run: RunFacts) -> Pictures:
    """Mask and reconstruct `SAMPLES` validation images with the run's weights."""
    return draw_with(run, SAMPLES, _draw)


def _draw(shown: Shown) -> Pictures:
    recipe = shown.run.recipe
    images = shown.run.method.picture(shown.batch, shown.plan)  # type: ignore[operator]  # `draw_with` saw it there
    if not images:
        return Pictures(note=f"{recipe.method} draws no pictures.")
    panels = {name: to_rgb(x, recipe.data.mean, recipe.data.std) for name, x in images.items()}
    mask = getattr(shown.plan, "mask", None)
    if "masked" in panels and isinstance(mask, Mask):
        panels["masked"] = shade(panels["masked"], mask.hidden)
    samples = [
        Picture(sample, [(TITLES.get(name, name), _png(x[i])) for name, x in panels.items()])
        for i, sample in enumerate(shown.names)
    ]
    note = f"{len(samples)} validation images, evenly spaced, at step {shown.run.step:,}."
    if "reconstruction" in panels:
        note += " Visible patches are copied into the reconstruction; only hidden ones are the model's."
    if getattr(recipe.model, "norm_pix", False):
        note += " They are predicted relative to each patch and put back to scale with its true mean and deviation."
    if not _displayable(recipe.data.mean, recipe.data.std):
        note += " Contrast is stretched: black and white lie 2.5 standard deviations from the mean."
    return Pictures(samples, note + _channels_note(next(iter(images.values())).shape[1]))


def _channels_note(channels: int) -> str:
    if channels in (1, 3):
        return ""
    return f" Of the {channels} channels {'the first is' if channels == 2 else 'the first three are'} shown."


def to_rgb(
    images: Shaped[Tensor, "batch channels height width"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Tensor, "batch 3 height width"]:
    """Images back from normalised units to [0, 1], with three channels.

    Where their own values would give a flat picture, mean -+ 2.5 deviations become 0 and 1.
    """
    if not _displayable(mean, std):
        mean, std = (0.5,) * len(mean), (0.2,) * len(std)
    pixels = denormalise(images.float(), mean, std)
    pixels = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)
    return pixels.clamp(0, 1)


def _displayable(mean: tuple[float, ...], std: tuple[float, ...]) -> bool:
    """Whether values of this mean and deviation show something on a scale from black, 0, to white, 1."""
    return all(0 <= value <= 1 for value in mean) and all(0.05 <= value <= 1 for value in std)


def shade(
    images: Float[Tensor, "batch 3 height width"], hidden: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch 3 height width"]:
    """Hidden patches in one flat colour where tokens are square patches in raster order; else the images unchanged."""
    height, width = images.shape[-2:]
    side = round((height * width / hidden.shape[1]) ** 0.5)
    if side == 0 or height % side or width % side or (height // side) * (width // side) != hidden.shape[1]:
        return images
    grid = hidden.view(-1, 1, height // side, width // side)
    wide = grid.repeat_interleave(side, 2).repeat_interleave(side, 3)
    return torch.where(wide, torch.tensor(_HIDDEN).view(1, 3, 1, 1), images)


def _png(image: Float[Tensor, "3 height width"]) -> str:
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8), format="png")
    return data_address(buffer.getvalue())
