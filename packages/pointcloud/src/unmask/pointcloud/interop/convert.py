"""Names of an encoder's weights: ours, and those of the SST detectors (github.com/tusen-ai/SST, Apache-2.0).

SST's names are those that we know its modules by (``DynamicScatterVFE``, ``SSTv1`` and ``torch.nn.MultiheadAttention``
inside); they were not checked against the code. The numbers are the same on both sides, in the same order: queries,
keys and values lie one after another in one matrix here and there. So converting there and back changes no bit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from unmask.pointcloud.data.settings import Settings
from unmask.pointcloud.encoders.window import WindowSettings
from unmask.pointcloud.geometry.voxels import VoxelGrid

# (ours, SST's) inside a layer. Theirs come in blocks of two: layer j of block i is our number 2 i + j.
_IN_LAYER = [
    ("attn.qkv.weight", "win_attn.self_attn.in_proj_weight"),
    ("attn.qkv.bias", "win_attn.self_attn.in_proj_bias"),
    ("attn.proj.", "win_attn.self_attn.out_proj."),
    ("mlp.fc1.", "linear1."),
    ("mlp.fc2.", "linear2."),
    ("norm1.", "norm1."),
    ("norm2.", "norm2."),
]
_OUR_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")
_SST_LAYER = re.compile(r"backbone\.block_list\.(\d+)\.encoder_list\.([01])\.")
_OUR_VFE = re.compile(r"pillar_encoder\.layers\.(\d+)\.")
_SST_VFE = re.compile(r"voxel_encoder\.vfe_layers\.(\d+)\.")


def to_sst(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's weights (``pillar_encoder.*`` and ``encoder.*``) by SST's names; all others are left out.

    Raises:
        ValueError: a weight of the encoder that SST has no place for.
    """
    ours = {name: tensor for name, tensor in state.items() if is_encoder(name)}
    return {_to_sst(name): tensor for name, tensor in ours.items()}


def from_sst(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_sst`. What else a detector's checkpoint holds (neck, heads) is left out.

    Raises:
        ValueError: a weight of pillar encoder or backbone that ours has no place for.
    """
    theirs = {n: t for n, t in state.items() if n.startswith(("voxel_encoder.", "backbone.block_list."))}
    return {_from_sst(name): tensor for name, tensor in theirs.items()}


def is_encoder(name: str) -> bool:
    """Whether a method's weight of this name belongs to what transfers."""
    return name.startswith(("pillar_encoder.", "encoder."))


def _to_sst(name: str) -> str:
    if match := _OUR_VFE.match(name):
        return f"voxel_encoder.vfe_layers.{match[1]}.{name[match.end() :]}"
    if match := _OUR_LAYER.match(name):
        block, layer = divmod(int(match[1]), 2)
        return f"backbone.block_list.{block}.encoder_list.{layer}.{_swap(name[match.end() :], 0, name)}"
    raise ValueError(f"{name!r} is not a weight of a window transformer or its pillar encoder; SST has no place for it")


def _from_sst(name: str) -> str:
    if match := _SST_VFE.match(name):
        return f"pillar_encoder.layers.{match[1]}.{name[match.end() :]}"
    if match := _SST_LAYER.match(name):
        number = 2 * int(match[1]) + int(match[2])
        return f"encoder.layers.{number}.{_swap(name[match.end() :], 1, name)}"
    raise ValueError(f"{name!r} is not a weight that an SST encoder of ours has")


def _swap(rest: str, side: int, name: str) -> str:
    """The part of a name inside a layer, from the given side (0 ours, 1 SST's) to the other."""
    for pair in _IN_LAYER:
        if rest.startswith(pair[side]):
            return pair[1 - side] + rest.removeprefix(pair[side])
    raise ValueError(f"{name!r}: {rest} is not a part of a transformer layer that can be converted")


def sst_settings(settings: WindowSettings, data: Settings, grid: VoxelGrid) -> dict[str, Any]:
    """What a detector's configuration has to say for these weights, by the names of SST's modules as we know them."""
    hidden = int(settings.dim * settings.mlp_ratio)
    rows, columns = grid.shape
    return {
        "voxel_size": list(grid.pillar),
        "point_cloud_range": list(grid.bounds),
        "sparse_shape": [columns, rows, 1],
        "window_shape": [settings.window, settings.window, 1],
        "voxel_encoder": {
            "in_channels": data.channels,
            "feat_channels": [settings.dim // 2, settings.dim],
            "with_distance": False,
            "with_cluster_center": True,
            "with_voxel_center": True,
            "norm_cfg": {"type": "BN1d", "eps": 1e-3, "momentum": 0.01},
        },
        "backbone": {
            "d_model": [settings.dim] * settings.depth,
            "nhead": [settings.heads] * settings.depth,
            "num_blocks": settings.depth,
            "dim_feedforward": [hidden] * settings.depth,
            "activation": "gelu",
            "dropout": 0.0,
            "pos_temperature": 10000,
            "normalize_pos": False,
        },
    }
