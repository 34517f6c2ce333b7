"""Encoders and initial weights from runs."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from unmask.core.method import encoder_of
from unmask.core.training.checkpoint import load_model, load_run, weights_of


def load(path: str | Path, device: str = "cpu") -> nn.Module:
    """The encoder of a run, in eval mode: ``encoder(letters, valid)`` gives `Features`."""
    return encoder_of(load_run(path, device).method)


def load_initial_weights(method: nn.Module, path: str | Path) -> None:
    """Start a method from a run of the same method."""
    load_model(method, weights_of(Path(path))[0], str(path))
