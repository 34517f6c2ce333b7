"""Images of a method at work, as PNG data that an HTML page can hold."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unmask.core import registry
from unmask.core.errors import UnmaskError
from unmask.core.mask import Mask
from unmask.core.method import Clock, to_device
from unmask.core.randomness import Key
from unmask.core.report.gather import RunFacts
from unmask.core.training.checkpoint import load_run

SAMPLES = 8
NAMES = {"input": "original", "masked": "what the encoder sees", "reconstruction": "reconstruction"}
_HIDDEN = (0.45, 0.49, 0.55)  # a cool grey that neither black nor white images contain


@dataclass(frozen=True)
class Picture:
    """One sample's images, in the order of `NAMES`.

    Args:
        name: of the sample.
        images: (what it shows, PNG as a data address).
    """

    name: str
    images: list[tuple[str, str]]


@dataclass(frozen=True)
class Pictures:
    """What the gallery shows, or why it is empty.

    Args:
        samples: may be empty.
        note: says what is seen, or what is missing.
        parameters: of the whole method, where it could be loaded.
        wide: each sample has one picture that wants the whole width.
    """

    samples: list[Picture]
    note: str
    parameters: int | None = None
    wide: bool = False


def draw_pictures(run: RunFacts) -> Pictures:
    """Mask and reconstruct `SAMPLES` validation samples with the run's weights, keyed so that a report repeats."""
    try:
        loaded = load_run(run.path)
    except UnmaskError as error:
        return Pictures([], f"No pictures: {error}")
    parameters = sum(p.numel() for p in loaded.method.parameters())
    if not hasattr(loaded.method, "picture"):
        return Pictures([], f"{run.card.id} draws no pictures.", parameters)
    part = registry.data_kind(run.card.id)
    try:
        dataset = part.open_split(loaded.recipe.data, "val", seed=loaded.recipe.seed, augment=False)
        chosen = torch.linspace(0, len(dataset) - 1, min(SAMPLES, len(dataset))).long().tolist()
        batch = to_device(part.collate([dataset[index, 0] for index in chosen]), "cpu")
    except UnmaskError as error:
        return Pictures([], f"No pictures: {error}", parameters)
    key = Key.of(loaded.recipe.seed, batch.ids, 0).stream("plan")
    method: Any = loaded.method
    with torch.no_grad():
        plan = method.draw(batch, Clock(loaded.step, max(1, loaded.step)), key)
        images = method.picture(batch, plan)
    if not images:
        return Pictures([], f"{run.card.id} draws no pictures.", parameters)
    data, shown = loaded.recipe.data, {}
    for name, normalised in images.items():
        shown[name] = to_rgb(normalised, data.mean, data.std)
    mask = getattr(plan, "mask", None)
    if "masked" in shown and isinstance(mask, Mask):
        shown["masked"] = shade(shown["masked"], mask.hidden)
    names = [dataset.name_of(int(i)) for i in batch.ids]
    pictures = [
        Picture(sample, [(NAMES.get(name, name), png(x[i])) for name, x in shown.items()])
        for i, sample in enumerate(names)
    ]
    note = (
        f"{len(names)} validation images, evenly spaced, at step {loaded.step:,}. Visible patches are copied into the "
        "reconstruction; only hidden ones are the model's."
    )
    if getattr(loaded.recipe.model, "norm_pix", False):
        note += " They are predicted relative to each patch and put back to scale with its true mean and deviation."
    if not _displayable(data.mean, data.std):
        note += " Contrast is stretched: black and white lie 2.5 standard deviations from the mean."
    return Pictures(pictures, note + _channels_note(batch.images.shape[1]), parameters)


def _channels_note(channels: int) -> str:
    if channels in (1, 3):
        return ""
    return f" Of the {channels} channels {'the first is' if channels == 2 else 'the first three are'} shown."


def to_rgb(
    images: Float[Tensor, "batch channels height width"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Tensor, "batch 3 height width"]:
    """Images back from normalised units to [0, 1], with three channels.

    Where their own values would give a flat picture, mean -+ 2.5 deviations become 0 and 1.
    """
    if not _displayable(mean, std):
        mean, std = (0.5,) * len(mean), (0.2,) * len(std)
    shape = (1, -1, 1, 1)
    pixels = images.float() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
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


def png(image: Float[Tensor, "3 height width"]) -> str:
    """A PNG as a data address."""
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8), format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
