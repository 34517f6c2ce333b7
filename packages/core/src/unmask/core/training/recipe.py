"""The recipe: everything that decides what a run computes, as frozen dataclasses read from YAML.

`load_recipe` gathers every problem of a recipe (unknown keys, wrong types, values that do not fit together, settings
the method refuses) and raises one `RecipeError` that lists them all, before anything runs.
"""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from unmask.core import registry
from unmask.core.errors import UnmaskError
from unmask.core.training.build_check import build_problems
from unmask.core.training.schedules import NotNegative, NumberOrSchedule
from unmask.core.training.validation import section, unknown_key, validated

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Precision = Literal["auto", "32-true", "bf16-mixed"]


class RecipeError(UnmaskError):
    """A recipe with problems, all of them.

    Args:
        source: where the recipe came from.
        problems: one line per problem, each naming the key.
    """

    def __init__(self, source: str, problems: list[str]) -> None:
        self.problems = problems
        head = f"{source}: {len(problems)} problem{'s' if len(problems) > 1 else ''}"
        super().__init__("\n  - ".join([head, *problems]) if len(problems) > 1 else f"{source}: {problems[0]}")


@dataclass(frozen=True)
class Optimizer:
    """AdamW. The learning rate is ``base_lr * batch_size / reference_batch`` (the linear scaling rule).

    Args:
        base_lr: peak learning rate at the reference batch.
        reference_batch: the batch size that `base_lr` is stated for.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: on matrices; never on vectors, biases and what the method's `no_weight_decay()` names. A number,
            or a schedule such as ``{start: 0.04, end: 0.4, shape: cosine}``; see `unmask.core.training.schedules`.
        clip_norm: largest norm of all gradients together; null for no clipping.
    """

    base_lr: NotNegative = 1.5e-4
    reference_batch: Count = 256
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NumberOrSchedule = 0.05
    clip_norm: Positive | None = None


@dataclass(frozen=True)
class Schedule:
    """How long a run is and how its learning rate moves; `start_lr` and `min_lr` scale as `base_lr` does.

    Args:
        epochs: passes over the training split.
        steps: optimizer steps instead of epochs; the schedule below is squeezed or stretched to them.
        warmup_epochs: rise from `start_lr`, of the `epochs`.
        warmup: the rise is a line or half a cosine, as in one-cycle schedules.
        start_lr: learning rate at step 0 when there is a warm-up.
        min_lr: learning rate at the end of the cosine or line.
        decay: half a cosine or a line to `min_lr`, or steps: times 0.1 at each epoch of `step_at`, or constant.
        cosine_from: whether the cosine or line begins after the warm-up or at epoch 0 (the warm-up then cuts into it).
        step_at: epochs of the drops, for ``decay: step``.
        horizon: where the cosine or line reaches `min_lr`, as a multiple of the run: beyond 1 it stops on the way.
    """

    epochs: Count = 100
    steps: Count | None = None
    warmup_epochs: NotNegative = 0.0
    warmup: Literal["linear", "cosine"] = "linear"
    start_lr: NotNegative = 0.0
    min_lr: NotNegative = 0.0
    decay: Literal["cosine", "linear", "step", "constant"] = "cosine"
    cosine_from: Literal["warmup", "start"] = "warmup"
    step_at: tuple[NotNegative, ...] = ()
    horizon: Positive = 1.0


@dataclass(frozen=True)
class Training:
    """How a run is computed.

    Args:
        batch_size: samples per optimizer step, over all devices and micro-batches.
        micro_batch: samples per device and forward pass; null for as many as fit the batch on the devices.
        precision: ``auto`` is fp32 on a CPU and bf16 on a GPU.
        compile: pass the method through torch.compile.
        workers: data loading processes per device; 0 loads in the training process.
        log_every: steps between lines in metrics.jsonl.
        validate_every_epochs: epochs between validations: the loss, and what `monitor` adds.
        checkpoint_every_steps: steps between checkpoints.
        keep_checkpoints: how many to keep.
        monitor: measure at validation how many dimensions the features use, which tells a collapse: true, false, or
            ``auto`` for methods with a teacher; see `unmask.core.training.collapse`.
        probe_every_epochs: epochs between online k-NN and linear probes, for data with labels; null for none. See
            `unmask.core.evaluation.online`.
        threads: CPU threads for torch; null leaves its default.
    """

    batch_size: Count = 256
    micro_batch: Count | None = None
    precision: Precision = "auto"
    compile: bool = False
    workers: Annotated[int, Field(ge=0)] = 0
    log_every: Count = 10
    validate_every_epochs: Count = 1
    checkpoint_every_steps: Count = 200
    keep_checkpoints: Count = 2
    monitor: Literal["auto"] | bool = "auto"
    probe_every_epochs: Count | None = None
    threads: Count | None = None


