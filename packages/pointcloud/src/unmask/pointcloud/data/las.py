"""What the class numbers of points in LAS files mean."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from unmask.pointcloud.data.readers import Cloud

# The classes of the LAS 1.4 R15 standard from 2 on. It calls 0 and 1 unclassified, reserves 23 to 63, and leaves 64 to
# 255 to the user.
_STANDARD = (
    "ground", "low vegetation", "medium vegetation", "high vegetation", "building", "low noise", "model key point",
    "water", "rail", "road surface", "overlap", "wire guard", "wire conductor", "transmission tower", "wire connector",
    "bridge deck", "high noise", "overhead structure", "ignored ground", "snow", "temporal exclusion",
)  # fmt: skip
_OWN = range(64, 256)
LAS_CLASSES = [*_STANDARD, *(f"class {code}" for code in _OWN)]
_INDEX = np.full(256, -1, np.int64)
_INDEX[[*range(2, 2 + len(_STANDARD)), *_OWN]] = np.arange(len(LAS_CLASSES))


def index_points(cloud: Cloud) -> Cloud:
    """The cloud of a LAS file with indices into `LAS_CLASSES`, -1 for unclassified points; other clouds as they are."""
    return cloud if cloud.labels is None else replace(cloud, labels=_INDEX[cloud.labels])
