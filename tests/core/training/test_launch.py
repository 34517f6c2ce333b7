"""Starting a run: with processes that are there already, and without leaving anything when it fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from faults import die
from processes import in_process, in_ranks
from safetensors.torch import load_file
from torch import nn

from unmask.core import cli
from unmask.core.errors import UnmaskError
from unmask.core.training.rundir import RunDirectory
from unmask.core.training.startup import StartupError
from unmask.core.training.world import processes, rank

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "RANK": "5", "LOCAL_RANK": "1"}
SLURM = {"SLURM_JOB_NAME": "job", "SLURM_NTASKS": "6", "SLURM_NNODES": "3", "SLURM_PROCID": "4", "SLURM_LOCALID": "0"}
RECIPE = """
method: vision/mae
model: {encoder: {patch_size: 7, dim: 16, depth: 1, heads: 2}, decoder: {dim: 16, depth: 1, heads: 2}}
data: {source: FOLDER, image_size: 28, channels: 1, flip: 0.0, val_share: 0.2}
schedule: {epochs: 1, warmup_epochs: 0}
training: {batch_size: 8, log_every: 1, threads: 1}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(draw.integers(0, 255, (30, 30), dtype=np.uint8)).save(folder / f"{i:02}.png")
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.replace("FOLDER", str(folder)))
    return path


def test_one_process_unless_asked_for_more() -> None:
    assert (processes(None, None), processes(2, None), processes(4, 2)) == ((1, 1), (2, 1), (4, 2))
    assert rank() == 0


@pytest.mark.parametrize(
    ("names", "expected", "number", "by"),
    [(TORCHRUN, (4, 2), 5, "torchrun --nnodes"), (SLURM, (2, 3), 4, "srun --nodes")],
)
def test_started_processes_are_adopted(
    names: dict[str, str], expected: tuple[int, int], number: int, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert rank() == number
    assert processes(None, None) == processes(*expected) == expected
    devices, nodes = expected
    with pytest.raises(UnmaskError, match=rf"^--devices 7: \w+ has started {devices} process.*{by} {nodes} .* 7$"):
        processes(7, None)
    with pytest.raises(UnmaskError, match="^--devices 7 --nodes 9: "):
        processes(7, 9)
    if names is SLURM:  # a shell inside an allocation: nothing was started
        monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
        assert processes(7, None) == (7, 1)


def test_an_uneven_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (TORCHRUN | {"WORLD_SIZE": "7"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UnmaskError, match="7 processes, not the same number"):
        processes(None, None)


def command_line(errors: Path, elastic: bool, *arguments: str) -> None:
    """The program as one of two processes, as torchrun starts them if `elastic`."""
    if elastic:
        os.environ.update({"TORCHELASTIC_RUN_ID": "test", "LOCAL_WORLD_SIZE": "2", "RANK": os.environ["LOCAL_RANK"]})
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "GROUP_RANK": "0"}
    sys.argv = ["unmask", *arguments]
    with errors.with_suffix("." + os.environ["LOCAL_RANK"]).open("w", buffering=1) as sys.stderr:
        cli.main()


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]


def test_processes_of_torchrun_train_one_run(recipe: Path, tmp_path: Path) -> None:
    """As `--devices 2` does; started again, both of them say what is wrong."""
    plain, elastic, errors = tmp_path / "plain", tmp_path / "elastic", tmp_path / "errors"
    base = ["train", "--recipe", str(recipe), "--quiet"]
    assert in_ranks(2, command_line, errors, False, *base, "--out", str(plain), "--devices", "2") == [0, 0]
    assert in_ranks(2, command_line, errors, True, *base, "--out", str(elastic)) == [0, 0]
    assert losses(elastic) == pytest.approx(losses(plain), abs=1e-6) and len(losses(plain)) == 4
    weights = [load_file(run / "model.safetensors") for run in (plain, elastic)]
    assert all(torch.allclose(value, weights[1][name], atol=1e-6) for name, value in weights[0].items())
    assert json.loads((elastic / "environment.json").read_text())["processes"] == 2

    assert in_ranks(2, command_line, errors, True, *base, "--out", str(elastic)) == [2, 2]
    said = [errors.with_suffix(f".{number}").read_text() for number in (0, 1)]
    assert said[0].startswith(f"error: {elastic} already holds a run") and said[1].startswith("error on rank 1: ")


