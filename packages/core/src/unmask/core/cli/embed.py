"""``unmask embed``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unmask.core import registry
from unmask.core.cli.options import Run, method_of

EXAMPLES = ("unmask embed runs/photos photos/ --out features.parquet",)


def embed(
    run: Run,
    folder: Annotated[str, typer.Argument(help="What to embed: a folder, or a name from `unmask data list`.")],
    out: Annotated[Path, typer.Option(help="The parquet file to write: one row per sample, name and feature vector.")],
) -> None:
    """Write the encoder's feature vector of every sample to a parquet file. Nothing is masked."""
    registry.task(method_of(run), "embed").embed(run, folder, out)
    print(out)
