"""Names of weights: ours, torchaudio's and transformers' for HuBERT.

Pure functions on state dicts. Our side is the state dict of a `HuBERT`, or its ``encoder.`` part alone; torchaudio's a
``HuBERTPretrainModel`` (``torchaudio.models.hubert_pretrain_base`` and others) or, without head, a ``Wav2Vec2Model``;
transformers' a ``HubertModel``. Every name is accounted for: one too many or one too few is an error. The positional
convolution's gain and direction are read under both of torch's spellings of weight normalisation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import Tensor

from unmask.core.errors import UnmaskError
from unmask.core.interop.names import Table, prefixed, read_table, write_table
from unmask.core.interop.weights import State
from unmask.speech_audio.encoders.wav2vec2 import KERNELS, STRIDES, EncoderSettings

WeightNorm = Literal["parametrizations", "weight_g"]

_SPELLINGS = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
_HEAD: Table = {
    "mask_embedding": ("mask_generator.mask_embedding",),
    "label_embeddings": ("logit_generator.label_embeddings",),
    "final_proj.weight": ("logit_generator.final_proj.weight",),
    "final_proj.bias": ("logit_generator.final_proj.bias",),
}
_PARTS = {  # ours: (torchaudio's, transformers')
    "encoder.feature_norm": ("encoder.feature_projection.layer_norm", "feature_projection.layer_norm"),
    "encoder.feature_proj": ("encoder.feature_projection.projection", "feature_projection.projection"),
    "encoder.norm": ("encoder.transformer.layer_norm", "encoder.layer_norm"),
}
_POSITIONS = ("encoder.transformer.pos_conv_embed.conv", "encoder.pos_conv_embed.conv")
_BLOCKS = ("encoder.transformer.layers", "encoder.layers")
_IN_BLOCK: Table = {
    "norm1": ("layer_norm",),
    "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attn.proj": ("attention.out_proj",),
    "norm2": ("final_layer_norm",),
    "mlp.fc1": ("feed_forward.intermediate_dense",),
    "mlp.fc2": ("feed_forward.output_dense",),
}
_TORCHAUDIO, _TRANSFORMERS = 0, 1


def from_torchaudio(state: Mapping[str, Tensor]) -> State:
    """Our weights from torchaudio's: of a whole `HuBERT` with one target, or of the encoder alone.

    Raises:
        UnmaskError: lists the names that are unknown or missing.
    """
    state = _respell(state, _SPELLINGS)
    whole = any(name.startswith("wav2vec2.") for name in state)
    table = _encoder_table(_TORCHAUDIO, state, "wav2vec2." if whole else "", theirs=True)
    return read_table(state, table | (_HEAD if whole else {}), "torchaudio's HuBERT")


def to_torchaudio(state: Mapping[str, Tensor], weight_norm: WeightNorm = "parametrizations") -> State:
    """The inverse of `from_torchaudio`.

    Args:
        state: of a `HuBERT`, or its ``encoder.`` part.
        weight_norm: how the positional convolution is spelled; ``weight_g`` before torchaudio 2.1.

    Raises:
        UnmaskError: lists the names that are unknown or missing; or there are several targets with their own heads.
    """
    whole = any(not name.startswith("encoder.") for name in state)
    table = _encoder_table(_TORCHAUDIO, state, "wav2vec2." if whole else "", theirs=False)
    if whole and {"final_proj.weight", "label_embeddings"} <= state.keys():
        heads = state["final_proj.weight"].shape[0] // state["label_embeddings"].shape[1]
        if heads != 1:
            raise UnmaskError(f"torchaudio's HuBERT has one head and this one has {heads}; convert its encoder alone")
    return _spelled(write_table(state, table | (_HEAD if whole else {}), "our HuBERT"), weight_norm)


def from_transformers(state: Mapping[str, Tensor]) -> State:
    """Our encoder (and `mask_embedding`, where it is there) from a transformers ``HubertModel``.

    Raises:
        UnmaskError: lists the names that are unknown or missing.
    """
    state = _respell(state, _SPELLINGS)
    table = _encoder_table(_TRANSFORMERS, state, "", theirs=True)
    if "masked_spec_embed" in state:
        table["mask_embedding"] = ("masked_spec_embed",)
    return read_table(state, table, "transformers' HuBERT")


def to_transformers(state: Mapping[str, Tensor], weight_norm: WeightNorm = "parametrizations") -> State:
    """A transformers ``HubertModel`` from our weights: encoder and mask embedding. The head is left out.

    Args:
        state: of a `HuBERT`, or its ``encoder.`` part.
        weight_norm: how the positional convolution is spelled; published files say ``weight_g``.

    Raises:
        UnmaskError: lists the names that are unknown or missing.
    """
    kept = {name: t for name, t in state.items() if name.split(".")[0] not in ("label_embeddings", "final_proj")}
    table = _encoder_table(_TRANSFORMERS, kept, "", theirs=False)
    if "mask_embedding" in kept:
        table["mask_embedding"] = ("masked_spec_embed",)
    return _spelled(write_table(kept, table, "our HuBERT"), weight_norm)


_SETTINGS = {  # ours: a HubertConfig's
    "conv_bias": "conv_bias", "dim": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads",
    "positional_kernel": "num_conv_pos_embeddings", "positional_groups": "num_conv_pos_embedding_groups",
    "input_dropout": "feat_proj_dropout", "dropout": "hidden_dropout", "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout", "layer_drop": "layerdrop",
}  # fmt: skip
_FIXED = {  # what our encoder always is
    "conv_kernel": list(KERNELS), "conv_stride": list(STRIDES), "hidden_act": "gelu", "layer_norm_eps": 1e-5,
    "feat_extract_activation": "gelu", "feat_proj_layer_norm": True, "conv_pos_batch_norm": False,
    "adapter_attn_dim": None,
}  # fmt: skip


def settings_from_transformers(config: Mapping[str, Any]) -> EncoderSettings:
    """The encoder that a ``HubertConfig`` (its ``config.json``) describes.

    `feature_grad` is not in it: 0.1 with GroupNorm and 1 with LayerNorm, as released.

    Raises:
        UnmaskError: lists what our encoder cannot be.
    """
    from transformers import HubertConfig

    given = HubertConfig().to_dict() | dict(config)
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    wrong = [f"{n} is {given[n]!r}, not {value!r}" for n, value in _FIXED.items() if given.get(n, value) != value]
    if len(set(given["conv_dim"])) > 1:
        wrong.append("conv_dim has different widths")
    if wrong:
        raise UnmaskError("this configuration is no HuBERT that can be converted: " + "; ".join(wrong))
    by_layer = given["feat_extract_norm"] == "layer"
    return EncoderSettings(
        channels=given["conv_dim"][0],
        extractor="layer_norm" if by_layer else "group_norm",
        feature_grad=1.0 if by_layer else 0.1,
        mlp_ratio=given["intermediate_size"] / given["hidden_size"],
        norm="pre" if given["do_stable_layer_norm"] else "post",
        **{ours: given[theirs] for ours, theirs in _SETTINGS.items()},
    )


def settings_to_transformers(settings: EncoderSettings) -> dict[str, Any]:
    """The arguments of a ``HubertConfig`` for this encoder; it has no `feature_grad`."""
    s = settings
    return {theirs: getattr(s, ours) for ours, theirs in _SETTINGS.items()} | {
        "conv_dim": [s.channels] * len(KERNELS), "conv_kernel": list(KERNELS), "conv_stride": list(STRIDES),
        "feat_extract_norm": "layer" if s.extractor == "layer_norm" else "group", "layer_norm_eps": 1e-5,
        "intermediate_size": int(s.dim * s.mlp_ratio), "do_stable_layer_norm": s.norm == "pre",
    }  # fmt: skip


def _encoder_table(side: int, state: Iterable[str], prefix: str, *, theirs: bool) -> Table:
    """The names of an encoder as deep, with norms and biases where this state dict has them."""
    names = set(state)
    layers = "feature_extractor.conv_layers"
    blocks, waveform, norm = (f"{prefix}{_BLOCKS[side]}", prefix + layers, "layer_norm")
    if not theirs:
        blocks, waveform, norm = "encoder.blocks", "encoder.waveform", "norm"
    matches = [re.match(re.escape(blocks) + r"\.(\d+)\.", name) for name in names]
    depth = max((int(match[1]) + 1 for match in matches if match), default=0)
    normed = range(len(KERNELS)) if f"{waveform}.1.{norm}.weight" in names else range(1)
    biased = f"{waveform}.0.conv.bias" in names

    modules: Table = {ours: (prefix + pair[side],) for ours, pair in _PARTS.items()}
    modules |= {f"encoder.waveform.{i}.norm": (f"{prefix}{layers}.{i}.layer_norm",) for i in normed}
    for i in range(depth):
        modules |= prefixed(f"encoder.blocks.{i}.", f"{prefix}{_BLOCKS[side]}.{i}.", _IN_BLOCK)
    table = {f"{ours}.{kind}": tuple(f"{t}.{kind}" for t in many) for ours, many in modules.items() for kind in _KINDS}
    for i in range(len(KERNELS)):
        for kind in _KINDS if biased else _KINDS[:1]:
            table[f"encoder.waveform.{i}.conv.{kind}"] = (f"{prefix}{layers}.{i}.conv.{kind}",)
    for kind in ("bias", *_SPELLINGS.values()):
        table[f"encoder.positions.conv.{kind}"] = (f"{prefix}{_POSITIONS[side]}.{kind}",)
    return table


_KINDS = ("weight", "bias")


def _spelled(state: State, weight_norm: WeightNorm) -> State:
    if weight_norm == "parametrizations":
        return state
    return _respell(state, {new: old for old, new in _SPELLINGS.items()})


def _respell(state: Mapping[str, Tensor], spellings: Mapping[str, str]) -> State:
    """The state with other names for the gain and the direction of the positional convolution."""
    out = {}
    for name, tensor in state.items():
        start, convolution, end = name.partition(".pos_conv_embed.conv.")
        out[start + convolution + spellings.get(end, end)] = tensor
    return out
