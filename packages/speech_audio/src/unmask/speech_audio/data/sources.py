"""Where clips come from: folders, manifests, tar shards, embedded sets; all seen as the same `Source`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Int8
from torch import Tensor

from unmask.core.data import shards
from unmask.core.data.shards import Member, Window
from unmask.core.data.splits import assign, split_of
from unmask.core.errors import Problem
from unmask.core.randomness import stable_id
from unmask.speech_audio.data import layouts
from unmask.speech_audio.data.decode import SUFFIXES, CorruptAudioError, Header, examine
from unmask.speech_audio.data.embedded.sets import EMBEDDED, load
from unmask.speech_audio.data.headers import scan
from unmask.speech_audio.data.layouts import Listing, Values
from unmask.speech_audio.data.readers import FileReader, JoinedReader, Reader, ShardReader, SourceError

_UNKNOWN = (
    "Give a folder of recordings or of .tar shards, a manifest (.tsv), or embedded sets (joined by +): "
    + ", ".join(EMBEDDED)
)
_PACKED = (".tar.gz", ".tgz", ".zip", ".tar.xz", ".tar.zst")
_FEW = 10_000  # files whose own times of change are compared when a source is opened again
_SPEAKERS = 3  # fewer cannot be shared out among train, val and test


@dataclass(frozen=True)
class Source:
    """All clips of a data set, whatever it is kept in.

    Args:
        names: one per clip: the path below the folder, the shard key, or ``set:name``.
        lengths: samples at 16 kHz, from the headers.
        read: decodes a part of one clip.
        labels: class indices by what they say; -1 where unknown.
        classes: class names by what they say.
        texts: what is said, or None.
        given: the split that the data themselves give to each clip (see `unmask.core.data.splits`), None where none.
        problems: what cannot be read and is not in `names`.
        codes: the final split of each clip, for sets whose splits are fixed; else None.
        own_ids: the ids of samples that are not named by a path alone; else None.
    """

    names: Sequence[str]
    lengths: Int[Tensor, "n"]
    read: Reader
    labels: dict[str, Int[Tensor, "n"]] = field(default_factory=dict)
    classes: dict[str, list[str]] = field(default_factory=dict)
    texts: Sequence[str | None] = ()
    given: Sequence[int | None] | None = None
    problems: tuple[Problem, ...] = ()
    codes: Int8[Tensor, "n"] | None = None
    own_ids: Int[Tensor, "n"] | None = None

    @cached_property
    def ids(self) -> Int[Tensor, "n"]:
        """Stable sample ids, from the names where there are no others."""
        if self.own_ids is not None:
            return self.own_ids
        return torch.tensor([stable_id(name) for name in self.names], dtype=torch.int64)

    def splits(self, val_share: float) -> Int8[Tensor, "n"]:
        """The split of each clip: disjoint by speaker where at least three are known, else by clip.

        By clip they are made class by class, where each class is large enough to give one. A test split is only made
        where there are labels to report on.
        """
        if self.codes is not None:
            return self.codes
        test_share = val_share if self.labels else 0.0
        speakers = self.labels.get("speaker")
        groups = None
        if speakers is not None and len(self.classes["speaker"]) >= _SPEAKERS:
            stable = torch.tensor([stable_id(f"speaker {name}") for name in self.classes["speaker"]])
            groups = torch.where(speakers >= 0, stable[speakers], self.ids)
        strata = next(iter(self.labels.values()), None)
        if strata is not None and strata.unique(return_counts=True)[1].min() * val_share < 0.5:
            strata = None  # a class too small to give one clip
        return assign(self.ids, strata, self.given, val_share, test_share, groups)


def open_source(source: str, corrupt: str) -> Source:
    """Find a source's clips without decoding them (file headers are looked at).

    What was found is kept for as long as the process lives and no folder or list of the source changes; nor any file,
    where there are at most 10,000.

    Raises:
        SourceError: nothing is there, or nothing that can be read; or something cannot and `corrupt` is ``fatal``.
    """
    parts = source.split("+")
    if all(part in EMBEDDED for part in parts):
        if len(set(parts)) < len(parts):
            raise SourceError(f"data source {source!r} names a set twice")
        return _join([_embedded(part) for part in parts])
    if source.startswith("pipe:") or "://" in source:
        raise SourceError(f"data source {source!r}: addresses and pipes are never opened. {_UNKNOWN}")
    root = Path(source).expanduser().resolve()
    if not root.exists():
        raise SourceError(f"data source {source!r} does not exist. {_UNKNOWN}")
    found = _remembered(root)
    if found.problems and (corrupt == "fatal" or not found.names):
        first = "; ".join(f"{p.name} ({p.reason})" for p in found.problems[:3])
        total = len(found.names) + len(found.problems)
        remedy = "Remove or replace them" + (", or set data.corrupt=skip." if found.names else ".")
        raise SourceError(f"{source}: {len(found.problems)} of {total} clips cannot be read: {first}. {remedy}")
    return found


_OPENED: dict[Path, tuple[dict[Path, int], Source]] = {}


def _remembered(root: Path) -> Source:
    if root in _OPENED:
        times, found = _OPENED[root]
        if times == _times(list(times)):
            return found
    witnesses: list[Path] = []
    found = _open_path(root, witnesses)
    _OPENED[root] = (_times(witnesses), found)
    return found


def _times(places: list[Path]) -> dict[Path, int]:
    """When files and folders last changed; a folder does when something in it comes or goes."""
    found = {}
    for place in places:
        try:
            found[place] = os.stat(place).st_mtime_ns
        except (OSError, ValueError):  # gone, or no name that a file can have
            found[place] = -1
    return found


def _open_path(root: Path, witnesses: list[Path]) -> Source:
    if root.is_file():
        witnesses.append(root)
        if root.suffix.lower() == ".tsv":
            return _open_manifests(root, [root], witnesses)
        files, root = [root], root.parent
    else:
        listing = layouts.common_voice(root)
        if listing is not None:
            witnesses += [root, root / "clips", *listing.witnesses]
            return _open_files(root, listing, witnesses)
        files = sorted(_walk(root, witnesses))
    audio = [f for f in files if f.suffix.lower() in SUFFIXES]
    tars = [f for f in files if f.suffix.lower() == ".tar"]
    if audio and tars:
        raise SourceError(f"{root} holds {len(tars)} .tar and {len(audio)} sound files; give a folder with one kind")
    if tars:
        witnesses += tars
        return _open_shards(root, tars)
    lists = [f for f in files if f.suffix.lower() == ".tsv" and f.parent == root and layouts.is_manifest(f)]
    if not audio and lists:
        witnesses += lists
        return _open_manifests(root, lists, witnesses)
    if not audio:
        packed = [f.name for f in files if f.name.lower().endswith(_PACKED)]
        hint = f"{packed[0]} is compressed: unpack it first. " if packed else ""
        raise SourceError(f"no clips in {root} (looked for {' '.join(SUFFIXES)} at any depth). {hint}{_UNKNOWN}")
    inside = {f.relative_to(root).as_posix() for f in files}
    names = [f.relative_to(root).as_posix() for f in audio]
    return _open_files(root, layouts.describe(root, names, inside), witnesses)


def _walk(root: Path, folders_seen: list[Path]) -> list[Path]:
    """Every file below `root` that is not hidden."""
    found, seen = [], set()
    for parent, folders, names in os.walk(root, followlinks=True):
        place = os.path.realpath(parent)
        if place in seen:  # a link back up, or a second one to the same folder
            folders.clear()
            continue
        seen.add(place)
        folders_seen.append(Path(parent))
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return found


def _open_manifests(place: Path, lists: list[Path], witnesses: list[Path]) -> Source:
    try:
        root, listing = layouts.manifests(lists)
    except (ValueError, OSError, IndexError) as error:  # UnicodeDecodeError is a ValueError
        raise SourceError(f"{place}: not a manifest that can be read ({error})") from error
    if not root.is_dir():
        raise SourceError(f"{place}: the folder in its first line, {root}, does not exist; put the right one there")
    if not listing.names:
        raise SourceError(f"no clips in {place}: the manifest lists none. {_UNKNOWN}")
    described = layouts.describe(root, listing.names, set())
    witnesses.append(root)
    labels = listing.labels or described.labels
    given = listing.given or described.given
    return _open_files(root, replace(listing, labels=labels, given=given), witnesses)


def _open_files(root: Path, listing: Listing, witnesses: list[Path]) -> Source:
    if len(listing.names) <= _FEW:
        witnesses += [root / name for name in listing.names]
    found = scan(root, listing.names)
    if listing.frames is not None:
        found = [_agrees(header, count) for header, count in zip(found, listing.frames, strict=True)]
    good = [i for i, header in enumerate(found) if isinstance(header, Header)]
    headers = [header for header in found if isinstance(header, Header)]
    problems = [
        Problem(shards.printable(name), header)
        for name, header in zip(listing.names, found, strict=True)
        if isinstance(header, str)
    ]
    names = _take(listing.names, good)
    labels, classes = index_labels({key: _take(values, good) for key, values in listing.labels.items()})
    texts = [None] * len(names) if listing.texts is None else _take(listing.texts, good)
    given = None if listing.given is None else _take(listing.given, good)
    lengths = torch.tensor([header.samples for header in headers], dtype=torch.int64)
    return Source(names, lengths, FileReader(root, names, headers), labels, classes, texts, given, tuple(problems))


def _agrees(header: Header | str, count: int) -> Header | str:
    if isinstance(header, Header) and header.frames != count:
        return f"has {header.frames} samples, the manifest says {count}"
    return header


def _take(values: Sequence[Any], chosen: list[int]) -> list[Any]:
    return [values[i] for i in chosen]


def index_labels(values: dict[str, Values]) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Class indices and names from one class name per clip, None (index -1) where it is not known.

    What nothing is known of is left out.
    """
    labels, classes = {}, {}
    for key, names in values.items():
        known = {name for name in names if name is not None}
        if not known:
            continue
        numeric = all(name.isdecimal() for name in known)
        classes[key] = sorted(known, key=int if numeric else None)
        index: dict[str | None, int] = {name: i for i, name in enumerate(classes[key])}
        labels[key] = torch.tensor([index.get(name, -1) for name in names])
    return labels, classes


