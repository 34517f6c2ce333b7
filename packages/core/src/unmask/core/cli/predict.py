"""``unmask predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = (
    "unmask finetune runs/photos --data labelled/ --out runs/classifier",
    "unmask predict runs/classifier photos/ --out predictions.parquet",
)


def predict(
    classifier: Annotated[
        Path, typer.Argument(metavar="CLASSIFIER", help="What `--out` named when it was fine-tuned.")
    ],
    folder: Annotated[str, typer.Argument(help="What to classify: a folder, or a name from `unmask data list`.")],
    out: Annotated[
        Path,
        typer.Option(help="The parquet file to write: one row per sample, name, label and probability of every class."),
    ],
    device: Annotated[str, typer.Option(help="`auto`, `cpu` or `cuda`.")] = "auto",
) -> None:
    """Write what a fine-tuned classifier says of every sample to a parquet file."""
    from unmask.core.evaluation.predict import predict as write_predictions

    print(write_predictions(classifier, folder, out, device=device))
