"""Checkpoints: round trip, damage of every kind, full disks, other models, and no pickle."""

from __future__ import annotations

import errno
import json
import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from processes import in_ranks
from torch import nn
from toy import ToyMethod, run_toy, toy_recipe

from unmask.core.errors import UnmaskError
from unmask.core.training import checkpoint, files
from unmask.core.training.groups import make_optimizer
from unmask.core.training.launch import make_fabric
from unmask.core.training.recipe import Optimizer
from unmask.core.training.stages import Stage, run_stages


def test_round_trip_of_tensors_that_share_memory(tmp_path: Path) -> None:
    weight = torch.randn(3, 4)
    tensors = {"a": weight, "b": weight.T, "n": torch.tensor(7), "h": torch.randn(2).bfloat16(), "m": torch.ones(2) > 0}
    checkpoint.write(tmp_path / "x.safetensors", tensors, {"step": 3})
    found = checkpoint.read(tmp_path / "x.safetensors")
    assert found.meta == {"step": 3}
    assert all(torch.equal(found.tensors[k], v) for k, v in tensors.items())


@pytest.mark.parametrize("damage", ["truncated", "header", "flipped bit", "metadata", "empty"])
def test_damage_is_noticed(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "step-00000002.safetensors"
    for step in (1, 2):
        checkpoint.write(checkpoint.path_of(tmp_path, step), {"w": torch.arange(500.0)}, {"step": step})
    content = bytearray(path.read_bytes())
    if damage == "flipped bit":
        content[-77] ^= 1
    cut = {"truncated": content[:-4], "header": content[:20], "flipped bit": content, "empty": b""}
    path.write_bytes(cut.get(damage, content.replace(b'\\"step\\": 2', b'\\"step\\": 9')))
    said: list[str] = []
    found = checkpoint.newest(tmp_path, said.append)
    assert found is not None and found.meta["step"] == 1
    assert len(said) == 1 and "step-00000002.safetensors is damaged" in said[0]


def test_all_damaged(tmp_path: Path) -> None:
    checkpoint.path_of(tmp_path, 1).write_bytes(b"no")
    with pytest.raises(checkpoint.CheckpointError, match="every checkpoint in .* is damaged"):
        checkpoint.newest(tmp_path, lambda text: None)
    assert checkpoint.newest(tmp_path / "elsewhere") is None


def test_prune_keeps_the_newest_and_clears_leftovers(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        checkpoint.write(checkpoint.path_of(tmp_path, step), {"w": torch.ones(1)}, {})
    (tmp_path / ".step-00000011.safetensors.tmp").write_bytes(b"half")
    checkpoint.prune(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["step-00000002.safetensors", "step-00000010.safetensors"]


def test_full_disk_leaves_the_file_before_and_no_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint.path_of(tmp_path, 1)
    checkpoint.write(path, {"w": torch.ones(1)}, {"step": 1})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UnmaskError, match="cannot write .*: No space left on device"):
        checkpoint.write(path, {"w": torch.zeros(1)}, {"step": 2})
    assert checkpoint.read(path).meta["step"] == 1
    assert os.listdir(tmp_path) == [path.name]


def test_optimizer_state_by_parameter_name(tmp_path: Path) -> None:
    """State goes to the parameter of the same name, also where the groups hold them in another order."""
    torch.manual_seed(0)
    first, second = (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2))
    mine, other = make_optimizer(first, Optimizer()), make_optimizer(second, Optimizer(weight_decay=0.0))
    other.param_groups.reverse()
    first(torch.ones(1, 3)).sum().backward()
    mine.step()
    checkpoint.load_optimizer(other, checkpoint.optimizer_tensors(mine))
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(mine.state[a]["exp_avg"], other.state[b]["exp_avg"]), name
        assert other.state[b]["step"] == 1


def test_checkpoint_of_another_model_names_what_differs() -> None:
    state = ToyMethod().state_dict()
    state["head.weight"] = torch.zeros(9, 8)
    state["extra"] = state.pop("mask_token")
    with pytest.raises(checkpoint.CheckpointError) as error:
        checkpoint.load_model(ToyMethod(), state, "runs/other")
    for part in ("runs/other holds another model", "mask_token", "extra", "head.weight (9, 8) for (4, 8)"):
        assert part in str(error.value)


def test_no_pickle_in_a_run_directory(tmp_path: Path) -> None:
    """Every file is text, JSON, YAML or safetensors, whose header is JSON."""
    run = run_toy(tmp_path / "run", toy_recipe(steps=3))
    for path in (p for p in run.rglob("*") if p.is_file()):
        assert path.suffix in {".yaml", ".json", ".jsonl", ".safetensors"}
        if path.suffix == ".safetensors":
            content = path.read_bytes()
            json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def test_stages_run_once_and_again_when_their_inputs_change(tmp_path: Path) -> None:
    ran: list[str] = []

    def stage(name: str, **inputs: object) -> Stage:
        def work(out: Path) -> None:
            ran.append(name)
            (out / "result.txt").write_text(name)

        return Stage(name, work, inputs)

    assert run_stages(tmp_path, [stage("kmeans", k=10), stage("train")]) == [tmp_path / "kmeans", tmp_path / "train"]
    run_stages(tmp_path, [stage("kmeans", k=10), stage("train")])
    assert ran == ["kmeans", "train"]
    run_stages(tmp_path, [stage("kmeans", k=20), stage("train")])
    assert ran == ["kmeans", "train", "kmeans", "train"], "a stage runs again after an earlier one changed"
    assert (tmp_path / "train" / "result.txt").read_text() == "train"


def test_a_stage_that_fails_is_not_done_and_keeps_earlier_ones(tmp_path: Path) -> None:
    def fail(out: Path) -> None:
        (out / "half").write_text("")
        raise RuntimeError("stopped")

    good = Stage("one", lambda out: (out / "x").write_text("x"))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="stopped"):
            run_stages(tmp_path, [good, Stage("two", fail)])
    assert (tmp_path / "one" / "x").exists()
    assert not (tmp_path / "two").exists()
    run_stages(tmp_path, [good, Stage("two", lambda out: None)])
    assert not (tmp_path / "two" / "half").exists()


