"""A stage before preference optimisation: supervised fine-tuning on the chosen responses.

``RUN/stages/sft`` is a run of the same method with ``loss: sft``; ``RUN/stages/network`` holds what it made, as
transformers saves it, and is the ``model`` that the run itself starts from and is held against.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from unmask.core.training.changes import filled_in, free_to_change
from unmask.core.training.checkpoint import load_run
from unmask.core.training.loop import Launch
from unmask.core.training.recipe import NetworkSource, Recipe, Schedule, as_dict, flatten
from unmask.core.training.stages import Planned, Stage, run_stages

_SFT, _NETWORK = "sft", "network"


@dataclass(frozen=True)
class Stages:
    """The stage before.

    Args:
        length: of the fine-tuning, as a multiple of the recipe's schedule.
        base_lr: its learning rate, instead of the optimizer's.
    """

    length: Annotated[float, Field(gt=0)] = 1.0
    base_lr: Annotated[float, Field(gt=0)] = 1e-5


def planned(recipe: Recipe) -> Recipe:
    """The recipe of the run itself before there is a network: one at random weights.

    Raises:
        ValueError: a network is given, which has been fine-tuned before.
    """
    if recipe.stages is not None and "model" in _given(recipe):
        raise ValueError(
            "they train a network from random weights, and networks.model is given; remove one of them (--set "
            "stages=null). To fine-tune a given network first: a run of its own with model.loss=sft"
        )
    return recipe


def outline(recipe: Recipe) -> list[Planned]:
    """The stages for a dry run."""
    return [Planned(_SFT, _fine_tuning(recipe)), Planned("training", replace(recipe, stages=None))]


def prepare(recipe: Recipe, folder: Path, launch: Launch) -> Recipe:
    """Fine-tune, and return the recipe of the training that follows.

    Args:
        recipe: a recipe with `stages`.
        folder: the parent of the stages' folders.
        launch: see `unmask.core.training.loop.Launch`.
    """
    first = _fine_tuning(planned(recipe))
    free = free_to_change(first) | filled_in(first)
    inputs = {key: value for key, value in flatten(as_dict(first)).items() if key not in free}
    stages = [
        Stage(_SFT, lambda out: launch.train(first, out), inputs, resumable=True, on_all_ranks=True),
        Stage(_NETWORK, lambda out: save_network(folder / _SFT, out)),
    ]
    run_stages(folder, stages, fabric=launch.fabric, say=launch.say, keep_done=launch.extend)
    network = NetworkSource(str((folder / _NETWORK).resolve()))
    tokenizer = recipe.data.tokenizer
    data = replace(recipe.data, tokenizer=None if tokenizer and _is_made(tokenizer) else tokenizer)
    return replace(recipe, data=data, networks={**_given(recipe), "model": network})


def save_network(run: Path, out: Path) -> None:
    """Write a run's language model and its tokenizer as transformers reads them."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    method: Any = load_run(run).method
    method.model.save_pretrained(out)
    for file in (run / "tokenizer").iterdir():
        shutil.copy(file, out / file.name)


def _given(recipe: Recipe) -> dict[str, NetworkSource]:
    """Networks from elsewhere; a run that is resumed also names the one that its stage made."""
    return {name: network for name, network in recipe.networks.items() if not _is_made(network.source)}


def _is_made(source: str) -> bool:
    """Whether a path is where a run keeps what its stage made; the run may have been moved since."""
    return Path(source).parts[-2:] == ("stages", _NETWORK)


def _fine_tuning(recipe: Recipe) -> Recipe:
    """The recipe of the stage before."""
    stages = recipe.stages
    return replace(
        recipe,
        stages=None,
        networks={},
        model=replace(recipe.model, loss="sft"),
        optimizer=replace(recipe.optimizer, base_lr=stages.base_lr),
        schedule=_of_length(recipe.schedule, stages.length),
    )


def _of_length(schedule: Schedule, length: float) -> Schedule:
    """The schedule with another length; its warm-up keeps its share."""
    epochs = max(1, round(schedule.epochs * length))
    steps = None if schedule.steps is None else max(1, round(schedule.steps * length))
    warmup = schedule.warmup_epochs * epochs / schedule.epochs
    return replace(schedule, epochs=epochs, steps=steps, warmup_epochs=warmup)
