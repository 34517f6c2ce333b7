"""Trained weights from elsewhere: a run, an exported directory, an encoder by the names of SST's detectors.

`load` gives an encoder to use, and `load_initial_weights` starts a new run from any of them (the recipe's key
``init``), decoders and heads included where they are there.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from unmask.core.errors import UnmaskError
from unmask.core.evaluation.finetune import load_tuned
from unmask.core.interop.directories import directory, is_run, read_config
from unmask.core.interop.fine_tuned import FineTunedEncoder, is_fine_tuned
from unmask.core.interop.weights import State, check_fit, read_state
from unmask.core.method import encoder_of
from unmask.core.training.build import make_method
from unmask.core.training.checkpoint import weights_of
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
    """What a place holds, by our names.

    Args:
        state: the weights.
        recipe: the method and its settings; None where only a file of weights is there.
        whole: whether decoders and heads are among them.
    """

    state: State
    recipe: Recipe | None
    whole: bool


def load(path: str | Path, device: str = "cpu") -> CloudEncoder | FineTunedEncoder:
    """A trained encoder, in eval mode.

    ``encoder.preprocess(clouds)`` makes a `PointBatch` of file names or arrays, and ``encoder(batch)`` gives
    `PillarFeatures`: ``tokens``, ``valid``, ``pooled`` (the mean over pillars), ``voxels`` and ``per_point()``.
    Of a fine-tuned directory it is a `FineTunedEncoder`: ``encoder.logits(batch)`` scores ``encoder.classes``, too.

    Args:
        path: a run directory, what ``unmask finetune`` wrote, a directory made by ``unmask export``, or the id of one
            on the Hugging Face hub.
        device: where to put it.

    Raises:
        UnmaskError: nothing of the kind is there.
    """
    if is_fine_tuned(path):
        tuned = load_tuned(path, device)
        parts: Any = encoder_of(tuned.method)
        encoder = CloudEncoder(parts.pillar_encoder, parts.encoder, tuned.recipe.data).to(device).eval()
        return FineTunedEncoder(tuned.method, encoder, encoder.preprocess)
    found = read_weights(path)
    if found.recipe is None:
        raise UnmaskError(
            f"{path}: weights alone do not say how the model is shaped; give the directory of the run or export"
        )
    recipe = found.recipe
    method: Any = make_method(recipe)
    encoder = CloudEncoder(method.pillar_encoder, method.encoder, recipe.data)
    given = {name: tensor for name, tensor in found.state.items() if convert.is_encoder(name)}
    check_fit(given, encoder.state_dict(), f"{path}: damaged: these are not the weights that it describes")
    encoder.load_state_dict(given)
    return encoder.to(device).eval()


def load_initial_weights(method: nn.Module, path: str | Path) -> None:
    """Copy trained weights into a freshly built method, so that pre-training goes on from them.

    Decoders and heads are copied, too, and have to fit. Weights by SST's names have none: those of the method then stay
    as they are, which is said on stderr, as is a pillar of another size.

    Args:
        method: what the recipe's ``build`` returned; changed in place.
        path: as for `load`, or a ``.safetensors`` or ``.pth`` file with our names or SST's.

    Raises:
        UnmaskError: the weights are those of another model; the message names what differs.
    """
    found, wanted = read_weights(path), method.state_dict()
    differing = [] if found.recipe is None else _settings_that_differ(found.recipe, method)
    hint = f" Settings that differ: {'; '.join(differing)}." if differing else ""
    expected = wanted if found.whole else {n: t for n, t in wanted.items() if convert.is_encoder(n)}
    check_fit(
        found.state,
        expected,
        f"{path}: these weights are of another model",
        f"{hint} Give weights trained with the same `model` settings and channels, or change the settings to theirs.",
    )
    names = _UNSEEN + (_UNSEEN_WHOLE if found.whole else ())
    unseen = [text for text in differing if text.startswith(tuple(f"model.{name} " for name in names))]
    if unseen:
        raise UnmaskError(
            f"{path}: these weights fit, but mean something else: {'; '.join(unseen)}. Set what they had."
        )
    method.load_state_dict({**wanted, **found.state})
    if not found.whole:
        print(f"{path}: the encoder is loaded; decoders and heads start at random values", file=sys.stderr)
    _say_pillar(found.recipe, method, path)


def _settings_that_differ(recipe: Recipe, method: Any) -> list[str]:
    """Settings of the shape that are not the method's, in words."""
    theirs, ours = flatten(asdict(recipe.model)), flatten(asdict(method.settings))
    names = [name for name in dict.fromkeys([*theirs, *ours]) if not name.startswith(_NO_MATTER)]
    found = [
        f"model.{name} is {theirs.get(name)} there and {ours.get(name)} here"
        for name in names
        if _differ(name, theirs.get(name), ours.get(name))
    ]
    channels = method.pillar_encoder.layers[0].linear.in_features - 6
    if recipe.data.channels != channels:
        found.append(f"points have {recipe.data.channels} channels there and {channels} here (data.features)")
    return found


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
    place = Path(path)
    if is_run(place):
        return _of_run(place)
    if place.is_file():
        return _of_file(place)
    return _of_export(directory(path, _FILES))


def _of_run(place: Path) -> Weights:
    path = place / "recipe.yaml"
    recipe = make_recipe(read_yaml(path), source=str(path), try_build=False)
    _check_domain(recipe, place)
    return Weights(dict(weights_of(place)[0]), recipe, whole=True)


def _check_domain(recipe: Recipe, place: Path) -> None:
    if not recipe.method.startswith("pointcloud/"):
        raise UnmaskError(f"{place}: a run of {recipe.method} has no encoder of point clouds")


def _of_file(place: Path) -> Weights:
    state = read_state(place)
    if any(name.startswith("voxel_encoder.") for name in state):
        return Weights(_from_sst(state, place), None, whole=False)
    whole = not all(convert.is_encoder(name) for name in state)
    return Weights(state, None, whole)


def _of_export(place: Path) -> Weights:
    """A directory that `unmask.pointcloud.interop.export` made."""
    config = read_config(place / "config.json")
    if config.get("format") not in FORMATS:
        raise UnmaskError(
            f"{place / 'config.json'}: not an exported encoder of point clouds; make one with: unmask export RUN"
        )
    raw = {name: config.get(name) for name in ("method", "model", "data")}
    recipe = make_recipe(raw, source=str(place / "config.json"), try_build=False)
    _check_domain(recipe, place)
    state = read_state(place / "model.safetensors")
    if config["format"] == "sst":
        return Weights(_from_sst(state, place), recipe, whole=False)
    return Weights(state, recipe, whole=True)


def _from_sst(state: Mapping[str, Tensor], place: Path) -> State:
    try:
        return convert.from_sst(state)
    except ValueError as error:
        raise UnmaskError(f"{place}: {error}") from None