def test_a_stage_depends_only_on_the_stages_it_names(tmp_path: Path) -> None:
    ran: list[str] = []

    def stages(k: int) -> list[Stage]:
        def named(name: str, after: tuple[str, ...], **inputs: object) -> Stage:
            return Stage(name, lambda out: ran.append(name), inputs, after=after)

        return [named("a", (), k=k), named("b", ()), named("c", ("a", "b"))]

    run_stages(tmp_path, stages(1))
    run_stages(tmp_path, stages(2))
    assert ran == ["a", "b", "c", "a", "c"]
    told: list[str] = []
    run_stages(tmp_path, stages(3), keep_done=True, say=told.append)
    assert ran == ["a", "b", "c", "a", "c"], "what is done is taken as it is"
    assert told == [f"stage {i} of 3, {name}: done before" for i, name in enumerate("abc", 1)]
    run_stages(tmp_path, stages(3))
    run_stages(tmp_path, stages(2))
    assert ran == ["a", "b", "c", "a", "c"], "and stays done, for what it was made from and what it was kept for"


def run_slow_stage(out: Path) -> None:
    fabric = make_fabric(toy_recipe(), out, devices=2, accelerator="cpu")
    torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=1))  # Fabric's half hour, in small
    run_stages(out, [Stage("labels", lambda folder: time.sleep(2.5))], fabric=fabric)


def test_processes_wait_for_the_first_one_as_long_as_it_takes(tmp_path: Path) -> None:
    assert in_ranks(2, run_slow_stage, tmp_path) == [0, 0]
    assert (tmp_path / "labels").is_dir()
