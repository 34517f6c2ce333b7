"""What a page is made of. Domains give these, and core puts them into the template."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import Literal

Tone = Literal["good", "warn", "plain"]
Rows = list[tuple[str, list[tuple[str, bool]]]]  # per row its name, and cells: text, and whether it is the best


@dataclass(frozen=True)
class Verdict:
    """A sentence about a run and how to colour it."""

    text: str
    tone: Tone


@dataclass(frozen=True)
class Tile:
    """A headline number: what, how much, and beside what."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A plot with the sentence that says what it shows."""

    title: str
    svg: str
    alt: str
    note: str = ""


@dataclass(frozen=True)
class Probes:
    """The evaluation as a table: cells are text, and whether they are the best of their column."""

    columns: list[str]
    rows: Rows
    summary: Verdict
    note: str
    figure: Figure | None = None
    corner: str = "features"


@dataclass(frozen=True)
class Section:
    """A domain's own part of the page: a table as in `Probes`, plots, and a sentence or two.

    Args:
        columns: heads of all columns, of the rows' names too.
        prose: cells are sentences, which break into lines, rather than numbers.
    """

    title: str
    note: str
    columns: list[str] = field(default_factory=list)
    rows: Rows = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    prose: bool = False


@dataclass(frozen=True)
class Picture:
    """What is shown of one sample.

    Args:
        name: of the sample.
        panels: (what it shows, PNG as a data address), side by side.
    """

    name: str
    panels: list[tuple[str, str]]


@dataclass(frozen=True)
class Pictures:
    """What the gallery shows, or why it is empty.

    Args:
        samples: may be empty; without a note, too, the page has no gallery.
        note: says what is seen, or what is missing.
        parameters: of the whole method, where it could be loaded.
        wide: each sample has one picture that wants the whole width.
    """

    samples: list[Picture] = field(default_factory=list)
    note: str = ""
    parameters: int | None = None
    wide: bool = False


def data_address(png: bytes) -> str:
    """A PNG as an address that a page holds in itself."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
