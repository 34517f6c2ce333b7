"""Masked image modelling.

Importing this package is cheap; `load` brings in torch when it is called::

    import unmask.vision

    encoder = unmask.vision.load("runs/demo")
    features = encoder(encoder.preprocess(["cat.jpg", "dog.jpg"])).pooled
"""

from unmask.core.domain import Domain

__version__ = "0.1.0"
__all__ = ["DOMAIN", "__version__", "load"]

DOMAIN = Domain(
    name="vision",
    samples="images",
    data={"images": "unmask.vision.data.images"},
    tasks={"representation": "unmask.vision.evaluation.representation"},
    encoding="unmask.vision.evaluation.encoding",
    pretrained="unmask.vision.interop.pretrained",
    export="unmask.vision.interop.export",
    formats={"timm": "the encoder", "transformers": "the whole model, of MAE; a classifier"},
    report="unmask.vision.report.sections",
    sets="unmask.vision.data.embedded.carriers",
    checks="unmask.vision.checks",
)
load = DOMAIN.load
