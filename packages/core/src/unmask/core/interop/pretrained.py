"""Trained encoders and initial weights, for every domain.

`load` opens runs and fine-tuned directories of any domain. The rest is a whole `unmask.core.domain.Pretrained`: what a
domain has that reads its own runs and nothing else.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from unmask.core import registry
from unmask.core.domain import Domain
from unmask.core.errors import UnmaskError
from unmask.core.evaluation.classifier import encoder_alone
from unmask.core.evaluation.finetune import load_tuned
from unmask.core.interop.directories import is_run
from unmask.core.interop.fine_tuned import FineTunedEncoder, is_fine_tuned
from unmask.core.interop.weights import read_state
from unmask.core.method import Features, to_device
from unmask.core.training.checkpoint import LoadedRun, load_model, load_run, weights_of


def load(domain: Domain, path: str | Path, device: str = "cpu") -> Any:
    """See `unmask.core.domain.Domain.load`."""
    reader = importlib.import_module(domain.pretrained)
    folder = Path(path).parent if Path(path).name == "model.safetensors" else Path(path)
    if not is_run(folder):
        return reader.open_directory(path).to(device).eval()
    run = load_tuned(folder) if is_fine_tuned(folder) else load_run(folder)
    check_domain_of(run.recipe.method, domain.name, path)
    if run.recipe.finetune is None:
        return reader.as_encoder(run).to(device).eval()
    classifier: Any = run.method
    encoder = reader.as_encoder(replace(run, method=classifier.method))
    return FineTunedEncoder(classifier, encoder).to(device).eval()


def check_domain_of(method: str, domain: str, path: str | Path) -> None:
    """Raise an UnmaskError where the weights at `path` are of a method of another domain."""
    if registry.domain(method).name != domain:
        raise UnmaskError(f"{path}: a run of {method}; give one of a {domain} method")


class PretrainedEncoder(nn.Module):
    """A method's `encode`, without the parts that it does not run: ``encoder(encoder.preprocess(samples))``.

    Args:
        run: a trained method, and the recipe whose data settings say how samples are prepared.
    """

    def __init__(self, run: LoadedRun) -> None:
        super().__init__()
        self.recipe = run.recipe
        self.method: Any = run.method if run.recipe.finetune else encoder_alone(run.method)

    def preprocess(self, samples: Any) -> Any:
        """A batch on the encoder's device, as the data kind's `preprocess` makes it."""
        data = registry.data_kind(self.recipe.method)
        return to_device(data.preprocess(samples, self.recipe.data), next(self.parameters()).device)

    def forward(self, batch: Any) -> Features:
        """The features of a batch: nothing is masked."""
        return self.method.encode(batch)


as_encoder = PretrainedEncoder


def open_directory(path: str | Path) -> nn.Module:
    """Raise an UnmaskError: no other library's directories are read."""
    raise UnmaskError(f"{path}: not a run (no recipe.yaml)")


def load_initial_weights(method: nn.Module, path: str | Path) -> None:
    """Start a method from the weights of a run of the same method, or from a file of weights by its names.

    Raises:
        UnmaskError: neither is there, or the weights are those of another model; the message names what differs.
    """
    given = weights_of(Path(path))[0] if is_run(path) else read_state(Path(path))
    load_model(method, given, str(path))
