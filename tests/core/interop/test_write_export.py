"""An export is whole or not there, and its card keeps to itself where things lay."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from classifiers import write_classifier

from unmask.core.errors import UnmaskError
from unmask.core.interop.export import Exported, Exporter
from unmask.core.interop.model_card import lines, model_card, public
from unmask.core.training import checkpoint
from unmask.core.training.launch import build
from unmask.core.training.recipe import make_recipe, to_yaml

RAW = {
    "method": "vision/mae",
    "model": {"encoder": {"patch_size": 4, "dim": 32, "depth": 1, "heads": 2}, "decoder": {"dim": 32, "depth": 1}},
    "data": {"source": "digits", "image_size": 8, "channels": 1, "mean": [0.3], "std": [0.3]},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    recipe = make_recipe(json.loads(json.dumps(RAW)))
    method = build(recipe)
    recipe = replace(recipe, init="/home/me/before", data=replace(recipe.data, source="/home/me/photos"))
    out.mkdir()
    (out / "recipe.yaml").write_text(to_yaml(recipe))
    (out / "environment.json").write_text(json.dumps({"versions": {"torch": "2.9"}, "python": "3.11"}))
    scores = {"run": "/home/me/run", "note": "/home/me/x has no labels", "data": "/home/me/x", "knn": 0.5}
    (out / "evaluation.json").write_text(json.dumps(scores))
    checkpoint.write(out / "model.safetensors", method.state_dict(), {"step": 7, "method": recipe.method})
    return out


def card(exported: Exported, to: str) -> str:
    return model_card(exported, "some", {"What this is": "A test.", "Empty": ""}, ["tag", "mae"], "some-task")


def write(exported: Exported, out: Path) -> None:
    (out / "weights").write_text(str(exported.run.step))


def broken(exported: Exported, out: Path) -> None:
    write(exported, out)
    raise UnmaskError("does not fit; use --to some")


WRITERS: Any = {"some": write, "broken": broken}


def test_an_export_is_what_the_writer_wrote_and_a_card(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "deep" / "new", tmp_path / "empty"):
        assert Exporter(WRITERS, card)(str(run), str(out)) == out
        assert {path.name for path in out.iterdir()} == {"weights", "README.md"}
        assert (out / "weights").read_text() == "7"
    assert {path.name for path in tmp_path.iterdir()} == {"deep", "empty"}


def test_refusals_leave_nothing(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for given, out, to, said in (
        (run, "out", "onnx", "cannot export to 'onnx'; choose one of: some, broken"),
        (run, "file", "some", "file is there already and not empty"),
        (run, "", "some", "is there already and not empty; give a new directory"),
        (run, "file/out", "some", "cannot write the export to .*file/out"),
        (run, "out", "broken", "does not fit; use --to some"),
        (tmp_path, "out", "some", "is not a run"),
    ):
        with pytest.raises(UnmaskError, match=said):
            Exporter(WRITERS, card)(given, tmp_path / out, to)
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_a_format_for_classifiers_is_named(run: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    write_classifier(run, tuned, ("cat", "dog"))
    (tuned / "finetune.json").write_text(json.dumps({"step": 9, "data": "/home/me/pets", "accuracy": 0.75}))
    with pytest.raises(UnmaskError, match="--to some writes none; export it with: --to other or --to more$"):
        Exporter(WRITERS, card, classifiers=["other", "more"])(tuned, tmp_path / "out", "some")
    with pytest.raises(UnmaskError, match=r"use it with unmask\.vision\.load, or export the run that was fine-tuned$"):
        Exporter(WRITERS, card)(tuned, tmp_path / "out", "some")
    text = (Exporter(WRITERS, card, classifiers=["some"])(tuned, tmp_path / "out", "some") / "README.md").read_text()
    for part in (
        "pre-trained with unmask, and fine-tuned",
        "on labels of 2 classes",
        '"accuracy": 0.75',
        '"data": "pets"',
    ):
        assert part in text


def test_the_card_says_how_the_weights_came_to_be(run: Path, tmp_path: Path) -> None:
    text = (Exporter(WRITERS, card)(run, tmp_path / "out", "some") / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    tags = ["unmask", "self-supervised-learning", "tag", "mae"]
    assert front == {"library_name": "some", "pipeline_tag": "some-task", "tags": tags}
    for part in ("mae pre-trained with unmask, 7 steps", "7 optimizer steps of 256 images. torch 2.9, Python 3.11."):
        assert part in text
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## What this is", "## Training", "## Scores", "## Licence",
    ]  # fmt: skip
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert (recipe["method"], recipe["data"]["source"], recipe["init"]) == ("vision/mae", "photos", "before")
    assert json.loads(text.split("```json\n")[1].split("```")[0]) == {"data": "x", "knn": 0.5}
    assert "/home" not in text


def test_only_last_names_of_paths_are_public() -> None:
    @dataclass(frozen=True)
    class Settings:
        method: str
        folders: tuple[str, ...]
        inner: dict[str, Any]
        none: str | None = None

    given = Settings("some/method", ("/a/b", "c"), {"x": ["/d/e"], "n": 1.5})
    assert public(given) == Settings("some/method", ("b", "c"), {"x": ["e"], "n": 1.5})


def test_facts_without_a_value_are_left_out() -> None:
    assert lines({"a": "1", "b": "", "c": "2"}) == "- a: 1\n- c: 2"
