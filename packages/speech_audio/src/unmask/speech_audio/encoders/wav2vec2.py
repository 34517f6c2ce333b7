"""The speech encoder of wav2vec 2.0 and HuBERT: convolutions on the waveform, then a Transformer.

Sources: wav2vec 2.0 (arXiv 2006.11477, section 2) and HuBERT (arXiv 2106.07447, section II-E); released code
facebookresearch/fairseq. Parameter names inside the blocks are timm's; ``unmask.speech_audio.interop.convert`` knows
torchaudio's and transformers'.

Padding never changes a clip: GroupNorm's statistics are taken over a clip's own frames, padded frames are zero where
the positional convolution reads them and nothing attends to them. The released group-norm models pad with zeros and
take statistics over them, so features of padded batches differ there (and in torchaudio and transformers) from those of
the same clips alone; features of unpadded batches agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from unmask.core.errors import UnmaskError
from unmask.core.method import Features
from unmask.core.nn.transformer import Block, Norm
from unmask.speech_audio.data.frames import RECEPTIVE_FIELD, num_frames

KERNELS = (10, 3, 3, 3, 3, 2, 2)
STRIDES = (5, 2, 2, 2, 2, 2, 2)
_EPS = 1e-5  # of every norm in the released models

Extractor = Literal["group_norm", "layer_norm"]


@dataclass(frozen=True)
class EncoderSettings:
    """The encoder's shape; the defaults are HuBERT BASE.

    LARGE is ``extractor: layer_norm, norm: pre, dim: 1024, depth: 24, heads: 16``, a `feature_grad` of 1 and all
    dropouts 0; X-LARGE the same with ``dim: 1280, depth: 48``.

    Args:
        channels: width of the waveform convolutions.
        extractor: ``group_norm`` after the first convolution only (BASE), or ``layer_norm`` after each (LARGE).
        conv_bias: biases in the waveform convolutions. HuBERT has none; some LARGE directories in transformers' format
            (and wav2vec 2.0 LARGE) do.
        feature_grad: gradients into the waveform convolutions are multiplied by this, in (0, 1].
        dim: width of the Transformer.
        depth: number of Transformer layers.
        heads: attention heads; must divide `dim`.
        mlp_ratio: width of the feed-forward layer over `dim`.
        norm: ``post`` (BASE) or ``pre`` (LARGE).
        positional_kernel: width of the positional convolution, in frames.
        positional_groups: its groups; must divide `dim`.
        input_dropout: dropout after the projection of the waveform features; this and the next three are probabilities.
        dropout: dropout at the Transformer's input and at the end of each residual branch.
        attention_dropout: dropout of attention weights.
        activation_dropout: dropout inside the feed-forward layer.
        layer_drop: probability of skipping a whole Transformer layer in training.
    """

    channels: int = 512
    extractor: Extractor = "group_norm"
    conv_bias: bool = False
    feature_grad: float = 0.1
    dim: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    norm: Norm = "post"
    positional_kernel: int = 128
    positional_groups: int = 16
    input_dropout: float = 0.1
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.0
    layer_drop: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.feature_grad <= 1:
            raise ValueError(
                f"feature_grad {self.feature_grad} is not in (0, 1]; to freeze the waveform convolutions, set "
                "requires_grad of their parameters to False"
            )
        if self.dim % self.positional_groups:
            raise ValueError(
                f"positional_groups {self.positional_groups} do not divide dim {self.dim}; choose groups that divide it"
            )


class WaveformLayer(nn.Module):
    """One convolution on the waveform, its norm (if it has one) and a GELU."""

    def __init__(self, channels: tuple[int, int], kernel: int, stride: int, norm: nn.Module | None, bias: bool) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv1d(*channels, kernel, stride, bias=bias)
        self.norm = norm
        nn.init.kaiming_normal_(self.conv.weight)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(
        self, x: Float[Tensor, "batch channels_in time"], lengths: Int[Tensor, "batch"] | None
    ) -> Float[Tensor, "batch channels frames"]:
        """Convolve, normalise, activate; `lengths` counts the output frames of each clip, None without padding."""
        if isinstance(self.norm, nn.LayerNorm):
            # As a 2-d convolution in channels-last memory: the norm over channels then needs no transposition.
            weight, bias = self.conv.weight[:, :, None], self.conv.bias
            x = F.conv2d(x[:, :, None], weight, bias, stride=(1, self.stride))[:, :, 0]  # [batch, channels, frames]
            return F.gelu(self.norm(x.transpose(1, 2)).to(x.dtype)).transpose(1, 2)
        x = self.conv(x)  # [batch, channels, frames]
        if isinstance(self.norm, nn.GroupNorm):
            # In float32 as released, and back to the convolution's type: the longest activations of the model.
            x = (self.norm(x) if lengths is None else _normalise_clips(x, lengths, self.norm)).to(x.dtype)
        return F.gelu(x)


def _normalise_clips(
    x: Float[Tensor, "batch channels time"], lengths: Int[Tensor, "batch"], norm: nn.GroupNorm
) -> Float[Tensor, "batch channels time"]:
    """GroupNorm with one channel per group over each clip's own frames; padding becomes the bias."""
    valid = (torch.arange(x.shape[2], device=x.device) < lengths[:, None])[:, None]
    count = lengths.clamp(min=1)[:, None, None]
    mean = torch.where(valid, x, 0.0).sum(2, keepdim=True, dtype=torch.float32) / count
    centred = torch.where(valid, x.float() - mean, 0.0)
    scale = (centred.square().sum(2, keepdim=True) / count + norm.eps).rsqrt()
    return centred * (scale * norm.weight[:, None]) + norm.bias[:, None]


