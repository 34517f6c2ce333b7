"""``unmask evaluate``."""

from __future__ import annotations

from typing import Annotated

import typer

from unmask.core import registry
from unmask.core.cli.options import Json, Run, method_of, print_json

EXAMPLES = (
    "unmask evaluate runs/first",
    "unmask evaluate runs/photos --data labelled/ --json",
)


def evaluate(
    run: Run,
    data: Annotated[
        str | None, typer.Option(help="Labelled data to evaluate on; the run's own data when it has labels.")
    ] = None,
    device: Annotated[str, typer.Option(help="`auto`, `cpu` or `cuda`.")] = "auto",
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Leave out what takes longest, for example fine-tuning.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Judge a run's frozen features: probes, k-NN and rank, beside raw input and an untrained encoder.

    The table is also written to RUN/evaluation.json.
    """
    part = registry.task(method_of(run))
    result = part.evaluate(run, data=data, device=device, quick=quick)
    if as_json:
        print_json(result)
    else:
        print(part.table(result))
