"""Where samples come from, seen as one `Source` whatever they are kept in; opened once and remembered.

A domain has a `Kind` and a function that makes a `Source` of a `Place`; `open_source` does the rest. See
`unmask.core.data` for the whole of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Bool, Int, Int8
from torch import Tensor

from unmask.core.data import headers, shards
from unmask.core.data.folders import Place, class_folders, count_suffixes, index_classes, split_folders, split_packs
from unmask.core.data.kinds import Kind, SourceError, naming, printable
from unmask.core.data.splits import SPLITS, assign
from unmask.core.errors import Problem
from unmask.core.randomness import stable_id

Split = Literal["train", "val", "test", "all"]


@dataclass(frozen=True)
class Source:
    """All samples of a data set. A domain that knows more of its samples subclasses it.

    Args:
        names: one per sample: the path below the folder, the shard key, or ``set:name``.
        read: decodes one sample, given its index (and what the domain's reader takes beside it); raises
            `CorruptSampleError` for those that cannot be used.
        labels: class indices, or None.
        classes: class names, or None.
        given: the split that the data themselves give to each sample (see `unmask.core.data.splits`), None where none.
        groups: what stays together in one split, a name for each sample; None where nothing is known.
        problems: what was found to be unreadable and is not in `names`.
        codes: the final split of each sample, for sets whose splits are fixed; else None.
        left: how many files of each suffix lie there and are no samples.
    """

    names: Sequence[str]
    read: Callable[..., Any]
    labels: Int[Tensor, "n"] | None = None
    classes: list[str] | None = None
    given: Sequence[int | None] | None = None
    groups: Sequence[str] | None = None
    problems: tuple[Problem, ...] = ()
    codes: Int8[Tensor, "n"] | None = None
    left: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def ids(self) -> Int[Tensor, "n"]:
        """Stable sample ids, from the names."""
        return torch.tensor([stable_id(name) for name in self.names], dtype=torch.int64)

    @property
    def labelled(self) -> bool:
        """Whether there is something to report on, so that a test split is of use."""
        return self.labels is not None

    def splits(self, val_share: float) -> Int8[Tensor, "n"]:
        """The split of each sample: whole groups where they are known, else class by class.

        A test split is only made where there are labels to report on.
        """
        if self.codes is not None:
            return self.codes
        groups = None if self.groups is None else torch.tensor([stable_id(f"group {name}") for name in self.groups])
        return assign(self.ids, self.labels, self.given, val_share, val_share if self.labelled else 0.0, groups)


S = TypeVar("S", bound=Source)
T = TypeVar("T")
_OPENED: dict[tuple[Any, ...], tuple[dict[Path, int], Source]] = {}


def open_source(
    source: str, kind: Kind, open_place: Callable[[Place], S], *, corrupt: str, options: tuple[Any, ...] = ()
) -> S:
    """Find the samples of a folder or file without decoding them.

    What was found is kept for as long as the process lives and no folder or list of the source changes; nor any file,
    where there are at most 10,000.

    Args:
        source: see ``data.source``; no set that comes by name.
        kind: what a sample is.
        open_place: finds the samples of a place.
        corrupt: ``skip`` or ``fatal``.
        options: what else `open_place` depends on.

    Raises:
        SourceError: nothing is there, or nothing that can be read; or something cannot and `corrupt` is ``fatal``.
    """
    if source.startswith("pipe:") or "://" in source:
        raise SourceError(f"data source {source!r}: addresses and pipes are never opened. {kind.expected}")
    path = Path(source).expanduser().resolve()
    if not path.exists():
        raise SourceError(f"data source {source!r} does not exist. {kind.expected}")
    found = _remembered(path, (path, kind.name, *options), open_place)
    if found.problems and (corrupt == "fatal" or not len(found.names)):
        first = "; ".join(f"{p.name} ({p.reason})" for p in found.problems[:3])
        total = len(found.names) + len(found.problems)
        remedy = "Remove or replace them" + (", or set data.corrupt=skip." if len(found.names) else ".")
        raise SourceError(f"{source}: {len(found.problems)} of {total} {kind.plural} cannot be read: {first}. {remedy}")
    return found


def _remembered(path: Path, key: tuple[Any, ...], open_place: Callable[[Place], S]) -> S:
    if key in _OPENED:
        times, known = _OPENED[key]
        if times == _times(list(times)):
            return known  # type: ignore[return-value]
    place = Place(path)
    found = open_place(place)
    if place.left:
        found = replace(found, left=dict(place.left))
    _OPENED[key] = (_times(place.watched), found)
    return found


def _times(places: Sequence[Path]) -> dict[Path, int]:
    """When files and folders last changed; a folder does when something in it comes or goes."""
    found = {}
    for place in places:
        try:
            found[place] = os.stat(place).st_mtime_ns
        except (OSError, ValueError):  # gone, or no name that a file can have
            found[place] = -1
    return found


def open_files(place: Place, names: Sequence[str], kind: Kind, decode: Callable[..., Any]) -> Source:
    """Files as samples, with the splits and classes that their folders say.

    Top folders named train, val and test are splits where there is nothing else; folders below them, or at the top, are
    classes. ``CLASS/train/file`` is understood, too.

    Args:
        place: where they are.
        names: paths below it.
        kind: what a sample is.
        decode: see `FileReader`.
    """
    good, problems = sift(names, headers.scan(place.root, names, kind))
    return source_of_files(Source, place.root, take(names, good), problems, decode)


def source_of_files(
    make: Callable[..., S],
    root: Path,
    names: Sequence[str],
    problems: tuple[Problem, ...],
    decode: Callable[..., Any],
    **more: Any,
) -> S:
    """`open_files` for files that were looked at already, as a domain's own `Source` with `more` in it."""
    given, rest = split_folders(names)
    labels, classes = class_folders(rest)
    if labels is not None and given is None:
        given, _ = split_folders([name.split("/", 1)[1] for name in rest])
    reader = FileReader(root, names, decode)
    return make(names, reader, labels, classes, given, problems=problems, **more)


def open_shards(place: Place, names: Sequence[str], kind: Kind, decode: Callable[..., Any]) -> Source:
    """The samples of shards, with the splits and classes that they say.

    Args:
        place: where the shards are.
        names: of the shards.
        kind: what a sample is.
        decode: see `unmask.core.data.shards.ShardReader`.
    """
    return source_of_shards(Source, place.root, *shards.index_all(place, names, kind), decode)


def source_of_shards(
    make: Callable[..., S],
    root: Path,
    members: Sequence[shards.Member],
    problems: tuple[Problem, ...],
    decode: Callable[..., Any],
    **more: Any,
) -> S:
    """`open_shards` for members that are known already, as a domain's own `Source` with `more` in it."""
    names = [member.name for member in members]
    labels, classes = index_classes([member.label for member in members])
    given = split_packs(names, [member.shard for member in members])
    reader = shards.ShardReader(root, members, decode)
    return make(names, reader, labels, classes, given, problems=problems, **more)


def sift(names: Sequence[str], found: Sequence[Any]) -> tuple[list[int], tuple[Problem, ...]]:
    """Indices of the files that can be samples, and what is wrong with the others, which is a text in `found`."""
    good = [i for i, facts in enumerate(found) if not isinstance(facts, str)]
    bad = [(name, facts) for name, facts in zip(names, found, strict=True) if isinstance(facts, str)]
    return good, tuple(Problem(printable(name), reason) for name, reason in bad)


def take(values: Sequence[T], chosen: Sequence[int]) -> list[T]:
    """The values at these indices."""
    return [values[i] for i in chosen]


class FileReader:
    """Reads the files of a folder. Holds no open file, so it can go to any number of workers.

    Args:
        root: the folder.
        names: paths below it.
        decode: makes a sample of a file and its name; also given what the reader is called with.
    """

    def __init__(self, root: Path, names: Sequence[str], decode: Callable[..., Any]) -> None:
        self.root, self.names, self.decode = root, names, decode

    def __call__(self, index: int, *how: Any) -> Any:
        name = self.names[index]
        with naming(name):
            return self.decode(self.root / name, name, *how)


def members_of(
    source: Source,
    split: Split,
    val_share: float,
    what: str,
    kind: Kind,
    usable: Bool[Tensor, "n"] | None = None,
    unusable: str = "",
) -> Int[Tensor, "m"]:
    """Indices of the samples of one split.

    Args:
        source: all samples.
        split: ``all`` is every sample, also those that were dropped because they are twice in the set.
        val_share: see `Source.splits`.
        what: what to call the source in a message.
        kind: what a sample is.
        usable: False for samples that are left out of every split.
        unusable: what to say and do where that leaves none.

    Raises:
        SourceError: there are none, with what to do about it.
    """
    there = torch.ones(len(source.names), dtype=torch.bool)
    if split != "all":
        there = source.splits(val_share) == SPLITS[split]
    chosen = there if usable is None else there & usable
    if not chosen.any():
        remedy = unusable if there.any() else _how_to_split(source, split, val_share, kind)
        raise SourceError(f"{what} has no {split} {kind.plural}. {remedy}")
    return chosen.nonzero()[:, 0]


def _how_to_split(source: Source, split: Split, val_share: float, kind: Kind) -> str:
    if split == "test" and not source.labelled:
        return (
            f"Without labels none are set aside for testing: put {kind.plural} in one folder a class, or in a folder "
            "test/."
        )
    if source.groups is not None and (few := len(set(source.groups))) < 3:
        return f"Those of one {kind.groups} stay together, and there are {few}: add more of them."
    if split == "train":
        return "Put some in the folder train/."
    return f"Raise data.val_share, add {kind.plural}, or put some in a folder {split}/."


def absolute(settings: T, sets: Container[str] = ()) -> T:
    """Data settings whose ``source`` is an absolute path, where it is none of the sets that come by name."""
    source: str = settings.source  # type: ignore[attr-defined]
    if source in sets:
        return settings
    return replace(settings, source=str(Path(source).expanduser().resolve()))  # type: ignore[type-var]


def left_note(source: Source, kind: Kind) -> list[str]:
    """What to say of the files beside the samples; nothing where there are none."""
    if not source.left:
        return []
    return [f"other files there, which are no {kind.plural}: {count_suffixes(source.left)}"]
