"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from unmask.core.errors import UnmaskError

_UMASK = os.umask(0o022)  # the only way to read it is to set it
os.umask(_UMASK)
_MODE = 0o666 & ~_UMASK


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, sync it and rename it over `path`.

    Killed at any moment, `path` holds its old content or the new, never a part. On an error the temporary file goes.

    Raises:
        UnmaskError: the file cannot be written (full disk, no permission); `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        temporary.chmod(_MODE)  # safetensors makes files that only their owner can read
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except Exception as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UnmaskError(
            f"cannot write {path}: {reason}. What was there before is untouched; make room or choose another place"
        ) from error


def check_empty(out: Path) -> None:
    """See that nothing is lost when `out` is written.

    Raises:
        UnmaskError: it is a file, or a folder with something in it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UnmaskError(f"{out} is there already and not empty; give a new directory with --out")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when all went well; otherwise nothing is left of it.

    Raises:
        UnmaskError: `out` is not empty, or cannot be written.
    """
    check_empty(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            yield made
            os.replace(made, out)
    except OSError as error:
        raise UnmaskError(f"cannot write {out}: {error.strerror or error}. Nothing was left there") from None


def write_text(path: Path, text: str) -> None:
    """`write_atomically` for text."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """`write_atomically` for a value as indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
