"""One vector per recording of a folder, as a parquet file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unmask.core.evaluation.features import pick_device, stand_ins
from unmask.core.method import to_device
from unmask.core.progress import Advance, progress_bar
from unmask.core.training.checkpoint import load_run
from unmask.core.training.files import write_atomically
from unmask.core.training.position import batches
from unmask.speech_audio.data.clips import Clips, collate, open_split
from unmask.speech_audio.evaluation.encoding import audio_settings, frame_mask, length_sorted, name_left_out

_WINDOW = 512  # clips sorted by length together and written in their order


def embed(run_dir: str | Path, folder: str, out: str | Path, *, device: str = "auto") -> Path:
    """Write one row per recording to a parquet file: ``id`` (int64), ``name`` and ``embedding`` (list of float32).

    The embedding is the mean over the frames of the last layer; nothing is masked. A recording longer than the run's
    ``max_seconds`` is encoded in segments of at most that length, as `unmask.speech_audio.data.segments` cuts them, and
    averaged over the frames of all. Recordings are read and written as a stream, in the order of the data, all splits
    together; unreadable ones (of a long recording, segments) are left out and named on stderr.

    Args:
        run_dir: a run directory.
        folder: recordings, as for training; labels are not needed.
        out: the file; whole or not there.
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        UnmaskError: no run, no recordings, or `out` cannot be written.
    """
    out, place = Path(out), pick_device(device)
    run = load_run(run_dir, place)
    clips = open_split(replace(audio_settings(run, folder), long="segments"), "all")
    about = {"method": run.recipe.method, "step": str(run.step)}
    encoder: Any = run.method.encoder
    with progress_bar("embedding", len(clips)) as advance:
        rows = embeddings(encoder, clips, place, run.recipe.training.workers, advance)
        write_atomically(out, lambda temporary: _write(temporary, rows, clips, about))
    name_left_out(clips.problems)
    return out


Rows = tuple[list[int], Float[Tensor, "n dim"]]


@torch.inference_mode()
def embeddings(encoder: Any, clips: Clips, device: torch.device, workers: int, advance: Advance) -> Iterator[Rows]:
    """Recordings, as indices, and means over their frames, window by window in the data's order, on the CPU."""
    recordings = [*clips.recordings.tolist(), len(clips.segments.recordings.names)]
    means: dict[int, _Mean] = {}
    for start in range(0, len(clips), _WINDOW):
        window = torch.arange(start, min(start + _WINDOW, len(clips)))
        chunks = [window[torch.tensor(chunk)].tolist() for chunk in length_sorted(clips.lengths[window])]
        loader = batches(clips, [[(i, 0) for i in chunk] for chunk in chunks], collate, workers, pin=False)
        for batch, chunk in zip(loader, chunks, strict=True):
            wrong = stand_ins(batch, clips, chunk)
            moved = to_device(batch, device)
            valid = frame_mask(moved)  # [clips, frames]
            tokens = encoder(moved.audio, moved.lengths).float()  # [clips, frames, dim]
            totals, frames = torch.where(valid[..., None], tokens, 0.0).sum(1).cpu(), valid.sum(1).tolist()
            for row, i in enumerate(chunk):
                if wrong is None or not wrong[row]:
                    means.setdefault(recordings[i], _Mean()).add(totals[row], frames[row])
            advance(len(chunk))
        done = sorted(recording for recording in means if recording < recordings[int(window[-1]) + 1])
        if done:
            yield done, torch.stack([means.pop(recording).value for recording in done])


@dataclass
class _Mean:
    """The mean over a recording's frames, segment by segment."""

    total: Float[Tensor, "dim"] | float = 0.0
    frames: int = 0

    def add(self, total: Float[Tensor, "dim"], frames: int) -> None:
        self.total, self.frames = self.total + total, self.frames + frames

    @property
    def value(self) -> Any:
        return self.total / max(self.frames, 1)


def _write(path: Path, rows: Iterator[Rows], clips: Clips, about: dict[str, str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [("id", pa.int64()), ("name", pa.string()), ("embedding", pa.list_(pa.float32()))]
    schema = pa.schema(columns, metadata=about)
    with pq.ParquetWriter(path, schema) as writer:
        recordings = clips.segments.recordings
        for index, x in rows:
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(x.flatten().numpy()), x.shape[1])
            names = [recordings.names[i] for i in index]
            arrays = [pa.array(recordings.ids[index].tolist()), pa.array(names), vectors.cast(pa.list_(pa.float32()))]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
