"""``unmask finetune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from unmask.core import registry
from unmask.core.cli.options import Json, method_of, print_json
from unmask.core.errors import UnmaskError
from unmask.core.training.world import rank

EXAMPLES = (
    "unmask finetune runs/photos --data labelled/",
    "unmask finetune runs/first --data cifar10 --epochs 20 --set optimizer.base_lr=0.001",
    "unmask finetune --resume runs/first/finetune                    after an interruption",
    "unmask finetune runs/first --data cifar10 --labels 0.1 --out few/",
    "unmask finetune runs/first --data cifar10 --labels 0.1 --scratch --out scratch/    what few/ has to beat",
)


def finetune(
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="A run directory: what `--out` named when it was trained.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Labelled data: a folder with one sub-folder per class, or a name.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run directory to make; RUN/finetune when not given.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the labelled data.")] = None,
    labels: Annotated[float, typer.Option(help="Share of each class's training labels to use.")] = 1.0,
    scratch: Annotated[bool, typer.Option("--scratch", help="Begin with random weights instead of the run's.")] = False,
    seed: Annotated[int, typer.Option(help="Of the head, the order, the augmentation and which labels.")] = 0,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change any key of its recipe; may be repeated."),
    ] = None,
    devices: Annotated[int | None, typer.Option(min=1, metavar="N", help="Processes on this machine.")] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Go on with a fine-tuning that was interrupted, exactly.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
    as_json: Json = False,
) -> None:
    """Train a run's encoder further, with a classifier on top, on labelled data.

    It is a run of its own, with recipe, metrics and checkpoints; `unmask predict` uses the classifier.
    """
    if resume is None and (run is None or data is None):
        raise UnmaskError("name a run and labelled data, for example: unmask finetune runs/first --data labelled/")
    method = method_of(resume or run)  # type: ignore[arg-type]  # one of the two was given
    from unmask.core.evaluation import finetune as tuning
    from unmask.core.evaluation.tables import tuned_text

    if resume is not None:
        result = tuning.resume(resume, devices=devices, progress=not quiet)
    else:
        folder = out or run / "finetune"  # type: ignore[operator]  # it was given
        options: dict[str, Any] = {"epochs": epochs, "labels": labels, "scratch": scratch, "seed": seed}
        options |= {"settings": settings or [], "devices": devices, "progress": not quiet}
        result = tuning.finetune(run, data, folder, **options)  # type: ignore[arg-type]  # likewise
    if rank() != 0:
        return
    if as_json:
        print_json(result)
    else:
        print(tuned_text(result, registry.domain(method).samples))
