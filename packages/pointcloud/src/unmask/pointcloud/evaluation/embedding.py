"""One vector per cloud of a folder, as a parquet file."""

from __future__ import annotations

from pathlib import Path

import torch

from unmask.core.evaluation.features import epoch_batches, pick_device, stand_ins
from unmask.core.method import to_device
from unmask.core.progress import progress_bar
from unmask.core.training.checkpoint import LoadedRun, load_run
from unmask.core.training.files import write_atomically
from unmask.pointcloud.data.clouds import PointClouds, collate, open_split
from unmask.pointcloud.evaluation.encoding import clouds_at_once, data_settings, name_left_out
from unmask.pointcloud.evaluation.features import of_clouds


def embed(run_dir: str | Path, folder: str, out: str | Path, *, device: str = "auto") -> Path:
    """Write one row per cloud to a parquet file: ``id`` (int64), ``name`` and ``embedding`` (list of float32).

    The embedding is what the probes of `evaluate` see: the maximum over the cloud's pillars, then their mean, so twice
    the encoder's width; nothing is masked. Clouds are read and written as a stream, in the order of the data, all
    splits together; unreadable ones, and those without a point inside the run's range, are left out and named on
    stderr.

    Args:
        run_dir: a run directory.
        folder: clouds, as for training; labels are not needed.
        out: the file; whole or not there.
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        UnmaskError: no run, no clouds, or `out` cannot be written.
    """
    out, place = Path(out), pick_device(device)
    run = load_run(run_dir, place)
    clouds = open_split(data_settings(run, folder), "all")
    write_atomically(out, lambda temporary: _write(temporary, run, clouds, place))
    name_left_out(clouds.problems)
    return out


@torch.inference_mode()
def _write(path: Path, run: LoadedRun, clouds: PointClouds, device: torch.device) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [("id", pa.int64()), ("name", pa.string()), ("embedding", pa.list_(pa.float32()))]
    encode = of_clouds(run.method)
    schema = pa.schema(columns, metadata={"method": run.recipe.method, "step": str(run.step)})
    with pq.ParquetWriter(path, schema) as writer, progress_bar("embedding", len(clouds)) as advance:
        for batch, chunk in epoch_batches(clouds, collate, clouds_at_once(run), run.recipe.training.workers):
            wrong = stand_ins(batch, clouds, chunk)
            if wrong is not None:
                batch = batch.take((~wrong).nonzero()[:, 0].tolist())
            if len(batch.ids):
                vectors = encode(to_device(batch, device)).float().cpu()
                rows = pa.FixedSizeListArray.from_arrays(pa.array(vectors.flatten().numpy()), vectors.shape[1])
                names = pa.array([clouds.name_of(int(i)) for i in batch.ids])
                arrays = [pa.array(batch.ids.numpy()), names, rows.cast(pa.list_(pa.float32()))]
                writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
            advance(len(chunk))
