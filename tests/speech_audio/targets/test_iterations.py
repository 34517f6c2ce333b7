"""Labels, model, labels, model: every stage once, killed anywhere it goes on there, and mistakes are told at once."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from iterations import KMEANS, raw_recipe, train_hubert, write_clips
from lightning_fabric.loggers.logger import Logger
from processes import in_process

from unmask.core.errors import UnmaskError
from unmask.core.training.checkpoint import load_run, read
from unmask.core.training.dryrun import dry_run
from unmask.core.training.loop import train
from unmask.core.training.recipe import RecipeError, load_recipe, make_recipe, read_yaml
from unmask.speech_audio.data.labels import LabelSet
from unmask.speech_audio.targets.iterations import planned


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
    text, estimate = dry_run(make_recipe(raw_recipe(data)))
    assert "stages:" in text
    assert estimate.parameters > 0
    assert estimate.steps == 6
    assert any("masked" in line or "visible" in line for line in estimate.lines())
    stages = [(stage.name, stage.steps) for stage in estimate.stages]
    assert stages == [("labels-1", None), ("model-1", 4), ("labels-2", None), ("training", 6)]
    assert all(stage.seconds and stage.memory_bytes > 2**20 for stage in estimate.stages)
    assert estimate.seconds == pytest.approx(sum(stage.seconds or 0.0 for stage in estimate.stages))


def test_mistakes_in_stages_are_told_before_anything_runs(data: Path) -> None:
    layer = {"kind": "layer", "layers": [1], "clusters": 5}

    def problems(stages: object) -> str:
        with pytest.raises(RecipeError) as error:
            make_recipe(raw_recipe(data, stages=stages))
        return str(error.value)

    assert "iterations.0: the first iteration has no earlier model" in problems({"iterations": [{"targets": [layer]}]})
    mfcc = {"kind": "mfcc", "clusters": 4}
    deep = {"iterations": [{"targets": [mfcc]}, {"targets": [layer | {"layers": [2, 9]}]}]}
    assert "stages: iterations.1: there are no layers [9]; model.encoder.depth is 2" in problems(deep)
    short = {"iterations": [{"targets": [mfcc]}, {"targets": [layer], "length": 0.5}]}
    assert "iterations.1.length: the last iteration is as long as the schedule says" in problems(short)
    assert "at least one" in problems({"iterations": []})
    assert "iterations.0.targets.0.clusterz: unknown key; did you mean clusters?" in problems(
        {"iterations": [{"targets": [{"kind": "mfcc", "clusterz": 5}]}]}
    )
    assert "length" in problems({"iterations": [{"targets": [{"kind": "mfcc"}], "length": 1.5}]})
    vision = read_yaml(_recipe_file("vision/mae")) | {"stages": {"iterations": []}}
    with pytest.raises(RecipeError, match="trained in one stage"):
        make_recipe(vision)


def test_mistakes_in_a_study_are_told_before_anything_runs(data: Path) -> None:
    mfcc, layer = {"kind": "mfcc", "clusters": 4}, {"kind": "layer", "layers": [3], "clusters": 4}

    def problems(teacher: list[object], compare: dict[str, object]) -> str:
        stages = {"teacher": [{"targets": targets} for targets in teacher], "compare": compare}
        with pytest.raises(RecipeError) as error:
            make_recipe(raw_recipe(data, "speech_audio/prediction_targets", stages=stages))
        return str(error.value)

    assert "teacher.0: the first iteration has no earlier model" in problems([[layer]], {"mfcc": [mfcc]})
    assert "compare.deep: there are no layers [3]" in problems([[mfcc]], {"deep": [layer]})
    for name in ("1", "a/b", ""):  # a number would be taken for the teacher
        assert f"compare: {name!r} cannot be a name" in problems([[mfcc]], {name: [mfcc]})


def made(run: Path) -> dict[str, int]:
    # When the stages' results were written: doing a stage again gives newer ones.
    results = [path for name in ("labels.npy", "*.safetensors") for path in (run / "stages").rglob(name)]
    return {str(path): path.stat().st_mtime_ns for path in results}


@pytest.mark.parametrize("changes", [{"training.workers": 1}, {"training.keep_checkpoints": 1}])
def test_what_may_change_on_a_resume_does_no_stage_again(
    changes: dict[str, int], undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    before = made(run)
    train(make_recipe(read_yaml(run / "recipe.yaml"), changes), run, resume=True, progress=False)
    assert made(run) == before


def test_a_run_made_longer_is_resumed_like_any_other(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    before = made(run)
    longer = make_recipe(read_yaml(run / "recipe.yaml"), {"schedule.steps": 8})
    train(longer, run, resume=True, extend=True, progress=False)
    train(make_recipe(read_yaml(run / "recipe.yaml")), run, resume=True, progress=False)
    assert made(run) == before
    assert load_run(run).step == 8


class Steps(Logger):
    name, version = "steps", 0

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.steps.append(step)

    def log_hyperparams(self, *_: object) -> None:
        pass


def test_only_the_run_itself_is_logged_elsewhere(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = Steps()
    monkeypatch.setattr("unmask.core.training.launch.make_logger", lambda *_: logger)
    train(make_recipe(raw_recipe(data)), tmp_path / "run", progress=False, loggers=["steps"])
    assert sorted(set(logger.steps)) == list(range(1, 7))
    assert logger.steps == sorted(logger.steps), "W&B drops steps that fall back"


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


def test_the_paper_clusters_features_as_they_are() -> None:
    iterations = load_recipe("speech_audio/hubert", "paper").stages.iterations
    assert [target.standardised for iteration in iterations for target in iteration.targets] == [False, False]


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


def test_a_dry_run_names_what_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_clips(tmp_path / "clips", 12)
    (data / "broken.wav").write_bytes(b"RIFF and nothing after it")
    dry_run(make_recipe(raw_recipe(data)))
    said = capsys.readouterr().err
    assert "samples that are left out (1): broken.wav: " in said
    assert re.search(r"to train on: \d+ recordings, 0\.\d min(, in \d+ segments.*)?; an epoch hears ", said)


def test_clipped_recordings_are_named_once_in_two_iterations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_clips(tmp_path / "clips", 12)
    soundfile.write(data / "speaker0" / "loud.wav", np.ones(8_000, np.float32), 16_000)
    raw = raw_recipe(data)
    raw["data"]["val_share"] = 0.0
    train(make_recipe(raw), tmp_path / "run")
    said = capsys.readouterr().err
    assert said.count("samples are used but look wrong: speaker0/loud.wav: clipped") == 1
    assert 0 < said.index("to train on: 13 recordings") < said.index("stage 2 of 3")


def test_a_stage_that_fails_at_once_leaves_nothing(data: Path, tmp_path: Path) -> None:
    raw = raw_recipe(data)
    raw["stages"]["iterations"][0]["targets"][0]["clusters"] = 100_000
    with pytest.raises(UnmaskError, match="ask for fewer clusters"):
        train(make_recipe(raw), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
