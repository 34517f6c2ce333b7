"""Where images come from: folders, tar shards, parquet files, embedded sets; all seen as the same `Source`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from jaxtyping import UInt8
from torch import Tensor

from unmask.core.data import sources
from unmask.core.data.carriers import cache_dir
from unmask.core.data.folders import Place, index_classes, split_packs
from unmask.core.data.kinds import CorruptSampleError, Kind, SourceError
from unmask.core.data.shards import Window
from unmask.core.data.sources import open_files, open_shards
from unmask.vision.data.arrays import EMBEDDED, load_arrays, sample_name
from unmask.vision.data.decode import HEAD, SUFFIXES, complaint, convert, decode


def _examine(file: BinaryIO, name: str) -> dict[str, Any]:
    reason = complaint(file.read(HEAD))
    if reason:
        raise CorruptSampleError(reason)
    return {}


IMAGES = Kind(
    name="image",
    suffixes=SUFFIXES,
    examine=_examine,
    expected="Give a folder of images, of .tar shards or of .parquet files, or one of the embedded sets: "
    + ", ".join(EMBEDDED),
    sets=EMBEDDED,
)


@dataclass(frozen=True)
class Source(sources.Source):
    """All images of a data set. ``read`` also takes the wanted number of channels, and gives [channels, h, w].

    Args:
        images: all pixels, for sets that are in memory.
    """

    images: UInt8[Tensor, "n c h w"] | None = field(default=None, repr=False)


def open_source(source: str, channels: int, corrupt: str) -> sources.Source:
    """Find a source's images without decoding them; see `unmask.core.data.sources.open_source`."""
    if source in EMBEDDED:
        return _open_embedded(source, channels, cache_dir())
    return sources.open_source(source, IMAGES, _open_place, corrupt=corrupt)


def _open_place(place: Place) -> sources.Source:
    pack, names = place.pick(IMAGES, (".tar", ".parquet"))
    if pack == ".parquet":
        return _open_parquet(place.root, names)
    return (open_shards if pack else open_files)(place, names, IMAGES, _decode)


def _decode(file: Path | Window, name: str, channels: int) -> Tensor:
    return decode(file.read_bytes(), channels, name)


@lru_cache(maxsize=2)
def _open_embedded(source: str, channels: int, cache: Path) -> Source:
    arrays = load_arrays(source)
    images = convert(arrays.images, channels, f"data source {source!r}")
    names = [sample_name(source, i) for i in range(len(images))]
    return Source(names, partial(_read_array, images), arrays.labels, arrays.classes, codes=arrays.codes, images=images)


def _read_array(images: Tensor, index: int, channels: int) -> Tensor:
    """An image of a set in memory, which has the wanted channels already."""
    return images[index]


def _open_parquet(root: Path, files: Sequence[str]) -> Source:
    import pyarrow.parquet
    from datasets import Dataset, Image

    try:
        rows = [pyarrow.parquet.read_metadata(root / file).num_rows for file in files]
        table = Dataset.from_parquet([str(root / file) for file in files], cache_dir=str(cache_dir() / "parquet"))
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise SourceError(f"{root}: the parquet files cannot be read ({str(error).splitlines()[0]})") from error
    column = _image_column(table, root)
    if isinstance(table.features[column], Image):
        table = table.cast_column(column, Image(decode=False))
    pairs = [(file, i) for file, n in zip(files, rows, strict=True) for i in range(n)]
    names = [f"{file}:{i}" for file, i in pairs]
    labels, classes = _parquet_labels(table)
    given = split_packs(names, [file for file, _ in pairs])
    return Source(names, partial(_read_row, table, column, names), labels, classes, given)


def _image_column(table: Any, root: Path) -> str:
    from datasets import Image

    for name, feature in table.features.items():
        if isinstance(feature, Image) or (isinstance(feature, dict) and "bytes" in feature):
            return name
    for name in ("image", "img"):
        if getattr(table.features.get(name), "dtype", None) in ("binary", "large_binary"):
            return name
    raise SourceError(f"{root}: no image column among {', '.join(table.column_names)}; expected one of type Image")


def _parquet_labels(table: Any) -> tuple[Tensor | None, list[str] | None]:
    from datasets import ClassLabel

    column = next((name for name in ("label", "labels", "class", "fine_label") if name in table.column_names), None)
    if column is None:
        return None, None
    values = table[column][:]
    if not isinstance(table.features[column], ClassLabel):
        return index_classes(values)
    if any(value is None or value < 0 for value in values):
        return None, None
    return torch.tensor(values), list(table.features[column].names)


def _read_row(table: Any, column: str, names: Sequence[str], index: int, channels: int) -> Tensor:
    """The image of a row of a parquet data set."""
    cell = table[index][column]
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    return decode(data or b"", channels, names[index])
