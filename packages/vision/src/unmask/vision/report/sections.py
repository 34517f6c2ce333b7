"""What an image run's page shows: images, what was hidden of them, and what is answered."""

from __future__ import annotations

from unmask.core.report.gather import RunFacts
from unmask.core.report.parts import Section
from unmask.core.report.probes import probes as probes
from unmask.vision.report.pictures import draw_pictures as draw_pictures

COMMANDS = (
    ("Measure the encoder on labelled data of yours", "unmask evaluate {run} --data LABELLED"),
    ("Train a classifier from it", "unmask finetune {run} --data LABELLED"),
    ("One vector per sample, as a parquet file", "unmask embed {run} FOLDER --out features.parquet"),
    ("Take the encoder to timm", "unmask export {run} --to timm --out encoder/"),
)


def sections(run: RunFacts) -> list[Section]:
    """None beside those of every domain."""
    return []
