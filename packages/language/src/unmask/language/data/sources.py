"""Where documents come from: a folder, one file or a set that comes by name; and which of them are for what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask.core.data import headers
from unmask.core.data.folders import Place, split_files, split_folders, suffix
from unmask.core.data.kinds import SourceError
from unmask.core.data.sources import sift
from unmask.core.data.splits import split_of
from unmask.core.errors import Problem
from unmask.language.data.documents import TEXTS, Document, Unit, read_documents
from unmask.language.data.embedded.sets import folder_of, names


@dataclass(frozen=True)
class Files:
    """The text files of a source.

    Args:
        root: where they lie.
        names: paths below `root`.
        given: the split that each file's folder, name or suffix says (see `unmask.core.data.splits`); None where none.
        problems: files that cannot be used.
        left: what to say of other files there.
    """

    root: Path
    names: list[str]
    given: list[int | None] | None
    problems: tuple[Problem, ...]
    left: str

    @property
    def identity(self) -> list[Any]:
        """Paths, sizes and times of change: what is read depends on nothing else."""
        stats = [(self.root / name).stat() for name in self.names]
        return [str(self.root), [[n, s.st_size, s.st_mtime_ns] for n, s in zip(self.names, stats, strict=True)]]

    def documents(
        self, index: int, *, unit: Unit = "file", piece: int = 4000, text_field: str | None = "text"
    ) -> Iterator[Document | Problem]:
        """The documents of one file; see `read_documents`."""
        name = self.names[index]
        return read_documents(self.root / name, name, unit=unit, piece=piece, text_field=text_field)


def find_files(source: str, suffixes: Sequence[str] = TEXTS.suffixes) -> Files:
    """The text files of a source, without reading them.

    Args:
        source: a folder (files at any depth, hidden ones passed over), one file, or the name of a set.
        suffixes: which files count.

    Raises:
        SourceError: nothing is there, or no file with text.
    """
    if source in names():
        source = str(folder_of(source))
    if "://" in source or source.startswith("pipe:"):
        raise SourceError(f"data source {source!r}: addresses and pipes are never opened. {TEXTS.expected}")
    path = Path(source).expanduser()
    if not path.exists():
        raise SourceError(f"data source {source!r}: no such file or folder, and no set of this name. {TEXTS.expected}")
    place = Place(path)
    _, found = place.pick(TEXTS, packs=())
    found = [name for name in found if suffix(name) in suffixes]
    good, problems = sift(found, headers.scan(place.root, found, TEXTS))
    if not good:
        first = f": {problems[0].name}: {problems[0].reason}" if problems else f" ending in {', '.join(suffixes)}"
        raise SourceError(f"{source}: none of its files can be used{first}. {TEXTS.expected}")
    kept = [found[i] for i in good]
    left = ", ".join(f"{count} {kind or 'without a suffix'}" for kind, count in place.left.most_common(5))
    return Files(place.root, kept, _given(kept), problems, left)


def _given(files: Sequence[str]) -> list[int | None] | None:
    """Splits from folders or names such as train and val, or from BabyLM's suffixes .train, .dev and .test."""
    by_suffix = [split_of(suffix(name).removeprefix(".")) for name in files]
    return (
        split_folders(files)[0] or split_files(files) or (by_suffix if any(s is not None for s in by_suffix) else None)
    )
