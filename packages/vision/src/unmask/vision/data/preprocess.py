"""From pictures to what an encoder takes, as evaluation does it: resized, cut to the centre, normalised."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from unmask.core.errors import UnmaskError
from unmask.vision.data.augment import Interpolation, fit, normalise, to_unit
from unmask.vision.data.decode import decode, from_array, from_picture
from unmask.vision.data.statistics import IMAGENET_MEAN, IMAGENET_STD

Picture = Image.Image | np.ndarray | str | Path
_FARTHEST = 10.0  # root mean square of normalised pictures above which they cannot be meant
_RESAMPLE = {"bilinear": 2, "bicubic": 3}  # PIL's numbers, which transformers' configuration uses


@dataclass(frozen=True)
class Preprocess:
    """Makes a normalised batch from pictures: ``preprocess([picture, "file.jpg"])``.

    The largest centred part with the shape of `size` is resized to it, and every channel normalised, as for evaluation.

    Args:
        size: (height, width) of the result, in pixels.
        mean: per channel, of values in [0, 1]; as many as the encoder has channels.
        std: likewise.
        interpolation: ``bicubic`` or ``bilinear``, both with antialiasing.
        full_scale: the stored value that is 1 to `mean` and `std`: 255, 65535, or 1 of floating point. Here the pixels'
            type says it; transformers has to be told.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation = "bicubic"
    full_scale: float = 255.0

    @classmethod
    def of_data(cls, data: Any) -> Preprocess:
        """What a run's data settings say."""
        return cls(data.image_size, tuple(data.mean), tuple(data.std), data.interpolation, data.full_scale or 255.0)

    @classmethod
    def of_directory(cls, path: str | Path, size: tuple[int, int], channels: int) -> Preprocess:
        """What a transformers directory's image processor says; ImageNet's statistics where there is none.

        Raises:
            UnmaskError: no image processor, and the images are not RGB.
        """
        from transformers import AutoImageProcessor

        try:
            processor = AutoImageProcessor.from_pretrained(str(path), trust_remote_code=False)
        except (OSError, ValueError):
            if channels != 3:
                raise UnmaskError(
                    f"{path}: no preprocessor_config.json, so the mean and deviation of its {channels} channels are "
                    "not known; add one (transformers.ViTImageProcessor(...).save_pretrained)"
                ) from None
            return cls(size, IMAGENET_MEAN, IMAGENET_STD)
        kind: Interpolation = "bilinear" if int(processor.resample) == _RESAMPLE["bilinear"] else "bicubic"
        full_scale = 1 / processor.rescale_factor if processor.do_rescale else 1.0
        return cls(size, tuple(processor.image_mean), tuple(processor.image_std), kind, full_scale)

    def save(self, out: Path) -> None:
        """Write it as transformers' image processor configuration."""
        from transformers import ViTImageProcessor

        height, width = self.size
        ViTImageProcessor(
            size={"shortest_edge": height},
            crop_size={"height": height, "width": width},
            do_center_crop=True,
            do_convert_rgb=len(self.mean) == 3,
            resample=_RESAMPLE[self.interpolation],
            do_rescale=self.full_scale != 1,
            rescale_factor=1 / self.full_scale,
            image_mean=list(self.mean),
            image_std=list(self.std),
        ).save_pretrained(out)

    def __call__(self, pictures: Picture | Sequence[Picture]) -> Float[Tensor, "batch channels height width"]:
        """A batch from one picture or several: PIL images, file names or numpy arrays, of any size and mode.

        Arrays are [height, width] or [height, width, channels]. Integers are divided by their type's largest value, as
        in files; floating point is taken as it is. Warns where the batch is far from the scale of the training images.

        Raises:
            UnmaskError: a file that is no picture, or a picture that cannot be given the encoder's channels.
        """
        if isinstance(pictures, np.ndarray):
            pictures = [pictures] if pictures.ndim < 4 else list(pictures)
        elif isinstance(pictures, Image.Image | str | Path):
            pictures = [pictures]
        batch = torch.stack([self._one(picture) for picture in pictures])
        scale = float(batch.double().square().mean().sqrt())
        if scale > _FARTHEST:
            warnings.warn(
                f"normalised by mean {self.mean} and std {self.std}, the pictures reach {scale:.3g} (root mean square; "
                "about 1 is expected): they are not on the scale of the training images. Floating point is taken as "
                "it is: divide 8-bit values by 255 first",
                stacklevel=2,
            )
        return batch

    def _one(self, picture: Picture) -> Float[Tensor, "channels height width"]:
        channels = len(self.mean)
        if isinstance(picture, Image.Image):
            pixels = from_picture(picture, channels)
        elif isinstance(picture, np.ndarray):
            pixels = from_array(picture, channels)
        else:
            pixels = decode(_bytes(picture), channels, str(picture))
        return normalise(to_unit(fit(pixels, self.size, self.interpolation)), self.mean, self.std)


def _bytes(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UnmaskError(f"{path}: cannot be read ({error.strerror})") from None
