"""Import of labels from fairseq's k-means scripts: ``.km`` text files with their ``.tsv`` manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from unmask.core.randomness import stable_id
from unmask.speech_audio.data.frames import SAMPLE_RATE
from unmask.speech_audio.data.labels import RATES, SLACK, LabelError, LabelSet, Target
from unmask.speech_audio.targets.labels import LabelWriter

Files = str | Path | Sequence[str | Path]


def import_km(manifest: Files, km: Files, rate: float, out: str | Path, classes: int | None = None) -> LabelSet:
    """Make a label set from labels that fairseq's k-means scripts wrote.

    The manifest (.tsv) has the recordings' folder in its first line and ``path<tab>samples`` in each other; line i of
    the .km file holds the labels of the manifest's clip i, as numbers separated by spaces. A clip's id comes from its
    path below the root, as in every source here. A run looks for train's and valid's labels in one set: import both
    at once, ``import_km(["train.tsv", "valid.tsv"], ["train.km", "valid.km"], ...)``; one codebook must have made both.
    No dictionary file is read: the numbers are the classes, and nothing is added to them.

    Args:
        manifest: the .tsv file, or several; samples are counted at 16 kHz.
        km: the .km file, or as many, in the same order.
        rate: labels per second: 50 for features, 100 for MFCC.
        out: the label set's folder.
        classes: size of the codebook; None: the largest label plus one.

    Raises:
        LabelError: a file is missing or empty, the two differ in length, a line is not numbers, a label is out of
            range, or a clip has more or fewer labels than its duration and the rate require.
    """
    manifests, kms = _paths(manifest), _paths(km)
    if len(manifests) != len(kms) or not kms:
        raise LabelError(f"got {len(manifests)} manifests and {len(kms)} .km files; expected one manifest for each")
    if not rate > 0:
        raise LabelError(f"rate is {rate}; expected more than 0. {RATES}")
    largest = {path: max((int(labels.max()) for labels in _km_lines(path) if len(labels)), default=-1) for path in kms}
    for path, label in largest.items():
        if label < 0:
            raise LabelError(f"{path} holds no labels. Make it again: a run on an empty table learns nothing")
    classes = 1 + max(largest.values()) if classes is None else classes
    target = Target(kms[0].stem, classes, rate, _digest(kms))
    info = {"made_by": "import_km", "manifest": [path.name for path in manifests], "km": [path.name for path in kms]}
    with LabelWriter(out, (target,), info) as writer:
        for pair in zip(manifests, kms, strict=True):
            _write(writer, *pair, rate)
    return LabelSet.open(out)


def _write(writer: LabelWriter, manifest: Path, km: Path, rate: float) -> None:
    clips, lines = _manifest_lines(manifest), _km_lines(km)
    for line, ((name, samples), labels) in enumerate(_paired(clips, lines, manifest, km), start=1):
        if abs(len(labels) / rate - samples / SAMPLE_RATE) > SLACK:
            raise LabelError(
                f"{km}, line {line} ({name}): {len(labels)} labels for {samples / SAMPLE_RATE:.2f} s; expected "
                f"about {round(samples / SAMPLE_RATE * rate)} at {rate:g} per second. {RATES}; or the manifest is "
                "not the one that the labels were made from"
            )
        writer.add(stable_id(name), labels[:, None])


def _paths(files: Files) -> list[Path]:
    return [Path(files)] if isinstance(files, str | Path) else [Path(file) for file in files]


def _open_text(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from file
    except OSError as error:
        raise LabelError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise LabelError(f"{path} is not a text file ({error.reason})") from None


def _km_lines(km: Path) -> Iterator[Int[np.ndarray, "frames"]]:
    for number, line in enumerate(_open_text(km), start=1):
        try:
            yield np.array(line.split(), dtype=np.int64)
        except (ValueError, OverflowError) as error:
            raise LabelError(f"{km}, line {number}: expected whole numbers separated by spaces ({error})") from None


def _manifest_lines(manifest: Path) -> Iterator[tuple[str, int]]:
    lines = _open_text(manifest)
    next(lines, None)
    for number, line in enumerate(lines, start=2):
        name, tab, samples = line.rstrip("\n").partition("\t")
        if not tab or not samples.strip().isdecimal():
            raise LabelError(f"{manifest}, line {number}: expected path<tab>samples, got {line.strip()!r}")
        yield name, int(samples)


def _paired(clips: Iterable[Any], lines: Iterable[Any], manifest: Path, km: Path) -> Iterator[tuple[Any, Any]]:
    """Pairs; where one side is shorter, an error that gives both lengths."""
    first, second = iter(clips), iter(lines)
    for done, clip in enumerate(first):
        labels = next(second, None)
        if labels is None:
            total = done + 1 + sum(1 for _ in first)
            raise LabelError(f"{manifest} lists {total} clips and {km} has {done} lines; they must be made together")
        yield clip, labels
    if rest := sum(1 for _ in second):
        raise LabelError(f"{km} has {rest} lines more than {manifest} lists clips; they must be made together")


def _digest(paths: list[Path]) -> str:
    total = hashlib.blake2b(digest_size=16)
    for path in paths:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                total.update(piece)
    return total.hexdigest()
