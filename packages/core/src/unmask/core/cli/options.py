"""What the commands share: options, printing, and which method a run is of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from unmask.core.errors import UnmaskError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout, for scripts.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory: what `--out` named when it was trained.")]


def print_json(value: Any) -> None:
    """Print a value for scripts."""
    print(json.dumps(value, indent=2, default=str))


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Print rows in columns; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def full_name(domain: str | None, method: str) -> str:
    """A method's id; `domain` is put before a name without one (``unmask-vision train mae``)."""
    return f"{domain}/{method}" if domain and "/" not in method else method


def network_sources(texts: list[str]) -> dict[str, str]:
    """``--network NAME=SOURCE``, each of them, as names and sources."""
    pairs = [text.partition("=") for text in texts]
    for name, equals, source in pairs:
        if not (name.isidentifier() and equals and source):
            raise UnmaskError(
                f"--network {name}{equals}{source}: expected NAME=DIR_OR_HUB_ID, for example "
                "--network teacher=runs/first"
            )
    return {name: source for name, _, source in pairs}


def method_of(run: Path) -> str:
    """The method of a run directory, without importing it."""
    import yaml

    path = run / "recipe.yaml"
    if not path.is_file():
        raise UnmaskError(f"{run} is not a run: it has no recipe.yaml. Give the folder that --out named")
    return str(yaml.safe_load(path.read_text(encoding="utf-8"))["method"])
