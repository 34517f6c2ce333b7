"""Hand a trained model on, as a directory of safetensors, a configuration and a model card.

* ``unmask``: the whole model by our names, decoders and heads included: what `unmask.pointcloud.load` reads, and what
  pre-training goes on from.
* ``sst``: the encoder alone by the names of SST's modules, for detectors on that code base
  (github.com/tusen-ai/SST), as far as we know these names: see `unmask.pointcloud.interop.convert`.

`unmask.pointcloud.interop.pretrained` reads both back.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor

from unmask.core.errors import UnmaskError
from unmask.core.training.checkpoint import LoadedRun, load_run
from unmask.core.training.recipe import as_dict
from unmask.pointcloud.encoders.window import WindowTransformer
from unmask.pointcloud.interop import convert
from unmask.pointcloud.interop.model_card import model_card, public_name

Target = Literal["unmask", "sst"]
State = dict[str, Tensor]


def export(run_dir: str | Path, out: str | Path, to: Target = "unmask") -> Path:
    """Write a run's weights as ``model.safetensors``, ``config.json`` and ``README.md``.

    Args:
        run_dir: a run directory.
        out: a directory that does not exist yet, or is empty.
        to: ``unmask`` (the whole model) or ``sst`` (the encoder, by the names of SST's modules).

    Returns:
        `out`.

    Raises:
        UnmaskError: not a run, `out` holds something or cannot be written, no such format, or an encoder that it has no
            place for.
    """
    write = _WRITERS.get(to)
    if write is None:
        raise UnmaskError(f"cannot export point clouds to {to!r}; choose one of: {', '.join(_WRITERS)}")
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UnmaskError(f"{out} is there already and not empty; give a new directory for the export")
    run = load_run(run_dir)
    state, extra = write(run)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
            made = Path(scratch) / "export"
            made.mkdir()
            tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
            save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
            config = {"format": to, **_recipe(run), **extra}
            (made / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            (made / "README.md").write_text(model_card(run, Path(run_dir), to, tensors), encoding="utf-8")
            if out.exists():
                out.rmdir()
            shutil.move(made, out)
    except OSError as error:
        raise UnmaskError(f"cannot write the export to {out}: {error.strerror or error}") from None
    return out


def _recipe(run: LoadedRun) -> dict[str, Any]:
    """What builds the model and prepares its input; of the data's place its own name only."""
    data = replace(run.recipe.data, source=public_name(run.recipe.data.source))
    values = as_dict(replace(run.recipe, data=data))
    return {"method": run.recipe.method, "step": run.step, "model": values["model"], "data": values["data"]}


def _as_unmask(run: LoadedRun) -> tuple[State, dict[str, Any]]:
    return dict(run.method.state_dict()), {}


def _as_sst(run: LoadedRun) -> tuple[State, dict[str, Any]]:
    method: Any = run.method
    if not isinstance(method.encoder, WindowTransformer):
        raise UnmaskError(
            f"SST has no place for an encoder of {type(method.encoder).__name__}: its detectors are made of window "
            "transformers (model.convolutions: null). Export it with: --to unmask"
        )
    settings = convert.sst_settings(run.recipe.model.encoder, run.recipe.data, method.grid)
    return convert.to_sst(method.state_dict()), {"detector": settings}


_WRITERS: dict[str, Callable[[LoadedRun], tuple[State, dict[str, Any]]]] = {"unmask": _as_unmask, "sst": _as_sst}
