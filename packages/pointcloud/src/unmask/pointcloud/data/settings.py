"""What a recipe sets under ``data``; users have it from `unmask.pointcloud.data.clouds`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from unmask.core.errors import UnmaskError
from unmask.pointcloud.data.extent import Range
from unmask.pointcloud.data.readers import WIDTHS

Feature = Literal["intensity", "time", "color", "normal"]
_WHOLE = 1e-3  # of a pillar: how far a range may be from a whole number of them


@dataclass(frozen=True)
class Settings:
    """Which point clouds, and how they are given to a model.

    Args:
        source: a folder of .pcd, .ply, .xyz, .npy, .las, .laz or .bin files (KITTI and SemanticKITTI are recognised),
            of nuScenes tables or of tar shards; or an embedded set: ``ldraw``, ``lidar``, ``shapes``. An embedded set's
            name wins over a folder's: write ``./shapes`` then.
        features: channels after x, y, z, in this order: ``intensity`` (1), ``time`` (1, seconds before the key frame, 0
            for single sweeps), ``color`` (3, 0..1), ``normal`` (3). Every cloud must have them.
        range: least x, y, z and largest x, y, z in metres, after normalising. None: chosen by `resolve`.
        pillar: size of a pillar along x and y in metres; the range must be a whole number of them. None: chosen by
            `resolve`.
        normalize: ``none``; ``center`` moves the middle of the bounding box in x and y, and the least z, to 0;
            ``sphere`` moves the centroid to 0 and scales the farthest point to 1. None: chosen by `resolve`.
        max_points: where more points of a cloud lie in the range, a random subset of this many of them is kept.
        sweeps: nuScenes only: the key frame and up to this many less one earlier sweeps, moved along with the vehicle.
        rotate: clouds are turned about z by up to this many radians either way. A cloud that this, scaling and
            mirroring would take out of the range altogether stays as it is.
        scale: least and largest factor that clouds are scaled by.
        flip: probability of mirroring x, and again of mirroring y.
        corrupt: ``skip`` counts and names unreadable clouds and goes on without them; ``fatal`` stops at them.
        val_share: share of the training clouds set aside where the data have no val split (and again for test where
            they have labels and no test split). Embedded sets have fixed splits.
    """

    source: str
    features: tuple[Feature, ...] = ()
    range: Range | None = None
    pillar: tuple[float, float] | None = None
    normalize: Literal["none", "center", "sphere"] | None = None
    max_points: Annotated[int, Field(ge=1)] | None = None
    sweeps: Annotated[int, Field(ge=1)] = 1
    rotate: Annotated[float, Field(ge=0)] = 0.3925
    scale: tuple[float, float] = (0.95, 1.05)
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    corrupt: Literal["skip", "fatal"] = "skip"
    val_share: Annotated[float, Field(ge=0, lt=1)] = 0.1

    free_to_change: ClassVar[frozenset[str]] = frozenset({"source", "corrupt"})
    filled_in: ClassVar[frozenset[str]] = frozenset({"range", "pillar", "normalize"})

    def __post_init__(self) -> None:
        if len(set(self.features)) < len(self.features):
            raise ValueError(f"features names one twice: {', '.join(self.features)}")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale is {self.scale}; expected 0 < least <= largest")
        if self.range is not None and not all(
            low < high for low, high in zip(self.range[:3], self.range[3:], strict=True)
        ):
            raise ValueError(f"range is {self.range}; expected x0 < x1, y0 < y1 and z0 < z1 in x0, y0, z0, x1, y1, z1")
        if self.pillar is not None and min(self.pillar) <= 0:
            raise ValueError(f"pillar is {self.pillar}; expected positive sizes along x and y")
        if self.range is not None and self.pillar is not None:
            for axis, size, cells in zip("xy", self.pillar, self._cells(), strict=True):
                if abs(cells - round(cells)) > _WHOLE or round(cells) < 1:
                    raise ValueError(
                        f"range is {cells:.6g} pillars of {size:g} m along {axis}; expected a whole number"
                    )

    @property
    def channels(self) -> int:
        """Columns of a sample's points: x, y, z and the features."""
        return 3 + sum(WIDTHS[name] for name in self.features)

    @property
    def grid_shape(self) -> tuple[int, int]:
        """Pillars along y (rows) and x (columns).

        Raises:
            UnmaskError: range or pillar are not known yet.
        """
        if self.range is None or self.pillar is None:
            raise UnmaskError("data.range and data.pillar are not known yet; `resolve` chooses them, or set both")
        columns, rows = self._cells()
        return round(rows), round(columns)

    def _cells(self) -> tuple[float, float]:
        """Pillars along x and y, not rounded."""
        assert self.range is not None and self.pillar is not None
        x0, y0, _, x1, y1, _ = self.range
        return (x1 - x0) / self.pillar[0], (y1 - y0) / self.pillar[1]
