"""What the class numbers of points in LAS files mean."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from unmask.pointcloud.data.readers import Cloud

# The LAS 1.4 R15 standard. It calls 0 and 1 unclassified, reserves 23 to 63, and leaves 64 to 255 to the user.
_STANDARD = {
    2: "ground",
    3: "low vegetation",
    4: "medium vegetation",
    5: "high vegetation",
    6: "building",
    7: "low noise",
    8: "model key point",
    9: "water",
    10: "rail",
    11: "road surface",
    12: "overlap",
    13: "wire guard",
    14: "wire conductor",
    15: "transmission tower",
    16: "wire connector",
    17: "bridge deck",
    18: "high noise",
    19: "overhead structure",
    20: "ignored ground",
    21: "snow",
    22: "temporal exclusion",
}
_OWN = range(64, 256)
LAS_CLASSES = [*_STANDARD.values(), *(f"class {code}" for code in _OWN)]
_INDEX = np.full(256, -1, np.int64)
_INDEX[[*_STANDARD, *_OWN]] = np.arange(len(LAS_CLASSES))


def index_points(cloud: Cloud) -> Cloud:
    """The cloud of a LAS file with indices into `LAS_CLASSES`, -1 for unclassified points; other clouds as they are."""
    return cloud if cloud.labels is None else replace(cloud, labels=_INDEX[cloud.labels])
