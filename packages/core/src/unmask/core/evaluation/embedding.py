"""`unmask embed`: one vector per sample of a folder, as a parquet file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unmask.core import registry
from unmask.core.evaluation.encoding import Named, encoder_of_samples, encoding_of, name_left_out, say_notes
from unmask.core.evaluation.features import epoch_batches, pick_device, stand_ins
from unmask.core.method import to_device
from unmask.core.progress import Advance, progress_bar
from unmask.core.training.checkpoint import LoadedRun, load_run
from unmask.core.training.files import write_atomically


def embed(run_dir: str | Path, folder: str, out: str | Path, *, device: str = "auto") -> Path:
    """Write one row per sample to a parquet file: ``id`` (int64), ``name`` and ``embedding`` (list of float32).

    The embedding is what probes see (`Encoding.vectors`); nothing is masked. Samples are read and written as a stream,
    in the order of the data, all splits together; those that cannot be read are left out and named on stderr.

    Args:
        run_dir: a run directory.
        folder: samples, as for training; labels are not needed.
        out: the file; whole or not there.
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        UnmaskError: no run, no samples, or `out` cannot be written.
    """
    place = pick_device(device)
    run = load_run(run_dir, place)
    encoding = encoding_of(run.recipe.method)
    dataset = open_all(run, folder, encoding.embedded)
    columns = {"embedding": "list<float>"}
    with progress_bar("embedding", len(dataset)) as advance:
        found = (encoding.rows or _rows)(run, dataset, place, advance)
        rows = ((ids, names, {"embedding": vectors}) for ids, names, vectors in found)
        write_rows(Path(out), columns, rows, run)
    name_left_out(dataset.problems, run.recipe.method)
    return Path(out)


def open_all(run: LoadedRun, folder: str, change: Callable[[Any], Any] = lambda settings: settings) -> Any:
    """All samples of a folder, as a run's encoder takes them; what the data have to say is said."""
    encoding, method = encoding_of(run.recipe.method), run.recipe.method
    settings = change(encoding.settings(run.recipe.data, folder))
    dataset = registry.data_kind(method).open_split(settings, "all")
    say_notes(dataset, settings.source, run)
    return dataset


def _rows(run: LoadedRun, dataset: Any, device: torch.device, advance: Advance) -> Iterator[Named]:
    """One row per sample of the dataset."""
    encoding = encoding_of(run.recipe.method)
    return per_sample(encoder_of_samples(run.method, encoding), run, dataset, device, advance)


@torch.inference_mode()
def per_sample(
    function: Callable[[Any], Float[Tensor, "batch values"]],
    run: LoadedRun,
    dataset: Any,
    device: torch.device,
    advance: Advance,
) -> Iterator[Named]:
    """What a function says of every sample of a dataset that can be read, in order: ids, names, values on the CPU."""
    collate, at_once = registry.data_kind(run.recipe.method).collate, encoding_of(run.recipe.method).at_once(run.recipe)
    for batch, chunk in epoch_batches(dataset, collate, at_once, run.recipe.training.workers):
        wrong = stand_ins(batch, dataset, chunk)
        values = function(to_device(batch, device)).float().cpu()
        ids, values = (batch.ids, values) if wrong is None else (batch.ids[~wrong], values[~wrong])
        if len(ids):
            yield ids.tolist(), [dataset.name_of(int(i)) for i in ids], values
        advance(len(chunk))


Columns = dict[str, Any]  # lists, or tensors of one vector per row


def write_rows(
    out: Path,
    columns: dict[str, str],
    rows: Iterator[tuple[list[int], list[str], Columns]],
    run: LoadedRun,
    about: dict[str, str] | None = None,
) -> None:
    """Write rows to a parquet file as they come: ``id``, ``name``, then `columns` by the names of arrow's types.

    The file is whole or not there; its metadata are the method, the step and what is in `about`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"list<float>": pa.list_(pa.float32()), "string": pa.string(), "float": pa.float32()}
    fields = [("id", pa.int64()), ("name", pa.string()), *((name, types[kind]) for name, kind in columns.items())]
    schema = pa.schema(fields, metadata={"method": run.recipe.method, "step": str(run.step)} | (about or {}))

    def array(values: Any, kind: Any) -> Any:
        if not isinstance(values, Tensor):
            return pa.array(values, kind)
        return pa.FixedSizeListArray.from_arrays(pa.array(values.flatten().numpy()), values.shape[1]).cast(kind)

    def write(path: Path) -> None:
        with pq.ParquetWriter(path, schema) as writer:
            for ids, names, values in rows:
                arrays = [array(values[name], types[kind]) for name, kind in columns.items()]
                writer.write_table(pa.Table.from_arrays([pa.array(ids), pa.array(names), *arrays], schema=schema))

    write_atomically(out, write)
