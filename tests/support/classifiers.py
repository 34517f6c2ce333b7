"""Fine-tuned directories without fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from unmask.core.evaluation.classifier import Classifier
from unmask.core.evaluation.encoding import encoding_of
from unmask.core.training import checkpoint
from unmask.core.training.checkpoint import load_run
from unmask.core.training.recipe import Tuning, to_yaml


def write_classifier(run: Path, out: Path, classes: Sequence[str]) -> Classifier:
    """A directory as `unmask finetune` leaves it, with the run's encoder and a head at its initial weights."""
    loaded, tuning = load_run(run), Tuning(classes=tuple(classes))
    encoder = loaded.method.encoder
    model = Classifier(loaded.method, encoding_of(loaded.recipe.method), encoder.dim, tuning)  # type: ignore[arg-type, union-attr]
    out.mkdir()
    (out / "recipe.yaml").write_text(to_yaml(replace(loaded.recipe, finetune=tuning)))
    checkpoint.write(out / "model.safetensors", model.state_dict(), {"step": 1})
    return model
