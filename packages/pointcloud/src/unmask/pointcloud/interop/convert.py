"""Names of an encoder's weights: ours, and those of the SST detectors (github.com/tusen-ai/SST, Apache-2.0).

SST's names are those that we know its modules by (``DynamicScatterVFE``, ``SSTv1`` and ``torch.nn.MultiheadAttention``
inside); they were not checked against the code. The numbers are the same on both sides, in the same order: queries,
keys and values are rows of one matrix here and there. So converting there and back changes no bit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from unmask.core.interop.names import Names, Table, prefixed
from unmask.pointcloud.data.settings import Settings
from unmask.pointcloud.encoders.window import WindowSettings
from unmask.pointcloud.geometry.voxels import VoxelGrid

_LAYER: Table = {
    "attn.qkv.weight": ("win_attn.self_attn.in_proj_weight",),
    "attn.qkv.bias": ("win_attn.self_attn.in_proj_bias",),
    "attn.proj.*": ("win_attn.self_attn.out_proj.*",),
    "mlp.fc1.*": ("linear1.*",),
    "mlp.fc2.*": ("linear2.*",),
    "norm1.*": ("norm1.*",),
    "norm2.*": ("norm2.*",),
}
# Theirs come in blocks of two: layer j of block i is our layer 2 i + j, here written as layer j of block i, too.
_NAMES = Names(
    {
        "pillar_encoder.layers.*.*.*": ("voxel_encoder.vfe_layers.*.*.*",),
        **prefixed("encoder.layers.*.*.", "backbone.block_list.*.encoder_list.*.", _LAYER),
    },
    "SST's detectors",
)


def to_sst(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's weights (``pillar_encoder.*`` and ``encoder.*``) by SST's names; all others are left out.

    Raises:
        UnmaskError: lists weights of the encoder that SST's cannot hold.
    """

    def in_blocks(match: re.Match[str]) -> str:
        block, layer = divmod(int(match[1]), 2)
        return f"encoder.layers.{block}.{layer}."

    return _NAMES.to_theirs(
        {re.sub(r"^encoder\.layers\.(\d+)\.", in_blocks, n): t for n, t in state.items() if is_encoder(n)}
    )


def from_sst(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_sst`. What else a detector's checkpoint holds (neck, heads) is left out.

    Raises:
        UnmaskError: lists weights of pillar encoder or backbone that ours cannot hold.
    """

    def in_a_row(match: re.Match[str]) -> str:
        return f"encoder.layers.{2 * int(match[1]) + int(match[2])}."

    theirs = {n: t for n, t in state.items() if n.startswith(("voxel_encoder.", "backbone.block_list."))}
    ours = _NAMES.to_ours(theirs)
    return {re.sub(r"^encoder\.layers\.(\d+)\.(\d+)\.", in_a_row, name): tensor for name, tensor in ours.items()}


def is_encoder(name: str) -> bool:
    """Whether a method's weight of this name belongs to what transfers."""
    return name.startswith(("pillar_encoder.", "encoder."))


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