class WaveformEncoder(nn.ModuleList):
    """Seven convolutions from 16 kHz samples to one frame every 320, with a receptive field of 400."""

    def __init__(self, channels: int, extractor: Extractor, bias: bool = False) -> None:
        layers = []
        for i, (kernel, stride) in enumerate(zip(KERNELS, STRIDES, strict=True)):
            norm: nn.Module | None = nn.LayerNorm(channels, eps=_EPS) if extractor == "layer_norm" else None
            if extractor == "group_norm" and i == 0:
                norm = nn.GroupNorm(channels, channels, eps=_EPS)
            layers.append(WaveformLayer((channels if i else 1, channels), kernel, stride, norm, bias))
        super().__init__(layers)

    def forward(
        self, audio: Float[Tensor, "batch samples"], lengths: Int[Tensor, "batch"] | None = None
    ) -> Float[Tensor, "batch frames channels"]:
        """Frames of every clip; those past its end hold arbitrary values."""
        x = audio[:, None]  # [batch, 1, samples]
        for layer, kernel, stride in zip(self, KERNELS, STRIDES, strict=True):
            if lengths is not None:
                lengths = ((lengths - kernel) // stride + 1).clamp(min=0)
            x = layer(x, lengths)  # [batch, channels, time]
        return x.transpose(1, 2)


class PositionalConvolution(nn.Module):
    """Relative positions as a grouped convolution over frames, weight-normalised over all but the kernel axis.

    The weight is initialised from N(0, 4 / (kernel * dim)), the bias is 0. With an even kernel the last frame is cut.
    """

    def __init__(self, dim: int, kernel: int, groups: int) -> None:
        super().__init__()
        conv = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=groups)
        nn.init.normal_(conv.weight, std=math.sqrt(4 / (kernel * dim)))
        assert conv.bias is not None
        nn.init.zeros_(conv.bias)
        self.conv = weight_norm(conv, dim=2)

    def forward(self, x: Float[Tensor, "batch frames dim"]) -> Float[Tensor, "batch frames dim"]:
        out = self.conv(x.transpose(1, 2))[..., : x.shape[1]]  # [batch, dim, frames]
        return F.gelu(out).transpose(1, 2)


