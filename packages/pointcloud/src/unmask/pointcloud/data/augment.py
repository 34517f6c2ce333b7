"""What a model is given of a cloud, and GeoMAE's augmentation, keyed by sample.

GeoMAE (arXiv 2305.08808) turns about the vertical axis, scales, and mirrors x and y. Its shuffling of the points is
left out: nothing depends on their order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from unmask.core.data.kinds import CorruptSampleError
from unmask.core.errors import UnmaskError
from unmask.core.randomness import Key, SampleKey, stable_id
from unmask.pointcloud.data.extent import inside
from unmask.pointcloud.data.readers import Cloud
from unmask.pointcloud.data.settings import Settings

_SUBSET = stable_id("subset of points")


class FeatureError(UnmaskError):
    """A cloud without a feature that the settings ask for."""


@dataclass(frozen=True)
class Transform:
    """An augmentation: a rotation about z, perhaps with a reflection, and a scale.

    Args:
        matrix: orthogonal; normals are multiplied by it.
        factor: positions are scaled by it, too.
    """

    matrix: Float[np.ndarray, "3 3"]
    factor: float

    def positions(self, xyz: Float[np.ndarray, "points 3"]) -> Float[np.ndarray, "points 3"]:
        """The points rotated and scaled, in their dtype."""
        return (xyz @ (self.factor * self.matrix.T)).astype(xyz.dtype)

    def normals(self, normals: Float[np.ndarray, "points 3"]) -> Float[np.ndarray, "points 3"]:
        """The normals rotated, in their dtype."""
        return (normals @ self.matrix.T).astype(normals.dtype)


def draw_transform(key: SampleKey, rotate: float, scale: tuple[float, float], flip: float) -> Transform:
    """A random augmentation.

    Args:
        key: the sample's key of the stream ``augment``.
        rotate: largest angle in radians either way.
        scale: least and largest factor.
        flip: probability of mirroring x, and again of mirroring y.
    """
    turn, size, flip_x, flip_y = key.uniform(4)
    angle = rotate * (2 * turn - 1)
    cos, sin = math.cos(angle), math.sin(angle)
    sign_x, sign_y = (-1.0 if coin < flip else 1.0 for coin in (flip_x, flip_y))
    matrix = np.array([[sign_x * cos, -sign_x * sin, 0], [sign_y * sin, sign_y * cos, 0], [0, 0, 1]])
    return Transform(matrix, scale[0] + (scale[1] - scale[0]) * size)


def normalise(xyz: Float[np.ndarray, "points 3"], how: str) -> Float[np.ndarray, "points 3"]:
    """Positions moved (and scaled) as ``data.normalize`` says, in float64, so that no digit of a large offset is lost.

    Args:
        xyz: positions.
        how: ``none``; ``center``: the middle of the bounding box in x and y, and the least z, at 0; ``sphere``: the
            centroid at 0 and the farthest point at distance 1.
    """
    xyz = xyz.astype(np.float64)
    if how == "center":
        low, high = xyz.min(0), xyz.max(0)
        return xyz - np.array([(low[0] + high[0]) / 2, (low[1] + high[1]) / 2, low[2]])
    if how == "sphere":
        xyz = xyz - xyz.mean(0)
        return xyz / np.sqrt((xyz**2).sum(1).max())  # two distinct points: never zero
    return xyz


def prepare(
    cloud: Cloud, settings: Settings, name: str
) -> tuple[Float[np.ndarray, "points channels"], Int[np.ndarray, "points"] | None]:
    """What a model is given of a cloud without any randomness: points as float32, normalised, and their labels.

    Points with a wanted feature that is not finite are left out.

    Args:
        cloud: what was read.
        settings: which features, and how to normalise.
        name: what to call the cloud in errors.

    Raises:
        FeatureError: the cloud lacks a feature.
        CorruptSampleError: no points are in the range.
    """
    columns = [_feature(cloud, feature, name) for feature in settings.features]
    xyz, labels = cloud.xyz, cloud.labels
    good = np.logical_and.reduce([np.isfinite(values).all(1) for values in columns] or [np.ones(len(xyz), bool)])
    if not good.all():
        xyz, labels = xyz[good], None if labels is None else labels[good]
        columns = [values[good] for values in columns]
    if not len(xyz):
        raise CorruptSampleError(f"no point has finite {' and '.join(settings.features)}", name)
    xyz = normalise(xyz, settings.normalize or "none")
    points = np.concatenate([xyz, *columns], 1).astype(np.float32)
    if not inside(points, settings.range).any():
        raise CorruptSampleError("no points inside data.range", name)
    return points, labels


def _feature(cloud: Cloud, feature: str, name: str) -> Float[np.ndarray, "points k"]:
    if feature in cloud.features:
        return cloud.features[feature]
    if feature == "time":  # a single sweep
        return np.zeros((len(cloud.xyz), 1), np.float32)
    has = ", ".join(cloud.features) or "positions only"
    raise FeatureError(f"{name}: has no {feature} (it has {has}); take it out of data.features, or the cloud away")


def subset(
    points: Float[np.ndarray, "points channels"], settings: Settings, key: Key
) -> Int[np.ndarray, "kept"] | slice:
    """Rows to keep, in order: of a cloud with more than ``max_points`` a random choice of those in the range, else all.

    Args:
        points: prepared, and augmented if they are to be.
        settings: with the range and ``max_points``.
        key: of this one cloud.
    """
    most = settings.max_points
    if most is None or len(points) <= most:
        return slice(None)
    rows = inside(points, settings.range).nonzero()[0]
    if len(rows) > most:
        rows = np.sort(rows[key.stream(_SUBSET).permutation(len(rows))[0, :most].numpy()])
    return rows
