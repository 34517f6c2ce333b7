"""Evaluating, fine-tuning and embedding with a real run, trained for a few steps on `digits`."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from processes import in_ranks

from unmask.core import cli
from unmask.core.errors import UnmaskError
from unmask.core.evaluation import samples
from unmask.core.evaluation.embedding import embed
from unmask.core.evaluation.encoding import at_source, untrained
from unmask.core.evaluation.finetune import finetune, load_classifier, resume
from unmask.core.evaluation.run import evaluate, table
from unmask.core.evaluation.tables import tuned_text
from unmask.core.training.checkpoint import load_run
from unmask.core.training.launch import build
from unmask.core.training.loop import Loop, train
from unmask.core.training.recipe import make_recipe
from unmask.core.training.signals import Interrupted
from unmask.vision.data.images import open_split
from unmask.vision.evaluation.representation import pixels

RECIPE: dict[str, Any] = {
    "method": "vision/mae",
    "seed": 5,
    "model": {
        "encoder": {"patch_size": 2, "dim": 24, "depth": 2, "heads": 2},
        "decoder": {"dim": 16, "depth": 1, "heads": 2},
    },
    "data": {"source": "digits", "image_size": 8, "channels": 1, "flip": 0.0},
    "schedule": {"steps": 6},
    "training": {"batch_size": 64, "log_every": 2, "precision": "32-true"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(make_recipe(json.loads(json.dumps(RECIPE))), tmp_path_factory.mktemp("run") / "run", progress=False)


@pytest.fixture(scope="module")
def evaluated(run: Path) -> dict[str, Any]:
    return evaluate(run, device="cpu", quick=True)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve images of several sizes, without labels, and one that is not an image."""
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    noise = np.random.default_rng(0)
    for i in range(12):
        pixel = noise.integers(0, 255, (9 + i, 12), dtype=np.uint8)
        Image.fromarray(pixel).save(folder / ("deep" if i % 2 else "") / f"{i:02}.png")
    (folder / "notes.jpg").write_text("not a picture")
    return folder


def test_three_rows_are_measured_in_the_same_way_and_written(run: Path, evaluated: dict[str, Any]) -> None:
    rows = evaluated["rows"]
    assert list(rows) == ["trained", "random", "pixels"]
    for row in rows.values():
        assert list(row["few_label"]) == ["1", "5", "10", "100"]
        assert row["few_label"]["100"] == row["linear"] > row["few_label"]["1"]
        assert all(0 <= row[name] <= 1 for name in ("knn", "linear", "linear_val"))
        assert 1 <= row["rankme"] <= row["dim"] + 1e-3
        assert "finetune" not in row
    assert [row["dim"] for row in rows.values()] == [24, 24, 64]
    assert evaluated["splits"] == {"train": 1259, "val": 179, "test": 359, "classes": 10}
    assert evaluated["val_loss"] > 0 and evaluated["step"] == 6
    assert json.loads((run / "evaluation.json").read_text()) == evaluated


def test_pixels_of_digits_are_as_good_as_is_known(evaluated: dict[str, Any]) -> None:
    """Logistic regression and nearest neighbours on this set are textbook examples near 0.96 and 0.98."""
    assert evaluated["rows"]["pixels"]["linear"] > 0.94
    assert evaluated["rows"]["pixels"]["knn"] > 0.95


def test_evaluation_repeats(run: Path, evaluated: dict[str, Any]) -> None:
    again = evaluate(run, device="cpu", quick=True)
    assert again["rows"] == evaluated["rows"]


def test_the_reference_has_other_weights_than_the_run_began_with(run: Path) -> None:
    loaded = load_run(run)
    random = untrained(loaded, seed=0)
    weight = random.encoder.blocks[0].mlp.fc1.weight  # type: ignore[union-attr]
    assert not weight.equal(loaded.method.encoder.blocks[0].mlp.fc1.weight)  # type: ignore[union-attr]
    assert not weight.equal(build(loaded.recipe).encoder.blocks[0].mlp.fc1.weight)  # type: ignore[union-attr]
    assert weight.equal(untrained(loaded, seed=0).encoder.blocks[0].mlp.fc1.weight)  # type: ignore[union-attr]


