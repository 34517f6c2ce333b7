"""How clouds become vectors, for core: maximum and mean over pillars."""

from __future__ import annotations

from unmask.core.evaluation.encoding import Encoding
from unmask.core.training.recipe import micro_batch
from unmask.pointcloud.evaluation.features import cloud_vectors

# Clouds per forward pass: as many as fitted into memory in training.
ENCODING = Encoding(vectors=cloud_vectors, at_once=lambda recipe: micro_batch(recipe, 1))
