"""``unmask list``."""

from __future__ import annotations

from typing import Annotated

import typer

from unmask.core import registry
from unmask.core.cli.options import Json, print_json, print_table
from unmask.core.errors import UnmaskError

EXAMPLES = (
    "unmask list",
    "unmask list --kind generate",
    "unmask list --json",
)
_KINDS = f"Only methods of this kind: {', '.join(registry.KINDS)}."


def list_methods(
    context: typer.Context,
    kind: Annotated[str | None, typer.Option("--kind", metavar="KIND", help=_KINDS)] = None,
    as_json: Json = False,
) -> None:
    """Every method that is installed, with its kind, its task and its paper.

    The kind says what a method is for and which command takes it; the task is what `unmask evaluate` measures. Methods
    marked as a reconstruction rest on thin published evidence: most of their numbers are ours.
    """
    if kind not in (None, *registry.KINDS):
        raise UnmaskError(f"--kind {kind}: unknown; choose one of {', '.join(registry.KINDS)}")
    installed = registry.methods().values()
    cards = [c for c in installed if context.obj in (None, c.id.split("/")[0]) and kind in (None, c.kind)]
    if as_json:
        names = ("id", "title", "package", "kind", "task", "paper", "evidence", "reference", "reference_licence")
        print_json([{name: getattr(c, name) for name in names} | {"reconstruction": c.reconstruction} for c in cards])
        return
    rows = [(c.id, c.kind, c.task, c.paper + (" (reconstruction)" if c.reconstruction else "")) for c in cards]
    print_table([("method", "kind", "task", "paper"), *rows])
