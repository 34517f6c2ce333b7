"""Mean and deviation of a set's pixels: what normalises the images, and whether it suits them.

An encoder sees contrast only where normalised images have a deviation of about 1. ImageNet's statistics give that for
8-bit photographs; sixteen-bit and infrared images often use a hundredth of their range, and floating point has any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float64, Shaped
from torch import Tensor

from unmask.core.errors import UnmaskError
from unmask.core.progress import progress_bar
from unmask.vision.data.augment import fit, to_unit

if TYPE_CHECKING:
    from unmask.vision.data.images import Images, Settings

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MEASURED = 1000  # images that mean and deviation are measured from
_CHECKED = 100  # images that tell whether given ones suit
_PIXELS = 250_000  # of an image as it is stored: of larger ones fewer are read, so that measuring takes seconds
_LEAST = 8  # images read however large they are
_DEVIATIONS = (0.3, 3.0)  # after normalising; outside, the input is said to be off
_FLAT = 0.1  # the middle image's deviation, relative to the whole set's, below which a few images dominate


@dataclass(frozen=True)
class Statistics:
    """What a set's images look like at the model's size, on the scale of `unmask.vision.data.augment.to_unit`.

    Args:
        mean: of each channel.
        std: of each channel; 0 where all pixels have one value.
        middle: the median over images of their own deviation, relative to `std` and averaged over channels.
        extreme: index of the image with the pixel farthest from the mean.
        images: how many were measured.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    middle: float
    extreme: int
    images: int


def measure(images: Images, at_most: int = MEASURED) -> Statistics:
    """Statistics of evenly spaced images, without augmentation; the same for the same images.

    Args:
        images: a split.
        at_most: so many images; fewer where they have more than 250,000 pixels on average, but at least 8.

    Raises:
        UnmaskError: none of the images can be read.
    """
    rows = []
    chosen = _choose(images, at_most)
    with progress_bar("measuring mean and deviation", len(chosen)) as advance:
        for index in chosen:
            rows.append(_moments(images, index))
            advance(1)
    return _summarise(torch.stack(rows), chosen)


def _choose(images: Images, at_most: int) -> list[int]:
    """Evenly spaced indices, as many as `measure` promises."""
    sizes = [images.read(index)[0].shape[-2:].numel() for index in _spaced(len(images), 4)]
    affordable = max(_LEAST, int(_PIXELS * at_most * len(sizes) / sum(sizes)))
    return _spaced(len(images), min(at_most, affordable))


def _spaced(total: int, n: int) -> list[int]:
    return torch.linspace(0, total - 1, min(total, n)).long().tolist()


def _moments(images: Images, index: int) -> Float64[Tensor, "4 channels"]:
    """Mean, mean square, least and largest value of each channel of an image."""
    settings = images.settings
    pixels = to_unit(fit(images.read(index)[0], settings.image_size, settings.interpolation)).double().flatten(1)
    return torch.stack([pixels.mean(1), pixels.square().mean(1), pixels.amin(1), pixels.amax(1)])


def _summarise(moments: Float64[Tensor, "n 4 channels"], chosen: Sequence[int]) -> Statistics:
    mean, square, least, largest = moments.unbind(1)  # each [n, channels]
    middle, spread = mean.mean(0), largest.amax(0) - least.amin(0)
    std = (square.mean(0) - middle.square()).clamp(min=0).sqrt()
    std[spread <= 1e-6 * torch.maximum(largest.amax(0).abs(), least.amin(0).abs())] = 0  # float32's rounding
    unit = torch.where(std > 0, std, 1.0)
    own = ((square - mean.square()).clamp(min=0).sqrt() / unit)[:, std > 0]
    distance = (torch.maximum(largest - middle, middle - least) / unit).amax(1)
    return Statistics(
        mean=tuple(middle.tolist()),
        std=tuple(std.tolist()),
        middle=float(own.mean(1).median()) if own.numel() else 1.0,
        extreme=chosen[int(distance.argmax())],
        images=len(chosen),
    )


