"""Hand a trained model on, as a directory of safetensors, a configuration and a model card.

* ``unmask``: the whole model by our names, decoders and heads included: what `unmask.pointcloud.load` reads, and what
  pre-training goes on from.
* ``sst``: the encoder alone by the names of SST's modules, for detectors on that code base
  (github.com/tusen-ai/SST), as far as we know these names: see `unmask.pointcloud.interop.convert`.

`unmask.pointcloud.interop.pretrained` reads both back.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from unmask.core.errors import UnmaskError
from unmask.core.interop.export import Exported, write_export
from unmask.core.interop.model_card import public
from unmask.core.interop.weights import State, save_state
from unmask.core.training.recipe import as_dict
from unmask.pointcloud.encoders.window import WindowTransformer
from unmask.pointcloud.interop import convert
from unmask.pointcloud.interop.model_card import cloud_card

Target = Literal["unmask", "sst"]


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
    return write_export(
        run_dir, out, to, _WRITERS, lambda exported: cloud_card(exported, to, _STATES[to](exported.method.state_dict()))
    )


def _write_unmask(exported: Exported, out: Path) -> None:
    _write(exported, out, "unmask")


def _write_sst(exported: Exported, out: Path) -> None:
    recipe, method = exported.run.recipe, exported.method
    if not isinstance(method.encoder, WindowTransformer):
        raise UnmaskError(
            f"SST has no place for an encoder of {type(method.encoder).__name__}: its detectors are made of window "
            "transformers (model.convolutions: null). Export it with: --to unmask"
        )
    _write(exported, out, "sst", detector=convert.sst_settings(recipe.model.encoder, recipe.data, method.grid))


def _write(exported: Exported, out: Path, to: str, **extra: Any) -> None:
    """The weights, and what builds the model and prepares its input; of folders their own names only."""
    run = exported.run
    values = as_dict(public(run.recipe))
    config = {"format": to, "method": run.recipe.method, "step": run.step}
    config |= {"model": values["model"], "data": values["data"], **extra}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_state(_STATES[to](exported.method.state_dict()), out / "model.safetensors")


_WRITERS = {"unmask": _write_unmask, "sst": _write_sst}
_STATES: dict[str, Callable[[State], State]] = {"unmask": dict, "sst": convert.to_sst}
