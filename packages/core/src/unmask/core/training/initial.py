"""Initial weights from elsewhere: the recipe's key ``init``.

A run of the same method, an exported directory or a hub id is read by the domain, heads included where they fit. Of a
run of another method, and of a fine-tuned classifier, only the encoder is taken.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from unmask.core import registry
from unmask.core.errors import UnmaskError
from unmask.core.method import encoder_of
from unmask.core.targets import EMATeacher
from unmask.core.training.build import make_method
from unmask.core.training.checkpoint import load_run, saved_state, weights_of
from unmask.core.training.recipe import Recipe, as_dict, flatten, make_recipe, read_yaml
from unmask.core.training.startup import shorten

Say = Callable[[str], Any]


def say_on_stderr(text: str) -> None:
    """A line for the person who waits, away from what a script reads."""
    print(text, file=sys.stderr)


def load_initial(method: nn.Module, recipe: Recipe, say: Say = say_on_stderr) -> None:
    """Copy the weights that ``recipe.init`` names into a freshly built method.

    An `EMATeacher` that got none of its own begins as a copy of the student, as it was built to.

    Raises:
        UnmaskError: nothing of the kind is there, or it is of another model; names the settings that differ.
    """
    teachers = [(teacher, _copies(teacher)) for teacher in method.modules() if isinstance(teacher, EMATeacher)]
    path = Path(str(recipe.init))
    if _method_of(path) in (None, recipe.method) and not _is_classifier(path):
        registry.part(recipe.method, "pretrained").load_initial_weights(method, recipe.init)  # type: ignore[union-attr]
    else:
        take_encoder(method, recipe, path, say)
    for teacher, before in teachers:
        if all(tensor.equal(before[name]) for name, tensor in teacher.state_dict().items()):
            teacher.restart()


def _copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _method_of(path: Path) -> str | None:
    """The method of a run directory; None for anything else."""
    recipe = path / "recipe.yaml"
    return registry.card(str(read_yaml(recipe).get("method"))).id if recipe.is_file() else None


def _is_classifier(path: Path) -> bool:
    """Whether `path` is what `unmask finetune` wrote."""
    recipe = path / "recipe.yaml"
    return recipe.is_file() and read_yaml(recipe).get("finetune") is not None


@dataclass(frozen=True)
class _Source:
    """A run that an encoder is taken from.

    Args:
        name: for the account: its method, or that it is a classifier.
        recipe: its recipe.
        encoder: the encoder's tensors, by their names in it.
        replaced: names of the encoder's tensors that fine-tuning has replaced by layers of its own.
        left: how many tensors it has beside the encoder, by the first part of their names.
    """

    name: str
    recipe: Recipe
    encoder: dict[str, Tensor]
    replaced: set[str]
    left: Mapping[str, int]


def _source(run: Path, say: Say) -> _Source:
    if _is_classifier(run):
        return _classifier(run, say)
    found = load_run(run, say=say)
    encoder = encoder_of(found.method).state_dict()
    return _Source(found.recipe.method, found.recipe, encoder, set(), _groups(found.method))


def _classifier(run: Path, say: Say) -> _Source:
    """A fine-tuned run: a classifier holds its method, without heads and final norm, as ``method``."""
    recipe = make_recipe(read_yaml(run / "recipe.yaml"), source=str(run / "recipe.yaml"), try_build=False)
    state, _ = weights_of(run, say)
    method = make_method(recipe)
    names = {id(tensor): name for name, tensor in method.state_dict(keep_vars=True).items()}
    whole = {name: f"method.{names[id(t)]}" for name, t in encoder_of(method).state_dict(keep_vars=True).items()}
    encoder = {name: state[there] for name, there in whole.items() if there in state}
    left = Counter(name.removeprefix("method.").split(".")[0] for name in state if name not in whole.values())
    return _Source(f"a classifier of {recipe.method}", recipe, encoder, set(whole) - set(encoder), left)


def take_encoder(method: nn.Module, recipe: Recipe, run: Path, say: Say = say_on_stderr) -> None:
    """Copy the encoder of another method's run, or of a classifier, into a new method; say what was taken and left.

    Every trainable weight and every buffer of the encoder must be there, by name and shape. Fixed tables (parameters
    that do not learn, such as positions) are taken where they fit and stay the new method's own where they do not. So
    does the final norm where the run is a classifier, which has another in its place.

    Args:
        method: what the recipe's ``build`` returned; changed in place.
        recipe: its recipe.
        run: a run directory.
        say: told in one line what was taken, what was left, and what begins at random.

    Raises:
        UnmaskError: the encoders differ; names the settings that do.
    """
    _check_domain(recipe, run)
    source, ours = _source(run, say), encoder_of(method)
    theirs, wanted = source.encoder, ours.state_dict()
    fixed = {name for name, parameter in ours.named_parameters() if not parameter.requires_grad}
    different = _different(theirs, wanted, fixed | source.replaced)
    settings = _settings_that_differ(source.recipe, recipe)
    if different:
        raise UnmaskError(
            _mismatch(run, source, recipe, settings or _data_that_differ(source.recipe, recipe), different)
        )
    unseen = {key: pair for key, pair in settings.items() if None not in pair and not isinstance(pair[0], float)}
    if unseen:
        raise UnmaskError(_mismatch(run, source, recipe, unseen, ["no shape, but what the weights mean"]))
    taken = {name: tensor for name, tensor in theirs.items() if name in wanted and tensor.shape == wanted[name].shape}
    ours.load_state_dict(taken, strict=False)
    own = Counter(f"encoder.{name.split('.')[0]}" for name in wanted if name in source.replaced)
    say(_account(run, source, recipe, len(taken), own | _groups(method)))


def _check_domain(recipe: Recipe, run: Path) -> None:
    other, domain = _method_of(run), recipe.method.split("/")[0]
    if other is None or other.split("/")[0] != domain:
        raise UnmaskError(
            f"{run}: a run of {other} has no encoder for {recipe.method}; give a run of a {domain} method"
        )


def _different(theirs: dict[str, Tensor], ours: dict[str, Tensor], fixed: set[str]) -> list[str]:
    """Tensors that do not fit, in words."""
    found = [f"{name} is only there" for name in theirs if name not in ours]
    found += [f"{name} is only here" for name in ours if name not in theirs and name not in fixed]
    return found + [
        f"{name} is {_shape(theirs[name])} there and {_shape(ours[name])} here"
        for name in ours
        if name in theirs and theirs[name].shape != ours[name].shape and name not in fixed
    ]


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "scalar"


Differences = dict[str, tuple[Any, Any]]  # dotted key: its value there and here


def _settings_that_differ(there: Recipe, here: Recipe) -> Differences:
    """Settings of the encoder; None where a method has no such setting."""
    theirs, ours = (flatten({"model": as_dict(recipe)["model"]}) for recipe in (there, here))
    keys = [key for key in dict.fromkeys([*theirs, *ours]) if "encoder" in key.split(".")[1]]
    return {key: (theirs.get(key), ours.get(key)) for key in keys if theirs.get(key) != ours.get(key)}


def _data_that_differ(there: Recipe, here: Recipe) -> Differences:
    """Whole numbers among the data's settings: sizes and counts, which decide shapes."""
    theirs, ours = (flatten({"data": as_dict(recipe)["data"]}) for recipe in (there, here))
    return {key: (theirs[key], ours[key]) for key in theirs if _whole(theirs[key]) and ours.get(key) != theirs[key]}


