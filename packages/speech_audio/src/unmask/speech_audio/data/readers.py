"""Reading parts of clips out of files, shards and other sources. No reader holds an open file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from unmask.core.data.shards import Window
from unmask.speech_audio.data.decode import Header, Sound, read

Reader = Callable[[int, int, int], Sound]  # index, first sample and end at 16 kHz


def decode(file: Path | Window, name: str, header: Header, start: int, stop: int) -> Sound:
    """Samples `start` to `stop` of a file, for core's readers."""
    return read(file, header, start, stop)  # type: ignore[arg-type]


class HeaderReader:
    """Gives a reader of files or shards, which decodes by `decode`, each clip's header; many take little memory."""

    def __init__(self, read: Callable[..., Sound], headers: Sequence[Header]) -> None:
        rows = [(header.frames, header.rate, header.float) for header in headers]
        self.read, self.table = read, np.array(rows, np.int64).reshape(len(rows), 3)

    def __call__(self, index: int, start: int, stop: int) -> Sound:
        frames, rate, is_float = self.table[index].tolist()
        return self.read(index, Header(frames, rate, bool(is_float)), start, stop)


class JoinedReader:
    """Reads from several sources, one after the other."""

    def __init__(self, readers: Sequence[Reader], sizes: Sequence[int]) -> None:
        self.readers, self.starts = readers, np.cumsum([0, *sizes])

    def __call__(self, index: int, start: int, stop: int) -> Sound:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.readers[part](index - int(self.starts[part]), start, stop)
