"""How images become vectors, for core: the mean of an encoder's patch tokens."""

from __future__ import annotations

from unmask.core.evaluation.encoding import Encoding
from unmask.vision.data.statistics import transfer_notes

ENCODING = Encoding(notes=transfer_notes)
