"""Fine-tuning by masks: which weights of a frozen classifier are kept is learnt, after R-AMT (arXiv 2307.15049).

Every weight of the linear layers below the head has a score; weights whose score is above a threshold are kept, the
others are 0. The threshold passes gradients straight through. Nothing else is trained, and only scores are saved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from unmask.core.errors import UnmaskError
from unmask.core.losses import mean_term
from unmask.core.method import Clock, Metric, Output
from unmask.core.networks import Network
from unmask.core.randomness import Key
from unmask.vision.data.images import ImageBatch
from unmask.vision.data.images import Settings as DataSettings

CARD = {
    "title": "Fine-tuning by masks",
    "paper": "after R-AMT, arXiv 2307.15049",
    "kind": "finetune",
    "task": "classification",
    "evidence": "thin",
    "reference": "none",
    "reference_licence": "none",
}
NETWORKS = {"classifier": "the image classifier whose weights are masked (transformers)"}


@dataclass(frozen=True)
class Settings:
    """What a recipe may set under ``model``.

    Args:
        threshold: weights whose score is above it are kept; scores begin at 1.
    """

    threshold: float = 0.5


def build(settings: Settings, data: DataSettings, networks: dict[str, Network]) -> MaskTuned:
    return MaskTuned(networks["classifier"].module, settings.threshold)


class Kept(nn.Module):
    """A weight where its score is above the threshold, and 0 elsewhere."""

    def __init__(self, shape: torch.Size, threshold: float) -> None:
        super().__init__()
        self.scores, self.threshold = nn.Parameter(torch.ones(shape)), threshold

    def forward(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        kept = (self.scores > self.threshold).to(weight)
        return weight * (kept + self.scores - self.scores.detach())  # its gradient is the score's


class MaskTuned(nn.Module):
    def __init__(self, classifier: nn.Module, threshold: float) -> None:
        super().__init__()
        self.classifier = classifier
        for layer in [m for m in classifier.base_model.modules() if isinstance(m, nn.Linear)]:
            parametrize.register_parametrization(layer, "weight", Kept(layer.weight.shape, threshold))

    def train(self, mode: bool = True) -> MaskTuned:
        """The frozen network stays in eval mode."""
        super().train(mode)
        self.classifier.eval()
        return self

    def draw(self, batch: ImageBatch, clock: Clock, key: Key) -> None:
        """Nothing is random."""

    def forward(self, batch: ImageBatch, plan: None) -> Output:
        if batch.labels is None:
            raise UnmaskError("fine-tuning by masks needs labels: put images in one folder a class")
        logits = self.classifier(batch.images).logits  # [batch, classes]
        values = F.cross_entropy(logits.float(), batch.labels, reduction="none")
        right = (logits.argmax(1) == batch.labels).sum()
        return Output({"classes": mean_term(values)}, {"accuracy": Metric(right, len(logits))})
