"""Prediction targets: what should masked prediction of speech predict? (arXiv 2409.10788, September 2024).

HuBERT leaves three choices open: the features of the first labels, the layer of later labels, and the number of
classes. The paper varies each, scores frozen features, and proposes to predict the clusters of several layers at once
(layer multi-target, LMT) and residual vector quantised (RVQ) labels. The network, the masks and the loss are HuBERT's;
only the targets differ.

This is a **reconstruction**: the full paper could not be read, and there is no released code. The two proposals and the
evaluation (content, speaker, fine detail, on frozen features) are the paper's. All numbers are ours: layers, clusters,
RVQ stages, lengths, and equal weights 1/K for K targets, so that the balance with the feature penalty stays (HuBERT's
code sums the targets).

``stages.teacher`` trains the models that layer targets come from; ``stages.compare`` names target sets, and a model of
equal length is trained on each, with the same seed and masks. The last named set's model is the run itself. At the end
every model is evaluated in the same way, the references once, and the table is printed and written to RUN/study.json.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unmask.core.training.files import write_json
from unmask.core.training.loop import Launch
from unmask.core.training.recipe import Recipe
from unmask.core.training.stages import Planned, run_stages
from unmask.speech_audio.data.clips import Settings as DataSettings
from unmask.speech_audio.methods import hubert
from unmask.speech_audio.methods.hubert import HuBERT, Settings
from unmask.speech_audio.targets import iterations
from unmask.speech_audio.targets.iterations import Iteration
from unmask.speech_audio.targets.make import TargetSettings

__all__ = ["CARD", "Settings", "Stages", "build", "finish", "outline", "planned", "prepare"]

CARD = {
    "title": "Exploring Prediction Targets in Masked Pre-Training for Speech Foundation Models",
    "paper": "arXiv 2409.10788, 2024",
    "summary": "spans, as HuBERT; labels of several layers at once, residual labels, and a study of what to predict",
    "kind": "pretrain",
    "evidence": "thin",
    "reference": "none",
    "reference_licence": "none",
}
_NAME = re.compile(r"[A-Za-z][\w-]*")  # a folder's name, and never that of an iteration


@dataclass(frozen=True)
class Stages:
    """The study.

    Args:
        teacher: iterations before the comparison, as HuBERT's; the last one's model gives the layers.
        compare: target sets by name. Each is trained for the recipe's length; the last one is the run's own model.
    """

    teacher: tuple[Iteration, ...]
    compare: dict[str, tuple[TargetSettings, ...]]

    def __post_init__(self) -> None:
        if not self.compare:
            raise ValueError("compare: name at least one set of targets")
        wrong = [name for name in self.compare if not _NAME.fullmatch(name)]
        if wrong:
            raise ValueError(
                f"compare: {', '.join(map(repr, wrong))} cannot be a name; names begin with a letter and go on with "
                "letters, digits, - and _ (numbers are the teacher's iterations)"
            )
        if self.teacher:
            iterations.check_first("teacher.0", self.teacher[0])
        elif any(target.kind == "layer" for targets in self.compare.values() for target in targets):
            raise ValueError("teacher: layer targets need at least one iteration before them")


def build(settings: Settings, data: DataSettings) -> HuBERT:
    """HuBERT whose K targets weigh 1/K each, unless the recipe gives weights."""
    count = len(data.targets or ())
    if settings.head.target_weights is None and count:
        settings = replace(settings, head=replace(settings.head, target_weights=(1.0 / count,) * count))
    return hubert.build(settings, data)


def planned(recipe: Recipe) -> Recipe:
    """The recipe of the run's own model before any label is made.

    Raises:
        ValueError: targets of layers that the model does not have.
    """
    if recipe.stages is None:
        return iterations.stand_in(recipe)
    depth = recipe.model.encoder.depth
    for i, iteration in enumerate(recipe.stages.teacher):
        iterations.check_layers(f"teacher.{i}", iteration.targets, depth)
    for name, targets in recipe.stages.compare.items():
        iterations.check_layers(f"compare.{name}", targets, depth)
    _, last = _sets(recipe.stages)[-1]
    return replace(recipe, data=replace(recipe.data, targets=iterations.planned_data(last.targets)))


def outline(recipe: Recipe) -> list[Planned]:
    """The stages of the study for a dry run: the teacher's iterations, then labels and model of every set."""
    stages = iterations.outlined(recipe, dict(enumerate(recipe.stages.teacher, start=1)) | dict(_sets(recipe.stages)))
    return [*stages[:-1], replace(stages[-1], name="training"), Planned("evaluation")]


def prepare(recipe: Recipe, folder: Path, launch: Launch) -> Recipe:
    """Train the teacher and every set but the last; return the recipe of the last."""
    stages = iterations.iteration_stages(recipe, folder, recipe.stages.teacher, launch)
    before = tuple(stage.name for stage in stages[-2:])  # the last teacher's labels and model
    *others, (last, iteration) = _sets(recipe.stages)
    for name, targets in others:
        stages += [replace(iterations.label_stage(recipe, folder, name, targets, launch), after=before)]
        trained = iterations.one_iteration(recipe, folder, name, targets)
        stages += [iterations.model_stage(trained, name, launch, after=(f"labels-{name}",))]
    stages += [replace(iterations.label_stage(recipe, folder, last, iteration, launch), after=before)]
    run_stages(folder, stages, fabric=launch.fabric, say=launch.say, keep_done=launch.extend)
    return replace(iterations.one_iteration(recipe, folder, last, iteration), stages=recipe.stages)


def finish(recipe: Recipe, run: Path, launch: Launch) -> None:
    """Evaluate every model of the study, print the table and write RUN/study.json."""
    from unmask.core.evaluation.run import evaluate
    from unmask.speech_audio.evaluation.representation import study_table

    if not launch.fabric.is_global_zero:
        return
    models = {name: run / "stages" / f"model-{name}" for name in recipe.stages.compare}
    models[list(models)[-1]] = run
    results: dict[str, Any] = {}
    for name, folder in models.items():
        launch.say(f"evaluating {name}")
        # The references are the same for all: once is enough.
        results[name] = evaluate(folder, references=not results, seed=recipe.seed)
    write_json(run / "study.json", results)
    print(study_table(results))


def _sets(stages: Stages) -> list[tuple[str, Iteration]]:
    return [(name, Iteration(targets)) for name, targets in stages.compare.items()]
