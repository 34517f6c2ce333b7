"""Occlusion maps (Zeiler and Fergus, ECCV 2014, arXiv 1311.2901): what happens to the answer where a square is hidden.

A grey square is moved over the image. A pixel's value is how much the score of the class that was answered for the
whole image drops, on average over the squares that hide it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from unmask.core.explanation import answer_of

CARD = {
    "title": "Occlusion",
    "paper": "Zeiler and Fergus, ECCV 2014, arXiv 1311.2901",
    "kind": "explain",
    "task": "explanation",
    "evidence": "full",
    "reference": "none",
    "reference_licence": "none",
}
NETWORKS = {"network": "the classifier that is explained (timm or transformers)"}


@dataclass(frozen=True)
class Settings:
    """What ``--set`` takes.

    Args:
        side: of the square, in pixels.
        stride: pixels from one square to the next.
    """

    side: Annotated[int, Field(ge=1)] = 4
    stride: Annotated[int, Field(ge=1)] = 2


@torch.no_grad()
def explain(
    network: nn.Module, inputs: Float[Tensor, "batch channels rows columns"], settings: Settings
) -> Float[Tensor, "batch rows columns"]:
    answered = answer_of(network, inputs)  # [batch, classes]
    best = answered.argmax(1, keepdim=True)
    drops = torch.zeros_like(inputs[:, 0])
    times = torch.zeros_like(drops)
    for top, left in product(*(range(0, size, settings.stride) for size in inputs.shape[2:])):
        square = (..., slice(top, top + settings.side), slice(left, left + settings.side))
        hidden = inputs.clone()
        hidden[square] = 0  # the mean, in normalised units
        drop = (answered - answer_of(network, hidden)).gather(1, best)  # [batch, 1]
        drops[square] += drop[..., None]
        times[square] += 1
    return drops / times.clamp(min=1)
