"""``unmask explain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unmask.core import registry
from unmask.core.cli.options import Json, full_name, network_sources, print_json

EXAMPLES = (
    "unmask list --kind explain                               what --method takes",
    "unmask explain FILE --method METHOD --network network=DIR --out maps/",
    "unmask explain FOLDER --method METHOD --network network=runs/first --count 20 --out maps/",
    "unmask explain FOLDER --method METHOD --network network=OWNER/NAME --set KEY=VALUE --out maps/",
)


def explain(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="INPUT", help="A file, a folder, or the name of a data set.")],
    method: Annotated[str, typer.Option(metavar="METHOD", help="A method of the kind `explain`; see `unmask list`.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to make; nothing in it is overwritten.")],
    networks: Annotated[
        list[str] | None,
        typer.Option(
            "--network",
            metavar="NAME=DIR_OR_HUB_ID|RUN",
            help="The network to explain, under the name that the method gives it: a run, a directory of transformers "
            "or timm, or an id on the Hugging Face hub. Repeated where a method uses several.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one of the method's settings; may be repeated."),
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, metavar="N", help="At most so many inputs; else all.")] = None,
    device: Annotated[str, typer.Option(help="`auto`, `cpu` or `cuda`.")] = "auto",
    as_json: Json = False,
) -> None:
    """Show what a network looks at: one map for each input, larger where the input matters more.

    Each map is written as an array (.npy) and, where the domain can draw it, as a picture over its input.
    explanation.json says which file is of which input, and by which network and settings it was made.
    """
    given = network_sources(networks or [])
    method = full_name(context.obj, method)
    registry.card(method)  # a misspelt name is answered before torch is imported
    from unmask.core.explanation import explain as write_maps
    from unmask.core.explanation import make_explainer
    from unmask.core.training.recipe import parse_override

    explainer = make_explainer(method, given, dict(parse_override(text) for text in settings or []))
    said = write_maps(explainer, source, out, count=count, device=device)
    if as_json:
        print_json(said | {"out": str(out)})
    else:
        print(f"{out}: {len(said['inputs'])} maps, listed in explanation.json")
