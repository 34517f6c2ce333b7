"""Where images come from: folders, tar shards, parquet files, embedded sets; all seen as the same `Source`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, Int8, UInt8
from torch import Tensor

from unmask.core.data.carriers import cache_dir
from unmask.core.data.splits import assign, split_of
from unmask.core.errors import Problem, UnmaskError
from unmask.core.randomness import stable_id
from unmask.vision.data import shards
from unmask.vision.data.arrays import EMBEDDED, load_arrays, sample_name
from unmask.vision.data.decode import HEAD, SUFFIXES, CorruptImageError, complaint, convert, decode

_UNKNOWN = "Give a folder of images, of .tar shards or of .parquet files, or one of the embedded sets: " + ", ".join(
    EMBEDDED
)


class SourceError(UnmaskError):
    """A data source that does not exist, holds no images, or is not of a kind that can be read."""


@dataclass(frozen=True)
class Source:
    """All images of a data set, whatever it is kept in.

    Args:
        names: one per image: the path below the folder, the shard key, or ``set:index``.
        read: decodes one image, given its index and the wanted number of channels: [channels, h, w].
        labels: class indices, or None.
        classes: class names, or None.
        given: the split that the data themselves give to each image (see `unmask.core.data.splits`), None where none.
        problems: what was found to be unreadable and is not in `names`.
        codes: the final split of each image, for sets whose splits are fixed; else None.
        images: all pixels, for sets that are in memory.
    """

    names: Sequence[str]
    read: Callable[[int, int], Tensor]
    labels: Int[Tensor, "n"] | None = None
    classes: list[str] | None = None
    given: Sequence[int | None] | None = None
    problems: tuple[Problem, ...] = ()
    codes: Int8[Tensor, "n"] | None = None
    images: UInt8[Tensor, "n c h w"] | None = field(default=None, repr=False)

    @cached_property
    def ids(self) -> Int[Tensor, "n"]:
        """Stable sample ids, from the names."""
        return torch.tensor([stable_id(name) for name in self.names], dtype=torch.int64)

    def splits(self, val_share: float) -> Int8[Tensor, "n"]:
        """The split of each image. A test split is only made where there are labels to report on."""
        if self.codes is not None:
            return self.codes
        return assign(self.ids, self.labels, self.given, val_share, val_share if self.labels is not None else 0.0)


def open_source(source: str, channels: int, corrupt: str) -> Source:
    """Find a source's images without decoding them (file headers are looked at).

    Raises:
        SourceError: nothing is there, or nothing that can be read; or something cannot and `corrupt` is ``fatal``.
    """
    if source in EMBEDDED:
        return _open_embedded(source, channels)
    if source.startswith("pipe:") or "://" in source:
        raise SourceError(f"data source {source!r}: addresses and pipes are never opened. {_UNKNOWN}")
    root = Path(source).expanduser()
    if not root.exists():
        raise SourceError(f"data source {source!r} does not exist. {_UNKNOWN}")
    found = _open_path(root)
    if found.problems and (corrupt == "fatal" or not found.names):
        first = "; ".join(f"{p.name} ({p.reason})" for p in found.problems[:3])
        total = len(found.names) + len(found.problems)
        remedy = "Remove or replace them" + (", or set data.corrupt=skip." if found.names else ".")
        raise SourceError(f"{source}: {len(found.problems)} of {total} images cannot be read: {first}. {remedy}")
    return found


def _open_path(root: Path) -> Source:
    if root.is_file():
        files = [root]
        root = root.parent
    else:
        files = sorted(_walk(root))
    by_suffix = {suffix: [f for f in files if f.name.lower().endswith(suffix)] for suffix in (".tar", ".parquet")}
    kinds = {suffix: len(found) for suffix, found in by_suffix.items() if found}
    kinds |= {"image": n} if (n := sum(f.suffix.lower() in SUFFIXES for f in files)) else {}
    if len(kinds) > 1:
        counts = " and ".join(f"{n} {kind} files" for kind, n in kinds.items())
        raise SourceError(f"{root} holds {counts}; give a folder with one kind")
    if by_suffix[".tar"]:
        return _open_shards(root, by_suffix[".tar"])
    if by_suffix[".parquet"]:
        return _open_parquet(root, by_suffix[".parquet"])
    packed = [f.name for f in files if f.name.lower().endswith((".tar.gz", ".tgz", ".zip", ".tar.xz", ".tar.zst"))]
    images = [f for f in files if f.suffix.lower() in SUFFIXES]
    if not images:
        hint = f"{packed[0]} is compressed: unpack it first. " if packed else ""
        raise SourceError(f"no images in {root} (looked for {' '.join(SUFFIXES)} at any depth). {hint}{_UNKNOWN}")
    return _open_folder(root, images)


def _walk(root: Path) -> list[Path]:
    """Every file below `root` that is not hidden."""
    found, seen = [], set()
    for parent, folders, names in os.walk(root, followlinks=True):
        place = os.path.realpath(parent)
        if place in seen:  # a link back up, or a second one to the same folder
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return found


def _open_embedded(source: str, channels: int) -> Source:
    arrays = load_arrays(source)
    images = convert(arrays.images, channels, f"data source {source!r}")
    names = [sample_name(source, i) for i in range(len(images))]
    return Source(names, _ArrayReader(images), arrays.labels, arrays.classes, codes=arrays.codes, images=images)


class _ArrayReader:
    """Reads the images of a set in memory, which have the wanted channels already."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __call__(self, index: int, channels: int) -> Tensor:
        return self.images[index]


