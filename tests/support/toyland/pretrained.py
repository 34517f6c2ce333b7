"""Encoders of runs, without preparation of their input; the rest is core's."""

from __future__ import annotations

from torch import nn

from unmask.core.interop.pretrained import load_initial_weights as load_initial_weights
from unmask.core.interop.pretrained import open_directory as open_directory
from unmask.core.method import encoder_of
from unmask.core.training.checkpoint import LoadedRun


def as_encoder(run: LoadedRun) -> nn.Module:
    """The encoder itself."""
    return encoder_of(run.method)
