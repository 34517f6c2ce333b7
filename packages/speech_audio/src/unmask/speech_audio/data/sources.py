"""Where clips come from: folders, manifests, tar shards, embedded sets; all seen as the same `Source`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from jaxtyping import Int, Int8
from torch import Tensor

from unmask.core.data import headers, sources
from unmask.core.data.carriers import cache_dir
from unmask.core.data.folders import Place, index_labels, split_packs
from unmask.core.data.kinds import Kind, SourceError
from unmask.core.data.shards import ShardReader, index_all
from unmask.core.data.sources import FileReader, sift, take
from unmask.core.data.splits import assign
from unmask.core.randomness import stable_id
from unmask.speech_audio.data import layouts
from unmask.speech_audio.data.decode import SUFFIXES, Header, examine
from unmask.speech_audio.data.embedded.sets import EMBEDDED, load
from unmask.speech_audio.data.layouts import Listing
from unmask.speech_audio.data.readers import HeaderReader, JoinedReader, decode

_SPEAKERS = 3  # fewer cannot be shared out among train, val and test


def _examine(file: BinaryIO, name: str) -> dict[str, Any]:
    return asdict(examine(file))


CLIPS = Kind(
    name="clip",
    suffixes=SUFFIXES,
    examine=_examine,
    expected="Give a folder of recordings or of .tar shards, a manifest (.tsv), or embedded sets (joined by +): "
    + ", ".join(EMBEDDED),
    sets=EMBEDDED,
    groups="speaker",
)


@dataclass(frozen=True, kw_only=True)
class Source(sources.Source):
    """All clips of a data set, whatever it is kept in. ``read`` decodes a part of one clip, see `Reader`.

    Args:
        lengths: samples at 16 kHz, from the headers.
        attributes: class indices by what they say (``speaker``, ``class``); -1 where unknown.
        values: class names by what they say.
        texts: what is said, or None.
        own_ids: the ids of samples that are not named by a path alone; else None.
    """

    lengths: Int[Tensor, "n"]
    attributes: dict[str, Int[Tensor, "n"]] = field(default_factory=dict)
    values: dict[str, list[str]] = field(default_factory=dict)
    texts: Sequence[str | None] = ()
    own_ids: Int[Tensor, "n"] | None = None

    @cached_property
    def ids(self) -> Int[Tensor, "n"]:
        """Stable sample ids, from the names where there are no others."""
        if self.own_ids is not None:
            return self.own_ids
        return torch.tensor([stable_id(name) for name in self.names], dtype=torch.int64)

    @property
    def labelled(self) -> bool:
        """Whether there is something to report on."""
        return bool(self.attributes)

    def splits(self, val_share: float) -> Int8[Tensor, "n"]:
        """The split of each clip: disjoint by speaker where at least three are known, else by clip.

        By clip they are made class by class, where each class is large enough to give one. A test split is only made
        where there are labels to report on.
        """
        if self.codes is not None:
            return self.codes
        test_share = val_share if self.labelled else 0.0
        speakers = self.attributes.get("speaker")
        groups = None
        if speakers is not None and len(self.values["speaker"]) >= _SPEAKERS:
            stable = torch.tensor([stable_id(f"speaker {name}") for name in self.values["speaker"]])
            groups = torch.where(speakers >= 0, stable[speakers], self.ids)
        strata = next(iter(self.attributes.values()), None)
        if strata is not None and strata.unique(return_counts=True)[1].min() * val_share < 0.5:
            strata = None  # a class too small to give one clip
        return assign(self.ids, strata, self.given, val_share, test_share, groups)


def open_source(source: str, corrupt: str) -> Source:
    """Find a source's clips without decoding them; see `unmask.core.data.sources.open_source`."""
    parts = source.split("+")
    if all(part in EMBEDDED for part in parts):
        if len(set(parts)) < len(parts):
            raise SourceError(f"data source {source!r} names a set twice")
        return _open_sets(tuple(parts), cache_dir())
    return sources.open_source(source, CLIPS, _open_place, corrupt=corrupt)


