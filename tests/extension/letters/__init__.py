"""Masked modelling of short lines of text, letter by letter: a whole domain, as small as one can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unmask.core.domain import Domain

DOMAIN = Domain(
    name="letters",
    samples="lines",
    data={"lines": "unmask.letters.data.lines", "pairs": "unmask.letters.data.pairs"},
    tasks={"representation": "unmask.letters.evaluation.representation"},
    pretrained="unmask.letters.interop.pretrained",
    checks="unmask.letters.checks",
)


def load(path: str | Path, device: str = "cpu") -> Any:
    """The encoder of a run."""
    from unmask.letters.interop.pretrained import load

    return load(path, device)
