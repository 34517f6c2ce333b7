"""Masked prediction for point clouds.

Importing this package is cheap; `load` brings in torch when it is first asked for::

    import unmask.pointcloud

    encoder = unmask.pointcloud.load("runs/geomae")
    features = encoder(encoder.preprocess(["scan.ply", "sweep.bin"])).pooled
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unmask.pointcloud.pretrained import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from unmask.pointcloud.pretrained import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
