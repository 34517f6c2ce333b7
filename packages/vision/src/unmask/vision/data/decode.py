"""Image files to tensors: grey, RGB, RGBA, 16 bits and any number of channels, converted to what a model wants.

* 8-bit pixels stay uint8; 16- and 32-bit integers become float32 in [0, 1] by their type's largest value; floating
  point is taken as it is, and must be finite.
* Grey becomes RGB by repetition, RGB becomes grey by luma (ITU-R BT.601). Transparent images are laid on white and
  lose their alpha, unless the model wants as many channels as there are. Any other mismatch is an error.
* Palettes and CMYK become RGB. JPEG orientation tags are followed. Of an animation the first frame counts; the pages of
  a TIFF are its channels.
"""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from unmask.core.data.kinds import CorruptSampleError
from unmask.core.errors import UnmaskError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm")
HEAD = 16  # bytes of a file that `complaint` looks at
_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"BM", b"P1", b"P2", b"P3", b"P4", b"P5", b"P6")
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_LUMA = (0.299, 0.587, 0.114)


class ChannelsError(UnmaskError):
    """An image whose channels do not fit the model's and cannot be converted."""


def complaint(head: bytes) -> str | None:
    """Why a file with these first `HEAD` bytes cannot be an image; None where they can be one's."""
    if not head:
        return "empty file"
    if head.startswith(_MAGIC + _TIFF) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP"):
        return None
    text = all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head)
    return "a text file, not an image" if text else "not an image in a known format"


def decode(data: bytes, channels: int, name: str) -> Shaped[Tensor, "channels h w"]:
    """The pixels of an image file.

    Args:
        data: the file's bytes.
        channels: how many channels to return.
        name: what to call the file in errors.

    Returns:
        uint8, or float32 for files with more than 8 bits a pixel; see the module's docstring.

    Raises:
        CorruptSampleError: not an image, damaged, or with pixels that are NaN or infinite.
        ChannelsError: it has another number of channels that cannot be converted.
    """
    reason = complaint(data[:HEAD])
    if reason:
        raise CorruptSampleError(reason, name)
    try:
        pixels, alpha = _read(data)
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:  # decoders raise whatever they like on damaged files
        raise CorruptSampleError(f"damaged ({str(error)[:200] or type(error).__name__})", name) from error
    return convert(_finite(pixels, name), channels, name, alpha)


def _finite(pixels: Tensor, name: str) -> Tensor:
    """The pixels, if every one is a number: a single NaN would make the whole model NaN."""
    if pixels.is_floating_point() and not pixels.isfinite().all():
        wrong = int((~pixels.isfinite()).any(0).sum())
        raise CorruptSampleError(
            f"{wrong} of {pixels[0].numel()} pixels are NaN or infinite; fill them first (numpy.nan_to_num)", name
        )
    return pixels


def from_array(array: np.ndarray, channels: int, name: str = "array") -> Shaped[Tensor, "channels h w"]:
    """`decode` for pixels in memory, [h, w] or [h, w, c], on the scale that a file of the same type has.

    Raises:
        CorruptSampleError: another shape or type, or pixels that are NaN or infinite.
        ChannelsError: it has another number of channels that cannot be converted.
    """
    wide = array.ndim == 3 and array.shape[2] > max(4, channels)  # a height or width where the channels should be
    if array.ndim not in (2, 3) or wide or array.dtype.kind not in "buif":
        raise CorruptSampleError(
            f"shape {array.shape} and type {array.dtype}; expected numbers of shape [height, width] or "
            "[height, width, channels]",
            name,
        )
    pixels = _finite(_tensor(array[None] if array.ndim == 2 else array.transpose(2, 0, 1)), name)
    return convert(pixels, channels, name, alpha=len(pixels) in (2, 4))


def from_picture(picture: Image, channels: int, name: str = "picture") -> Shaped[Tensor, "channels h w"]:
    """`decode` for a Pillow image that is open already.

    Raises:
        CorruptSampleError: pixels that are NaN or infinite.
        ChannelsError: it has another number of channels that cannot be converted.
    """
    pixels, alpha = _from_pillow(picture)
    return convert(_finite(pixels, name), channels, name, alpha)


def _read(data: bytes) -> tuple[Tensor, bool]:
    """Pixels [c, h, w], and whether the last channel is alpha."""
    if data.startswith(_TIFF):
        return _read_tiff(data)
    if data.startswith(_MAGIC[0]) and data[24] == 16:  # Pillow would cut 16-bit colour to 8 bits
        return _read_png16(data)
    from PIL import Image, ImageOps

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metadata that does not touch the pixels
        with Image.open(io.BytesIO(data)) as image:
            return _from_pillow(ImageOps.exif_transpose(image))


