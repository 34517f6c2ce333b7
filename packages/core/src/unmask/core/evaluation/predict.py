"""`unmask predict`: what a fine-tuned classifier says of every sample of a folder, as a parquet file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from unmask.core.evaluation.embedding import Columns, open_all, per_sample, write_rows
from unmask.core.evaluation.encoding import Named, name_left_out
from unmask.core.evaluation.features import pick_device
from unmask.core.evaluation.finetune import load_tuned
from unmask.core.progress import progress_bar
from unmask.core.training.initial import say_on_stderr

_COLUMNS = {"label": "string", "probability": "float", "probabilities": "list<float>"}


def predict(tuned: str | Path, folder: str, out: str | Path, *, device: str = "auto") -> Path:
    """Write one row per sample to a parquet file.

    Columns are ``id`` (int64), ``name``, ``label`` (the most probable class), ``probability`` (of it) and
    ``probabilities`` (list of float32: of every class, in the order of ``classes`` in the file's metadata, a JSON
    list). Samples are read and written as a stream, in the order of the data, all splits together, without
    augmentation; those that cannot be read are left out and named on stderr.

    Args:
        tuned: what `unmask finetune` wrote.
        folder: samples, as for training; labels are not needed.
        out: the file; whole or not there.
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        UnmaskError: no classifier, no samples, or `out` cannot be written.
    """
    place = pick_device(device)
    run = load_tuned(tuned, place)
    if not (Path(tuned) / "model.safetensors").is_file():
        say_on_stderr(
            f"{tuned} is not finished: its classifier of step {run.step} is used. Go on with: unmask finetune --resume "
            f"{tuned}"
        )
    model: Any = run.method
    dataset = open_all(run, folder)

    def probabilities(batch: Any) -> Float[Tensor, "batch classes"]:
        return model.predict(batch).float().softmax(1)

    with progress_bar("predicting", len(dataset)) as advance:
        found = per_sample(probabilities, run, dataset, place, advance)
        about = {"classes": json.dumps(model.classes)}
        write_rows(Path(out), _COLUMNS, _rows(found, model.classes), run, about)
    name_left_out(dataset.problems, run.recipe.method)
    return Path(out)


def _rows(found: Iterator[Named], classes: list[str]) -> Iterator[tuple[list[int], list[str], Columns]]:
    for ids, names, probabilities in found:
        best, index = probabilities.max(1)
        labels = [classes[i] for i in index.tolist()]
        yield ids, names, {"label": labels, "probability": best.tolist(), "probabilities": probabilities}
