"""Hand a trained model on, as a directory of safetensors, a configuration and a model card.

* ``unmask``: the whole model by our names, decoders and heads included: what `unmask.pointcloud.load` reads, and what
  pre-training goes on from.
* ``sst``: the encoder alone by the names of SST's modules, for detectors on that code base
  (github.com/tusen-ai/SST), as far as we know these names: see `unmask.pointcloud.interop.convert`.

`unmask.pointcloud.interop.pretrained` reads both back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unmask.core.errors import UnmaskError
from unmask.core.interop.export import Exported, Exporter, write_directory
from unmask.core.interop.model_card import public
from unmask.core.interop.weights import State
from unmask.core.training.recipe import as_dict
from unmask.pointcloud.encoders.window import WindowTransformer
from unmask.pointcloud.interop import convert
from unmask.pointcloud.interop.model_card import cloud_card


def _write_unmask(exported: Exported, out: Path) -> None:
    _write(exported, out, "unmask")


def _write_sst(exported: Exported, out: Path) -> None:
    recipe, method = exported.run.recipe, exported.method
    if not isinstance(method.encoder, WindowTransformer):
        raise UnmaskError(
            f"SST cannot hold an encoder of {type(method.encoder).__name__}: its detectors are made of window "
            "transformers (model.convolutions: null). Export it with: --to unmask"
        )
    _write(exported, out, "sst", detector=convert.sst_settings(recipe.model.encoder, recipe.data, method.grid))


def _write(exported: Exported, out: Path, to: str, **extra: Any) -> None:
    """The weights, and what builds the model and prepares its input; of folders their own names only."""
    run = exported.run
    values = as_dict(public(run.recipe))
    config = {"format": to, "method": run.recipe.method, "step": run.step}
    config |= {"model": values["model"], "data": values["data"], **extra}
    write_directory(out, config, _state(exported, to))


def _state(exported: Exported, to: str) -> State:
    """What is written: all weights by our names, or the encoder's by SST's."""
    state = exported.method.state_dict()
    return state if to == "unmask" else convert.to_sst(state)


export = Exporter(
    {"unmask": _write_unmask, "sst": _write_sst},
    lambda exported, to: cloud_card(exported, to, _state(exported, to)),
)
