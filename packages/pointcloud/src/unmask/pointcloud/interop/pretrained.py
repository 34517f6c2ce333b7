"""Trained weights from elsewhere: a run, an exported directory, an encoder by the names of SST's detectors.

`unmask.pointcloud.load` gives an encoder to use, and `load_initial_weights` starts a new run from any of them (the
recipe's key ``init``), decoders and heads included where they are there.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from unmask.core.errors import UnmaskError
from unmask.core.interop.directories import directory, is_run, read_config
from unmask.core.interop.pretrained import check_domain_of
from unmask.core.interop.weights import State, check_fit, check_initial, read_state
from unmask.core.method import encoder_of
from unmask.core.training.build import make_method
from unmask.core.training.checkpoint import LoadedRun, weights_of
from unmask.core.training.recipe import Recipe, flatten, make_recipe, read_yaml
from unmask.pointcloud.interop import convert
from unmask.pointcloud.interop.model import CloudEncoder

FORMATS = ("unmask", "sst")
_FILES = ["config.json", "model.safetensors"]
# Settings that change what is computed, or asked, and perhaps no weight's shape; and settings that change neither.
_UNSEEN, _UNSEEN_WHOLE = ("encoder.heads", "encoder.window"), ("low", "med")
_NO_MATTER = ("mask_ratio", "normal_loss", "convolutions.backend")


@dataclass(frozen=True)
class Weights:
    """What a file or a directory holds, by our names.

    Args:
        state: the weights.
        recipe: the method and its settings; None where only a file of weights is there.
        whole: whether decoders and heads are among them.
    """

    state: State
    recipe: Recipe | None
    whole: bool


def as_encoder(run: LoadedRun) -> CloudEncoder:
    """The encoder of a method, with the preparation of its input.

    ``encoder.preprocess(clouds)`` makes a `PointBatch` of file names or arrays, and ``encoder(batch)`` gives
    `PillarFeatures`: ``tokens``, ``valid``, ``pooled`` (the mean over pillars), ``voxels`` and ``per_point()``.
    """
    parts: Any = encoder_of(run.method)
    return CloudEncoder(parts.pillar_encoder, parts.encoder, run.recipe.data)


def open_directory(path: str | Path) -> CloudEncoder:
    """`as_encoder` of a directory made by ``unmask export``, or of the id of one on the Hugging Face hub.

    Raises:
        UnmaskError: nothing of the kind is there.
    """
    weights = read_weights(path)
    if weights.recipe is None:
        raise UnmaskError(
            f"{path}: weights alone do not say how the model is shaped; give the directory of the run or export"
        )
    encoder = as_encoder(LoadedRun(make_method(weights.recipe), weights.recipe, 0))
    given = {name: tensor for name, tensor in weights.state.items() if convert.is_encoder(name)}
    check_fit(given, encoder.state_dict(), f"{path}: damaged: these are not the weights that it describes")
    encoder.load_state_dict(given)
    return encoder


def load_initial_weights(method: nn.Module, path: str | Path) -> None:
    """Copy trained weights into a freshly built method, so that pre-training goes on from them.

    Decoders and heads are copied, too, and have to fit. Weights by SST's names have none: those of the method then stay
    as they are, which is said on stderr, as is a pillar of another size.

    Args:
        method: what the recipe's ``build`` returned; changed in place.
        path: a run directory, as for `open_directory`, or a ``.safetensors`` or ``.pth`` file with our names or SST's.

    Raises:
        UnmaskError: the weights are those of another model; the message names what differs.
    """
    weights, wanted = read_weights(path), method.state_dict()
    differing = [] if weights.recipe is None else _settings_that_differ(weights.recipe, method)
    hint = f" Settings that differ: {'; '.join(differing)}." if differing else ""
    expected = wanted if weights.whole else {n: t for n, t in wanted.items() if convert.is_encoder(n)}
    check_initial(weights.state, expected, path, "`model` settings and channels", hint=hint)
    names = _UNSEEN + (_UNSEEN_WHOLE if weights.whole else ())
    unseen = [text for text in differing if text.startswith(tuple(f"model.{name} " for name in names))]
    if unseen:
        raise UnmaskError(
            f"{path}: these weights fit, but mean something else: {'; '.join(unseen)}. Set what they had."
        )
    method.load_state_dict({**wanted, **weights.state})
    if not weights.whole:
        print(f"{path}: the encoder is loaded; decoders and heads start at random values", file=sys.stderr)
    _say_pillar(weights.recipe, method, path)


def _settings_that_differ(recipe: Recipe, method: Any) -> list[str]:
    """Settings of the shape that are not the method's, in words."""
    theirs, ours = flatten(asdict(recipe.model)), flatten(asdict(method.settings))
    names = [name for name in dict.fromkeys([*theirs, *ours]) if not name.startswith(_NO_MATTER)]
    differing = [
        f"model.{name} is {theirs.get(name)} there and {ours.get(name)} here"
        for name in names
        if _differ(name, theirs.get(name), ours.get(name))
    ]
    channels = method.pillar_encoder.layers[0].linear.in_features - 6
    if recipe.data.channels != channels:
        differing.append(f"points have {recipe.data.channels} channels there and {channels} here (data.features)")
    return differing


def _differ(name: str, theirs: Any, ours: Any) -> bool:
    """Of a loss term's weight it only matters whether it is 0: then there is no head."""
    return bool(theirs) != bool(ours) if name.startswith("weights.") else theirs != ours


def _say_pillar(recipe: Recipe | None, method: Any, path: str | Path) -> None:
    """Weights do not depend on the size of a pillar, but what they have learned does."""
    if recipe is not None and recipe.data.pillar is not None and recipe.data.pillar != method.grid.pillar[:2]:
        theirs, ours = (" x ".join(f"{v:g}" for v in size) for size in (recipe.data.pillar, method.grid.pillar[:2]))
        print(f"{path}: trained on pillars of {theirs} m, goes on with {ours} m", file=sys.stderr)


# ---- reading -------------------------------------------------------------------------------------------------------


def read_weights(path: str | Path) -> Weights:
    """The weights, and how the model is shaped, of whatever `path` is; see `load_initial_weights`."""
    if is_run(path):
        file = Path(path) / "recipe.yaml"
        recipe = _recipe(read_yaml(file), file)
        return Weights(dict(weights_of(Path(path))[0]), recipe, whole=True)
    if Path(path).is_file():
        return _of_file(read_state(Path(path)))
    return _of_export(directory(path, _FILES))


def _of_export(folder: Path) -> Weights:
    """A directory that `unmask.pointcloud.interop.export` made."""
    config = read_config(folder / "config.json")
    if config.get("format") not in FORMATS:
        raise UnmaskError(
            f"{folder / 'config.json'}: not an exported encoder of point clouds; make one with: unmask export RUN"
        )
    raw = {name: config.get(name) for name in ("method", "model", "data")}
    recipe, state = _recipe(raw, folder / "config.json"), read_state(folder / "model.safetensors")
    whole = config["format"] == "unmask"
    return Weights(state if whole else convert.from_sst(state), recipe, whole)


def _recipe(raw: dict[str, Any], path: Path) -> Recipe:
    recipe = make_recipe(raw, source=str(path), try_build=False)
    check_domain_of(recipe.method, "pointcloud", path)
    return recipe


def _of_file(state: State) -> Weights:
    """By our names or SST's, whole or an encoder alone."""
    if any(name.startswith("voxel_encoder.") for name in state):
        return Weights(convert.from_sst(state), None, whole=False)
    return Weights(state, None, whole=not all(convert.is_encoder(name) for name in state))