def _from_pillow(image: Image) -> tuple[Tensor, bool]:
    if image.mode not in ("L", "RGB", "RGBA", "I", "I;16", "I;16B", "F"):
        transparent = "A" in image.mode or "a" in image.mode or "transparency" in image.info
        grey = "L" if image.mode == "1" else "RGB"
        image = image.convert("RGBA" if transparent else grey)
    pixels = np.array(image)
    if image.mode == "I":  # Pillow's name for the 16 bits of a PGM
        pixels = pixels.clip(0, 65535).astype(np.uint16)
    return _tensor(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)), image.mode == "RGBA"


def _read_png16(data: bytes) -> tuple[Tensor, bool]:
    from torchvision.io import ImageReadMode, decode_png

    pixels = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    return _tensor(pixels.numpy()), len(pixels) in (2, 4)


def _read_tiff(data: bytes) -> tuple[Tensor, bool]:
    import tifffile
    from PIL import Image

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series, page, kinds = file.series[0], file.pages.first, tifffile.PHOTOMETRIC
        if page.photometric in (kinds.PALETTE, kinds.SEPARATED):  # indices or inks, which are no colours yet
            return _from_pillow(Image.open(io.BytesIO(data)))
        try:
            pixels, axes = series.asarray(), series.axes
        except ValueError:  # a compression that tifffile leaves to another package; Pillow knows the common ones
            return _from_pillow(Image.open(io.BytesIO(data)))
        if page.photometric == kinds.MINISWHITE and pixels.dtype.kind in "bu":
            pixels = ~pixels  # the type's largest value minus the pixel
        alpha = page.photometric == kinds.RGB and bool(page.extrasamples)
    return _tensor(_channels_first(pixels, axes)), alpha


def _channels_first(pixels: np.ndarray, axes: str) -> np.ndarray:
    """A TIFF's array as [c, h, w]; `axes` names its axes, Y and X for the rows and columns."""
    keep = [i for i, axis in enumerate(axes) if pixels.shape[i] > 1 or axis in "YX"]
    pixels, axes = pixels.reshape([pixels.shape[i] for i in keep]), "".join(axes[i] for i in keep)
    if len(axes) == 2:
        return pixels[None]
    if len(axes) != 3 or "Y" not in axes or "X" not in axes:
        raise ValueError(f"axes {axes} of shape {pixels.shape}; expected rows, columns and channels")
    return np.moveaxis(pixels, next(i for i, axis in enumerate(axes) if axis not in "YX"), 0)


def _tensor(pixels: np.ndarray) -> Tensor:
    if pixels.dtype == bool:
        pixels = pixels * np.uint8(255)
    if pixels.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(pixels))
    if pixels.dtype.kind not in "iuf":
        raise ValueError(f"pixels of type {pixels.dtype}; expected integers or real numbers")
    scale = np.iinfo(pixels.dtype).max if np.issubdtype(pixels.dtype, np.integer) else 1
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, which is looked at later
        return torch.from_numpy(np.ascontiguousarray((pixels / scale).astype(np.float32)))


def convert(
    pixels: Shaped[Tensor, "*batch c h w"], channels: int, name: str, alpha: bool = False
) -> Shaped[Tensor, "*batch channels h w"]:
    """Images with another number of channels: grey to RGB, RGB to grey, transparent onto white.

    Raises:
        ChannelsError: there is no such conversion.
    """
    own = pixels.shape[-3]
    if own == channels:
        return pixels
    if alpha:
        return convert(_on_white(pixels), channels, name)
    if (own, channels) == (1, 3):
        return pixels.expand(*pixels.shape[:-3], 3, *pixels.shape[-2:]).contiguous()
    if (own, channels) == (3, 1):
        luma = (pixels.float() * torch.tensor(_LUMA)[:, None, None]).sum(-3, keepdim=True)
        return _like(luma, pixels)
    raise ChannelsError(
        f"{name}: has {own} channel{'s' if own > 1 else ''}, expected {channels}. "
        f"Set data.channels={own} for images like this one, or take it out."
    )


def _on_white(pixels: Tensor) -> Tensor:
    full = 255 if pixels.dtype == torch.uint8 else 1
    opacity = pixels[..., -1:, :, :].float() / full
    return _like(pixels[..., :-1, :, :].float() * opacity + full * (1 - opacity), pixels)


def _like(values: Tensor, pixels: Tensor) -> Tensor:
    return values.round().clamp(0, 255).to(torch.uint8) if pixels.dtype == torch.uint8 else values
