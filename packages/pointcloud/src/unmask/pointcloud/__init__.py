"""Masked prediction for point clouds.

Importing this package is cheap; `load` brings in torch when it is called::

    import unmask.pointcloud

    encoder = unmask.pointcloud.load("runs/geomae")
    features = encoder(encoder.preprocess(["scan.ply", "sweep.bin"])).pooled
"""

from unmask.core.domain import Domain

__version__ = "0.1.0"
__all__ = ["DOMAIN", "__version__", "load"]

DOMAIN = Domain(
    name="pointcloud",
    samples="point clouds",
    data={"clouds": "unmask.pointcloud.data.clouds"},
    tasks={"representation": "unmask.pointcloud.evaluation.representation"},
    encoding="unmask.pointcloud.evaluation.encoding",
    pretrained="unmask.pointcloud.interop.pretrained",
    export="unmask.pointcloud.interop.export",
    formats={"unmask": "the whole model", "sst": "the encoder, by the names of the SST detectors"},
    report="unmask.pointcloud.report.sections",
    sets="unmask.pointcloud.data.embedded.carriers",
    checks="unmask.pointcloud.checks",
)
load = DOMAIN.load