def test_a_contradiction_is_told_at_once(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert unmask(monkeypatch, "train", "--recipe", recipe, "--out", "x", "--devices", "3") == 2
    error = capsys.readouterr().err
    assert error.startswith("error on rank 5: --devices 3: torchrun has started 4 process(es)")
    assert len(error.splitlines()) == 1


@pytest.mark.slow
def test_torchrun_itself(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["-m", "unmask.core.cli", "train", "vision/mae", "--recipe", str(recipe), "--out", str(out)]
    done = subprocess.run([*program, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("unmask evaluate") == 1
    assert json.loads((out / "environment.json").read_text())["processes"] == 2


# ---- a start that fails ----------------------------------------------------------------------------------------------


class Wrong(toy.ToyMethod):
    """Fails in its first forward pass."""

    def forward(self, batch: Any, plan: Any) -> Any:
        raise RuntimeError("wrong from the start")


class Unused(toy.ToyMethod):
    """A parameter never gets a gradient, which shows in the second step."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))


class Late(toy.ToyMethod):
    """Fails when two steps are done."""

    def after_step(self, clock: Any) -> None:
        if clock.step == 1:
            raise RuntimeError("wrong at last")


@pytest.mark.parametrize(("method", "error"), [(Wrong, RuntimeError), (Unused, StartupError)])
def test_a_failed_start_leaves_nothing(method: type[nn.Module], error: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(error):
        toy.run_toy(tmp_path / "deep" / "run", method=method())
    assert not (tmp_path / "deep" / "run").exists()
    own = tmp_path / "own"
    own.mkdir()
    (own / "notes.txt").write_text("mine")
    with pytest.raises(error):
        toy.run_toy(own, method=method())
    assert [path.name for path in own.iterdir()] == ["notes.txt"]
    toy.run_toy(own)


def test_steps_are_never_taken_away(tmp_path: Path) -> None:
    recipe = toy.toy_recipe(log_every=1)
    with pytest.raises(RuntimeError, match="at last"):
        toy.run_toy(tmp_path, recipe, method=Late())
    assert len(losses(tmp_path)) == 1
    with pytest.raises(UnmaskError, match="already holds a run"):
        toy.run_toy(tmp_path, recipe)
    with pytest.raises(RuntimeError, match="at last"):
        toy.run_toy(tmp_path, recipe, method=Late(), resume=True)
    assert (tmp_path / "recipe.yaml").is_file()


class Doomed(toy.ToyMethod):
    def forward(self, batch: Any, plan: Any) -> Any:
        die()


def killed_at_once(out: Path) -> None:
    toy.run_toy(out, method=Doomed())


def test_a_run_that_was_killed_before_its_first_step_is_not_in_the_way(tmp_path: Path) -> None:
    assert in_process(killed_at_once, tmp_path) < 0
    assert (tmp_path / "recipe.yaml").is_file()
    path = tmp_path / "environment.json"
    found = json.loads(path.read_text())
    alive = found | {"process": found["process"] | {"id": os.getppid()}}
    path.write_text(json.dumps(alive))
    with pytest.raises(UnmaskError, match="already holds a run"):  # one that has just begun, for all we know
        RunDirectory(tmp_path).check_place(resume=False)
    path.write_text(json.dumps(found))
    toy.run_toy(tmp_path)


def test_a_recipe_of_the_users_own_stays(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("mine")
    with pytest.raises(UnmaskError, match="already holds a run"):
        toy.run_toy(tmp_path)
    assert (tmp_path / "recipe.yaml").read_text() == "mine"


def unmask(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of `unmask ARGUMENTS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["unmask", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.mask_ratio=0.999", "Choose a ratio that leaves between 1 and 15 of the 16"),
        ("data.source=EMPTY", "EMPTY"),
        ("training.batch_size=500", "500"),
    ],
)
def test_the_corrected_command_runs(
    setting: str,
    message: str,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "EMPTY").mkdir()
    monkeypatch.chdir(tmp_path)
    base = ["train", "--recipe", recipe, "--out", tmp_path / "run", "--quiet"]
    assert unmask(monkeypatch, *base, "--set", setting) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()
    corrected = []
    if found := re.search(r"between 1 and (\d+) of the (\d+)", error):  # the message's own remedy
        corrected = ["--set", f"model.mask_ratio={1 - 1 / int(found[2])}"]
    assert unmask(monkeypatch, *base, *corrected) == 0
