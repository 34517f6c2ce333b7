"""Images for training and evaluation: what to read, how to augment it, which split it belongs to.

A dataset is asked for ``(index, visit)``; the random crop and flip of a sample are a function of (seed, sample id,
visit) alone, so they do not depend on the batch, the worker or a resume. The parts, beside this module: `sources` finds
the images, `decode` reads them, `augment` crops them; `unmask.core.data.splits` divides them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from pydantic import BeforeValidator, Field
from torch import Tensor

from unmask.core.data.dataset import SplitDataset
from unmask.core.data.sources import Split, absolute, members_of
from unmask.core.errors import Problem
from unmask.core.networks import Network
from unmask.core.randomness import SampleKey, stable_id
from unmask.vision.data.augment import Interpolation, crop, draw_crop, fit, normalise, to_unit
from unmask.vision.data.embedded.carriers import CARRIERS
from unmask.vision.data.pictures import draw_map, size_of, statistics_of, write_samples
from unmask.vision.data.sources import IMAGES, Source, open_source
from unmask.vision.data.statistics import choose_statistics, full_scale, training_notes

__all__ = [
    "CARRIERS", "ImageBatch", "Images", "Problem", "Sample", "Settings", "collate", "draw_map", "inputs_of",
    "open_split", "resolve", "settings_for", "write_samples",
]  # fmt: skip

_AUGMENT = stable_id("augment")


def _square(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Settings:
    """Which images, and how they are given to a model.

    Args:
        source: a folder of images, of tar shards or of parquet files; or an embedded set: ``mnist5k``, ``photographs``,
            ``fmnist``, ``cifar10``, ``digits``. An embedded set's name wins over a folder's: write ``./digits`` then.
        image_size: rows and columns given to the model; one number means a square (in a recipe).
        channels: channels given to the model. Grey and RGB are converted into each other; others must match.
        mean: per channel, on the scale 0..1 of integer pixels, or that of floating point ones. None: measured on up to
            1000 training images; three channels near ImageNet's statistics (as 8-bit photographs are: means within one
            deviation, deviations within a factor of 2) take ImageNet's instead.
        std: like `mean`; give both or neither.
        full_scale: the stored value that is 1 on this scale, for exports: 255; 65535 of 16-bit pixels; 1 of floating
            point. None: taken from the first training image.
        crop_scale: least and largest share of the image that a random crop covers.
        crop_ratio: least and largest width / height of a random crop.
        flip: probability of a left-right flip; 0 for digits, letters and anything else with a handedness.
        interpolation: how crops are resized (with antialiasing).
        corrupt: ``skip`` counts and names unreadable images and goes on without them; ``fatal`` stops at them.
        val_share: share of the training images set aside where the data have no val split (and again for test where
            they have labels and no test split). Embedded sets have fixed splits.
    """

    source: str
    image_size: Annotated[tuple[Positive, Positive], BeforeValidator(_square)]
    channels: Positive = 3
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    full_scale: float | None = None
    interpolation: Interpolation = "bicubic"
    corrupt: Literal["skip", "fatal"] = "skip"
    val_share: Share = 0.1

    free_to_change: ClassVar[frozenset[str]] = frozenset({"source", "corrupt"})
    filled_in: ClassVar[frozenset[str]] = frozenset({"mean", "std", "full_scale"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", tuple(_square(self.image_size)))
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale is {self.crop_scale}; expected 0 < least <= largest <= 1")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_ratio is {self.crop_ratio}; expected 0 < least <= largest")
        if (self.mean is None) != (self.std is None):
            raise ValueError("give both mean and std, or neither")
        for name, value in (("mean", self.mean), ("std", self.std)):
            if value is not None and len(value) != self.channels:
                raise ValueError(f"{name} has {len(value)} values; expected one for each of {self.channels} channels")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std is {self.std}; expected positive values")


class Sample(NamedTuple):
    """One image: normalised pixels, its id, and its class index or None."""

    image: Float[Tensor, "channels rows columns"]
    id: int
    label: int | None


@dataclass(frozen=True)
class ImageBatch:
    """What an image method trains on.

    Args:
        images: normalised pixels.
        ids: the samples' stable ids (see `unmask.core.randomness`).
        labels: class indices, or None.
    """

    images: Float[Tensor, "batch channels rows columns"]
    ids: Int[Tensor, "batch"]
    labels: Int[Tensor, "batch"] | None = None


class Images(SplitDataset[Sample]):
    """One split of a source: ``dataset[index, visit]`` is a `Sample`; see `unmask.core.data.dataset.SplitDataset`.

    A batch sampler that yields lists of (index, visit) works too, and is faster.

    Args:
        source: where the images are.
        members: which of them belong to the split.
        settings: with mean and std set.
        seed: of the augmentation.
        augment: random crop and flip, or the largest centred part.
    """

    kind = IMAGES
    settings: Settings
    labels: Int[Tensor, "n"] | None
    classes: list[str] | None

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        batch = self.__getitems__([item])
        return Sample(batch.images[0], int(batch.ids[0]), None if batch.labels is None else int(batch.labels[0]))

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> ImageBatch:
        """The batch of several (index, visit): what `collate` makes of them one by one, with less overhead."""
        images = self._source.images if isinstance(self._source, Source) else None
        if images is not None and not self.augment and images.shape[-2:] == self.settings.image_size:
            indices = torch.tensor([index for index, _ in items])
            pixels = to_unit(images[self._members[indices]])
        else:
            read = [self._sample(*item) for item in items]
            indices = torch.tensor([index for _, index in read])
            pixels = _stack([image for image, _ in read])
        assert self.settings.mean is not None and self.settings.std is not None
        labels = None if self.labels is None else self.labels[indices]
        return ImageBatch(normalise(pixels, self.settings.mean, self.settings.std), self.ids[indices], labels)

    def _sample(self, index: int, visit: int) -> tuple[Tensor, int]:
        """Pixels of the wanted size, and the index that they come from in the end."""
        image, index = self.read(index)
        settings = self.settings
        if not self.augment:
            return fit(image, settings.image_size, settings.interpolation), index
        key = SampleKey.of(self.seed, int(self.ids[index]), visit).stream(_AUGMENT)
        box, coin = draw_crop(key, image.shape[-2], image.shape[-1], settings.crop_scale, settings.crop_ratio)
        image = crop(image, box, settings.image_size, settings.interpolation)
        return (image.flip(-1) if coin < settings.flip else image), index

    def read(self, index: int) -> tuple[Shaped[Tensor, "c h w"], int]:
        """The image at `index` as it is stored, or the next good one after it, and where that is.

        Raises:
            UnmaskError: it is damaged and `Settings.corrupt` is ``fatal``, or the whole split is.
        """
        return self.first_good(index, lambda at: (self.read_plain(at), at))

    def read_plain(self, index: int) -> Shaped[Tensor, "c h w"]:
        """The image at `index` as it is stored; raises `CorruptSampleError` where it is damaged."""
        image: Tensor = self._source.read(int(self._members[index]), self.settings.channels)
        return image

    def notes(self, batch_size: int) -> list[str]:
        """What to say before training on this split: how it is normalised, with a warning where that does not suit."""
        return [*training_notes(self), *super().notes(batch_size)]


def _stack(images: list[Tensor]) -> Float[Tensor, "batch c h w"]:
    """Images on the scale 0..1, whatever mix of dtypes they came in."""
    if all(image.dtype == torch.uint8 for image in images):
        return to_unit(torch.stack(images))
    return torch.stack([to_unit(image) for image in images])


def collate(samples: Sequence[Sample] | ImageBatch) -> ImageBatch:
    """Samples of one dataset as a batch; a batch that the dataset made itself passes through."""
    if isinstance(samples, ImageBatch):
        return samples
    labels = [sample.label for sample in samples if sample.label is not None]
    return ImageBatch(
        torch.stack([sample.image for sample in samples]),
        torch.tensor([sample.id for sample in samples]),
        torch.tensor(labels) if labels else None,
    )


def open_split(settings: Settings, split: Split, *, seed: int = 0, augment: bool = False) -> Images:
    """The images of one split.

    Args:
        settings: what to read; mean and std are worked out if they are not set (`resolve` does it once).
        split: ``all`` is every image, also those that were dropped because they are twice in the set.
        seed: of the augmentation.
        augment: random crop and flip; else the largest centred part, resized.

    Raises:
        SourceError: there are no images, or none in this split.
    """
    if settings.mean is None:
        settings = resolve(settings)
    source = open_source(settings.source, settings.channels, settings.corrupt)
    members = members_of(source, split, settings.val_share, settings.source, IMAGES)
    return Images(source, members, settings, seed=seed, augment=augment)


def resolve(settings: Settings) -> Settings:
    """The same settings with an absolute path, mean, std and full scale filled in: what a run records.

    Fetches an embedded set where needed and decodes training images: one, or those that are measured.

    Raises:
        SourceError: there are no images to train on.
        ChannelsError: the images have other channels than `settings` says.
        UnmaskError: mean and std are to be measured, and every pixel has the same value.
    """
    plain = replace(settings, mean=(0.0,) * settings.channels, std=(1.0,) * settings.channels)
    train = open_split(plain, "train")
    settings = replace(absolute(settings, IMAGES.sets), full_scale=settings.full_scale or full_scale(train.read(0)[0]))
    if settings.mean is not None:
        return settings
    mean, std = choose_statistics(train)
    return replace(settings, mean=mean, std=std)


def settings_for(source: str, network: Network) -> Settings:
    """The settings that open `source` as a network from elsewhere takes its images.

    Raises:
        UnmaskError: size or normalisation of its images are not known.
    """
    mean, std = statistics_of(network)
    return Settings(source, size_of(network), channels=len(mean), mean=mean, std=std)


def inputs_of(batch: ImageBatch) -> Float[Tensor, "batch channels rows columns"]:
    """What a network is called with."""
    return batch.images