@dataclass(frozen=True)
class Tuning:
    """What makes a classifier of a pre-trained encoder; see `unmask.core.evaluation.finetune`.

    Args:
        classes: their names, in the order of the logits.
        labels: share of each class's training labels that is used, in (0, 1].
        layer_decay: what a layer's learning rate is multiplied by, relative to the layer above.
        label_smoothing: share of the target spread over all classes.
        drop_path: probability of dropping a residual branch of the last block; grows linearly over the depth.
        head_std: deviation of the head's initial weights.
    """

    classes: tuple[str, ...]
    labels: Annotated[float, Field(gt=0, le=1)] = 1.0
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.65
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    head_std: Positive = 2e-5


@dataclass(frozen=True)
class NetworkSource:
    """A network from elsewhere. In a recipe ``NAME: SOURCE`` is enough.

    Args:
        source: a run, a directory or a hub id; see `unmask.core.networks.open_network`.
        hash: of its weights; filled in when it is opened, and held against the weights from then on.
    """

    source: str
    hash: str | None = None


@dataclass(frozen=True)
class Recipe:
    """One run, completely.

    Args:
        method: the method's id, for example ``vision/mae``.
        seed: of initial weights, order, augmentation and masks.
        init: a run directory or exported directory to start the weights from; null starts at random.
        model: the method's `Settings`.
        data: the domain's data `Settings`.
        optimizer: of the training.
        schedule: length and learning rate.
        training: how it is computed.
        stages: the method's `Stages`, for methods that are trained in several; see `unmask.core.training.loop`.
        finetune: of a fine-tuning; what is trained is then a classifier on the method's encoder.
        networks: networks from elsewhere that the method uses, by the names its module declares in ``NETWORKS``.
    """

    method: str
    model: Any
    data: Any
    seed: int = 0
    init: str | None = None
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    training: Training = field(default_factory=Training)
    stages: Any = None
    finetune: Tuning | None = None
    networks: dict[str, NetworkSource] = field(default_factory=dict)


def load_recipe(
    method: str | None,
    recipe: str = "tiny",
    overrides: Mapping[str, Any] | None = None,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    world: int = 1,
) -> Recipe:
    """Read, override and check a recipe.

    Args:
        method: for example ``vision/mae``; None takes the one the recipe file names.
        recipe: ``tiny``, ``paper`` or a YAML file.
        overrides: dotted keys and values, for example ``{"training.batch_size": 32}``.
        epochs: train this long instead; warm-up and drops keep their share of the run.
        steps: train this many steps instead of the epochs; likewise.
        world: processes that will train, for the check of the batch size.

    Raises:
        RecipeError: with every problem found.
        ValueError: no such method or recipe.
    """
    path = registry.recipe_path(registry.card(method).id if method else "", recipe)
    raw = read_yaml(path)
    wanted = registry.card(method).id if method else raw.get("method")
    if raw.setdefault("method", wanted) != wanted:
        raise RecipeError(str(path), [f"method: is {raw['method']!r}, but {wanted!r} was asked for"])
    return make_recipe(raw, overrides, epochs=epochs, steps=steps, world=world, source=str(path))


def make_recipe(
    raw: dict[str, Any],
    overrides: Mapping[str, Any] | None = None,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    world: int = 1,
    source: str = "recipe",
    try_build: bool = True,
) -> Recipe:
    """`load_recipe` from nested dicts instead of a file; `try_build` asks the method what it thinks of its settings."""
    problems: list[str] = []
    for key, value in (overrides or {}).items():
        _put(raw, key, value, problems)
    method = raw.get("method")
    if not isinstance(method, str):
        raise RecipeError(source, ["method: missing; give the id of a method, for example vision/mae"])
    raw["method"] = registry.card(method).id
    registry.check_trained(method)
    module, data = registry.load(method), registry.data_kind(method)
    if epochs is not None:
        _rescale(raw, epochs)
    if steps is not None:
        _put(raw, "schedule.steps", steps, problems)
    parts = {**_PARTS, "model": module.Settings, "data": data.Settings}
    if raw.get("stages") is not None:
        if not hasattr(module, "Stages"):
            problems.append(f"stages: {raw['method']} is trained in one stage; remove them")
        else:
            parts["stages"] = module.Stages
    if raw.get("finetune") is not None:
        parts["finetune"] = Tuning
    made = {name: section(name, kind, raw.get(name), problems) for name, kind in parts.items()}
    top = _top_level(raw, problems)
    networks = network_sources(module, raw, problems)
    if not problems:
        result = Recipe(**top, **made, networks=networks)
        problems += cross_checks(result, world)
        problems += build_problems(module, result) if try_build else []
    if problems:
        raise RecipeError(source, problems)
    return result


_PARTS = {"optimizer": Optimizer, "schedule": Schedule, "training": Training}


