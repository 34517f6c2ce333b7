"""What is probed: vectors of clouds and of points, from an encoder and, as references, from the raw coordinates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unmask.core.nn.ragged import segment_max, segment_mean
from unmask.core.randomness import Key
from unmask.pointcloud.data.batches import PointBatch
from unmask.pointcloud.encoders.window import PillarFeatures
from unmask.pointcloud.geometry.voxels import VoxelGrid, Voxels, neighbours, voxelise

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
PAIRS = 512  # of points whose distances are counted, in every cloud
BINS = 32  # for these distances, from 0 to three times their mean; what is farther goes into the last

# Rows of features, and the row that holds for each point of ``voxels.order``.
Readout = Callable[[PointBatch, Voxels], tuple[Tensor, Tensor]]


def cloud_vectors(features: PillarFeatures) -> Float[Tensor, "batch twice_dim"]:
    """One vector per cloud: the maximum and the mean over its pillars, side by side; padding does not count."""
    assert features.valid is not None
    most = features.tokens.masked_fill(~features.valid[..., None], float("-inf")).amax(1)
    return torch.cat([most, features.pooled], dim=1)


def of_points(method: Any) -> Readout:
    """The vector of the pillar that a point lies in, and nothing else."""
    return lambda batch, voxels: (method.encode(batch).packed, voxels.pillar_of)


# ---- raw references ------------------------------------------------------------------------------------------------


def coordinates(batch: PointBatch, grid: VoxelGrid) -> Float[Tensor, "batch values"]:
    """Statistics of a cloud's points inside the range, the raw reference for whole clouds.

    Of every channel (x, y, z, then features): mean, deviation, skewness; of every channel and of the distance from the
    centroid: `QUANTILES`, which hold the extents; the roots of the eigenvalues of the positions' covariance, falling;
    the shares of distances between `PAIRS` random pairs of points in `BINS` bins (the D2 distribution of Osada et al.,
    ACM Transactions on Graphics 2002, scaled by its mean). Pairs are keyed by sample id.
    """
    voxels = voxelise(batch.points, batch.offsets, grid)
    bounds = voxels.pillar_starts[voxels.offsets].tolist()
    draws = Key.of(0, batch.ids).stream("pairs of points").uniform(2 * PAIRS)
    clouds = [batch.points[voxels.order[a:b]].double() for a, b in zip(bounds, bounds[1:], strict=False)]
    return torch.stack([_statistics(points, draw) for points, draw in zip(clouds, draws, strict=True)]).float()


def _statistics(points: Float[Tensor, "n channels"], draws: Float[Tensor, "draws"]) -> Float[Tensor, "values"]:
    mean, deviation = points.mean(0), points.std(0, correction=0)
    centred = points - mean
    # A channel that is constant but for rounding has no skewness.
    steady = deviation <= 1e-6 * points.abs().amax(0)
    skewness = torch.where(steady, 0.0, centred.pow(3).mean(0) / deviation.pow(3).clamp(min=1e-30))
    xyz = centred[:, :3]
    ranked = torch.cat([points, xyz.norm(dim=1, keepdim=True)], dim=1).sort(dim=0).values
    ranks = [round(q * (len(points) - 1)) for q in QUANTILES]
    axes = torch.linalg.eigvalsh(xyz.T @ xyz / len(xyz)).clamp(min=0).sqrt().flip(0)
    return torch.cat([mean, deviation, skewness, ranked[ranks].flatten(), axes, _distances(xyz, draws)])


def _distances(xyz: Float[Tensor, "n 3"], draws: Float[Tensor, "draws"]) -> Float[Tensor, "bins"]:
    """The share of distances in each bin."""
    first, second = xyz[(draws.double() * len(xyz)).long()].chunk(2)
    distance = (first - second).norm(dim=1)
    bins = distance / distance.mean().clamp(min=1e-30) * (BINS / 3)
    return bins.long().clamp(max=BINS - 1).bincount(minlength=BINS) / PAIRS


def point_coordinates(batch: PointBatch, voxels: Voxels, grid: VoxelGrid) -> Float[Tensor, "kept values"]:
    """The raw reference for points: one row per point of ``voxels.order``.

    The point's height above the lowest point of its pillar and the eight around it; its position relative to the mean
    of its pillar's points (x, y, z); its features; and of its pillar the logarithm of the number of points and, above
    that same lowest point, their mean, least and largest height, and the deviation of heights. Metres.
    """
    points, pillar, starts = batch.points[voxels.order], voxels.pillar_of, voxels.pillar_starts
    xyz, height = points[:, :3], points[:, 2:3]
    mean, lowest = segment_mean(xyz, starts), -segment_max(-height, starts)
    around = torch.cat([lowest[:, 0], lowest.new_full((1,), float("inf"))])  # the last is where no neighbour is
    ground = around[neighbours(voxels.pillars, grid.shape)].amin(1, keepdim=True)
    deviation = segment_mean((height - mean[pillar, 2:]).square(), starts).sqrt()
    heights = torch.cat([mean[:, 2:], lowest, segment_max(height, starts)], dim=1) - ground
    of_pillar = torch.cat([starts.diff()[:, None].log(), heights, deviation], dim=1)
    return torch.cat([height - ground[pillar], xyz - mean[pillar], points[:, 3:], of_pillar[pillar]], dim=1)


def raw_points(grid: VoxelGrid) -> Readout:
    """`point_coordinates` as a read-out: every point has a row of its own."""
    return lambda batch, voxels: (
        point_coordinates(batch, voxels, grid),
        torch.arange(len(voxels.order), device=voxels.order.device),
    )
