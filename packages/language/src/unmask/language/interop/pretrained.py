"""Initial weights from elsewhere: runs as core reads them, and the weights that PROP's authors released."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from unmask.core.errors import UnmaskError
from unmask.core.interop import pretrained
from unmask.core.interop.directories import directory, is_run
from unmask.core.interop.pretrained import as_encoder, open_directory
from unmask.core.interop.weights import State, read_state
from unmask.core.training.checkpoint import load_model
from unmask.language.interop.prop_weights import is_released, released_to_ours

__all__ = ["as_encoder", "load_initial_weights", "open_directory"]
_FILES = ("config.json", "model.safetensors", "pytorch_model.bin")


def load_initial_weights(method: nn.Module, path: str | Path) -> None:
    """Start a method from a run of the same method, or PROP from the weights that its authors released.

    Args:
        method: changed in place.
        path: a run directory; or a file of weights, by the method's own names or the release's, the directory that
            holds it, or its id on the Hugging Face hub. A file of PyTorch is read as tensors alone: no code in it runs.

    Raises:
        UnmaskError: nothing of the kind is there, or it is of another model.
    """
    if is_run(path):
        pretrained.load_initial_weights(method, path)
        return
    state = _read(Path(path))
    load_model(method, released_to_ours(state) if is_released(state) else state, str(path))


def _read(path: Path) -> State:
    if path.is_file():
        return read_state(path)
    folder = directory(str(path), _FILES)
    for name in _FILES[1:]:
        if (folder / name).is_file():
            return read_state(folder / name)
    raise UnmaskError(f"{path}: holds no weights ({' or '.join(_FILES[1:])})")
