"""Initial weights from elsewhere: the recipe's key ``init``.

A run of the same method, an exported directory or a hub id is read by the domain, heads included where they fit. Of a
run of another method only the encoder is taken.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from unmask.core import registry
from unmask.core.errors import UnmaskError
from unmask.core.method import encoder_of
from unmask.core.targets import EMATeacher
from unmask.core.training.checkpoint import LoadedRun, load_run, saved_state
from unmask.core.training.recipe import Recipe, as_dict, flatten, read_yaml
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
    if _method_of(path) in (None, recipe.method):
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


def take_encoder(method: nn.Module, recipe: Recipe, run: Path, say: Say = say_on_stderr) -> None:
    """Copy the encoder of another method's run into a freshly built method, and say what was taken and left.

    Every trainable weight and every buffer of the encoder must be there, by name and shape. Fixed tables (parameters
    that do not learn, such as positions) are taken where they fit and stay the new method's own where they do not.

    Args:
        method: what the recipe's ``build`` returned; changed in place.
        recipe: its recipe.
        run: a run directory.
        say: told in one line what was taken, what was left, and what begins at random.

    Raises:
        UnmaskError: the encoders differ; names the settings that do.
    """
    _check_domain(recipe, run)
    source = load_run(run, say=say)
    theirs, ours = encoder_of(source.method).state_dict(), encoder_of(method)
    fixed = {name for name, parameter in ours.named_parameters() if not parameter.requires_grad}
    different = _different(theirs, ours.state_dict(), fixed)
    settings = _settings_that_differ(source.recipe, recipe)
    if different:
        raise UnmaskError(
            _mismatch(run, source, recipe, settings or _data_that_differ(source.recipe, recipe), different)
        )
    unseen = {key: pair for key, pair in settings.items() if None not in pair and not isinstance(pair[0], float)}
    if unseen:
        raise UnmaskError(_mismatch(run, source, recipe, unseen, ["no shape, but what the weights mean"]))
    wanted = ours.state_dict()
    taken = {name: tensor for name, tensor in theirs.items() if name in wanted and tensor.shape == wanted[name].shape}
    ours.load_state_dict(taken, strict=False)
    say(_account(run, source, method, recipe, len(taken)))


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


def _mismatch(run: Path, source: LoadedRun, recipe: Recipe, settings: Differences, different: list[str]) -> str:
    """The error's text: the settings that differ, the tensors, and what to type."""
    pairs = [
        f"{key} is {json.dumps(there)} there and {json.dumps(here)} here" for key, (there, here) in settings.items()
    ]
    text = f"{run}: the encoder of {source.recipe.method} does not fit that of {recipe.method}: "
    text += f"{shorten(pairs)}. " if pairs else ""
    text += f"What differs: {shorten(different, 2)}. "
    remedy = " ".join(f"--set '{key}={json.dumps(there)}'" for key, (there, _) in list(settings.items())[:6])
    return text + (f"Set what it was trained with: {remedy}" if remedy else "Give a run with the same encoder")


def _account(run: Path, source: LoadedRun, method: nn.Module, recipe: Recipe, taken: int) -> str:
    """What was taken, left and begins at random, in one line."""
    left = _groups(source.method)
    random = _groups(method)
    text = f"took {taken} tensors of the encoder of {source.recipe.method} ({run})"
    text += f"; left {sum(left.values())} ({shorten(list(left), 4)})" if left else ""
    return text + (f"; new in {recipe.method}: {sum(random.values())} ({shorten(list(random), 4)})" if random else "")


def _groups(method: nn.Module) -> dict[str, int]:
    """How many tensors a method saves beside its encoder and EMAs, by the first part of their names."""
    saved = saved_state(method)
    inside = {id(tensor) for tensor in _tensors(encoder_of(method))}
    inside |= {id(t) for teacher in method.modules() if isinstance(teacher, EMATeacher) for t in _tensors(teacher)}
    counts: dict[str, int] = {}
    for name, tensor in [*method.named_parameters(), *method.named_buffers()]:
        if name in saved and id(tensor) not in inside and tensor.numel():
            counts[name.split(".")[0]] = counts.get(name.split(".")[0], 0) + 1
    return counts


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
