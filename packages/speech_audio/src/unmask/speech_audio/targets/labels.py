"""Writing label sets, which `unmask.speech_audio.data.labels` describes and reads."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.lib.format
from jaxtyping import Int

from unmask.core.training.files import write_json
from unmask.speech_audio.data.labels import FORMAT, HEADER, LabelError, LabelSet, Target, empty_error


def check_free(out: Path) -> None:
    """Raise a `LabelError` where `out` is anything but a new path or an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LabelError(f"{out} holds something already; remove it or choose another folder for the labels")


class LabelWriter:
    """Writes a label set clip by clip; the folder appears when the ``with`` block ends without an error.

    ::

        with LabelWriter("labels", (Target("mfcc", 100, 100.0, codebook_digest),)) as writer:
            for sample_id, labels in ...:
                writer.add(sample_id, labels)  # int [frames, streams]

    Memory does not grow with the number of frames: about 200 bytes per clip are kept. Files beside the labels, such as
    the codebook, are written into `folder` before the block ends.

    Args:
        out: where the label set will be; must not exist, or be an empty folder.
        targets: one per stream, all of one rate.
        info: what the labels are made from, as JSON values; may be added to until the block ends.

    Raises:
        LabelError: `out` holds something; at the end of the block: no labels were added.
    """

    def __init__(self, out: str | Path, targets: tuple[Target, ...], info: dict[str, Any] | None = None) -> None:
        self.out, self.targets, self.info = Path(out), tuple(targets), dict(info or {})
        if not self.targets or len({target.rate for target in self.targets}) > 1:
            raise LabelError(f"label set {self.out}: expected one or more streams of one rate, got {self.targets}")
        self.folder = self.out.with_name(f".{self.out.name}.tmp")
        self._classes = np.array([target.classes for target in self.targets])
        self._rows = 0
        self._clips: dict[int, tuple[int, int]] = {}
        self._hash = hashlib.blake2b(repr(self.targets).encode(), digest_size=16)

    def __enter__(self) -> LabelWriter:
        check_free(self.out)
        shutil.rmtree(self.folder, ignore_errors=True)  # what a killed attempt left
        self.folder.mkdir(parents=True)
        self._file = (self.folder / "labels.npy").open("wb")
        _write_header(self._file, (0, len(self.targets)))
        return self

    def add(self, sample_id: int, labels: Int[np.ndarray, "frames streams"]) -> None:
        """Write the labels of one clip.

        Raises:
            LabelError: wrong number of streams, a label that is not one of its stream's classes, or a clip that has
                labels already.
        """
        sample_id, labels = int(sample_id), np.ascontiguousarray(labels)
        if labels.ndim != 2 or labels.shape[1] != len(self.targets):
            raise LabelError(
                f"sample id {sample_id}: labels are {labels.shape}; expected [frames, {len(self.targets)}]"
            )
        if sample_id in self._clips:
            raise LabelError(f"sample id {sample_id} comes twice; two clips of the source share a name, or a split")
        if len(labels) and ((labels.min(axis=0) < 0) | (labels.max(axis=0) >= self._classes)).any():
            raise LabelError(
                f"sample id {sample_id}: labels lie between {labels.min(axis=0).tolist()} and "
                f"{labels.max(axis=0).tolist()}; expected 0 to {(self._classes - 1).tolist()}. "
                "Give the number of classes of the codebook that made them"
            )
        data = labels.astype("<i4").tobytes()
        self._file.write(data)
        self._hash.update(sample_id.to_bytes(8, "little") + data)
        self._clips[sample_id] = (self._rows, self._rows + len(labels))
        self._rows += len(labels)

    def so_far(self) -> LabelSet:
        """What was added until now, as a label set to look at (diagnostics).

        Raises:
            LabelError: no labels were added.
        """
        if not self._rows:
            raise empty_error(self.out)
        self._file.flush()
        shape = (self._rows, len(self.targets))
        labels = np.memmap(self._file.name, dtype="<i4", mode="r", offset=HEADER, shape=shape)
        ids, spans = self._tables()
        return LabelSet(self.folder, labels, ids, spans, self.targets, self._hash.hexdigest(), self.info)

    def _tables(self) -> tuple[Int[np.ndarray, "clips"], Int[np.ndarray, "clips 2"]]:
        ids = np.array(sorted(self._clips), dtype=np.int64)
        return ids, np.array([self._clips[i] for i in ids.tolist()], dtype=np.int64).reshape(-1, 2)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _finish(self) -> None:
        if not self._rows:
            raise empty_error(self.out)
        self._file.seek(0)
        _write_header(self._file, (self._rows, len(self.targets)))
        self._file.flush()
        os.fsync(self._file.fileno())
        ids, spans = self._tables()
        np.save(self.folder / "ids.npy", ids, allow_pickle=False)
        np.save(self.folder / "offsets.npy", spans, allow_pickle=False)
        about = {
            "format": FORMAT,
            "rate": self.targets[0].rate,
            "targets": [asdict(target) for target in self.targets],
            "clips": len(ids),
            "frames": self._rows,
            "digest": self._hash.hexdigest(),
            "info": self.info,
        }
        write_json(self.folder / "label_set.json", about)
        os.replace(self.folder, self.out)


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    """The header of an int32 .npy file, as long whatever the shape, so that it can be written again at the end."""
    numpy.lib.format.write_array_header_1_0(file, {"descr": "<i4", "fortran_order": False, "shape": shape})
    assert file.tell() == HEADER, f"numpy wrote {file.tell()} bytes"
