"""One vector per recording of a folder, as a parquet file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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
from unmask.speech_audio.data.decode import CorruptAudioError
from unmask.speech_audio.data.frames import RECEPTIVE_FIELD
from unmask.speech_audio.evaluation.encoding import audio_settings, frame_mask, length_sorted, name_left_out

_WINDOW = 512  # clips sorted by length together and written in their order


def embed(run_dir: str | Path, folder: str, out: str | Path, *, device: str = "auto") -> Path:
    """Write one row per recording to a parquet file: ``id`` (int64), ``name`` and ``embedding`` (list of float32).

    The embedding is the mean over the frames of the last layer; nothing is masked. A recording longer than the run's
    ``max_seconds`` is encoded in pieces of that length and averaged over all of them. Recordings are read and written
    as a stream, in the order of the data, all splits together; unreadable ones are left out and named on stderr.

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
    clips = open_split(audio_settings(run, folder), "all")
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
    """Sample ids and means over frames, window by window in the data's order, on the CPU."""
    longest = clips.settings.max_samples
    for start in range(0, len(clips), _WINDOW):
        window = torch.arange(start, min(start + _WINDOW, len(clips)))
        found: dict[int, Tensor] = {}
        whole = window[clips.whole_lengths[window] <= longest]
        chunks = [whole[torch.tensor(chunk)].tolist() for chunk in length_sorted(clips.lengths[whole])]
        loader = batches(clips, [[(i, 0) for i in chunk] for chunk in chunks], collate, workers, pin=False)
        for batch, chunk in zip(loader, chunks, strict=True):
            wrong = stand_ins(batch, clips, chunk)
            moved = to_device(batch, device)
            valid = frame_mask(moved)
            tokens = encoder(moved.audio, moved.lengths).float()
            means = torch.where(valid[..., None], tokens, 0.0).sum(1) / valid.sum(1).clamp(min=1)[:, None]
            for row, (i, mean) in enumerate(zip(chunk, means.cpu(), strict=True)):
                if wrong is None or not wrong[row]:
                    found[i] = mean
            advance(len(chunk))
        for i in window[clips.whole_lengths[window] > longest].tolist():
            with contextlib.suppress(CorruptAudioError):  # it shows in `clips.problems`
                found[i] = _in_pieces(encoder, clips.waveform(i), longest, device)
            advance(1)
        if found:
            order = sorted(found)
            yield clips.ids[torch.tensor(order)].tolist(), torch.stack([found[i] for i in order])


def _in_pieces(encoder: Any, waveform: Float[Tensor, "samples"], longest: int, device: torch.device) -> Tensor:
    """The mean over the frames of consecutive pieces; an end shorter than one frame goes."""
    total, frames = torch.zeros(encoder.dim), 0
    for piece in waveform.split(longest):
        if len(piece) >= RECEPTIVE_FIELD:
            tokens = encoder(piece[None].to(device)).float()[0]
            total, frames = total + tokens.sum(0).cpu(), frames + len(tokens)
    return total / max(frames, 1)


def _write(path: Path, rows: Iterator[Rows], clips: Clips, about: dict[str, str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [("id", pa.int64()), ("name", pa.string()), ("embedding", pa.list_(pa.float32()))]
    schema = pa.schema(columns, metadata=about)
    with pq.ParquetWriter(path, schema) as writer:
        for ids, x in rows:
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(x.flatten().numpy()), x.shape[1])
            names = [clips.name_of(i) for i in ids]
            arrays = [pa.array(ids), pa.array(names), vectors.cast(pa.list_(pa.float32()))]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
