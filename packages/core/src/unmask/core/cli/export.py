"""``unmask export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unmask.core import registry
from unmask.core.cli.options import Run, method_of
from unmask.core.errors import UnmaskError

EXAMPLES = (
    "unmask export runs/first --to timm --out encoder/",
    "unmask export runs/first --to transformers --out exported/",
    "unmask train vision/mae --init exported/ --data more/ --out runs/more    goes on from it",
)


def _formats() -> str:
    """Every domain's export formats, for help."""
    found = (registry.domain(name) for name in registry.domains())
    each = (f"{d.name}: {'; '.join(f'`{f}` ({what})' for f, what in d.formats.items())}." for d in found if d.formats)
    return " ".join(each)


def export(
    run: Run,
    out: Annotated[Path, typer.Option(help="The directory to write.")],
    to: Annotated[
        str | None,
        typer.Option(metavar="FORMAT", help=f"The first of its domain's formats when not given. {_formats()}"),
    ] = None,
) -> None:
    """Write a run's weights in another library's format, with a model card."""
    found = registry.domain(method_of(run))
    if not found.formats:
        raise UnmaskError(f"runs of {found.name} are not exported to other libraries")
    to = next(iter(found.formats)) if to is None else to
    if to not in found.formats:
        raise UnmaskError(f"--to {to}: unknown; {found.name} writes {', '.join(found.formats)}")
    writer = registry.part(method_of(run), "export")
    print(writer.export(run, out, to))  # type: ignore[union-attr]  # formats need a writer: `check_domain`