def _header_complaint(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return complaint(file.read(HEAD))
    except OSError as error:
        return error.strerror or str(error)


def _open_folder(root: Path, files: list[Path]) -> Source:
    with ThreadPoolExecutor(8) as pool:  # opening files is waiting, above all on network storage
        reasons = list(pool.map(_header_complaint, files, chunksize=256))
    names = [file.relative_to(root).as_posix() for file in files]
    problems = tuple(Problem(name, reason) for name, reason in zip(names, reasons, strict=True) if reason)
    names = [name for name, reason in zip(names, reasons, strict=True) if not reason]
    given, rest = _given_splits(names)
    labels, classes = _folder_classes(rest)
    return Source(names, _FileReader(root, names), labels, classes, given, problems)


def _given_splits(names: list[str]) -> tuple[list[int | None] | None, list[str]]:
    """Splits from top folders named train, val and test, where there is nothing else; and the names below them."""
    tops = {name.split("/")[0] if "/" in name else "" for name in names}
    if not names or not all(split_of(top) is not None for top in tops):
        return None, names
    return [split_of(name.split("/")[0]) for name in names], [name.split("/", 1)[1] for name in names]


def _folder_classes(names: list[str]) -> tuple[Tensor | None, list[str] | None]:
    """Labels from the first-level folders, where there are several and no image lies beside them."""
    if not all("/" in name for name in names):
        return None, None
    return _index_classes([name.split("/")[0] for name in names])


def _index_classes(values: Sequence[Any]) -> tuple[Tensor | None, list[str] | None]:
    """Labels and class names from one value per image; none where a value is missing or all are the same."""
    if any(value is None for value in values) or len(set(values)) < 2:
        return None, None
    numeric = all(isinstance(value, int) or str(value).isdecimal() for value in values)
    classes = sorted(set(map(str, values)), key=int if numeric else None)
    index = {name: i for i, name in enumerate(classes)}
    return torch.tensor([index[str(value)] for value in values]), classes


class _FileReader:
    """Reads the files of a folder."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.root, self.names = root, names

    def __call__(self, index: int, channels: int) -> Tensor:
        name = self.names[index]
        try:
            data = (self.root / name).read_bytes()
        except (FileNotFoundError, PermissionError) as error:
            raise CorruptImageError(f"{name}: {error.strerror}") from error
        except OSError as error:  # too many open files, a network drive away: not the image's fault
            raise SourceError(f"{name}: {error.strerror}. Put the storage right and resume") from error
        return decode(data, channels, name)


def _open_shards(root: Path, files: list[Path]) -> Source:
    members, problems = [], []
    for file in files:
        found, bad = shards.index(file, file.relative_to(root).as_posix())
        members += found
        problems += [Problem(*entry) for entry in bad]
    if not members and not problems:
        raise SourceError(f"no images in the {len(files)} tar shards of {root} (looked for {' '.join(SUFFIXES)})")
    names = [member.name for member in members]
    given, _ = _given_splits(names)
    if given is None:
        given = _splits_from_file_names([member.name.rpartition(".tar/")[0] for member in members])
    labels, classes = _index_classes([member.label for member in members])
    return Source(names, shards.ShardReader(root, members), labels, classes, given, tuple(problems))


def _splits_from_file_names(names: list[str]) -> list[int | None] | None:
    """Splits from files named like ``train-00000-of-00003``; None unless every name says its split."""
    given = [split_of(name.split("/")[-1].split("-")[0].split("_")[0].split(".")[0]) for name in names]
    return None if None in given else given


def _open_parquet(root: Path, files: list[Path]) -> Source:
    import pyarrow.parquet
    from datasets import Dataset, Image

    try:
        rows = [pyarrow.parquet.read_metadata(file).num_rows for file in files]
        table = Dataset.from_parquet([str(file) for file in files], cache_dir=str(cache_dir() / "parquet"))
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise SourceError(f"{root}: the parquet files cannot be read ({str(error).splitlines()[0]})") from error
    column = _image_column(table, root)
    if isinstance(table.features[column], Image):
        table = table.cast_column(column, Image(decode=False))
    where = [file.relative_to(root).as_posix() for file, n in zip(files, rows, strict=True) for _ in range(n)]
    names = [f"{file.relative_to(root).as_posix()}:{i}" for file, n in zip(files, rows, strict=True) for i in range(n)]
    given, _ = _given_splits(names)
    labels, classes = _parquet_labels(table)
    return Source(names, _ParquetReader(table, column, names), labels, classes, given or _splits_from_file_names(where))


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
        return _index_classes(values)
    if any(value is None or value < 0 for value in values):
        return None, None
    return torch.tensor(values), list(table.features[column].names)


class _ParquetReader:
    """Reads rows of a parquet data set."""

    def __init__(self, table: Any, column: str, names: Sequence[str]) -> None:
        self.table, self.column, self.names = table, column, names

    def __call__(self, index: int, channels: int) -> Tensor:
        cell = self.table[index][self.column]
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        return decode(data or b"", channels, self.names[index])
