"""The command line, as a person meets it: in its own process where that matters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from processes import start, wait

from unmask.core import cli

RECIPE = """
method: vision/mae
model:
  encoder: {patch_size: 7, dim: 16, depth: 1, heads: 2}
  decoder: {dim: 16, depth: 1, heads: 2}
data: {source: FOLDER, image_size: 28, channels: 1, flip: 0.0, val_share: 0.2}
schedule: {epochs: 1, warmup_epochs: 0}
training: {batch_size: 8, log_every: 1, checkpoint_every_steps: 100, threads: 1}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe over a folder of 40 little pictures."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(draw.integers(0, 255, (30, 30), dtype=np.uint8)).save(folder / f"{i:02}.png")
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.replace("FOLDER", str(folder)))
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of `unmask ARGUMENTS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["unmask", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_list_is_fast_and_imports_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['unmask', 'list', '--json']\n"
        "from unmask.core import cli\n"
        "try: cli.main()\n"
        "finally: assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = {card["id"]: card for card in json.loads(done.stdout)}
    assert found["vision/mae"]["package"] == "unmask-vision"
    assert found["vision/mae"]["kind"] == "pretrain"
    assert "2111.06377" in found["vision/mae"]["paper"]


@pytest.mark.parametrize(
    "command", ["list", "train", "evaluate", "finetune", "predict", "embed", "generate", "explain", "report", "export"]
)
def test_help_has_text_and_examples(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, command, "--help") == 0
    text = capsys.readouterr().out
    assert "Examples:" in text and f"unmask {command}" in text.split("Examples:")[1]
    assert "  " in text.split("Options:")[1]


def test_train_dry_run_and_go_on(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(monkeypatch, "train", "--recipe", recipe, "--out", out, "--dry-run", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert not out.exists(), "a dry run writes nothing"
    assert shown["estimate"]["tokens"] == 16 and shown["estimate"]["visible"] == 4
    assert shown["estimate"]["seconds_per_epoch"] > 0 and shown["estimate"]["memory_bytes"] > 10_000
    assert shown["recipe"]["data"]["mean"] is not None

    assert run(monkeypatch, "train", "vision/mae", "--recipe", recipe, "--out", out, "--seed", 5, "--quiet") == 0
    said = capsys.readouterr()
    assert f"unmask evaluate {out}" in said.out and said.err == ""
    resolved = yaml.safe_load((out / "recipe.yaml").read_text())
    assert resolved["seed"] == 5 and resolved["data"]["mean"] == shown["recipe"]["data"]["mean"]
    assert json.loads((out / "environment.json").read_text())["versions"]["torch"]

    assert run(monkeypatch, "train", "--resume", out, "--epochs", 2, "--quiet") == 2
    assert "Add --extend" in capsys.readouterr().err
    assert run(monkeypatch, "train", "--resume", out, "--epochs", 2, "--extend", "--json", "--quiet") == 0
    assert json.loads(capsys.readouterr().out)["step"] == 2 * (32 // 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "vision/mea", "--out", "x"], "did you mean 'vision/mae'"),
        (["train", "--out", "x"], "name a method"),
        (["train", "--resume", "nowhere"], "nowhere is not a run"),
        (["train", "--recipe", "none.yaml", "--out", "x"], "no recipe file none.yaml"),
        (["train", "--recipe", "RECIPE"], "name a directory for the run"),
        (["train", "--recipe", "RECIPE", "--out", "x", "--set", "seed"], "expected key=value"),
        (["train", "--recipe", "RECIPE", "--out", "x", "--set", "model.mask_ratio=1.2"], "1.2"),
        (["train", "--recipe", "RECIPE", "--out", "x", "--data", "nowhere"], "nowhere"),
        (["train", "--recipe", "RECIPE", "--out", "x", "--strategy", "fsdp"], "choose auto or ddp"),
        (["evaluate", "nowhere"], "nowhere is not a run"),
        (["generate", "nowhere", "--out", "x"], "nowhere is not a run"),
        (["explain", "x", "--method", "vision/mea", "--out", "x"], "did you mean 'vision/mae'"),
        (["explain", "x", "--method", "vision/mae", "--network", "a", "--out", "x"], "expected NAME=DIR_OR_HUB_ID"),
        (["list", "--kind", "pretraining"], "choose one of pretrain, finetune"),
        (["data", "fetch", "cifar11"], "did you mean 'cifar10'"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *[str(recipe) if a == "RECIPE" else a for a in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1 and "Traceback" not in error


def test_several_mistakes_get_a_line_each(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--set", "training.batch=8", "--set", "model.mask_raito=0.5", "--set", "schedule.epochs=none"]
    assert run(monkeypatch, "train", "--recipe", recipe, "--out", "x", *settings) == 2
    error = capsys.readouterr().err.splitlines()
    assert "3 problems" in error[0]
    assert len(error) == 4


def command_line(errors: Path, *arguments: str) -> None:
    """The program, with stderr in a file."""
    sys.argv = ["unmask", *arguments]
    with errors.open("w", buffering=1) as sys.stderr:
        cli.main()


def test_signals_and_exit_codes(recipe: Path, tmp_path: Path) -> None:
    """SIGTERM, then a resume stopped by Ctrl-C: it saves, says how to go on, and exits as a shell expects."""
    out, errors = tmp_path / "run", tmp_path / "errors"
    begin = ["--recipe", str(recipe), "--out", str(out), "--epochs", "500000"]
    for arguments, number, code in ((begin, signal.SIGTERM, 143), (["--resume", str(out)], signal.SIGINT, 130)):
        lines = count_lines(out)
        process = start(command_line, errors, "train", *arguments)
        for _ in range(1200):
            if count_lines(out) > lines + 5 or not process.is_alive():
                break
            time.sleep(0.05)
        os.kill(process.pid, number)
        assert wait(process) == code
        last = errors.read_text().splitlines()[-1]
        assert last.endswith(f"and saved. Go on with: unmask train --resume {out}")
        step = int(last.removeprefix("stopped at step ").split()[0])
        assert (out / f"checkpoints/step-{step:08d}.safetensors").exists()


def count_lines(out: Path) -> int:
    path = out / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_a_method_named_with_resume_is_that_runs(tmp_path: Path) -> None:
    """Its recipe is the run's, and not the method's default one; another method is refused."""
    from unmask.core.cli.train import _recipe
    from unmask.core.training.recipe import RecipeError

    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("FOLDER", str(tmp_path)), encoding="utf-8")

    def chosen(method: str) -> object:
        return _recipe(None, method, None, tmp_path, [], {"data.source": None}, None, None, 1)

    assert chosen("vision/mae").model.encoder.dim == 16  # type: ignore[attr-defined]
    with pytest.raises(RecipeError, match="is 'vision/mae', but 'vision/simmim' was asked for"):
        chosen("vision/simmim")
