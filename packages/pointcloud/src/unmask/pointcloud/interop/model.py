"""A trained encoder as people use it: from clouds to features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unmask.core.errors import UnmaskError
from unmask.core.method import to_device
from unmask.core.randomness import Key, stable_id
from unmask.pointcloud.data.augment import prepare, subset
from unmask.pointcloud.data.batches import PointBatch, Sample, collate
from unmask.pointcloud.data.readers import WIDTHS, Cloud, clean, read_cloud
from unmask.pointcloud.data.settings import Settings
from unmask.pointcloud.encoders.window import PillarEncoder, PillarFeatures, encode

Given = str | Path | Tensor | np.ndarray | Cloud


class CloudEncoder(nn.Module):
    """The pillar encoder and the backbone of a method, by the method's names, with the preparation of their input.

    Args:
        pillar_encoder: points to one vector per pillar.
        encoder: the backbone; see `unmask.pointcloud.encoders.window`.
        settings: how clouds are prepared.
    """

    def __init__(self, pillar_encoder: PillarEncoder, encoder: Any, settings: Settings) -> None:
        super().__init__()
        self.pillar_encoder, self.encoder = pillar_encoder, encoder
        self.settings, self.grid, self.dim = settings, pillar_encoder.grid, encoder.dim

    def preprocess(self, clouds: Given | Sequence[Given]) -> PointBatch:
        """A batch from clouds of any size, on the encoder's device, as evaluation sees them.

        Where a cloud has more than ``max_points`` points, the same ones are taken as in evaluation if it is a file at
        the top of its folder: the choice is keyed by the name. nuScenes sweeps are taken alone, without those before.

        Args:
            clouds: one or several: file names (.pcd, .ply, .xyz, .npy, .las, .laz, .bin), `Cloud`s, or arrays [points,
                channels] of x, y, z in metres and the features that the encoder was trained with, in their order.

        Raises:
            UnmaskError: a file that cannot be read, an array of another width, a cloud without points in the range, or
                one that lacks a feature.
        """
        many = [clouds] if isinstance(clouds, str | Path | Tensor | np.ndarray | Cloud) else list(clouds)
        if not many:
            raise UnmaskError("no clouds to encode")
        names = [Path(one).name if isinstance(one, str | Path) else f"cloud {i}" for i, one in enumerate(many)]
        batch = collate([self._prepare(one, name) for one, name in zip(many, names, strict=True)])
        return to_device(batch, next(self.parameters()).device)

    def _prepare(self, given: Given, name: str) -> Sample:
        if isinstance(given, str | Path):
            cloud = read_cloud(given)
        else:
            array = given.detach().cpu().numpy() if isinstance(given, Tensor) else given
            cloud = array if isinstance(array, Cloud) else self._of_array(np.asarray(array), name)
        points, _ = prepare(cloud, self.settings, name)
        sample_id = stable_id(name)
        rows = subset(points, self.settings, Key.of(0, torch.tensor([sample_id])))
        return Sample(torch.from_numpy(points[rows]), sample_id)

    def _of_array(self, array: np.ndarray, name: str) -> Cloud:
        expected = self.settings.channels
        if array.ndim != 2 or array.shape[1] != expected or array.dtype.kind not in "fiu":
            columns = ", ".join(["x, y, z", *self.settings.features])
            raise UnmaskError(
                f"{name}: an array of shape {array.shape} and type {array.dtype}; expected numbers "
                f"[points, {expected}]: {columns}"
            )
        ends = np.cumsum([3, *(WIDTHS[feature] for feature in self.settings.features)])
        parts = np.split(array, ends[:-1], axis=1)
        return clean(parts[0], dict(zip(self.settings.features, parts[1:], strict=True)))

    def forward(self, batch: PointBatch) -> PillarFeatures:
        """One vector per pillar that holds points: what the method's `encode` gives.

        Raises:
            UnmaskError: a cloud of the batch has no point inside the range.
        """
        return encode(batch, self.pillar_encoder, self.encoder)