class LayerDrop(nn.Module):
    """In training, replace a layer's output by its input with probability `rate` (arXiv 1909.11556).

    The layer is computed in any case: no host sync, one graph to compile, and every parameter has a gradient on every
    rank. There is one draw for the whole batch, from torch's generator as for dropout.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(
        self, before: Float[Tensor, "batch frames dim"], after: Float[Tensor, "batch frames dim"]
    ) -> Float[Tensor, "batch frames dim"]:
        if not self.training or self.rate == 0:
            return after
        return torch.where(torch.rand((), device=after.device) < self.rate, before, after)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


class SpeechEncoder(nn.Module):
    """Waveform convolutions, a projection, a positional convolution and a Transformer.

    As released, linear weights of the Transformer are initialised from a normal distribution with deviation 0.02, its
    biases are 0, and the projection keeps PyTorch's initial values.

    Args:
        settings: the shape.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        s = self.settings = settings
        self.dim, self.depth = s.dim, s.depth
        self.waveform = WaveformEncoder(s.channels, s.extractor, s.conv_bias)
        self.feature_norm = nn.LayerNorm(s.channels, eps=_EPS)
        self.feature_proj = nn.Linear(s.channels, s.dim)
        self.input_drop = nn.Dropout(s.input_dropout)
        self.positions = PositionalConvolution(s.dim, s.positional_kernel, s.positional_groups)
        self.norm = nn.LayerNorm(s.dim, eps=_EPS)
        self.drop = nn.Dropout(s.dropout)
        self.blocks = nn.ModuleList(self._block() for _ in range(s.depth))
        self.layer_drop = LayerDrop(s.layer_drop)
        self.blocks.apply(_normal_init)

    def _block(self) -> Block:
        s = self.settings
        return Block(
            s.dim, s.heads, s.mlp_ratio, eps=_EPS, norm=s.norm, dropout=s.dropout,
            attention_dropout=s.attention_dropout, activation_dropout=s.activation_dropout,
        )  # fmt: skip

    def waveform_features(
        self, audio: Float[Tensor, "batch samples"], lengths: Int[Tensor, "batch"] | None = None
    ) -> Float[Tensor, "batch frames channels"]:
        """The convolutions' output, before LayerNorm and projection; its gradient is multiplied by `feature_grad`.

        Args:
            audio: 16 kHz, at least 400 samples.
            lengths: samples of each clip, where some are padded; frames past a clip's end hold arbitrary values.

        Raises:
            UnmaskError: the batch is shorter than one frame.
        """
        if audio.shape[1] < RECEPTIVE_FIELD:
            raise UnmaskError(
                f"clips of {audio.shape[1]} samples are shorter than one frame, which takes {RECEPTIVE_FIELD} samples "
                "(25 ms at 16 kHz); leave them out or pad them with zeros"
            )
        features = self.waveform(audio, lengths)  # [batch, frames, channels]
        if self.settings.feature_grad < 1 and torch.is_grad_enabled():
            features = _ScaleGradient.apply(features, self.settings.feature_grad)
        return features

    def contextualise(
        self,
        features: Float[Tensor, "batch frames channels"],
        valid: Bool[Tensor, "batch frames"] | None = None,
        hidden: Bool[Tensor, "batch frames"] | None = None,
        mask_embedding: Float[Tensor, "dim"] | None = None,
    ) -> Float[Tensor, "batch frames dim"]:
        """The top layer's output for `waveform_features`, some of which may be hidden.

        Args:
            features: from `waveform_features`.
            valid: False = padding.
            hidden: True = replaced by `mask_embedding` after the projection, before positions are added. Nothing of the
                original passes, not even NaN.
            mask_embedding: needed with `hidden`.
        """
        x = self._embed(features, valid, hidden, mask_embedding)  # [batch, frames, dim]
        for block in self.blocks:
            x = self.layer_drop(x, block(x, valid=valid))  # [batch, frames, dim]
        return self.norm(x) if self.settings.norm == "pre" else x

    def _embed(
        self, features: Tensor, valid: Tensor | None, hidden: Tensor | None = None, mask_embedding: Tensor | None = None
    ) -> Tensor:
        """The first Transformer layer's input."""
        x = self.input_drop(self.feature_proj(self.feature_norm(features)))  # [batch, frames, dim]
        if hidden is not None and mask_embedding is not None:
            x = torch.where(hidden[..., None], mask_embedding.to(x.dtype), x)
        if valid is not None:
            x = torch.where(valid[..., None], x, 0.0)
        x = x + self.positions(x)
        return self.drop(self.norm(x) if self.settings.norm == "post" else x)

    def forward(
        self, audio: Float[Tensor, "batch samples"], lengths: Int[Tensor, "batch"] | None = None
    ) -> Float[Tensor, "batch frames dim"]:
        """The top layer's output, nothing hidden; for pre-norm after the final LayerNorm.

        Args:
            audio: 16 kHz.
            lengths: samples of each clip, where some are padded; frames past a clip's end (see
                `unmask.speech_audio.data.frames.num_frames`) hold arbitrary finite values. A clip without a single
                frame has no meaningful features.
        """
        features = self.waveform_features(audio, lengths)  # [batch, frames, channels]
        return self.contextualise(features, None if lengths is None else frame_mask(audio.shape[1], lengths))

    def states(
        self,
        audio: Float[Tensor, "batch samples"],
        lengths: Int[Tensor, "batch"] | None = None,
        final_norm: bool = True,
    ) -> list[Float[Tensor, "batch frames dim"]]:
        """The Transformer's input and every layer's output: ``depth + 1`` tensors, so that layer l (from 1) is [l].

        Args:
            audio: 16 kHz.
            lengths: as for `forward`.
            final_norm: for pre-norm, apply the final LayerNorm to the last one. HuBERT's clustering takes a layer
                without it.
        """
        valid = None if lengths is None else frame_mask(audio.shape[1], lengths)
        states = [self._embed(self.waveform_features(audio, lengths), valid)]
        for block in self.blocks:
            states.append(self.layer_drop(states[-1], block(states[-1], valid=valid)))  # [batch, frames, dim]
        if final_norm and self.settings.norm == "pre":
            states[-1] = self.norm(states[-1])
        return states


def encode(encoder: SpeechEncoder, audio: Float[Tensor, "batch samples"], lengths: Int[Tensor, "batch"]) -> Features:
    """One vector per 20 ms, nothing hidden; ``valid`` is False past a clip's end, and ``pooled`` leaves that out."""
    tokens = encoder(audio, lengths)  # [batch, frames, dim]
    return Features(tokens, (tokens.shape[1],), valid=frame_mask(audio.shape[1], lengths))


def frame_mask(samples: int, lengths: Int[Tensor, "batch"]) -> Bool[Tensor, "batch frames"]:
    """True at the frames of a padded batch of so many samples that lie within their clip."""
    return torch.arange(num_frames(samples), device=lengths.device) < num_frames(lengths)[:, None]


def _normal_init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