@lru_cache(maxsize=2)
def _open_sets(names: tuple[str, ...], cache: Path) -> Source:
    """Embedded sets, joined where there are several; what one of them does not know is -1."""
    sets = [load(name) for name in names]
    keys = dict.fromkeys(key for part in sets for key in part.labels)
    columns = {key: [v for part in sets for v in part.labels.get(key, [None] * len(part.names))] for key in keys}
    attributes, values = index_labels(columns)
    return Source(
        names=[name for part in sets for name in part.names],
        lengths=torch.cat([torch.from_numpy(np.diff(part.audio.offsets)) for part in sets]),
        read=JoinedReader(sets, [len(part.names) for part in sets]),
        attributes=attributes,
        values=values,
        texts=[text for part in sets for text in part.texts],
        codes=torch.cat([part.codes for part in sets]),
    )


def _open_place(place: Place) -> Source:
    listing = layouts.common_voice(place.root) if place.is_folder else None
    if listing is not None:
        place.watched += [place.root / "clips", *listing.witnesses]
        place.watch(listing.names)
        return _open_files(place.root, listing)
    lists = [name for name in place.of_suffix(".tsv") if "/" not in name and layouts.is_manifest(place.root / name)]
    if (lists and not place.of_suffix(".tar", *SUFFIXES)) or (not place.is_folder and place.of_suffix(".tsv")):
        return _open_manifests(place, [place.root / name for name in lists or place.files])
    pack, names = place.pick(CLIPS)
    if pack:
        return _open_shards(place, names)
    return _open_files(place.root, layouts.describe(place.root, names, set(place.files)))


def _open_manifests(place: Place, lists: list[Path]) -> Source:
    where = place.watched[0]
    try:
        root, listing = layouts.manifests(lists)
    except (ValueError, OSError, IndexError) as error:  # UnicodeDecodeError is a ValueError
        raise SourceError(f"{where}: not a manifest that can be read ({error})") from error
    if not root.is_dir():
        raise SourceError(f"{where}: the folder in its first line, {root}, does not exist; put the right one there")
    if not listing.names:
        raise SourceError(f"no clips in {where}: the manifest lists none. {CLIPS.expected}")
    place.watched += [*lists, root]
    place.watch(listing.names, root)
    described = layouts.describe(root, listing.names, set())
    labels = listing.labels or described.labels
    given = listing.given or described.given
    return _open_files(root, replace(listing, labels=labels, given=given))


def _open_files(root: Path, listing: Listing) -> Source:
    facts = headers.scan(root, listing.names, CLIPS)
    examined = [entry if isinstance(entry, str) else Header(**entry) for entry in facts]
    for i, count in enumerate(listing.frames or ()):
        header = examined[i]
        if isinstance(header, Header) and header.frames != count:
            examined[i] = f"has {header.frames} samples, the manifest says {count}"
    good, problems = sift(listing.names, examined)
    known = [header for header in examined if isinstance(header, Header)]
    names = take(listing.names, good)
    attributes, values = index_labels({key: take(column, good) for key, column in listing.labels.items()})
    return Source(
        names=names,
        lengths=torch.tensor([header.samples for header in known], dtype=torch.int64),
        read=HeaderReader(FileReader(root, names, decode), known),
        attributes=attributes,
        values=values,
        texts=[None] * len(names) if listing.texts is None else take(listing.texts, good),
        given=None if listing.given is None else take(listing.given, good),
        problems=problems,
    )


def _open_shards(place: Place, shards: list[str]) -> Source:
    members, problems = index_all(place, shards, CLIPS)
    names = [member.name for member in members]
    columns = {"speaker": [m.about.get("speaker") for m in members], "class": [m.label for m in members]}
    attributes, values = index_labels(columns)
    known = [Header(**member.facts) for member in members]
    return Source(
        names=names,
        lengths=torch.tensor([header.samples for header in known], dtype=torch.int64),
        read=HeaderReader(ShardReader(place.root, members, decode), known),
        attributes=attributes,
        values=values,
        texts=[member.about.get("text") for member in members],
        given=split_packs(names, [member.shard for member in members]),
        problems=problems,
    )
