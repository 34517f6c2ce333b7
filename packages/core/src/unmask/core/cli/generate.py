"""``unmask generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unmask.core.cli.options import Run, method_of

EXAMPLES = (
    "unmask list --kind generate                              methods that learn to generate",
    "unmask generate runs/first --out samples/",
    "unmask generate runs/first --out more/ --count 100 --seed 7",
)


def generate(
    run: Run,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to make; nothing in it is overwritten.")],
    count: Annotated[int, typer.Option(min=1, metavar="N", help="How many samples.")] = 16,
    seed: Annotated[int, typer.Option(metavar="N", help="The same seed gives the same samples.")] = 0,
    device: Annotated[str, typer.Option(help="`auto`, `cpu` or `cuda`.")] = "auto",
) -> None:
    """Draw new samples from a run of a method that generates, and write each as a file.

    They come in the form that the run was trained on, put back to its own scale.
    """
    method_of(run)
    from unmask.core.generation import generate as draw

    print(draw(run, out, count=count, seed=seed, device=device))
