"""One vector per recording, however long, and how core is told to encode recordings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unmask.core.evaluation.encoding import Encoding, Named
from unmask.core.evaluation.features import stand_ins
from unmask.core.method import to_device
from unmask.core.progress import Advance
from unmask.core.training.checkpoint import LoadedRun
from unmask.core.training.position import batches
from unmask.speech_audio.data.clips import Clips, collate
from unmask.speech_audio.encoders.wav2vec2 import frame_mask
from unmask.speech_audio.evaluation.encoding import audio_settings, length_sorted

_WINDOW = 512  # clips sorted by length together and written in their order

Rows = tuple[list[int], Float[Tensor, "n dim"]]


@torch.inference_mode()
def embeddings(encoder: Any, clips: Clips, device: torch.device, workers: int, advance: Advance) -> Iterator[Rows]:
    """Recordings, as indices, and means over their frames, window by window in the data's order, on the CPU."""
    recordings = [*clips.recordings.tolist(), len(clips.segments.recordings.names)]
    totals: dict[int, Any] = {}  # sums over the frames of recordings that are not done yet, and how many there are
    counts: Counter[int] = Counter()
    for start in range(0, len(clips), _WINDOW):
        window = torch.arange(start, min(start + _WINDOW, len(clips)))
        chunks = [window[torch.tensor(chunk)].tolist() for chunk in length_sorted(clips.lengths[window])]
        loader = batches(clips, [[(i, 0) for i in chunk] for chunk in chunks], collate, workers, pin=False)
        for batch, chunk in zip(loader, chunks, strict=True):
            wrong = stand_ins(batch, clips, chunk)
            moved = to_device(batch, device)
            valid = frame_mask(moved.audio.shape[1], moved.lengths)  # [clips, frames]
            tokens = encoder(moved.audio, moved.lengths).float()  # [clips, frames, dim]
            sums, frames = torch.where(valid[..., None], tokens, 0.0).sum(1).cpu(), valid.sum(1).tolist()
            for row, i in enumerate(chunk):
                if wrong is None or not wrong[row]:
                    totals[recordings[i]] = totals.get(recordings[i], 0.0) + sums[row]
                    counts[recordings[i]] += frames[row]
            advance(len(chunk))
        done = sorted(recording for recording in totals if recording < recordings[int(window[-1]) + 1])
        if done:
            yield done, torch.stack([totals.pop(recording) / max(counts.pop(recording), 1) for recording in done])


def recording_rows(run: LoadedRun, clips: Clips, device: torch.device, advance: Advance) -> Iterator[Named]:
    """Recordings by id and name, with the means over their frames of the last layer.

    A recording longer than the run's ``max_seconds`` is encoded in segments of at most that length, as
    `unmask.speech_audio.data.segments` cuts them, and averaged over the frames of all that can be read.
    """
    encoder: Any = run.method.encoder
    recordings = clips.segments.recordings
    for index, x in embeddings(encoder, clips, device, run.recipe.training.workers, advance):
        yield recordings.ids[index].tolist(), [recordings.names[i] for i in index], x


ENCODING = Encoding(
    settings=audio_settings,
    rows=recording_rows,
    embedded=lambda settings: replace(settings, long="segments"),  # so that all of a long recording is heard
)
