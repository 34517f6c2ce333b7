"""How clouds become vectors, for core: maximum and mean over pillars."""

from __future__ import annotations

from unmask.core.evaluation.encoding import Encoding
from unmask.core.training.recipe import Recipe, micro_batch
from unmask.pointcloud.evaluation.features import cloud_vectors


def clouds_at_once(recipe: Recipe) -> int:
    """Clouds per forward pass: as many as fitted into memory in training."""
    return micro_batch(recipe, 1)


ENCODING = Encoding(vectors=cloud_vectors, at_once=clouds_at_once)
