"""Data sets that come by name, decoded once and kept in the cache as arrays."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from unmask.core.data.carriers import CarrierError, staging


def stored(place: Path, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """What is known of a set in the cache; it is made first where it is not there yet.

    Args:
        place: its folder, which appears when it is whole.
        build: fills a folder with arrays, and returns what json can hold of the set.

    Raises:
        CarrierError: it cannot be fetched or written, or the folder is damaged.
    """
    about = place / "about.json"
    if not about.is_file():
        with staging(place) as folder:
            ready = folder / "ready"
            ready.mkdir()
            content = json.dumps(build(ready), ensure_ascii=False)
            (ready / "about.json").write_text(content, encoding="utf-8")
            try:
                os.rename(ready, place)
            except OSError:  # another process was faster, or an interrupted deletion left half of the folder
                if not about.is_file():
                    raise CarrierError(f"{place} is damaged; delete it and try again") from None
    found: dict[str, Any] = json.loads(about.read_text(encoding="utf-8"))
    return found


@dataclass(frozen=True)
class Ragged:
    """Arrays of samples of any length in a folder, one sample after another; memory-mapped when they are first read.

    Args:
        folder: holds ``NAME.npy`` for each array and ``offsets.npy``: the first row of each sample, and the last's end.
        arrays: their names.
    """

    folder: Path
    arrays: tuple[str, ...]

    @classmethod
    def write(cls, folder: Path, **pieces: list[np.ndarray]) -> Ragged:
        """Write each array from its samples' pieces; the pieces of a sample have one length in all of them."""
        lengths = [len(piece) for piece in next(iter(pieces.values()))]
        np.save(folder / "offsets.npy", np.cumsum([0, *lengths]))
        for name, parts in pieces.items():
            np.save(folder / f"{name}.npy", np.concatenate(parts))
        return cls(folder, tuple(pieces))

    @cached_property
    def offsets(self) -> Any:
        """The first row of each sample, and the end of the last."""
        return np.load(self.folder / "offsets.npy")

    @cached_property
    def _maps(self) -> dict[str, Any]:
        return {name: np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in self.arrays}

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "arrays": self.arrays}  # a worker maps the files again

    def rows(self, index: int, start: int = 0, stop: int | None = None) -> dict[str, Any]:
        """Rows `start` to `stop` of a sample, of each array."""
        first, end = (int(edge) for edge in self.offsets[index : index + 2])
        last = end if stop is None else min(first + stop, end)
        return {name: array[first + start : last] for name, array in self._maps.items()}
