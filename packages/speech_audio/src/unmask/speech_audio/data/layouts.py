"""What the public corpora say about their clips by where they put them: speakers, texts, splits.

* LibriSpeech: ``[train-clean-100/]SPEAKER/CHAPTER/SPEAKER-CHAPTER-UTTERANCE.flac`` with texts in ``*.trans.txt`` beside
  them; folders named train-..., dev-..., test-... are the splits. MLS is the same with underscores, and one
  ``transcripts.txt`` a split.
* LibriLight: ``SPEAKER/BOOK/*.flac``, each with a ``.json`` of the same name.
* Common Voice: ``clips/*.mp3`` listed in ``train.tsv``, ``dev.tsv`` and ``test.tsv``, or in ``validated.tsv``.
* Manifests as fairseq writes them: a ``.tsv`` whose first line is a folder, then ``path<TAB>samples``.
* Anything else: top folders named train, val (valid, validation, dev) and test are the splits where there is nothing
  beside them; otherwise, or below them, folders are classes, where there are several and no clip lies beside them.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from unmask.core.data.folders import split_folders
from unmask.core.data.splits import split_of
from unmask.speech_audio.data.decode import SUFFIXES

_LIBRISPEECH = re.compile(r"(?:^|.*/)(\d+)/(\d+)/\1([-_])\2\3\d+\.\w+$")
_LIBRILIGHT = re.compile(r"(?:^|.*/)(\d+)/[^/]+/[^/]+\.\w+$")
_NEARLY = 0.99  # of the files: a stray one in a hundred must not cost the others their speakers
_COMMON_VOICE = ("train", "dev", "test")

Values = list[str | None]


@dataclass
class Listing:
    """The clips of a data set, and what its layout says about them; one entry per clip, or None throughout.

    Args:
        names: paths below the folder.
        labels: class names by what they say.
        texts: what is said.
        given: the splits that the data give.
        frames: samples at the file's own rate, as a manifest says.
        witnesses: files and folders that change when the listing does.
    """

    names: list[str]
    labels: dict[str, Values] = field(default_factory=dict)
    texts: Values | None = None
    given: list[int | None] | None = None
    frames: list[int] | None = None
    witnesses: list[Path] = field(default_factory=list)


def describe(root: Path, names: list[str], other_files: set[str]) -> Listing:
    """The layout of the sound files `names` below a folder.

    Args:
        root: the folder.
        names: paths of the sound files below it.
        other_files: paths of all other files below it.
    """
    if not names:
        return Listing(names)
    described = {name.removesuffix(".json") for name in other_files if name.endswith(".json")}
    librispeech = [_LIBRISPEECH.match(name) for name in names]
    librilight = [_LIBRILIGHT.match(name) if name.rpartition(".")[0] in described else None for name in names]
    for matches in (librispeech, librilight):
        if sum(match is not None for match in matches) < _NEARLY * len(matches):
            continue
        transcripts = [name for name in other_files if name.endswith((".trans.txt", "transcripts.txt"))]
        texts = _transcripts(root, transcripts)
        said: Values = [texts.get(Path(name).stem) for name in names]
        speakers: Values = [match[1] if match else None for match in matches]
        return Listing(names, {"speaker": speakers}, said if any(said) else None, _prefix_splits(names, matches))
    given, rest = split_folders(names)
    classes = _class_folders(rest)
    return Listing(names, {"class": classes} if classes else {}, None, given)


def _prefix_splits(names: list[str], matches: list[re.Match[str] | None]) -> list[int | None] | None:
    """Splits from a folder on the way whose name is or begins with a split's (``train-clean-100``), strays apart."""
    given = []
    for name in names:
        folders = [split_of(folder.split("-")[0]) for folder in name.split("/")[:-3]]
        given.append(next((split for split in folders if split is not None), None))
    known = [split for split, match in zip(given, matches, strict=True) if match]
    return None if None in known else given


def _class_folders(names: list[str]) -> Values | None:
    """The first folder of each name, where all lie in one and there are at least two."""
    if not all("/" in name for name in names):
        return None
    tops: Values = [name.split("/")[0] for name in names]
    return tops if len(set(tops)) > 1 else None


