"""What fine-tuning leaves: a directory with a recipe, the weights of a classifier, and ``finetune.json``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from unmask.core import registry
from unmask.core.errors import UnmaskError
from unmask.core.training.recipe import Recipe, make_recipe, read_yaml


class FineTunedEncoder(nn.Module):
    """An encoder as ``load`` gives it for a run, with the head that it was fine-tuned with.

    ``model(batch)`` are the features, as of a run; ``model.logits(batch)`` the scores of ``model.classes``, and
    ``model.preprocess(samples)`` makes a batch.

    Args:
        classifier: gives logits of a batch; has the names of its classes as ``classes``.
        encoder: the part of it that gives features of a batch.
        preprocess: from what a user has to a batch.
    """

    def __init__(self, classifier: nn.Module, encoder: nn.Module, preprocess: Callable[[Any], Any]) -> None:
        super().__init__()
        self.classifier, self.encoder, self.preprocess = classifier, encoder, preprocess
        self.classes: list[str] = list(classifier.classes)  # type: ignore[arg-type]

    def forward(self, batch: Any) -> Any:
        """The fine-tuned encoder's `Features`."""
        return self.encoder(batch)

    def logits(self, batch: Any) -> Float[Tensor, "batch classes"]:
        """One score per class, before softmax."""
        return self.classifier(batch)


def is_fine_tuned(path: str | Path) -> bool:
    """Whether `path` is what `unmask finetune` wrote."""
    return (Path(path) / "finetune.json").is_file()


def load_classifier(path: str | Path, device: str = "cpu") -> tuple[Any, Recipe]:
    """The classifier of a fine-tuned directory, as the method's task reads it, in eval mode; and its recipe.

    Raises:
        UnmaskError: it cannot be read, or the method's task has no classifiers.
    """
    place = Path(path) / "recipe.yaml"
    recipe = make_recipe(read_yaml(place), source=str(place), try_build=False)
    read = getattr(registry.task(recipe.method), "load_classifier", None)
    if read is None:
        raise UnmaskError(f"{path}: {recipe.method} has no classifiers; give the run that was fine-tuned instead")
    return read(path, device), recipe
