"""What a domain's samples are called, which files hold them, and what is said of those that cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from unmask.core.errors import UnmaskError


class SourceError(UnmaskError):
    """A data source that does not exist, holds no samples, or is not of a kind that can be read."""


class CorruptSampleError(UnmaskError):
    """A sample that cannot be used: missing, damaged, or not what its name says. Others may be fine.

    Args:
        reason: what is wrong with it.
        name: what it is called; left empty where the caller adds it, see `naming`.
    """

    def __init__(self, reason: str, name: str = "") -> None:
        super().__init__(f"{name}: {reason}" if name else reason)
        self.reason, self.name = reason, name


@dataclass(frozen=True)
class Kind:
    """The samples of one data kind.

    Args:
        name: what one sample is called: ``image``.
        suffixes: of the files that are samples, with the dot, in lower case.
        examine: looks at the beginning of a file (any file-like, and its name) without decoding it; returns facts to
            keep (what json can hold) and raises `CorruptSampleError` where it cannot be a sample.
        expected: what a source may be, for messages: ``Give a folder of images, or one of the embedded sets: ...``.
        sets: names of the sets that are no folders; they win over folders of the same name.
        groups: what samples that stay together in one split have in common.
        version: raise it when `examine` finds other things.
    """

    name: str
    suffixes: tuple[str, ...]
    examine: Callable[[BinaryIO, str], dict[str, Any]]
    expected: str
    sets: tuple[str, ...] = ()
    groups: str = "group"
    version: int = 1

    @property
    def plural(self) -> str:
        """Several of them."""
        return f"{self.name}s"


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put the sample's name before what went wrong while it was read, and tell its own faults from the storage's.

    Raises:
        CorruptSampleError: it is not there, may not be read, or is damaged.
        SourceError: the storage does not answer.
    """
    try:
        yield
    except (FileNotFoundError, PermissionError) as error:
        raise CorruptSampleError(error.strerror or str(error), name) from error
    except CorruptSampleError as error:
        if error.name == name:
            raise
        raise CorruptSampleError(str(error), name) from error
    except OSError as error:  # too many open files, a network drive away: not the sample's fault
        raise SourceError(f"{name}: {error.strerror or error}. Put the storage right and resume") from error


def printable(name: str) -> str:
    """A file's name as text that can be written and hashed: bytes that are not UTF-8 become escapes."""
    return name.encode("utf-8", "backslashreplace").decode()
