"""An s3prl upstream, so that SUPERB (Yang et al., arXiv 2105.01051) runs on our models unchanged.

Put one line into ``s3prl/upstream/example/hubconf.py`` of an s3prl checkout::

    from unmask.speech_audio.interop.s3prl import customized_upstream

and name the weights with ``-k``: a run directory, its ``model.safetensors``, an exported directory or one in
transformers' format::

    python run_downstream.py -m train -n EXPERIMENT -u customized_upstream -k RUN -d speech_commands

To give it a name of its own, import `unmask_local` in a ``hubconf.py`` that ``s3prl/hub.py`` imports.

As in s3prl's own HuBERT upstream there is one state for the Transformer's input and one per layer, no layer is ever
dropped, and the waveform convolutions stay as they are when the rest is fine-tuned (``-f``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from unmask.core.errors import UnmaskError
from unmask.speech_audio.data.frames import HOP, RECEPTIVE_FIELD, num_frames
from unmask.speech_audio.interop.hear import encoder_at


class UpstreamExpert(nn.Module):
    """What s3prl calls: a list of waveforms in, the hidden states of all layers out.

    Args:
        ckpt: where the weights are; see the module.
        model_config: not used; s3prl passes it.
        kwargs: not used; s3prl passes ``refresh`` and others.

    Raises:
        UnmaskError: nothing to load at `ckpt`.
    """

    def __init__(self, ckpt: str | None = None, model_config: str | None = None, **kwargs: Any) -> None:
        super().__init__()
        self.model = encoder_at(ckpt)
        self.model.encoder.layer_drop.rate = 0.0
        self.model.encoder.waveform.requires_grad_(False)

    def get_downsample_rates(self, key: str) -> int:
        """Samples per frame, whichever states `key` names."""
        return HOP

    def forward(self, wavs: Sequence[Float[Tensor, "_"]]) -> dict[str, Any]:
        """The states of a batch.

        Args:
            wavs: waveforms at 16 kHz in about [-1, 1], not normalised (it is done here where the model was trained so),
                of any lengths; one shorter than a frame (400 samples) is padded with zeros.

        Returns:
            ``hidden_states``: depth + 1 tensors [batch, frames, dim], the Transformer's input first. Past a clip's end
            its last frame is repeated: s3prl counts round(samples / 320) frames, which may be one more than there are.
            ``last_hidden_state``: the last of them.
        """
        if not wavs or any(wav.dim() != 1 or not len(wav) for wav in wavs):
            raise UnmaskError("expected a list of waveforms, each of shape (samples,) and not empty")
        waves = [wav.float() for wav in wavs]
        if self.model.normalise:
            waves = [F.layer_norm(wave, wave.shape) for wave in waves]
        waves = [F.pad(wave, (0, max(0, RECEPTIVE_FIELD - len(wave)))) for wave in waves]
        lengths = torch.tensor([len(wave) for wave in waves], device=waves[0].device)
        states = self.model.encoder.states(torch.nn.utils.rnn.pad_sequence(waves, batch_first=True), lengths)
        frame = torch.arange(states[0].shape[1], device=lengths.device)  # [frames]
        source = torch.minimum(frame, num_frames(lengths)[:, None] - 1)[..., None]  # [batch, frames, 1]
        states = [state.gather(1, source.expand_as(state)) for state in states]
        return {"hidden_states": states, "last_hidden_state": states[-1]}


def unmask_local(ckpt: str, *args: Any, **kwargs: Any) -> UpstreamExpert:
    """s3prl's entry: the upstream of the weights at `ckpt`."""
    return UpstreamExpert(ckpt, *args, **kwargs)


def customized_upstream(*args: Any, **kwargs: Any) -> UpstreamExpert:
    """s3prl's entry for an upstream of one's own (``-u customized_upstream -k CKPT``)."""
    return UpstreamExpert(*args, **kwargs)
