"""Label sets: the discrete units that a run predicts, one or more per frame, kept in one folder.

A label set is made once (`unmask.speech_audio.targets.make`, or `km` for labels that fairseq's scripts wrote) and then
only read, as it is here. It holds the labels of every split, all made with one codebook: separate codebooks for
training and validation make the validation loss climb. The folder:

* ``labels.npy``: int32 [frames of all clips, streams], clip after clip in the order they were written;
* ``ids.npy``: int64 [clips], the clips' sample ids, sorted; ``offsets.npy``: int64 [clips, 2], first and last + 1 row;
* ``label_set.json``: rate, streams, digest, what it was made from, diagnostics;
* ``codebook.safetensors``: what made the labels, where that is known.

It appears under its name when it is whole. Arrays are memory-mapped, so a large set costs no memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import Tensor

from unmask.core.errors import UnmaskError
from unmask.speech_audio.data.frames import SAMPLE_RATE

FORMAT = 1
HEADER = 128  # bytes before the elements in an .npy file
_ROWS = 1 << 22  # rows looked at in one piece
SLACK = 0.1  # seconds by which labels may be shorter or longer than their clip
RATES = "The rate is 50 for features of a model and 100 for MFCC, log-mel and prosody"


class LabelError(UnmaskError):
    """A label set that is missing, empty, damaged, or does not belong to the data or the model."""


PLANNED = "planned"  # the digest of a stream whose labels are not made yet


@dataclass(frozen=True)
class Target:
    """One stream of labels, which is one thing to predict per frame.

    Args:
        name: what was quantised, such as ``mfcc``, ``layer 6`` or ``layer 6 stage 2``.
        classes: labels are 0 to classes - 1.
        rate: labels per second.
        digest: of the codebook that made it.
    """

    name: str
    classes: int
    rate: float
    digest: str


@dataclass(frozen=True, eq=False)
class LabelSet:
    """The labels of many clips, by sample id. Open one with `LabelSet.open`.

    Args:
        folder: of its files.
        labels: all labels.
        ids: sample ids, sorted.
        spans: first row and last row + 1 of each id.
        targets: one per stream; all of one rate.
        digest: changes with any label, id or codebook.
        info: what it was made from; ``info["diagnostics"]`` where they were computed; ``info["unreadable"]``, the ids
            of clips that could not be decoded, whose labels are empty; ``info["teacher"]``, the digest of the model
            whose features were clustered, None where there was none.
    """

    folder: Path
    labels: Int[np.ndarray, "total streams"]
    ids: Int[np.ndarray, "clips"]
    spans: Int[np.ndarray, "clips 2"]
    targets: tuple[Target, ...]
    digest: str
    info: dict[str, Any]

    @property
    def rate(self) -> float:
        """Labels per second."""
        return self.targets[0].rate

    def __len__(self) -> int:
        return len(self.ids)

    def __reduce__(self) -> tuple[Any, ...]:
        return LabelSet.open, (self.folder,)  # a worker maps the file again: pickling would copy all labels

    @classmethod
    def open(cls, folder: str | Path) -> LabelSet:
        """Open a label set without reading its labels.

        Raises:
            LabelError: the folder or a file is missing, the table is empty, or the files do not fit each other.
        """
        folder = Path(folder)
        if not (folder / "label_set.json").is_file():
            what = "holds no label_set.json" if folder.is_dir() else "does not exist"
            raise LabelError(
                f"label set {folder} {what}. Make one with make_labels, or with import_km from .km and .tsv files"
            )
        try:
            about = json.loads((folder / "label_set.json").read_text(encoding="utf-8"))
            targets = tuple(Target(**target) for target in about["targets"])
            digest, info = about["digest"], about["info"]
            if about["format"] != FORMAT:
                raise LabelError(f"label set {folder} has format {about['format']}; this version reads {FORMAT}")
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, LabelError):
                raise
            raise LabelError(
                f"label set {folder}: label_set.json is damaged ({error}). Make the labels again"
            ) from None
        ids, spans, labels = (_load(folder / name) for name in ("ids.npy", "offsets.npy", "labels.npy"))
        _check_tables(folder, labels, ids, spans, targets)
        return cls(folder, labels, np.asarray(ids), np.asarray(spans), targets, digest, info)

    def _find(self, sample_id: int) -> int | None:
        row = int(np.searchsorted(self.ids, sample_id))
        return row if row < len(self.ids) and self.ids[row] == sample_id else None

    def __contains__(self, sample_id: int) -> bool:
        return self._find(sample_id) is not None

    def has_all(self, ids: Int[Tensor, "n"]) -> bool:
        """Whether every one of these samples has labels here."""
        return bool(np.isin(ids.cpu().numpy(), self.ids).all())

    def get(self, sample_id: int) -> Int[np.ndarray, "frames streams"]:
        """The labels of one clip, mapped from the file and not to be written to.

        Raises:
            LabelError: the clip has none.
        """
        row = self._find(sample_id)
        if row is None:
            raise LabelError(
                f"label set {self.folder} has no labels for sample id {sample_id}. "
                "Make the labels again from the data that you train on, all splits included"
            )
        start, stop = self.spans[row]
        return self.labels[start:stop]

    def check_covers(
        self, ids: Int[Tensor, "n"], lengths: Int[Tensor, "n"], source: str, name_of: Callable[[int], str]
    ) -> None:
        """Check, before training, that these labels are labels of these clips.

        Every clip must have labels, as many as its duration asks for within 0.1 s, and every label must be one of its
        stream's classes.

        Args:
            ids: sample ids of the clips.
            lengths: samples of each whole clip at 16 kHz.
            source: the data's name, for the message.
            name_of: what to call a clip in a message.

        Raises:
            LabelError: what does not fit, for which clip, and what to do.
        """
        wanted, seconds = ids.cpu().numpy(), lengths.cpu().numpy() / SAMPLE_RATE
        rows = np.minimum(np.searchsorted(self.ids, wanted), len(self.ids) - 1)
        missing = np.flatnonzero(self.ids[rows] != wanted)
        if len(missing):
            raise LabelError(
                f"{len(missing)} of {len(wanted)} clips of {source} have no labels in {self.folder}, the first is "
                f"{name_of(int(wanted[missing[0]]))}. Make the labels again from this source, all splits included"
            )
        counts = self.spans[rows, 1] - self.spans[rows, 0]
        readable = ~np.isin(wanted, self.info.get("unreadable", []))
        wrong = np.flatnonzero(readable & (np.abs(counts / self.rate - seconds) > SLACK))
        if len(wrong):
            i = wrong[0]
            raise LabelError(
                f"{self.folder} has {counts[i]} labels for {name_of(int(wanted[i]))} of {source}, which lasts "
                f"{seconds[i]:.2f} s: expected about {round(seconds[i] * self.rate)} at the set's rate of "
                f"{self.rate:g} labels per second, got {counts[i] / seconds[i]:.1f} per second "
                f"({len(wrong)} of {len(wanted)} clips differ). {RATES}; or the labels are of other recordings"
            )
        self._check_range()

    def _check_range(self) -> None:
        classes = np.array([target.classes for target in self.targets])
        for start in range(0, len(self.labels), _ROWS):
            piece = self.labels[start : start + _ROWS]
            wrong = np.flatnonzero((piece.min(axis=0) < 0) | (piece.max(axis=0) >= classes))
            if len(wrong):
                target, column = self.targets[wrong[0]], piece[:, wrong[0]]
                raise LabelError(
                    f"{self.folder}: labels of {target.name!r} lie between {column.min()} and {column.max()}; expected "
                    f"0 to {target.classes - 1}. The files are damaged: make the labels again"
                )


def _load(path: Path) -> Any:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise LabelError(f"label set {path.parent}: {path.name} is missing. Make the labels again") from None
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        if path.is_file() and path.stat().st_size == HEADER:  # older NumPy cannot map an array without elements
            raise empty_error(path.parent) from None
        raise LabelError(f"label set {path.parent}: {path.name} is damaged ({error}). Make the labels again") from None


def empty_error(folder: Path) -> LabelError:
    """What to say of a label set without labels."""
    return LabelError(
        f"label set {folder} is empty: it holds no labels, so nothing could be learned from it. Make the labels again, "
        "and look at how many clips the source gives"
    )


def _check_tables(folder: Path, labels: Any, ids: Any, spans: Any, targets: tuple[Target, ...]) -> None:
    if not labels.size or not len(ids) or not targets:
        raise empty_error(folder)
    fits = (
        labels.ndim == 2
        and labels.dtype == np.int32
        and ids.dtype == spans.dtype == np.int64
        and labels.shape[1] == len(targets)
        and spans.shape == (*ids.shape, 2)
        and bool((ids[1:] > ids[:-1]).all())
        and bool((spans[:, 0] <= spans[:, 1]).all())
        and spans.min() >= 0
        and spans.max() <= len(labels)
        and all(target.classes > 0 and target.rate == targets[0].rate > 0 for target in targets)
    )
    if not fits:
        raise LabelError(
            f"label set {folder} is damaged: labels {labels.shape}, ids {ids.shape}, spans {spans.shape} and "
            f"{len(targets)} streams do not fit each other. Make the labels again"
        )
