"""Labels, model, labels, model: the iterations of HuBERT (arXiv 2106.07447, section II-B) as resumable stages.

Every iteration makes its labels from the features of the previous model and trains a new model on them from scratch.
``RUN/stages`` holds ``labels-1``, ``model-1`` (its own run directory), ``labels-2`` and so on; the last iteration's
model is the run itself. Where the recipe has `init`, every iteration's model starts from it. A finished stage is not
repeated: a run that was killed resumes in the stage it was in.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from unmask.core.errors import UnmaskError
from unmask.core.training.changes import filled_in, free_to_change
from unmask.core.training.checkpoint import load_run
from unmask.core.training.loop import Launch
from unmask.core.training.recipe import Recipe, Schedule, as_dict, flatten
from unmask.core.training.stages import Planned, Stage, run_stages
from unmask.speech_audio.data.clips import Clips, open_split
from unmask.speech_audio.data.frames import FRAME_RATE
from unmask.speech_audio.data.labels import PLANNED, Target
from unmask.speech_audio.targets.features import RATE as LABEL_RATE
from unmask.speech_audio.targets.label_cost import label_cost
from unmask.speech_audio.targets.make import TargetSettings, make_labels

_FREE = {"source", "label_sets", "targets"}  # data settings that do not change the labels


@dataclass(frozen=True)
class Iteration:
    """One iteration: its targets and its length.

    Args:
        targets: the features to cluster; several are predicted at once. ``layer`` needs an earlier iteration.
        length: its share of the recipe's schedule, in (0, 1]; 1 for the last iteration, whose model is the run.
    """

    targets: tuple[TargetSettings, ...]
    length: Annotated[float, Field(gt=0, le=1)] = 1.0


@dataclass(frozen=True)
class Stages:
    """The stages of a run.

    Args:
        iterations: in order; the last one's model is the result.
    """

    iterations: tuple[Iteration, ...]

    def __post_init__(self) -> None:
        if not self.iterations:
            raise ValueError("iterations: give at least one, for example [{targets: [{kind: mfcc, clusters: 100}]}]")
        check_first("iterations.0", self.iterations[0])
        if self.iterations[-1].length != 1:
            raise ValueError(
                f"iterations.{len(self.iterations) - 1}.length: the last iteration is as long as the schedule says; "
                "set schedule.steps or schedule.epochs to its length, and give the earlier ones their share of it"
            )


def check_first(name: str, iteration: Iteration) -> None:
    """Raise ValueError where a first iteration needs features of a model that does not exist yet."""
    if any(target.kind == "layer" for target in iteration.targets):
        raise ValueError(f"{name}: the first iteration has no earlier model; use mfcc, log_mel or prosody targets")


def check_layers(name: str, targets: Sequence[TargetSettings], depth: int) -> None:
    """Raise ValueError where targets name layers that the models do not have: now, not after hours of training."""
    beyond = [layer for target in targets for layer in target.layers if layer > depth]
    if beyond:
        raise ValueError(f"{name}: there are no layers {beyond}; model.encoder.depth is {depth}")


def planned(recipe: Recipe) -> Recipe:
    """The recipe of the last iteration before any label is made: its classes and rates follow from the settings.

    Without stages, label sets that have not been opened yet get stand-ins.

    Raises:
        ValueError: targets of layers that the model does not have.
    """
    if recipe.stages is None:
        return stand_in(recipe)
    for i, iteration in enumerate(recipe.stages.iterations):
        check_layers(f"iterations.{i}", iteration.targets, recipe.model.encoder.depth)
    return replace(recipe, data=replace(recipe.data, targets=planned_data(recipe.stages.iterations[-1].targets)))


def outline(recipe: Recipe) -> list[Planned]:
    """The stages of a run for a dry run: labels, model, labels, model."""
    stages = outlined(recipe, dict(enumerate(recipe.stages.iterations, start=1)))
    return [*stages[:-1], replace(stages[-1], name="training")]


def outlined(recipe: Recipe, iterations: Mapping[Any, Iteration]) -> list[Planned]:
    """The two stages of each iteration, by the names of `label_stage` and `model_stage`, before any has run."""
    stages = []
    for name, iteration in iterations.items():
        data = replace(recipe.data, label_sets=(), targets=planned_data(iteration.targets))
        schedule = shortened(recipe.schedule, iteration.length)
        stages += [
            Planned(f"labels-{name}", work=label_cost(iteration.targets)),
            Planned(f"model-{name}", replace(recipe, stages=None, schedule=schedule, data=data)),
        ]
    return stages


def stand_in(recipe: Recipe) -> Recipe:
    """The recipe with one stream of two classes for every target weight, where its label sets are not known yet."""
    if recipe.data.targets is not None or not recipe.data.label_sets:
        return recipe
    streams = (Target("label set", 2, FRAME_RATE, PLANNED),) * len(recipe.model.head.target_weights or (1.0,))
    return replace(recipe, data=replace(recipe.data, targets=streams))


def planned_data(targets: Sequence[TargetSettings]) -> tuple[Target, ...]:
    """The label streams that target settings will lead to: their number, classes and rates."""
    streams = []
    for settings in targets:
        parts = 1 if settings.average or settings.kind != "layer" else len(settings.layers)
        rate = FRAME_RATE if settings.kind == "layer" else LABEL_RATE
        streams += [Target(settings.kind, settings.clusters, rate, PLANNED)] * (parts * settings.stages)
    return tuple(streams)


def prepare(recipe: Recipe, folder: Path, launch: Launch) -> Recipe:
    """Run all stages before the last iteration's training, and return the recipe of that training.

    Args:
        recipe: a recipe with `stages`.
        folder: the parent of the stages' folders.
        launch: see `unmask.core.training.loop.Launch`.

    Raises:
        UnmaskError: labels that cannot be made; see `unmask.speech_audio.targets.make.make_labels`.
    """
    *earlier, last = recipe.stages.iterations
    number = len(earlier) + 1
    stages = iteration_stages(recipe, folder, earlier, launch)
    stages += [label_stage(recipe, folder, number, last, launch)]
    run_stages(folder, stages, fabric=launch.fabric, say=launch.say, keep_done=launch.extend)
    return replace(one_iteration(recipe, folder, number, last), stages=recipe.stages)


def iteration_stages(recipe: Recipe, folder: Path, iterations: Sequence[Iteration], launch: Launch) -> list[Stage]:
    """The two stages of each iteration: its labels, and its model."""
    stages = []
    for number, iteration in enumerate(iterations, start=1):
        stages += [label_stage(recipe, folder, number, iteration, launch)]
        stages += [model_stage(one_iteration(recipe, folder, number, iteration), number, launch)]
    return stages


def label_stage(recipe: Recipe, folder: Path, number: int | str, iteration: Iteration, launch: Launch) -> Stage:
    """The stage that clusters features and labels every clip, in a folder 1, 2, ... for each target."""

    def run(out: Path) -> None:
        device, encoder, digest = launch.fabric.device, None, None
        if any(target.kind == "layer" for target in iteration.targets):
            teacher = teacher_of(folder, number)
            encoder = load_run(teacher, device, launch.say).method.encoder
            with (teacher / "model.safetensors").open("rb") as file:
                digest = hashlib.file_digest(file, "blake2b").hexdigest()[:16]
        train, *other_splits = _splits(replace(recipe.data, label_sets=(), targets=None))
        for note in train.notes(recipe.training.batch_size):  # before labels are made, which may take days
            launch.say(note)
        for i, settings in enumerate(iteration.targets, start=1):
            options = {"encoder": encoder, "teacher_digest": digest, "seed": recipe.seed, "device": device}
            make_labels(settings, train, other_splits, out / str(i), **options)

    inputs = {
        "targets": [as_plain(target) for target in iteration.targets],
        "data": {k: v for k, v in as_plain(recipe.data).items() if k not in _FREE},
        "seed": recipe.seed,
    }
    return Stage(f"labels-{number}", run, inputs)


def _splits(data: Any) -> list[Clips]:
    """The training clips, and the other splits where there are any."""
    splits = [open_split(data, "train")]
    for split in ("val", "test"):
        with suppress(UnmaskError):  # a split that the data do not have
            splits.append(open_split(data, split))
    return splits


def model_stage(recipe: Recipe, number: int | str, launch: Launch, after: tuple[str, ...] | None = None) -> Stage:
    """The stage that trains one iteration's model, in a run directory of its own."""
    free = free_to_change(recipe) | filled_in(recipe)
    settings = {key: value for key, value in flatten(as_dict(recipe)).items() if key not in free}
    return Stage(
        f"model-{number}",
        lambda out: launch.train(recipe, out),
        settings,
        resumable=True,
        after=after,
        on_all_ranks=True,
    )