def _whole(value: Any) -> bool:
    return all(isinstance(v, int) for v in value) if isinstance(value, list) and value else isinstance(value, int)


def _mismatch(run: Path, source: _Source, recipe: Recipe, settings: Differences, different: list[str]) -> str:
    """The error's text: the settings that differ, the tensors, and what to type."""
    pairs = [
        f"{key} is {json.dumps(there)} there and {json.dumps(here)} here" for key, (there, here) in settings.items()
    ]
    text = f"{run}: the encoder of {source.name} does not fit that of {recipe.method}: "
    text += f"{shorten(pairs)}. " if pairs else ""
    text += f"What differs: {shorten(different, 2)}. "
    remedy = " ".join(f"--set '{key}={json.dumps(there)}'" for key, (there, _) in list(settings.items())[:6])
    return text + (f"Set what it was trained with: {remedy}" if remedy else "Give a run with the same encoder")


def _account(run: Path, source: _Source, recipe: Recipe, taken: int, new: Mapping[str, int]) -> str:
    """What was taken, left and begins anew, in one line."""
    text = f"took {taken} tensors of the encoder of {source.name} ({run})"
    text += f"; left {_listed(source.left)}" if source.left else ""
    return text + (f"; new in {recipe.method}: {_listed(new)}" if new else "")


def _listed(counts: Mapping[str, int]) -> str:
    return f"{sum(counts.values())} ({shorten(list(counts), 4)})"


def _groups(method: nn.Module) -> Counter[str]:
    """How many tensors a method saves beside its encoder and EMAs, by the first part of their names."""
    saved = saved_state(method)
    inside = {id(tensor) for tensor in _tensors(encoder_of(method))}
    inside |= {id(t) for teacher in method.modules() if isinstance(teacher, EMATeacher) for t in _tensors(teacher)}
    named = [*method.named_parameters(), *method.named_buffers()]
    return Counter(n.split(".")[0] for n, tensor in named if n in saved and id(tensor) not in inside and tensor.numel())


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
