"""Decoding: where lines are, and letters as ids."""

from __future__ import annotations

import builtins
from pathlib import Path

from unmask.core.errors import UnmaskError

PADDING, UNKNOWN = 0, 1
VOCABULARY = 97  # padding, anything else, and ASCII's 95 letters
NAMES = "names"  # the set that comes with Python: the names of its built-ins, exceptions apart from the others


def ids_of(text: str, length: int) -> list[int]:
    """The first `length` letters as ids, filled up with padding."""
    ids = [ord(letter) - 30 if " " <= letter <= "~" else UNKNOWN for letter in text[:length]]
    return ids + [PADDING] * (length - len(ids))


def read_lines(source: str) -> list[tuple[str, str, str]]:
    """Name, text and class of every line: of the set ``names``, or of a folder's .txt files, one class each."""
    if source == NAMES:
        kinds = {n: isinstance(getattr(builtins, n), type) and n[0].isupper() for n in dir(builtins)}
        return [(f"{NAMES}:{n}", n, "exceptions" if kinds[n] else "others") for n in kinds]
    paths = sorted(Path(source).expanduser().glob("*.txt"))
    lines = [(f"{p.name}:{i}", line, p.stem) for p in paths for i, line in enumerate(p.read_text().splitlines(), 1)]
    found = [line for line in lines if line[1].strip()]
    if not found:
        raise UnmaskError(f"{source}: no lines; expected a folder of .txt files, or the set {NAMES!r}")
    return found
