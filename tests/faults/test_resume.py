"""Killed at any moment, a run resumes to the same weights, optimizer state and metrics, bit for bit."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
import torch
from faults import metrics, train
from processes import in_process

from unmask.core.training.checkpoint import newest, read


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert in_process(train, out) == 0
    return out


def assert_same_run(run: Path, other: Path) -> None:
    """Equal weights, optimizer, generators and metrics."""
    for name in ("model.safetensors", "checkpoints/step-00000009.safetensors", "checkpoints/step-00000008.safetensors"):
        mine, theirs = read(run / name), read(other / name)
        assert mine.tensors.keys() == theirs.tensors.keys()
        differing = [k for k in mine.tensors if not torch.equal(mine.tensors[k], theirs.tensors[k])]
        assert not differing, f"{name}: {differing}"
    assert metrics(run) == metrics(other)


def test_the_undisturbed_run_is_worth_comparing_with(undisturbed: Path) -> None:
    """It has dropout, several epochs, two micro-batches a step, a validation line per epoch and optimizer state."""
    lines = metrics(undisturbed)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 10))
    assert [line["step"] for line in lines if "val_loss" in line] == [3, 6, 9]
    tensors = read(undisturbed / "checkpoints/step-00000009.safetensors").tensors
    assert "optimizer/embed.weight/exp_avg_sq" in tensors
    assert "rng/0/cpu" in tensors


@pytest.mark.parametrize(
    ("fault", "saved"),
    [("in the first step", None), ("in a step", 4), ("in accumulation", 4), ("in a save", 4), ("before the rename", 4)],
)
def test_killed(fault: str, saved: int | None, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert in_process(train, run, fault) == -signal.SIGKILL
    found = newest(run / "checkpoints")
    assert (found.meta["step"] if found else None) == saved
    assert in_process(train, run, "", True) == 0
    assert_same_run(run, undisturbed)
    assert not list(run.glob("**/.*.tmp")), "an interrupted write left its temporary file"


def test_killed_twice_and_once_between_epochs(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert in_process(train, run, "in accumulation") == -signal.SIGKILL
    assert in_process(train, run, "in a save", True) == -signal.SIGKILL
    assert in_process(train, run, "", True) == 0
    assert_same_run(run, undisturbed)


def test_a_data_worker_is_killed(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert in_process(train, run, "in a worker", False, 2) == 1
    error = (run / "error.txt").read_text()
    assert error.startswith("UnmaskError: a data loading process died")
    assert f"unmask train --resume {run}" in error
    assert in_process(train, run, "", True, 2) == 0
    assert_same_run(run, undisturbed)  # which had no workers: they change nothing either


@pytest.mark.parametrize("fault", ["terminated", "interrupted"])
def test_asked_to_stop(fault: str, undisturbed: Path, tmp_path: Path) -> None:
    """The step is finished and saved, whatever `checkpoint_every_steps` says."""
    run = tmp_path / "run"
    assert in_process(train, run, fault) == 1  # the exception; the command line makes 143 or 130 of it
    said = f"Interrupted: stopped at step 5 of 9, and saved. Go on with: unmask train --resume {run}"
    assert (run / "error.txt").read_text() == said
    assert newest(run / "checkpoints").meta["step"] == 5  # type: ignore[union-attr]
    assert in_process(train, run, "", True) == 0
    assert_same_run(run, undisturbed)


def test_truncated_newest_checkpoint(undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The one before is taken, and a line says so; the end is the same."""
    run = tmp_path / "run"
    assert in_process(train, run, "terminated") == 1
    path = run / "checkpoints/step-00000005.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    found = newest(run / "checkpoints", print)
    assert found is not None
    assert found.meta["step"] == 4
    said = capsys.readouterr().out
    assert "step-00000005.safetensors is damaged" in said
    assert "going back to the one before" in said
    assert in_process(train, run, "", True) == 0
    assert_same_run(run, undisturbed)


def test_full_disk(undisturbed: Path, tmp_path: Path) -> None:
    """One clear line, the earlier checkpoints intact, nothing half written, and an exact end once there is room."""
    run = tmp_path / "run"
    assert in_process(train, run, "full disk") == 1
    error = (run / "error.txt").read_text()
    assert error.startswith(f"UnmaskError: cannot write {run}/checkpoints/step-00000006.safetensors")
    assert len(error.splitlines()) == 1
    assert newest(run / "checkpoints").meta["step"] == 4  # type: ignore[union-attr]
    assert not list(run.glob("**/.*"))
    assert in_process(train, run, "", True) == 0
    assert_same_run(run, undisturbed)


def test_resuming_a_finished_run_changes_nothing(undisturbed: Path, tmp_path: Path) -> None:
    run = shutil.copytree(undisturbed, tmp_path / "run")
    (run / "model.safetensors").unlink()  # killed between the last checkpoint and the final weights
    assert in_process(train, run, "", True) == 0
    assert_same_run(run, undisturbed)
