"""Samples from a trained generator: ``unmask generate``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from unmask.core import registry
from unmask.core.errors import UnmaskError
from unmask.core.evaluation.features import pick_device
from unmask.core.method import to_device
from unmask.core.training.checkpoint import load_run
from unmask.core.training.files import check_empty, new_folder


def generate(run_dir: str | Path, out: str | Path, *, count: int = 16, seed: int = 0, device: str = "auto") -> Path:
    """Write samples of a run's method into a new folder: its ``generate(count, seed)``, as its data kind writes them.

    Args:
        run_dir: a run directory; one that is still training samples from its newest checkpoint.
        out: a folder that does not exist yet, or is empty; it is whole or not there.
        count: how many samples.
        seed: the same seed gives the same samples on the same device.
        device: ``auto``, ``cpu`` or ``cuda``.

    Returns:
        `out`.

    Raises:
        UnmaskError: no run, `out` holds something, or the method does not generate; names those that do.
    """
    out = Path(out)
    check_empty(out)
    run = load_run(run_dir, pick_device(device))
    make: Any = getattr(run.method, "generate", None)
    if make is None:
        raise UnmaskError(
            f"{run.recipe.method} does not generate; methods that do: {registry.of_kind('generate')} "
            "(`unmask list --kind generate`)"
        )
    samples = to_device(make(count, seed), "cpu")
    writer = getattr(registry.data_kind(run.recipe.method), "write_samples", None)
    with new_folder(out) as folder:
        if writer is None:
            _write_tensors(samples, folder)
        else:
            writer(samples, run.recipe.data, folder)
    return out


def _write_tensors(samples: Tensor | Mapping[str, Tensor], folder: Path) -> None:
    """A tensor, or several by name, as one file."""
    named = {"samples": samples} if isinstance(samples, Tensor) else dict(samples)
    save_file({name: tensor.contiguous() for name, tensor in named.items()}, folder / "samples.safetensors")