def choose_statistics(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std to normalise by: ImageNet's where they are near, else the data's own.

    Near means: three channels, each with a mean within one of ImageNet's deviations of ImageNet's mean and a deviation
    of half to twice ImageNet's. A channel that never varies gets std 1.

    Args:
        images: to train on; up to `MEASURED` of them are looked at.

    Raises:
        UnmaskError: no channel varies, or none of the images can be read.
    """
    stats = measure(images)
    if not any(stats.std):
        values = ", ".join(f"{value:.6g}" for value in stats.mean)
        raise UnmaskError(
            f"{images.settings.source}: every pixel of the {stats.images} training images looked at has the same value "
            f"({values}), so there is nothing to learn from. Check how they were written, or give others with --data"
        )
    if len(stats.mean) == 3 and _near_imagenet(stats):
        return IMAGENET_MEAN, IMAGENET_STD
    digits = [_digits(value) for value in stats.std]
    mean = tuple(round(value, n) for value, n in zip(stats.mean, digits, strict=True))
    return mean, tuple(round(value, n) if value else 1.0 for value, n in zip(stats.std, digits, strict=True))


def _near_imagenet(stats: Statistics) -> bool:
    deviations, shifts = normalised(stats, IMAGENET_MEAN, IMAGENET_STD)
    return all(0.5 <= value <= 2 for value in deviations) and all(abs(value) <= 1 for value in shifts)


def _digits(std: float) -> int:
    """Decimals that keep six significant digits of a deviation, and never fewer than six decimals."""
    return max(6, 5 - int(torch.tensor(std).log10().floor())) if std else 6


def normalised(
    stats: Statistics, mean: Sequence[float], std: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Deviation and mean of each channel after normalising by `mean` and `std`."""
    deviations = tuple(own / given for own, given in zip(stats.std, std, strict=True))
    shifts = tuple((own - m) / s for own, m, s in zip(stats.mean, mean, std, strict=True))
    return deviations, shifts


def full_scale(image: Shaped[Tensor, "c h w"]) -> float:
    """The stored value that reads as 1: 255, 65535 where all pixels are multiples of 1/65535, 1 of floating point."""
    if image.dtype == torch.uint8:
        return 255.0
    steps = image.double() * 65535
    whole = (steps - steps.round()).abs().amax() < 0.01  # float32's rounding is 0.004 at most
    return 65535.0 if whole and steps.amin() >= 0 and steps.amax() <= 65535.5 else 1.0


def training_notes(images: Images) -> list[str]:
    """What to say before training on a split: how its images are normalised, and warnings where that does not suit.

    Looks at up to a hundred images, and at all that `choose_statistics` does where those are off.
    """
    stats, settings = measure(images, _CHECKED), images.settings
    if _off(stats, settings):
        stats = measure(images)
    off = _off(stats, settings)
    if off:
        off += (
            ", so training would learn little from them. Normalise by the data's own mean and std: "
            "--set data.mean=null --set data.std=null"
        )
    lines = [_how(stats, settings)]
    return lines + [f"warning: {text}" for text in (_constant(stats), off or _uneven(stats, images)) if text]


def _constant(stats: Statistics) -> str:
    """In words: which channels never vary."""
    same = [str(channel) for channel, std in enumerate(stats.std) if std == 0]
    if not same:
        return ""
    which = "every pixel" if len(same) == len(stats.std) else f"every pixel of channel {', '.join(same)} (from 0)"
    return f"{which} has the same value in the {stats.images} training images looked at; check how they were written"


def _uneven(stats: Statistics, images: Images) -> str:
    """In words: that a few images dominate the statistics."""
    if stats.middle >= _FLAT:
        return ""
    return (
        f"half of the training images are nearly flat beside the others: each has at most {stats.middle:.2g} of the "
        f"deviation of the whole set. The most extreme pixel is in {images.name_of(int(images.ids[stats.extreme]))}. "
        "Give all images the same scale, and missing or dead pixels an ordinary value"
    )


def transfer_notes(images: Images) -> list[str]:
    """What to say before a trained encoder is used on other images than its own: a warning where they are off scale."""
    stats = measure(images, _CHECKED)
    off = _off(stats, images.settings)
    if not off:
        return []
    return [
        f"warning: {images.settings.source}: {off}: these images are not on the scale of those that the run was "
        "trained on. Bring them to it, or train on images like these"
    ]


def _how(stats: Statistics, settings: Settings) -> str:
    assert settings.mean is not None and settings.std is not None
    numbers = f"mean {_numbers(settings.mean)} and std {_numbers(settings.std)}"
    if (settings.mean, settings.std) == (IMAGENET_MEAN, IMAGENET_STD):
        return f"images are normalised by ImageNet's {numbers}"
    deviations, shifts = normalised(stats, settings.mean, settings.std)
    own = all(0.8 <= d <= 1.25 or d == 0 for d in deviations) and all(abs(shift) <= 0.2 for shift in shifts)
    owner = "the data's own" if own else "the recipe's"
    return f"images are normalised by {owner} {numbers}"


def _off(stats: Statistics, settings: Settings) -> str:
    """In words: how far normalised images are from mean 0 and deviation 1; empty where that is near enough."""
    assert settings.mean is not None and settings.std is not None
    deviations, shifts = normalised(stats, settings.mean, settings.std)
    low, high = _DEVIATIONS
    if all(value == 0 or low <= value <= high for value in deviations) and max(map(abs, shifts)) <= high:
        return ""
    return (
        f"normalised by mean {_numbers(settings.mean)} and std {_numbers(settings.std)} the images have deviation "
        f"{_numbers(deviations)} (expected about 1) and mean {_numbers(shifts)} (about 0); their own mean is "
        f"{_numbers(stats.mean)}, their std {_numbers(stats.std)}"
    )


def _numbers(values: Sequence[float], shown: int = 4) -> str:
    """Up to `shown` numbers for a person; one where all are the same."""
    texts = [f"{value:.3g}" for value in values]
    if len(set(texts)) == 1:
        return texts[0]
    return "(" + ", ".join(texts[:shown]) + (", ...)" if len(texts) > shown else ")")
