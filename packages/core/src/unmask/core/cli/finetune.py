"""``unmask finetune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unmask.core import registry
from unmask.core.cli.options import Json, Run, method_of, print_json

EXAMPLES = (
    "unmask finetune runs/photos --data labelled/",
    "unmask finetune runs/first --data cifar10 --epochs 20",
    "unmask finetune runs/first --data cifar10 --labels 0.1 --out few/",
    "unmask finetune runs/first --data cifar10 --labels 0.1 --scratch --out scratch/    what few/ has to beat",
)


def finetune(
    run: Run,
    data: Annotated[str, typer.Option(help="Labelled data: a folder with one sub-folder per class, or a name.")],
    out: Annotated[Path | None, typer.Option(help="Where to write; RUN/finetune when not given.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the labelled data.")] = None,
    labels: Annotated[float, typer.Option(help="Share of each class's training labels to use.")] = 1.0,
    scratch: Annotated[bool, typer.Option("--scratch", help="Begin with random weights instead of the run's.")] = False,
    seed: Annotated[int, typer.Option(help="Of the head, the order, the augmentation and which labels.")] = 0,
    as_json: Json = False,
) -> None:
    """Train a run's encoder further, with a classifier on top, on labelled data."""
    part = registry.task(method_of(run), "finetune")
    options = {"epochs": epochs, "labels": labels, "scratch": scratch, "seed": seed}
    result = part.finetune(run, data, out or run / "finetune", **options)
    if as_json:
        print_json(result)
    else:
        from unmask.core.evaluation.tables import tuned_text

        print(tuned_text(result, registry.domain(method_of(run)).samples))
