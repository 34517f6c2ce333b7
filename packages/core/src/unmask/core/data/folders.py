"""What lies in a folder: its files, which of them are samples, and what their paths say about splits and classes."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask.core.data.kinds import Kind, SourceError
from unmask.core.data.splits import split_of

_PACKED = (".tar.gz", ".tgz", ".zip", ".tar.xz", ".tar.zst", ".7z")
_FEW = 10_000  # files whose own times of change are compared when a source is opened again


class Place:
    """A folder or one file that a source names.

    Args:
        path: the folder or file.
    """

    def __init__(self, path: Path) -> None:
        self.root = path.parent if path.is_file() else path
        self.watched: list[Path] = [path]  # what changes when the samples do
        self.left: Counter[str] = Counter()  # files of each suffix that `pick` did not take
        self.is_folder = not path.is_file()

    @cached_property
    def files(self) -> list[str]:
        """Paths below `root` of every file that is not hidden, folder by folder; or the one file."""
        if not self.is_folder:
            return [self.watched[0].name]
        names, folders = walk(self.root)
        self.watched += folders
        return sorted(names, key=lambda name: name.split("/"))

    def watch(self, names: Sequence[str], root: Path | None = None) -> None:
        """Have the source opened again when one of these files changes, where they are at most 10,000."""
        if len(names) <= _FEW:
            self.watched += [(root or self.root) / name for name in names]

    def pick(self, kind: Kind, packs: tuple[str, ...] = (".tar",)) -> tuple[str, list[str]]:
        """The samples among the files, as ``""`` and their names; or the files that samples are packed in.

        Args:
            kind: what a sample is.
            packs: suffixes of files that hold many samples; returned as the first value where it is these.

        Raises:
            SourceError: there are none, or both kinds of files.
        """
        found = {pack: self.of_suffix(pack) for pack in packs} | {"": self.of_suffix(*kind.suffixes)}
        found = {pack: names for pack, names in found.items() if names}
        if len(found) > 1:
            counts = [f"{len(names)} {pack or kind.name}" for pack, names in found.items()]
            raise SourceError(f"{self.root} holds {' and '.join(counts)} files; give a folder with one kind")
        if not found:
            raise SourceError(self._nothing(kind))
        pack, names = found.popitem()
        self.left = Counter(map(suffix, set(self.files) - set(names)))
        self.watch(names)
        return pack, names

    def of_suffix(self, *suffixes: str) -> list[str]:
        """The files with one of these suffixes."""
        return [name for name in self.files if suffix(name) in suffixes]

    def _nothing(self, kind: Kind) -> str:
        packed = [name.rpartition("/")[2] for name in self.files if name.lower().endswith(_PACKED)]
        hint = f" {packed[0]} is compressed: unpack it first." if packed else ""
        there = f" There are {count_suffixes(Counter(map(suffix, self.files)))}." if self.files else ""
        looked = " ".join(kind.suffixes)
        return f"no {kind.plural} in {self.root} (looked for {looked} at any depth).{there}{hint} {kind.expected}"


def suffix(name: str) -> str:
    """The last suffix of a file's name, with the dot and in lower case; empty where it has none."""
    return os.path.splitext(name)[1].lower()


def count_suffixes(counts: Mapping[str, int]) -> str:
    """In words: so many files of each suffix, the most frequent first."""
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{n:,} {name or 'without a suffix'}" for name, n in most[:5]]
    return ", ".join(shown) + (f" and {len(most) - 5} more kinds" if len(most) > 5 else "")


def walk(root: Path) -> tuple[list[str], list[Path]]:
    """Paths of the files below `root`, and the folders that they lie in; what is hidden is passed over.

    Only regular files and links to them: opening a pipe could wait for ever. Links to nothing are among them, so that
    what is missing can be named. A folder that is linked to several times is taken once.
    """
    names: list[str] = []
    folders: list[Path] = []
    seen: set[str] = set()
    pending = [""]
    while pending:
        below = pending.pop()
        place = os.path.realpath(root / below)
        if place in seen:  # a link back up, or a second one to the same folder
            continue
        seen.add(place)
        folders.append(root / below)
        inside = []
        for entry in _entries(root / below):
            path = f"{below}/{entry.name}" if below else entry.name
            if os.path.isdir(entry) if entry.is_symlink() else entry.is_dir():
                inside.append(path)
            elif _is_sample_file(entry):
                names.append(path)
        pending += sorted(inside, reverse=True)
    return names, folders


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError:  # no permission, or removed in between
        return []


def _is_sample_file(entry: os.DirEntry[str]) -> bool:
    if entry.is_symlink():
        return os.path.isfile(entry) or not os.path.exists(entry)
    return entry.is_file()


def split_folders(names: Sequence[str]) -> tuple[list[int | None] | None, list[str]]:
    """Splits from top folders named train, val and test, where there is nothing else; and the names below them."""
    tops = {name.split("/")[0] if "/" in name else "" for name in names}
    if not names or not all(split_of(top) is not None for top in tops):
        return None, list(names)
    return [split_of(name.split("/")[0]) for name in names], [name.split("/", 1)[1] for name in names]


def split_files(names: Sequence[str]) -> list[int | None] | None:
    """Splits from files named like ``train-00000-of-00003``; None unless every name says its split."""
    given = [split_of(re.split(r"[-_.]", name.split("/")[-1])[0]) for name in names]
    return None if None in given else given


def split_packs(names: Sequence[str], packs: Iterable[str]) -> list[int | None] | None:
    """Splits of samples in packs: from the packs' folders, else from the packs' names."""
    return split_folders(names)[0] or split_files(list(packs))


def class_folders(names: Sequence[str]) -> tuple[Tensor | None, list[str] | None]:
    """Labels from the first-level folders, where there are several and no sample lies beside them."""
    return index_classes([name.split("/")[0] if "/" in name else None for name in names])


def index_classes(values: Sequence[Any]) -> tuple[Tensor | None, list[str] | None]:
    """Labels and class names from one value per sample; none where a value is missing or all are the same."""
    known = set(map(str, values))
    if None in values or len(known) < 2:
        return None, None
    classes = sort_classes(known)
    index = {name: i for i, name in enumerate(classes)}
    return torch.tensor([index[str(value)] for value in values]), classes


def index_labels(columns: Mapping[str, Sequence[str | None]]) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Labels and class names of several kinds from one value per sample, None (label -1) where it is not known.

    Kinds of which nothing is known are left out.
    """
    labels, classes = {}, {}
    for kind, values in columns.items():
        known = {value for value in values if value is not None}
        if known:
            classes[kind] = sort_classes(known)
            index = {name: i for i, name in enumerate(classes[kind])}
            labels[kind] = torch.tensor([-1 if value is None else index[value] for value in values])
    return labels, classes


def sort_classes(names: Iterable[str]) -> list[str]:
    """Class names in order: as numbers where all are."""
    names = set(names)
    numeric = all(name.removeprefix("-").isdecimal() for name in names)
    return sorted(names, key=(lambda name: (int(name), name)) if numeric else None)
