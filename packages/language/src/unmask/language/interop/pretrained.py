"""Encoders and initial weights from runs."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from unmask.core.training.checkpoint import load_model, weights_of


def load(path: str | Path, device: str = "cpu") -> nn.Module:
    raise NotImplementedError


def load_initial_weights(method: nn.Module, path: str | Path) -> None:
    """Start a method from a run of the same method."""
    load_model(method, weights_of(Path(path))[0], str(path))
