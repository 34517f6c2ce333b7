"""What `load` gives of a fine-tuned directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from unmask.core.training.recipe import read_yaml


class FineTunedEncoder(nn.Module):
    """An encoder as ``load`` gives it for a run, with the head that it was fine-tuned with.

    ``model(batch)`` are the features, as of a run; ``model.logits(batch)`` the scores of ``model.classes``, and
    ``model.preprocess(samples)`` makes a batch.

    Args:
        classifier: see `unmask.core.evaluation.classifier.Classifier`.
        encoder: the part of it that gives features of a batch, with its ``preprocess``.
    """

    def __init__(self, classifier: Any, encoder: Any) -> None:
        super().__init__()
        self.classifier, self.encoder, self.preprocess = classifier, encoder, encoder.preprocess
        self.classes: list[str] = list(classifier.classes)

    def forward(self, batch: Any) -> Any:
        """The fine-tuned encoder's `Features`, its final norm left out, as the classifier pools them."""
        return self.encoder(batch)

    def logits(self, batch: Any) -> Float[Tensor, "batch classes"]:
        """One score per class, before softmax."""
        vectors = self.classifier.encoding.vectors(self.encoder(batch))  # [batch, dim]
        return self.classifier.head(self.classifier.norm(vectors))  # [batch, classes]


def is_fine_tuned(path: str | Path) -> bool:
    """Whether `path` is what `unmask finetune` wrote."""
    recipe = Path(path) / "recipe.yaml"
    return recipe.is_file() and read_yaml(recipe).get("finetune") is not None
