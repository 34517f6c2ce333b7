"""Import of labels from fairseq's k-means scripts: ``.km`` text files with their ``.tsv`` manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from unmask.core.randomness import stable_id
from unmask.speech_audio.data.frames import SAMPLE_RATE
from unmask.speech_audio.data.labels import RATES, SLACK, LabelError, LabelSet, Target
from unmask.speech_audio.data.layouts import read_manifest
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
    largest = -1
    for path in kms:
        last = max((int(labels.max()) for labels in _km_lines(path) if len(labels)), default=-1)
        if last < 0:
            raise LabelError(f"{path} holds no labels. Make it again: a run on an empty table learns nothing")
        largest = max(largest, last)
    target = Target(kms[0].stem, largest + 1 if classes is None else classes, rate, _digest(kms))
    info = {"made_by": "import_km", "manifest": [path.name for path in manifests], "km": [path.name for path in kms]}
    with LabelWriter(out, (target,), info) as writer:
        for pair in zip(manifests, kms, strict=True):
            _write(writer, *pair, rate)
    return LabelSet.open(out)


def _write(writer: LabelWriter, manifest: Path, km: Path, rate: float) -> None:
    try:
        _, names, samples = read_manifest(manifest)
    except OSError as error:
        raise LabelError(f"{manifest} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise LabelError(f"{manifest} is not a manifest that can be read ({error})") from None
    lines = sum(1 for _ in _km_lines(km))
    if lines != len(names):
        raise LabelError(f"{manifest} lists {len(names)} clips and {km} has {lines} lines; they must be made together")
    for line, (name, count, labels) in enumerate(zip(names, samples, _km_lines(km), strict=True), start=1):
        seconds = count / SAMPLE_RATE
        if abs(len(labels) / rate - seconds) > SLACK:
            raise LabelError(
                f"{km}, line {line} ({name}): {len(labels)} labels for {seconds:.2f} s; expected about "
                f"{round(seconds * rate)} at {rate:g} per second. {RATES}; or the manifest is not the one that the "
                "labels were made from"
            )
        writer.add(stable_id(name), labels[:, None])


def _paths(files: Files) -> list[Path]:
    return [Path(files)] if isinstance(files, str | Path) else [Path(file) for file in files]


def _km_lines(km: Path) -> Iterator[Int[np.ndarray, "frames"]]:
    """The labels of each line; one line in memory at a time."""
    try:
        with km.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                yield _labels(line, f"{km}, line {number}")
    except OSError as error:
        raise LabelError(f"{km} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise LabelError(f"{km} is not a text file ({error.reason})") from None


def _labels(line: str, name: str) -> Int[np.ndarray, "frames"]:
    try:
        return np.array(line.split(), dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise LabelError(f"{name}: expected whole numbers separated by spaces ({error})") from None


def _digest(paths: list[Path]) -> str:
    """One hash over all files."""
    total = hashlib.blake2b(digest_size=16)
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: total)
    return total.hexdigest()