def one_iteration(recipe: Recipe, folder: Path, number: int | str, iteration: Iteration) -> Recipe:
    """The recipe that trains one iteration's model on its labels."""
    made = (folder / f"labels-{number}").resolve()
    labels = tuple(str(made / str(i)) for i in range(1, len(iteration.targets) + 1))  # one folder for each target
    data = replace(recipe.data, label_sets=labels, targets=None)
    return replace(recipe, stages=None, schedule=shortened(recipe.schedule, iteration.length), data=data)


def shortened(schedule: Schedule, length: float) -> Schedule:
    """The schedule with a share of its length."""
    if schedule.steps is not None:
        return replace(schedule, steps=max(1, round(schedule.steps * length)))
    epochs = max(1, round(schedule.epochs * length))
    return replace(schedule, epochs=epochs, warmup_epochs=schedule.warmup_epochs * epochs / schedule.epochs)


def teacher_of(folder: Path, number: int | str) -> Path:
    """The model whose features the labels of iteration `number` are made from."""
    numbers = [int(path.name.removeprefix("model-")) for path in folder.glob("model-[0-9]*")]
    earlier = [n for n in numbers if not isinstance(number, int) or n < number]
    if not earlier:
        raise UnmaskError(f"{folder} holds no model of an earlier iteration, which layer targets need")
    return folder / f"model-{max(earlier)}"


def as_plain(value: Any) -> Any:
    """A settings dataclass as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(value), default=str))