def _examine(clip: Window) -> tuple[str | None, dict[str, Any]]:
    try:
        header = examine(clip)  # type: ignore[arg-type]
    except CorruptAudioError as error:
        return str(error), {}
    return None, {"frames": header.frames, "rate": header.rate, "float": header.float}


_CLIPS = shards.Kind("sound file", SUFFIXES, _examine)


def _open_shards(root: Path, files: list[Path]) -> Source:
    members: list[Member] = []
    problems: list[Problem] = []
    for file in files:
        found, bad = shards.index(file, file.relative_to(root).as_posix(), _CLIPS)
        members += found
        problems += [Problem(*entry) for entry in bad]
    if not members and not problems:
        raise SourceError(f"no clips in the {len(files)} tar shards of {root} (looked for {' '.join(SUFFIXES)})")
    names = [member.name for member in members]
    given, _ = layouts.split_folders(names)
    if given is None:  # shards named like train-00000.tar
        stems = [member.shard.split("/")[-1] for member in members]
        given = [split_of(stem.split("-")[0].split("_")[0].split(".")[0]) for stem in stems]
        given = None if None in given else given
    labels, classes = index_labels(
        {"speaker": [m.about.get("speaker") for m in members], "class": [m.label for m in members]}
    )
    headers = [Header(**member.facts) for member in members]
    lengths = torch.tensor([header.samples for header in headers], dtype=torch.int64)
    texts = [member.about.get("text") for member in members]
    reader = ShardReader(root, members, headers)
    return Source(names, lengths, reader, labels, classes, texts, given, tuple(problems))


def _embedded(name: str) -> Source:
    found = load(name)
    labels, classes = index_labels(found.labels)
    lengths = torch.from_numpy(np.diff(found.offsets))
    return Source(found.names, lengths, found, labels, classes, found.texts, codes=found.codes)


def _join(sources: list[Source]) -> Source:
    """Several embedded sets as one; what one of them does not know is -1."""
    if len(sources) == 1:
        return sources[0]
    values: dict[str, Values] = {key: [] for source in sources for key in source.labels}
    for source in sources:
        for key, column in values.items():
            known = source.labels.get(key)
            if known is None:
                column += [None] * len(source.names)
            else:
                column += [None if i < 0 else source.classes[key][i] for i in known.tolist()]
    labels, classes = index_labels(values)
    return Source(
        [name for source in sources for name in source.names],
        torch.cat([source.lengths for source in sources]),
        JoinedReader([source.read for source in sources], [len(source.names) for source in sources]),
        labels,
        classes,
        [text for source in sources for text in source.texts],
        codes=torch.cat([source.codes for source in sources if source.codes is not None]),
    )
