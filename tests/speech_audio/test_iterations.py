"""Labels, model, labels, model: every stage once, killed anywhere it goes on there, and mistakes are told at once."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from iterations import KMEANS, raw_recipe, train_hubert, write_clips
from processes import in_process

from unmask.core.training.checkpoint import load_run, read
from unmask.core.training.dryrun import dry_run
from unmask.core.training.loop import train
from unmask.core.training.recipe import RecipeError, load_recipe, make_recipe, read_yaml
from unmask.speech_audio.iterations import planned
from unmask.speech_audio.labels import LabelSet


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert in_process(train_hubert, data, out) == 0
    return out


def test_the_stages_are_hubert(undisturbed: Path) -> None:
    stages = undisturbed / "stages"
    assert sorted(p.name for p in stages.iterdir()) == ["labels-1", "labels-2", "model-1"]
    first, second = (LabelSet.open(stages / name / "1") for name in ("labels-1", "labels-2"))
    assert (first.rate, first.targets[0].classes) == (100.0, 4)
    assert (second.rate, second.targets[0].classes) == (50.0, 5)
    assert set(first.ids) == set(second.ids), "one codebook labels every split"
    one, two = load_run(stages / "model-1"), load_run(undisturbed)
    assert (one.step, two.step) == (4, 6)
    assert one.method.label_embeddings.shape[0] == 4
    assert two.method.label_embeddings.shape[0] == 5
    assert two.recipe.data.targets == second.targets
    streams = second.info["diagnostics"]["streams"][0]
    assert streams["used"] + streams["empty"] == 5


@pytest.mark.parametrize("fault", ["labels 1", "model 1", "labels 2", "model 2"])
def test_killed_in_any_stage_it_goes_on_there(fault: str, data: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert in_process(train_hubert, data, run, fault) == -signal.SIGKILL
    done = sorted(p.name for p in (run / "stages").iterdir() if not p.name.startswith("."))
    order = ["labels-1", "model-1", "labels-2"]
    assert done == sorted(order[: {"labels 1": 0, "model 1": 1, "labels 2": 2, "model 2": 3}[fault]])
    times = {name: (run / "stages" / name / "stage.json").stat().st_mtime_ns for name in done}
    assert in_process(train_hubert, data, run, "", True) == 0
    for name, time in times.items():
        assert (run / "stages" / name / "stage.json").stat().st_mtime_ns == time, "what was done is not done again"
    mine, theirs = read(run / "model.safetensors").tensors, read(undisturbed / "model.safetensors").tensors
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs)


def test_the_plan_of_a_run_that_has_no_labels_yet(data: Path) -> None:
    recipe = planned(make_recipe(raw_recipe(data)))
    assert [(t.classes, t.rate) for t in recipe.data.targets] == [(5, 50.0)]
    text, numbers, lines = dry_run(make_recipe(raw_recipe(data)))
    assert "stages:" in text
    assert numbers["parameters"] > 0
    assert numbers["steps"] == 6
    assert any("masked" in line or "visible" in line for line in lines)


def test_mistakes_in_stages_are_told_before_anything_runs(data: Path) -> None:
    layer = {"kind": "layer", "layers": [1], "clusters": 5}

    def problems(stages: object) -> str:
        with pytest.raises(RecipeError) as error:
            make_recipe(raw_recipe(data, stages=stages))
        return str(error.value)

    assert "first iteration has no earlier model" in problems({"iterations": [{"targets": [layer]}]})
    assert "at least one" in problems({"iterations": []})
    assert "iterations.0.targets.0.clusterz: unknown key; did you mean clusters?" in problems(
        {"iterations": [{"targets": [{"kind": "mfcc", "clusterz": 5}]}]}
    )
    assert "length" in problems({"iterations": [{"targets": [{"kind": "mfcc"}], "length": 1.5}]})
    vision = read_yaml(_recipe_file("vision/mae")) | {"stages": {"iterations": []}}
    with pytest.raises(RecipeError, match="trained in one stage"):
        make_recipe(vision)


def _recipe_file(method: str) -> Path:
    from unmask.core import registry

    return registry.recipe_path(method, "tiny")


@pytest.mark.parametrize("method", ["speech_audio/hubert", "speech_audio/prediction_targets"])
def test_shipped_recipes_are_whole(method: str) -> None:
    from unmask.core import registry

    for name in registry.recipes(method):
        recipe = load_recipe(method, name)
        assert recipe.method == method
        assert bool(recipe.data.label_sets) == (name == "paper_large"), "its labels come from another run"


def test_the_study_trains_every_set_alike_and_prints_one_table(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = {"targets": [{"kind": "mfcc", "clusters": 4, "kmeans": KMEANS}]}
    layers = {"kind": "layer", "clusters": 4, "kmeans": KMEANS}
    compare = {
        "mfcc": first["targets"],
        "rvq": [layers | {"layers": [2], "stages": 2}],
        "lmt": [layers | {"layers": [1, 2]}],
    }
    raw = raw_recipe(data, "speech_audio/prediction_targets", stages={"teacher": [first], "compare": compare})
    raw["schedule"]["steps"] = 2
    out = train(make_recipe(raw), tmp_path / "run", progress=False)
    study = json.loads((out / "study.json").read_text())
    assert list(study) == ["mfcc", "rvq", "lmt"]
    assert all(result["step"] == 2 for result in study.values())
    table = capsys.readouterr().out
    assert all(name in table for name in study)
    assert load_run(out).method.target_weights == (0.5, 0.5), "equal weights 1/K"
    assert load_run(out / "stages" / "model-mfcc").method.target_weights == (1.0,)
    names = [target.name for target in load_run(out / "stages" / "model-rvq").recipe.data.targets]
    assert names == ["layer 2 stage 1", "layer 2 stage 2"]
