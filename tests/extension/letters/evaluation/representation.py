"""How good are the features? k-NN and a linear probe, beside an untrained encoder and the letters' counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.core.evaluation.features import Splits, epoch_batches, extract, pick_device
from unmask.core.evaluation.knn import knn_accuracy
from unmask.core.evaluation.linear import linear_probe
from unmask.core.evaluation.rankme import rankme
from unmask.core.method import encoder_of
from unmask.core.training.build import make_method
from unmask.core.training.checkpoint import LoadedRun, load_run
from unmask.core.training.files import write_json
from unmask.letters.data.decode import VOCABULARY
from unmask.letters.data.lines import LineBatch, collate, open_split

NAMES = {"trained": "this run", "random": "untrained encoder", "letters": "counts of letters"}
Encode = Callable[[LineBatch], Tensor]


def evaluate(run_dir: Path, *, data: str | None, device: str, quick: bool) -> dict[str, Any]:
    """Measure, write RUN/evaluation.json and return it."""
    run = load_run(run_dir, pick_device(device))
    settings = type(run.recipe.data)(data or run.recipe.data.source, run.recipe.data.length)
    sets = {split: open_split(settings, split) for split in ("train", "val", "test")}
    torch.manual_seed(0)
    untrained = encoder_of(make_method(run.recipe)).eval()
    encoders = {"trained": pooled(encoder_of(run.method)), "random": pooled(untrained), "letters": counts}
    result = {
        "method": run.recipe.method,
        "step": run.step,
        "data": settings.source,
        "names": NAMES,
        "labelled": False,
        "note": "Accuracies on the test lines are in evaluation.json.",
        "rows": {name: _measure(encode, sets) for name, encode in encoders.items()},
    }
    write_json(run_dir / "evaluation.json", result)
    return result


def _measure(encode: Encode, sets: dict[str, Any]) -> dict[str, float]:
    found = {split: extract(encode, data, collate) for split, data in sets.items()}
    train, test = found["train"], found["test"]
    return {
        "knn": knn_accuracy(train.x, train.labels, test.x, test.labels),
        "linear": linear_probe(Splits(train, found["val"], test)).accuracy,
        "rankme": rankme(test.x),
        "dim": train.x.shape[1],
    }


def pooled(encoder: nn.Module) -> Encode:
    return lambda batch: encoder(batch.letters, batch.valid).pooled


def counts(batch: LineBatch) -> Tensor:
    return F.one_hot(batch.letters, VOCABULARY)[..., 1:].sum(1).float()


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    rows = [f"{NAMES[name]:<20} {row['knn']:.3f}  {row['linear']:.3f}" for name, row in result["rows"].items()]
    return "\n".join([f"{'features':<20} k-NN   linear", *rows])


def embed(run_dir: Path, source: str, out: Path) -> None:
    """One row per line in a parquet file: its name and its feature vector."""
    import pyarrow
    from pyarrow import parquet

    run: LoadedRun = load_run(run_dir)
    lines = open_split(type(run.recipe.data)(source, run.recipe.data.length), "all")
    encode = pooled(encoder_of(run.method))
    with torch.no_grad():
        vectors = [encode(batch).tolist() for batch, _ in epoch_batches(lines, collate, 256)]
    names = [lines.name_of(int(i)) for i in lines.ids]
    parquet.write_table(pyarrow.table({"name": names, "feature": sum(vectors, [])}), out)
