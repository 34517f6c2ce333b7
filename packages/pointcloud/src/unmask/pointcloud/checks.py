"""`unmask.core.checks` for point-cloud methods: hidden input is what is known of points in hidden pillars."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from unmask.core import checks
from unmask.core.checks import hidden_tokens
from unmask.pointcloud.data.batches import PointBatch
from unmask.pointcloud.encoders.window import valid_pillars
from unmask.pointcloud.geometry.voxels import VoxelGrid, voxelise


def corrupt_pillars(grid: VoxelGrid) -> Callable[[PointBatch, Any, float], PointBatch]:
    """The `corrupt` of clouds: moves the points of hidden pillars inside their pillar and overwrites their features.

    That a pillar holds points is not hidden: it is where the method is asked. So the points stay in their pillar, at
    the position in it that `value` says, except that NaN goes into the coordinates too.
    """

    def corrupt(batch: PointBatch, plan: Any, value: float) -> PointBatch:
        voxels = voxelise(batch.points, batch.offsets, grid)
        valid = valid_pillars(voxels)
        hidden = hidden_tokens(plan, valid.shape[1])[valid][voxels.pillar_of]
        _, row, column = voxels.pillars[voxels.pillar_of[hidden]].unbind(1)
        corner = torch.stack([column, row, torch.zeros_like(row)], dim=1).to(batch.points.dtype)
        size, lower = corner.new_tensor(grid.pillar), corner.new_tensor(grid.lower)
        inside = value if math.isnan(value) else 0.5 + 0.3 * math.sin(value)
        points = batch.points.clone()
        chosen = voxels.order[hidden]
        points[chosen] = value
        points[chosen, :3] = lower + (corner + inside) * size
        return replace(batch, points=points)

    return corrupt


def check_method(method: Any, batch: PointBatch, **options: Any) -> None:
    """`unmask.core.checks.check_method` for a method with a ``grid``; options are passed on.

    A pillar encoder that normalises by batch statistics sees hidden points in them in train mode, in the released code
    as here: the method says so in `norms_over_all`.
    """
    checks.check_method(method, batch, corrupt_pillars(method.grid), **options)
