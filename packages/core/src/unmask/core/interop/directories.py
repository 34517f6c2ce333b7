"""Where weights are: a run, a directory that a library wrote, or an id on the Hugging Face hub."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unmask.core.errors import UnmaskError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_run(path: str | Path) -> bool:
    """Whether `path` is a run directory."""
    return (Path(path) / "recipe.yaml").is_file()


def directory(path: str | Path, files: Sequence[str]) -> Path:
    """The directory with a ``config.json`` that `path` is, or the hub's cached copy of the id that it is.

    ``a/b`` is taken for a path, not looked up on the hub, where there is a folder ``a`` here.

    Args:
        path: a directory or a hub id.
        files: names of the files to fetch from the hub.

    Raises:
        UnmaskError: neither is there, or the directory has no configuration.
    """
    folder = Path(path)
    if not folder.is_dir():
        return _fetch(str(path), files)
    if not (folder / "config.json").is_file():
        raise UnmaskError(f"{folder}: neither a run (no recipe.yaml) nor an exported directory (no config.json)")
    return folder


def _fetch(path: str, files: Sequence[str]) -> Path:
    """A hub id's directory in the hub's cache."""
    parent = Path(path).parent
    if not _HUB_ID.fullmatch(path) or (parent != Path() and parent.is_dir()):
        raise UnmaskError(f"{path}: no such file or directory{_near(Path(path))}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UnmaskError(
            f"no directory {path}; to read a model of that id from the hub: pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(path, allow_patterns=list(files)))
    except Exception as error:  # the hub's client raises a dozen kinds here; all mean "not readable"
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UnmaskError(
            f"no directory {path}, and no model of that id could be read from the hub ({reason})"
        ) from None


def _near(path: Path) -> str:
    """A hint at the nearest name beside a misspelt one."""
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        UnmaskError: it cannot be read, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnmaskError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(values, dict):
        raise UnmaskError(f"{path}: not a model's configuration: expected a mapping, got {type(values).__name__}")
    return values
