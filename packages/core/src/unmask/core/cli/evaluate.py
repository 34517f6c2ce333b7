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
    """Measure a run by its method's task, beside references.

    For pre-trained encoders: probes, k-NN and rank of the frozen features, beside raw input and an untrained encoder.

    The table is also written to RUN/evaluation.json.
    """
    registry.task(method_of(run))  # a task that nobody evaluates is answered before torch is imported
    from unmask.core.evaluation.run import evaluate, table

    result = evaluate(run, data=data, device=device, quick=quick)
    if as_json:
        print_json(result)
    else:
        print(table(result))
