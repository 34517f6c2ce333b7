"""HEAR's common interface (Turian et al., arXiv 2203.03022), so that its evaluation runs on our models unchanged.

    heareval.embeddings.runner unmask.speech_audio.interop.hear --model RUN --tasks-dir TASKS

RUN is a run directory, its ``model.safetensors``, an exported directory or one in transformers' format. Options go in
``--model-options '{"layer": 6}'``; see `load_model`.

One embedding every 20 ms; frame i is stamped with the centre of the 25 ms it sees, 12.5 + 20 i ms, computed from whole
samples. A scene is the mean of its timestamps' embeddings.

Clips longer than `window_seconds` go through in equal windows of that length, spread evenly with at least two seconds
shared by neighbours; every frame is taken from the window in which it lies further from the edge. Frames and timestamps
are those of one pass. Embeddings are not quite: attention (and in BASE the first layer's statistics) see one window.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from unmask.core.errors import UnmaskError
from unmask.speech_audio import DOMAIN
from unmask.speech_audio.data.frames import HOP, RECEPTIVE_FIELD, SAMPLE_RATE, num_frames
from unmask.speech_audio.interop.model import PretrainedEncoder

_SHARED = 100  # frames that neighbouring windows have in common at least: 2 s


class HearModel(nn.Module):
    """An encoder with the plain numbers that HEAR asks for; make one with `load_model`."""

    def __init__(self, pretrained: PretrainedEncoder, layer: int | str = "last", window_seconds: float = 30.0) -> None:
        super().__init__()
        self.pretrained = pretrained
        self.layer = _layer_number(layer, pretrained.depth)
        self.window = num_frames(round(window_seconds * SAMPLE_RATE))
        if self.window <= 2 * _SHARED:
            raise UnmaskError(f"window_seconds={window_seconds}: windows share 2 s, so they need more than 4")
        self.sample_rate: int = SAMPLE_RATE
        self.timestamp_embedding_size: int = pretrained.dim * (pretrained.depth + 1 if self.layer is None else 1)
        self.scene_embedding_size: int = self.timestamp_embedding_size

    def forward(self, audio: Float[Tensor, "sounds samples"]) -> Float[Tensor, "sounds frames dim"]:
        """One embedding per frame of audio that is no longer than a window and already normalised."""
        if self.layer == self.pretrained.depth:
            return self.pretrained.encoder(audio).float()
        states = self.pretrained.encoder.states(audio)  # depth + 1 times [sounds, frames, dim]
        return (torch.cat(states, dim=2) if self.layer is None else states[self.layer]).float()


def _layer_number(layer: int | str, depth: int) -> int | None:
    """None for all layers."""
    if layer == "all":
        return None
    number = depth if layer == "last" else layer
    if not isinstance(number, int) or not 0 <= number <= depth:
        raise UnmaskError(f'layer={layer!r}: expected "last", "all" or a number from 0 (the input) to {depth}')
    return number


def load_model(model_file_path: str = "", *, layer: int | str = "last", window_seconds: float = 30.0) -> HearModel:
    """A model in eval mode, on the CPU: HEAR moves it.

    Args:
        model_file_path: a run directory, the ``model.safetensors`` in it, a directory from ``unmask export`` or one
            in transformers' format.
        layer: whose output to give: ``"last"`` (the model's output), a number (0 is the Transformer's input, l the
            output of layer l), or ``"all"``: input and all layers side by side, (depth + 1) * dim values.
        window_seconds: the longest clip that goes through at once; less takes less memory.

    Raises:
        UnmaskError: no path, nothing there to load, or a layer that the model does not have.
    """
    return HearModel(encoder_at(model_file_path), layer, window_seconds).eval()


@torch.no_grad()
def get_scene_embeddings(audio: Float[Tensor, "sounds samples"], model: nn.Module) -> Float[Tensor, "sounds dim"]:
    """One float32 embedding per clip: the mean over its timestamps.

    Args:
        audio: mono at the model's sample rate (16 kHz), in [-1, 1], equal lengths of at least 25 ms.
        model: from `load_model`.
    """
    total, frames = None, 0
    for part in _parts(audio, model):
        total = part.sum(1) if total is None else total + part.sum(1)
        frames += part.shape[1]
    assert total is not None
    return total / frames


@torch.no_grad()
def get_timestamp_embeddings(
    audio: Float[Tensor, "sounds samples"], model: nn.Module
) -> tuple[Float[Tensor, "sounds frames dim"], Float[Tensor, "sounds frames"]]:
    """Float32 embeddings every 20 ms, and their times in milliseconds (the same for every clip).

    Args:
        audio: as for `get_scene_embeddings`.
        model: from `load_model`.
    """
    embeddings = torch.cat(list(_parts(audio, model)), dim=1)
    centre = torch.arange(embeddings.shape[1], device=embeddings.device) * HOP + RECEPTIVE_FIELD // 2
    times = (centre.double() * 1000 / SAMPLE_RATE).float()
    return embeddings, times.expand(len(embeddings), -1).contiguous()


def _parts(audio: Tensor, model: nn.Module) -> Iterator[Float[Tensor, "sounds part dim"]]:
    """The frames of all clips, window after window."""
    if not isinstance(model, HearModel):
        raise UnmaskError(f"expected the model that load_model returned; got {type(model).__name__}")
    if audio.dim() != 2 or audio.shape[1] < RECEPTIVE_FIELD:
        raise UnmaskError(
            f"audio of shape {tuple(audio.shape)}; expected (sounds, samples) with at least {RECEPTIVE_FIELD} samples"
        )
    audio = audio.to(next(model.parameters()).device, torch.float32)
    if model.pretrained.normalise:
        audio = F.layer_norm(audio, audio.shape[1:])
    frames = num_frames(audio.shape[1])
    for start, first, end in _windows(frames, model.window):
        # The last window keeps the samples after the last frame: BASE's first layer takes its statistics over them too.
        stop = audio.shape[1] if end == frames else (start + model.window - 1) * HOP + RECEPTIVE_FIELD
        yield model(audio[:, start * HOP : stop])[:, first - start : end - start]


def _windows(frames: int, window: int) -> list[tuple[int, int, int]]:
    """Where each window starts, and the frames that are taken from it (first, first after)."""
    if frames <= window:
        return [(0, 0, frames)]
    count = -((frames - _SHARED) // -(window - _SHARED))
    starts = [i * (frames - window) // (count - 1) for i in range(count)]
    cuts = [(right + left + window) // 2 for left, right in zip(starts, starts[1:], strict=False)]
    return list(zip(starts, [0, *cuts], [*cuts, frames], strict=True))


def encoder_at(path: str | Path | None) -> PretrainedEncoder:
    """The trained encoder of a directory, or of the ``model.safetensors`` in one.

    Raises:
        UnmaskError: no path, or nothing there to load.
    """
    if not path:
        raise UnmaskError("no weights are shipped; give the path of a run, an exported or a transformers directory")
    encoder: PretrainedEncoder = DOMAIN.load(path)
    return encoder
