"""Reading parts of clips out of files and shards. Readers hold no open file: they can go to any number of workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from unmask.core.data.shards import Member
from unmask.core.errors import UnmaskError
from unmask.speech_audio.data.decode import CorruptAudioError, Header, Sound, read

Reader = Callable[[int, int, int], Sound]  # index, first sample and end at 16 kHz


class SourceError(UnmaskError):
    """A data source that does not exist, holds no clips, or is not of a kind that can be read."""


class _Headers:
    """The headers of many files in little memory."""

    def __init__(self, headers: Sequence[Header]) -> None:
        rows = [(header.frames, header.rate, header.float) for header in headers]
        self.table = np.array(rows, np.int64).reshape(len(rows), 3)

    def __getitem__(self, index: int) -> Header:
        frames, rate, is_float = self.table[index].tolist()
        return Header(frames, rate, bool(is_float))


class FileReader:
    """Reads the files of a folder."""

    def __init__(self, root: Path, names: Sequence[str], headers: Sequence[Header]) -> None:
        self.root, self.names, self.headers = root, names, _Headers(headers)

    def __call__(self, index: int, start: int, stop: int) -> Sound:
        name = self.names[index]
        try:
            return read(self.root / name, self.headers[index], start, stop)
        except (FileNotFoundError, PermissionError) as error:
            raise CorruptAudioError(f"{error.strerror}") from error
        except OSError as error:  # too many open files, a network drive away: not the clip's fault
            raise SourceError(f"{name}: {error.strerror}. Put the storage right and resume") from error


class ShardReader:
    """Reads clips out of shards. Holds no open file, so it can go to any number of workers."""

    def __init__(self, root: Path, members: Sequence[Member], headers: Sequence[Header]) -> None:
        self.root, self.members, self.headers = root, members, _Headers(headers)

    def __call__(self, index: int, start: int, stop: int) -> Sound:
        member = self.members[index]
        try:
            with member.open(self.root) as clip:
                return read(clip, self.headers[index], start, stop)  # type: ignore[arg-type]
        except (FileNotFoundError, PermissionError) as error:
            raise CorruptAudioError(f"{error.strerror}") from error


class JoinedReader:
    """Reads from several sources, one after the other."""

    def __init__(self, readers: list[Reader], sizes: list[int]) -> None:
        self.readers, self.starts = readers, np.cumsum([0, *sizes])

    def __call__(self, index: int, start: int, stop: int) -> Sound:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.readers[part](index - int(self.starts[part]), start, stop)
