"""Whole weights from a run of the same method."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from toyland import load as load
from unmask.core.training.checkpoint import load_model, weights_of


def load_initial_weights(method: nn.Module, path: str | Path) -> None:
    load_model(method, weights_of(Path(path))[0], str(path))
