"""``unmask list``."""

from __future__ import annotations

import typer

from unmask.core import registry
from unmask.core.cli.options import Json, print_json, print_table

EXAMPLES = (
    "unmask list",
    "unmask list --json",
)


def list_methods(context: typer.Context, as_json: Json = False) -> None:
    """Every method that is installed, with its kind and paper.

    Methods marked as a reconstruction rest on thin published evidence: most of their numbers are ours.
    """
    cards = [c for c in registry.methods().values() if context.obj in (None, c.id.split("/")[0])]
    if as_json:
        names = ("id", "title", "package", "kind", "paper", "evidence", "reference", "reference_licence")
        print_json([{name: getattr(c, name) for name in names} | {"reconstruction": c.reconstruction} for c in cards])
        return
    rows = [(c.id, c.kind, c.paper + (" (reconstruction)" if c.reconstruction else "")) for c in cards]
    print_table([("method", "kind", "paper"), *rows])