def _transcripts(root: Path, names: list[str]) -> dict[str, str]:
    """Texts by utterance from files of lines ``UTTERANCE TEXT``, with a blank or a tab between."""
    with ThreadPoolExecutor(8) as pool:
        pairs = [line.split(None, 1) for part in pool.map(lambda name: _lines(root / name), names) for line in part]
    return {pair[0]: pair[1].strip() for pair in pairs if len(pair) == 2}


def _lines(path: Path) -> list[str]:
    """The lines that hold something. Not `str.splitlines`, which also cuts at a U+2028 or U+0085 inside a text."""
    return [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]


def common_voice(root: Path) -> Listing | None:
    """The clips that a Common Voice folder lists, or None where the folder is no such thing."""
    if not (root / "clips").is_dir():
        return None
    tables = [root / f"{split}.tsv" for split in _COMMON_VOICE if _is_common_voice(root / f"{split}.tsv")]
    has_splits = root / "train.tsv" in tables
    if not has_splits:
        tables = [root / "validated.tsv"] if _is_common_voice(root / "validated.tsv") else []
    if not tables:
        return None
    rows = [(split_of(table.stem), row) for table in tables for row in _rows(table)]
    paths = [row["path"] for _, row in rows]
    names = [f"clips/{path if path.lower().endswith(SUFFIXES) else path + '.mp3'}" for path in paths]
    speakers = [row["client_id"] or None for _, row in rows]
    texts = [row.get("sentence") for _, row in rows]
    given = [split for split, _ in rows]
    return Listing(names, {"speaker": speakers}, texts, given if has_splits else None, witnesses=tables)


def _rows(table: Path) -> list[dict[str, str]]:
    """The rows of a Common Voice table; the rest of a sentence with a line break in it is no row."""
    rows = csv.DictReader(_lines(table), delimiter="\t", quoting=csv.QUOTE_NONE)
    return [row for row in rows if row["path"] is not None and row["client_id"] is not None]


def _first_line(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.readline(100_000).rstrip("\r\n")
    except OSError:
        return ""


def _is_common_voice(path: Path) -> bool:
    return {"client_id", "path"} <= set(_first_line(path).split("\t"))


def is_manifest(path: Path) -> bool:
    """Whether a ``.tsv`` begins as fairseq's manifests do: with one folder on the first line."""
    first = _first_line(path)
    return bool(first) and "\t" not in first


def read_manifest(path: Path) -> tuple[Path, list[str], list[int]]:
    """The folder of a manifest, and the paths below it with their numbers of samples.

    Raises:
        ValueError: there is no folder in the first line, or another line is not ``path<TAB>samples``.
    """
    first, *lines = path.read_text(encoding="utf-8").split("\n")  # as `_lines`, but they are counted in the messages
    if not first.strip():
        raise ValueError(f"{path}: expected a folder in the first line, which is empty")
    names, frames = [], []
    for i, line in enumerate(lines, 2):
        name, tab, count = line.rpartition("\t")
        if not line.strip():
            continue
        if not tab or not count.strip().isdecimal():
            raise ValueError(f"{path}, line {i}: expected path<tab>samples, got {line[:80]!r}")
        names.append(name)
        frames.append(int(count))
    folder = Path(first.strip()).expanduser()
    return folder if folder.is_absolute() else path.parent / folder, names, frames


def manifests(paths: Sequence[Path]) -> tuple[Path, Listing]:
    """The folder and the clips of one manifest, or of several that are named after their splits.

    Raises:
        ValueError: see `read_manifest`; or a path is there twice, or the folders differ; with the reason.
    """
    parts = [read_manifest(path) for path in paths]
    roots = {root for root, _, _ in parts}
    if len(roots) != 1:
        raise ValueError(f"the manifests name different folders: {', '.join(sorted(map(str, roots)))}")
    names = [name for _, part, _ in parts for name in part]
    if len(set(names)) < len(names):
        raise ValueError(f"{Counter(names).most_common(1)[0][0]} is there twice")
    splits = [split_of(re.split("[_-]", path.stem)[0]) for path in paths]
    given = [split for split, (_, part, _) in zip(splits, parts, strict=True) for _ in part]
    frames = [count for _, _, counts in parts for count in counts]
    named = len(paths) > 1 and None not in given
    return roots.pop(), Listing(names, {}, None, given if named else None, frames, list(paths))
