"""Names of weights: ours (timm's inside the encoder) and those of transformers' ViTMAE and BEiT.

Pure functions on state dicts; the names on transformers' side are those of a model's ``state_dict()`` in version 5.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from unmask.core.interop.weights import State

# (ours, transformers'), tried in this order; a name is changed by the first prefix that it has.
_PARTS = [
    ("encoder.cls_token", "vit.embeddings.cls_token"),
    ("encoder.pos_embed", "vit.embeddings.position_embeddings"),
    ("encoder.patch_embed.proj.", "vit.embeddings.patch_embeddings.projection."),
    ("encoder.blocks.", "vit.layers."),
    ("encoder.norm.", "vit.layernorm."),
    ("mask_token", "decoder.mask_token"),
    ("decoder_pos_embed", "decoder.decoder_pos_embed"),
    ("decoder_embed.", "decoder.decoder_embed."),
    ("decoder_blocks.", "decoder.decoder_layers."),
    ("decoder_norm.", "decoder.decoder_norm."),
    ("decoder_pred.", "decoder.decoder_pred."),
]
_IN_BLOCK = [
    (".norm1.", ".layernorm_before."),
    (".attn.qkv.", ".attention.qkv."),
    (".attn.proj.", ".attention.o_proj."),
    (".norm2.", ".layernorm_after."),
]
_BEIT_PARTS = [  # a classifier's
    ("encoder.cls_token", "embeddings.cls_token"),
    ("encoder.pos_embed", "embeddings.position_embeddings"),
    ("encoder.patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("encoder.rel_pos_bias.table", "shared_position_bias.relative_position_bias_table"),
    ("encoder.blocks.", "layers."),
    ("norm.", "pooler.layernorm."),
]
_LAYER_SCALE = [(".ls1.gamma", ".lambda_1"), (".ls2.gamma", ".lambda_2")]
_QKV = ("q_proj", "k_proj", "v_proj")


def vitmae_to_mae(state: Mapping[str, Tensor]) -> State:
    """The state dict of a `MAE` from that of a transformers ``ViTMAEForPreTraining``, decoder included.

    Raises:
        ValueError: a name that a ViTMAE does not have.
    """
    return {_rename(name, theirs=True): tensor for name, tensor in fuse_qkv(state).items()}


def mae_to_vitmae(state: Mapping[str, Tensor]) -> State:
    """The inverse of `vitmae_to_mae`. The encoder must be what a ViTMAE can hold: class token, sincos positions.

    Raises:
        ValueError: a weight that a ViTMAE has no place for (relative bias, layer scale).
    """
    return split_qkv({_rename(name, theirs=False): tensor for name, tensor in state.items()})


def classifier_to_beit(state: Mapping[str, Tensor]) -> State:
    """The state dict of a transformers ``BeitForImageClassification`` from that of core's `Classifier` on a ViT.

    BEiT's keys have no bias. Ours adds the same number to all logits of a query, which softmax cancels: it is left out.
    """
    renamed: State = {}
    for name, tensor in state.items():
        for ours, theirs in _BEIT_PARTS:
            if name.startswith(ours):
                name = f"beit.{theirs}{name.removeprefix(ours)}"
                break
        for ours, theirs in (*_IN_BLOCK, *_LAYER_SCALE):
            name = name.replace(ours, theirs)
        renamed[name.replace("head.", "classifier.")] = tensor
    return {name: tensor for name, tensor in split_qkv(renamed).items() if not name.endswith(".k_proj.bias")}


def fuse_qkv(state: Mapping[str, Tensor]) -> State:
    """Join ``...q_proj.x``, ``...k_proj.x`` and ``...v_proj.x`` into one ``...qkv.x``, rows in that order."""
    fused: State = {}
    for name, tensor in state.items():
        if ".q_proj." in name:
            parts = [state[name.replace(".q_proj.", f".{part}.")] for part in _QKV]
            fused[name.replace(".q_proj.", ".qkv.")] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            fused[name] = tensor
    return fused


def split_qkv(state: Mapping[str, Tensor]) -> State:
    """The inverse of `fuse_qkv`. The parts are copies: no two share memory."""
    split: State = {}
    for name, tensor in state.items():
        if ".qkv." in name:
            parts = zip(_QKV, tensor.chunk(3), strict=True)
            split |= {name.replace(".qkv.", f".{part}."): rows.clone() for part, rows in parts}
        else:
            split[name] = tensor
    return split


def _rename(name: str, theirs: bool) -> str:
    """Our name for theirs, or theirs for ours."""
    for ours, other in _PARTS:
        old, new = (other, ours) if theirs else (ours, other)
        if name.startswith(old):
            name = new + name.removeprefix(old)
            return _rename_in_block(name, theirs) if "blocks." in ours else name
    side = "transformers ViTMAEForPreTraining" if theirs else "MAE"
    raise ValueError(f"{name!r} is not a weight of a {side} that can be converted")


def _rename_in_block(name: str, theirs: bool) -> str:
    if not theirs and (".ls1." in name or ".ls2." in name):
        raise ValueError(f"{name!r}: transformers' ViTMAE has no layer scale; export to timm instead")
    for ours, other in _IN_BLOCK:
        name = name.replace(other, ours) if theirs else name.replace(ours, other)
    return name