def test_fine_tuning_stands_beside_training_from_scratch(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decays = []
    tune = samples.tune

    def watched(run: Any, splits: Any, recipe: Any, **options: Any) -> Any:
        decays.append(recipe.finetune.layer_decay)
        return tune(run, splits, recipe, **options)

    monkeypatch.setattr(samples, "tune", watched)
    result = evaluate(run, device="cpu", epochs=1)
    assert decays == [0.65, 1.0]
    assert result["protocol"]["finetune"]["epochs"] == 1
    assert all(0 <= result["rows"][name]["finetune"] <= 1 for name in ("trained", "random"))
    assert "finetune" not in result["rows"]["pixels"]
    assert "fine-tuned" in table(result)


def test_the_table_names_every_row_and_split(evaluated: dict[str, Any]) -> None:
    text = table(evaluated)
    for part in ("trained encoder", "untrained encoder", "raw pixels", "k-NN", "linear", "1 % labels", "359 test"):
        assert part in text
    assert f"{100 * evaluated['rows']['trained']['linear']:.1f}" in text


def test_data_without_labels_are_said_to_be_so(run: Path, photos: Path) -> None:
    result = evaluate(run, data=str(photos), device="cpu")
    assert result["labelled"] is False
    assert "has no labels" in result["note"] and "one folder per class" in result["note"]
    assert all(set(row) == {"rankme", "deviation", "dim"} for row in result["rows"].values())
    assert "no labels" in table(result).replace("\n", " ")
    evaluate(run, device="cpu", quick=True)  # the file that other tests read


def test_pixels_of_large_images_are_averaged_down() -> None:
    assert pixels(torch.randn(2, 3, 8, 8)).shape == (2, 192)
    large = torch.arange(4.0).view(1, 1, 2, 2).repeat_interleave(64, 2).repeat_interleave(64, 3)
    small = pixels(large).view(32, 32)
    assert small[0, 0] == 0 and small[0, -1] == 1 and small[-1, 0] == 2 and small[-1, -1] == 3


def test_a_fine_tuned_classifier_comes_back_as_it_was(run: Path, tmp_path: Path) -> None:
    result = finetune(run, "digits", tmp_path / "out", epochs=2, progress=False)
    assert json.loads((tmp_path / "out" / "finetune.json").read_text()) == result
    assert f"{result['accuracy']:.1%}" in tuned_text(result, "images")
    model = load_classifier(tmp_path / "out")
    assert model.classes == list("0123456789")
    test = open_split(load_run(run).recipe.data, "test")
    batch = test.__getitems__([(i, 0) for i in range(len(test))])
    with torch.no_grad():
        right = (model.predict(batch).argmax(1) == batch.labels).float().mean()
    assert float(right) == pytest.approx(result["accuracy"])
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["val_accuracy"] for line in lines if "val_loss" in line][-1] == pytest.approx(result["val_accuracy"])
    with pytest.raises(UnmaskError, match="is a fine-tuned classifier, .* unmask predict"):
        load_run(tmp_path / "out")


