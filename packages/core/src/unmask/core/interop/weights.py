"""Files of weights: read without running code, and held against the model that they are meant for."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask.core.errors import UnmaskError

State = dict[str, Tensor]

PICKLED = (".pth", ".pt", ".bin", ".ckpt")
_INSIDE = ("state_dict", "model", "module")  # where training codes keep the weights in a checkpoint
_SHOWN = 3  # names listed per kind of difference


def read_state(path: Path) -> State:
    """The tensors of a ``.safetensors`` file, or of a PyTorch file that holds tensors and plain values only.

    PyTorch files are read with ``weights_only=True``, so no code in them runs. They may be a state dict, or hold one as
    ``state_dict``, ``model`` or ``module``.

    Raises:
        UnmaskError: another suffix, a file that is not whole, or one that holds more than tensors.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in PICKLED:
        return _state_in(_read_pickled(path), path)
    raise UnmaskError(
        f"{path}: weights are read from .safetensors and {', '.join(PICKLED)} files; save the state dict with "
        "safetensors.torch.save_file first"
    )


def _read_safetensors(path: Path) -> State:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UnmaskError(f"{path}: not a complete safetensors file ({error})") from None


def _read_pickled(path: Path) -> Any:
    try:
        with warnings.catch_warnings():  # about pickle protocols: what cannot be read is an error below
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds here; all mean "not tensors alone, or not whole"
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise UnmaskError(
            f"{path}: cannot be read as tensors alone ({reason}). Other things in such a file can run code when it is "
            "opened; if you trust it, open it yourself and save its state dict with safetensors.torch.save_file"
        ) from None


def _state_in(content: Any, path: Path) -> State:
    """The state dict that a file is, or holds."""
    inside = [content, *(content[name] for name in _INSIDE if name in content)] if isinstance(content, Mapping) else []
    for state in inside:
        if isinstance(state, Mapping) and state and all(isinstance(value, Tensor) for value in state.values()):
            return dict(state)
    raise UnmaskError(
        f"{path}: holds no state dict (tensors by name), neither itself nor as {', '.join(_INSIDE)}; save one with "
        "safetensors.torch.save_file"
    )


def save_state(state: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as ``.safetensors`` that other libraries open, no two of them sharing memory."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def difference(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], why_missing: str = "") -> str:
    """What keeps the weights `given` from fitting a model whose state is `wanted`, in words; empty when they fit.

    Args:
        given: by the model's names.
        wanted: the model's own.
        why_missing: put behind the number of weights that are missing.
    """
    shapes = [
        f"{name} ({shape(given[name])}, the model's is {shape(wanted[name])})"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]
    kinds = {
        "of another shape": shapes,
        f"missing{why_missing}": [name for name in wanted if name not in given],
        "that the model does not have": [name for name in given if name not in wanted],
    }
    return "; ".join(f"{len(names)} {kind}: {some(names)}" for kind, names in kinds.items() if names)


def check_fit(
    given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str, remedy: str = "", why_missing: str = ""
) -> None:
    """Raise an UnmaskError that says the `difference` between `given` and `wanted`, between `what` and `remedy`."""
    problem = difference(given, wanted, why_missing)
    if problem:
        raise UnmaskError(f"{what}: {problem}.{remedy}")


def check_initial(
    given: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    path: str | Path,
    settings: str = "`model` settings",
    *,
    why_missing: str = "",
    hint: str = "",
) -> None:
    """`check_fit` for weights that a run starts from: its remedy names the `settings` that have to agree."""
    remedy = f"{hint} Give weights trained with the same {settings}, or change the settings to theirs."
    check_fit(given, wanted, f"{path}: these weights are of another model", remedy, why_missing)


def check_names(given: Collection[str], expected: Collection[str], whose: str) -> None:
    """Raise an UnmaskError that lists every name that is `given` and not `expected`, and the other way round."""
    given, expected = set(given), set(expected)
    unknown, missing = sorted(given - expected), sorted(expected - given)
    parts = [f"{what}: {', '.join(names)}" for what, names in (("unknown", unknown), ("missing", missing)) if names]
    if parts:
        raise UnmaskError(f"these weights are not those of {whose}; {'; '.join(parts)}")


def shape(tensor: Tensor) -> str:
    """``3 x 16 x 16``."""
    return " x ".join(map(str, tensor.shape)) or "scalar"


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
