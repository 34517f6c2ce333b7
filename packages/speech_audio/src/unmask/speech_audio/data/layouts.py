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
_NEARLY = 0.99  # of the files
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


def describe(root: Path, names: list[str], others: set[str]) -> Listing:
    """The layout of the sound files `names` below a folder.

    Args:
        root: the folder.
        names: paths of the sound files below it.
        others: paths of all other files below it.
    """
    if not names:
        return Listing(names)
    matches = [_LIBRISPEECH.match(name) for name in names]
    if _nearly_all(matches):
        texts = _transcripts(root, [name for name in others if name.endswith((".trans.txt", "transcripts.txt"))])
        said: Values = [texts.get(Path(name).stem) for name in names]
        speakers: Values = [match[1] if match else None for match in matches]
        return Listing(names, {"speaker": speakers}, said if any(said) else None, _prefix_splits(names, matches))
    matches = [_LIBRILIGHT.match(name) for name in names]
    matches = [m if f"{n.rpartition('.')[0]}.json" in others else None for n, m in zip(names, matches, strict=True)]
    if _nearly_all(matches):
        speakers = [match[1] if match else None for match in matches]
        return Listing(names, {"speaker": speakers}, None, _prefix_splits(names, matches))
    given, rest = split_folders(names)
    classes = _class_folders(rest)
    return Listing(names, {"class": classes} if classes else {}, None, given)


def _nearly_all(matches: list[re.Match[str] | None]) -> bool:
    """Whether names follow a layout; a stray file in a hundred must not cost the others their speakers."""
    return sum(match is not None for match in matches) >= _NEARLY * len(matches)


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
    if not tables or not _is_common_voice(root / "train.tsv"):
        tables = [root / "validated.tsv"] if _is_common_voice(root / "validated.tsv") else []
    names, speakers, texts, given = [], [], [], []
    for table in tables:
        lines = _lines(table)
        columns = {name: i for i, name in enumerate(lines[0].split("\t"))}
        for line in lines[1:]:
            cells = line.split("\t")
            if len(cells) <= max(columns["path"], columns["client_id"]):
                continue  # the rest of a sentence with a line break in it
            path = cells[columns["path"]]
            names.append(f"clips/{path if path.lower().endswith(SUFFIXES) else path + '.mp3'}")
            speakers.append(cells[columns["client_id"]] or None)
            texts.append(
                cells[columns["sentence"]] if "sentence" in columns and columns["sentence"] < len(cells) else None
            )
            given.append(split_of(table.stem))
    if not tables:
        return None
    has_splits = tables[0].stem != "validated"
    return Listing(names, {"speaker": speakers}, texts, given if has_splits else None, witnesses=tables)


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


def manifests(paths: Sequence[Path]) -> tuple[Path, Listing]:
    """The folder and the clips of one manifest, or of several that are named after their splits.

    Raises:
        ValueError: a line is not ``path<TAB>samples``, a path is there twice, or the folders differ; with the reason.
    """
    roots, names, frames, given = set(), [], [], []
    for path in paths:
        lines = path.read_text(encoding="utf-8").split("\n")  # as `_lines`, but they are counted in the messages
        if not lines[0].strip():
            raise ValueError(f"{path}: expected a folder in the first line, which is empty")
        folder = Path(lines[0].strip()).expanduser()
        roots.add(folder if folder.is_absolute() else path.parent / folder)
        for i, line in enumerate(lines[1:], 2):
            name, tab, count = line.rpartition("\t")
            if not line.strip():
                continue
            if not tab or not count.strip().isdecimal():
                raise ValueError(f"{path}, line {i}: expected a path, a tab and a number of samples, got {line[:80]!r}")
            names.append(name)
            frames.append(int(count))
            given.append(split_of(path.stem.split("_")[0].split("-")[0]))
    if len(roots) != 1:
        raise ValueError(f"the manifests name different folders: {', '.join(sorted(map(str, roots)))}")
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise ValueError(f"{twice} is there twice")
    root = roots.pop()
    splits = given if len(paths) > 1 and None not in given else None
    return root, Listing(names, {}, None, splits, frames, list(paths))