def test_a_classifier_predicts_and_a_run_without_one_says_how_to_make_one(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The remedy in the refusal is followed to its end."""

    def command(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["unmask", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0)

    out = tmp_path / "predictions.parquet"
    assert command("predict", run, photos, "--out", out) == 2
    said = capsys.readouterr().err
    remedy = f"unmask finetune {run} --data LABELLED --out CLASSIFIER"
    assert remedy in said and not out.exists()
    classifier = tmp_path / "classifier"
    words = remedy.replace("LABELLED", "digits").replace("CLASSIFIER", str(classifier)).split()[1:]
    assert command(*words, "--epochs", 1) == 0
    assert command("predict", classifier, photos, "--out", out, "--device", "cpu") == 0
    assert "1 images are left out: notes.jpg" in capsys.readouterr().err
    (classifier / "model.safetensors").rename(classifier / "kept")
    command("predict", classifier, photos, "--out", tmp_path / "again.parquet", "--device", "cpu")
    assert f"Go on with: unmask finetune --resume {classifier}" in capsys.readouterr().err
    (classifier / "kept").rename(classifier / "model.safetensors")
    found = pq.read_table(out)
    classes = json.loads(found.schema.metadata[b"classes"])
    assert classes == list("0123456789") and len(found) == 12 and "deep/01.png" in found["name"].to_pylist()
    probabilities = torch.tensor(found["probabilities"].to_pylist())
    assert probabilities.shape == (12, 10)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(12))
    assert found["label"].to_pylist() == [classes[i] for i in probabilities.argmax(1).tolist()]
    torch.testing.assert_close(torch.tensor(found["probability"].to_pylist()), probabilities.amax(1))
    images = open_split(at_source(load_run(run).recipe.data, str(photos)), "all")
    names = [images.name_of(int(i)) for i in images.ids]
    row = names.index("04.png")
    with torch.no_grad():
        expected = load_classifier(classifier).predict(images.__getitems__([(row, 0)])).softmax(1)[0]
    torch.testing.assert_close(probabilities[found["name"].to_pylist().index("04.png")], expected, atol=1e-5, rtol=1e-4)


def test_fine_tuning_on_few_labels_and_from_scratch(run: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"labels": 0.1, "epochs": 1, "progress": False}
    found = [finetune(run, "digits", tmp_path / str(i), scratch=bool(i), **options) for i in range(2)]
    labels = open_split(load_run(run).recipe.data, "train").labels
    expected = sum(max(1, round(0.1 * n)) for n in torch.bincount(labels).tolist())
    assert [result["splits"]["train"] for result in found] == [expected, expected]
    recipes = [yaml.safe_load((tmp_path / str(i) / "recipe.yaml").read_text()) for i in range(2)]
    assert [recipe["finetune"]["layer_decay"] == 1 for recipe in recipes] == [False, True]
    assert [recipe["init"] for recipe in recipes] == [str(run), None]
    assert found[0]["losses"] != found[1]["losses"]
    with pytest.raises(UnmaskError, match=r"a share of 10 of the labels; expected .* at most 1 \(0\.1 is 10 %\)"):
        finetune(run, "digits", tmp_path / "out", labels=10.0)


def test_fine_tuning_needs_labels_and_a_classifier_its_directory(run: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UnmaskError, match="has no class for each of its images; .* one folder of images per class"):
        finetune(run, str(photos), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UnmaskError, match="holds no fine-tuned classifier; make one with"):
        load_classifier(tmp_path)
    with pytest.raises(UnmaskError, match="already holds a run"):
        finetune(run, "digits", run, epochs=1)


def test_a_fine_tuning_records_where_its_data_and_its_run_are(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given as seen from one folder, they have to be found when it is resumed in another."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    for number, image in enumerate(pixels):
        file = tmp_path / "here" / "photos" / f"class{number % 2}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    monkeypatch.chdir(tmp_path / "here")
    finetune(os.path.relpath(run), "photos", tmp_path / "out", epochs=1, progress=False)
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert recipe["data"]["source"] == str(tmp_path / "here" / "photos") and recipe["init"] == str(run.resolve())
    monkeypatch.chdir(tmp_path)
    assert resume(tmp_path / "out", progress=False)["run"] == str(run.resolve())


def test_an_interrupted_fine_tuning_goes_on_to_the_same_weights(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command in the message of the interruption is followed to its end, and so is that of `train --resume`."""
    settings = ["training.checkpoint_every_steps=4", "finetune.layer_decay=0.8"]
    options: dict[str, Any] = {"labels": 0.3, "epochs": 4, "settings": settings, "progress": False}
    whole = finetune(run, "digits", tmp_path / "whole", **options)
    step, seen = Loop._train_step, []

    def stop_at_six(loop: Any, calls: Any) -> Any:
        seen.append(1)
        if len(seen) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(loop, calls)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_train_step", stop_at_six)
        with pytest.raises(Interrupted) as stopped:
            finetune(run, "digits", tmp_path / "cut", **options)
    remedy = str(stopped.value).rpartition("Go on with: ")[2]
    assert remedy == f"unmask finetune --resume {tmp_path / 'cut'}"

    def command(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["unmask", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0)

    assert command("train", "--resume", tmp_path / "cut") == 2
    assert remedy in capsys.readouterr().err
    assert command(*remedy.split()[1:], "--quiet", "--json") == 0
    resumed = json.loads(capsys.readouterr().out)
    assert {**resumed, "out": whole["out"]} == whole
    first, second = (load_classifier(tmp_path / name).state_dict() for name in ("whole", "cut"))
    assert all(tensor.equal(second[name]) for name, tensor in first.items())


def _tune_on_the_cpu(run: Path, out: Path, devices: int) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    settings = ["finetune.drop_path=0", "training.log_every=1", "training.threads=1"]  # drop path is each rank's own
    finetune(run, "digits", out, epochs=2, labels=0.5, devices=devices, settings=settings, progress=False)


@pytest.mark.slow
def test_two_processes_fine_tune_as_one(run: Path, tmp_path: Path) -> None:
    """The same losses and accuracy at the same global batch."""
    assert in_ranks(1, _tune_on_the_cpu, run, tmp_path / "1", 1) == [0]
    assert in_ranks(2, _tune_on_the_cpu, run, tmp_path / "2", 2) == [0, 0]
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in "12"
    )
    for key in ("loss", "val_loss"):
        losses = [[line[key] for line in lines if key in line] for lines in (one, two)]
        assert losses[0] and losses[1] == pytest.approx(losses[0], abs=1e-5)
    results = [json.loads((tmp_path / name / "finetune.json").read_text()) for name in "12"]
    assert json.loads((tmp_path / "2" / "environment.json").read_text())["processes"] == 2
    for key in ("accuracy", "val_accuracy"):
        assert results[1][key] == pytest.approx(results[0][key], abs=0.006)  # one sample in 179, at a tie


def test_embeddings_are_the_encoders_and_name_their_images(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = pq.read_table(embed(run, str(photos), tmp_path / "features.parquet", device="cpu"))
    assert [str(field.type) for field in found.schema] == ["int64", "string", "list<element: float>"]
    images = open_split(_at(load_run(run), photos), "all")
    names = found["name"].to_pylist()
    assert len(names) == 12 and sorted(names)[0] == "00.png" and "deep/01.png" in names
    assert found["id"].to_pylist() == images.ids.tolist()
    batch = images.__getitems__([(i, 0) for i in range(12)])
    with torch.no_grad():
        expected = load_run(run).method.encode(batch).pooled  # type: ignore[operator]
    torch.testing.assert_close(torch.tensor(found["embedding"].to_pylist()), expected, atol=1e-5, rtol=1e-5)
    assert "notes.jpg" in capsys.readouterr().err


def _at(run: Any, folder: Path) -> Any:
    return at_source(run.recipe.data, str(folder))


def test_an_image_damaged_behind_its_header_is_left_out(run: Path, photos: Path, tmp_path: Path) -> None:
    broken = photos / "04.png"
    broken.write_bytes(broken.read_bytes()[:60])
    found = pq.read_table(embed(run, str(photos), tmp_path / "features.parquet", device="cpu"))
    assert len(found) == 11
    assert "04.png" not in found["name"].to_pylist()


def test_embedding_into_nowhere_leaves_nothing(run: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UnmaskError, match="cannot write"):
        embed(run, str(photos), tmp_path / "file" / "features.parquet", device="cpu")
    with pytest.raises(UnmaskError, match="does not exist"):
        embed(run, str(tmp_path / "missing"), tmp_path / "features.parquet", device="cpu")
    assert not (tmp_path / "features.parquet").exists()


def test_a_report_of_the_run_shows_the_probes(run: Path, evaluated: dict[str, Any]) -> None:
    from unmask.core.report import write_report

    text = write_report(run).read_text()
    assert "untrained encoder" in text
    assert text.count("<img ") == 24


def test_a_report_of_a_fine_tuning_shows_its_accuracy_and_commands_for_a_classifier(run: Path, tmp_path: Path) -> None:
    from unmask.core.report import write_report

    out = tmp_path / "tuned"
    result = finetune(run, "digits", out, epochs=1, labels=0.1, progress=False)
    text = write_report(out).read_text()
    assert f"is right on {result['accuracy']:.1%} of 359 test samples of 10 classes" in text
    assert f"{100 * result['val_accuracy']:.1f} %" in text and "A fine-tuning has no reference curve" in text
    assert f"unmask predict {out} FOLDER" in text and f"unmask train METHOD --init {out}" in text
    assert not any(f"unmask {verb} {out}" in text for verb in ("evaluate", "finetune", "embed", "train --resume"))
    for name in ("finetune.json", "model.safetensors"):  # as it is while it trains
        (out / name).unlink()
    text = write_report(out).read_text()
    assert "scored when the fine-tuning has finished" in text and f"unmask finetune --resume {out}" in text