def cross_checks(recipe: Recipe, world: int = 1) -> list[str]:
    """Problems between the values of a recipe that is otherwise well formed."""
    t, s, problems = recipe.training, recipe.schedule, []
    micro = micro_batch(recipe, world)
    if t.batch_size % (micro * world):
        on = f" on {world} devices" if world > 1 else ""
        problems.append(
            f"training.batch_size: {t.batch_size} is not a multiple of micro_batch {micro}{on}; "
            f"the nearest is {max(1, round(t.batch_size / (micro * world))) * micro * world}"
        )
    if s.warmup_epochs > s.epochs:
        problems.append(f"schedule.warmup_epochs: {s.warmup_epochs:g} is longer than the run of {s.epochs} epochs")
    if s.decay == "step" and not s.step_at:
        problems.append("schedule.step_at: decay is step, so give the epochs of the drops, for example [60, 80]")
    if s.step_at and s.decay != "step":
        problems.append("schedule.step_at: only used with decay: step; remove it or set schedule.decay=step")
    if list(s.step_at) != sorted(s.step_at) or any(at > s.epochs for at in s.step_at):
        problems.append(f"schedule.step_at: {list(s.step_at)} should rise and stay within {s.epochs} epochs")
    return problems


def micro_batch(recipe: Recipe, world: int) -> int:
    """Samples per device and forward pass."""
    return recipe.training.micro_batch or max(1, recipe.training.batch_size // world)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(str(path), [f"not YAML: {' '.join(str(error).split())}"]) from None
    if not isinstance(raw, dict):
        raise RecipeError(str(path), [f"expected keys and values, got {type(raw).__name__}"])
    return raw


def parse_override(text: str) -> tuple[str, Any]:
    """``"training.batch_size=32"`` as key and value; the value is read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UnmaskError(f"--set {text}: expected key=value, for example --set training.batch_size=32")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise UnmaskError(f"--set {text}: the value is not YAML; quote it") from None


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """Nested dicts and lists of plain values, ready for YAML and JSON."""
    return plain(dataclasses.asdict(recipe))


def plain(value: Any) -> Any:
    """Dataclasses and sequences as dicts and lists, ready for YAML and JSON."""
    return json.loads(json.dumps(value, default=_as_plain))


def _as_plain(value: Any) -> Any:
    is_instance = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return dataclasses.asdict(value) if is_instance else str(value)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested mappings."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def to_yaml(recipe: Recipe) -> str:
    """The recipe as a file that `load_recipe` reads back to an equal recipe."""
    order = ["method", "seed", "init", "stages", "finetune", "model", "data", "optimizer", "schedule", "training"]
    values = as_dict(recipe)
    if recipe.stages is None:
        order.remove("stages")
    if recipe.finetune is None:
        order.remove("finetune")
    if recipe.networks:
        order.insert(order.index("data"), "networks")
    return yaml.dump({key: values[key] for key in order}, Dumper=_Dumper, sort_keys=False, width=110)


class _Dumper(yaml.SafeDumper):
    """Mappings over several lines, lists on one."""


_Dumper.add_representer(list, lambda dumper, v: dumper.represent_sequence("tag:yaml.org,2002:seq", v, flow_style=True))


def _put(raw: dict[str, Any], key: str, value: Any, problems: list[str]) -> None:
    *path, last = key.split(".")
    for name in path:
        inner = raw.setdefault(name, {})
        if inner is None:
            inner = raw[name] = {}
        if not isinstance(inner, dict):
            problems.append(f"{key}: {name} is {inner!r}, it has no keys below it")
            return
        raw = inner
    raw[last] = value


def _rescale(raw: dict[str, Any], epochs: int) -> None:
    """A run of `epochs` epochs whose warm-up and drops keep their share."""
    schedule = raw["schedule"] = dict(raw.get("schedule") or {})
    was = schedule.get("epochs", Schedule().epochs)
    schedule["epochs"], schedule["steps"] = epochs, None
    if isinstance(was, int) and was > 0:
        if isinstance(schedule.get("warmup_epochs"), int | float):
            schedule["warmup_epochs"] = schedule["warmup_epochs"] * epochs / was
        if isinstance(schedule.get("step_at"), list):
            schedule["step_at"] = [at * epochs / was for at in schedule["step_at"]]


def _top_level(raw: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    known = [f.name for f in fields(Recipe)]
    problems += [unknown_key(key, known) for key in raw if key not in known]
    top = {"method": raw["method"]}
    for name, kind in {"seed": int, "init": str | None}.items():
        if name in raw:
            top[name] = validated(name, kind, raw[name], problems)
    return top


def network_sources(module: types.ModuleType, raw: Mapping[str, Any], problems: list[str]) -> dict[str, NetworkSource]:
    """The section `networks`, held against what the method's module declares."""
    needed: dict[str, str] = getattr(module, "NETWORKS", {})
    known = {**needed, **getattr(module, "OPTIONAL_NETWORKS", {})}
    given = raw.get("networks") or {}
    if not isinstance(given, Mapping):
        problems.append(f"networks: expected names and sources, got {given!r}")
        return {}
    for name in given.keys() - known.keys():
        none = f"{name}: {raw['method']} uses no network from elsewhere; remove it"
        problems.append(f"networks.{unknown_key(str(name), list(known)) if known else none}")
    for name in needed.keys() - given.keys():
        problems.append(f"networks.{name}: missing: {needed[name]}. Give it with --network {name}=DIR_OR_HUB_ID")
    found = {}
    for name in known:
        if name in given:
            value = {"source": given[name]} if isinstance(given[name], str) else given[name]
            found[name] = section(f"networks.{name}", NetworkSource, value, problems)
    return found
