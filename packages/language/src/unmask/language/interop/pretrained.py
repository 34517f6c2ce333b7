"""Encoders and initial weights from runs."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from unmask.core.errors import UnmaskError
from unmask.core.interop.directories import directory, is_run
from unmask.core.interop.weights import State, read_state
from unmask.core.training.checkpoint import load_model, weights_of
from unmask.language.interop.prop_weights import is_released, released_to_ours

_FILES = ("config.json", "model.safetensors", "pytorch_model.bin")


def load(path: str | Path, device: str = "cpu") -> nn.Module:
    raise NotImplementedError


def load_initial_weights(method: nn.Module, path: str | Path) -> None:
    """Start a method from a run of the same method, or PROP from the weights that its authors released.

    Args:
        method: changed in place.
        path: a run directory; or a file of released weights, the directory that holds it, or its id on the Hugging Face
            hub. A file of PyTorch is read as tensors alone, so that no code in it runs.

    Raises:
        UnmaskError: nothing of the kind is there, or it is of another model.
    """
    if is_run(path):
        load_model(method, weights_of(Path(path))[0], str(path))
        return
    state = _read(Path(path))
    if not is_released(state):
        raise UnmaskError(
            f"{path}: neither a run nor weights that PROP's authors released. A language model of transformers is "
            "given with --network model=DIR"
        )
    load_model(method, released_to_ours(state), str(path))


def _read(path: Path) -> State:
    if path.is_file():
        return read_state(path)
    folder = directory(str(path), _FILES)
    for name in _FILES[1:]:
        if (folder / name).is_file():
            return read_state(folder / name)
    raise UnmaskError(f"{path}: holds no weights ({' or '.join(_FILES[1:])})")
