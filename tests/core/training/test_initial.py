"""Initial weights from another method's run: the encoder, an account of it, and one error where it does not fit."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toyland

from unmask.core import cli
from unmask.core.errors import UnmaskError
from unmask.core.method import encoder_of
from unmask.core.training.checkpoint import load_run
from unmask.core.training.initial import take_encoder
from unmask.core.training.launch import build
from unmask.core.training.recipe import load_recipe


@pytest.fixture
def teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    toyland.install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "train", "toyland/plain", "--out", "runs/first", "--quiet") == 0
    return "runs/first"


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["unmask", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def guided(init: str, **changes: Any) -> Any:
    overrides = {"networks.teacher": "runs/first", "init": init, **changes}
    return load_recipe("toyland/guided", "tiny", overrides)


def test_the_encoder_is_taken_and_the_rest_accounted_for(teacher: str) -> None:
    said: list[str] = []
    method: Any = build(guided(teacher), say=said.append)
    trained: Any = load_run(teacher).method
    for name, tensor in trained.encoder.state_dict().items():
        assert torch.equal(method.encoder.state_dict()[name], tensor)
        assert torch.equal(method.mean.module.state_dict()[name], tensor), "an EMA begins as a copy of what was loaded"
    (text,) = said
    assert text == (
        "took 4 tensors of the encoder of toyland/plain (runs/first); left 2 (head); new in toyland/guided: 2 (head)"
    )
    before: Any = build(guided(None))  # type: ignore[arg-type]
    assert torch.equal(method.head.weight, before.head.weight), "the rest is what the seed gives"


def test_through_the_command_line(
    teacher: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "toyland/guided", "--network", f"teacher={teacher}", "--init", teacher]
    assert command(monkeypatch, *arguments, "--out", "runs/second") == 0
    assert "took 4 tensors of the encoder of toyland/plain (runs/first)" in capsys.readouterr().err
    shutil.rmtree("runs/second/checkpoints")
    Path("runs/second/model.safetensors").unlink()
    assert command(monkeypatch, "train", "--resume", "runs/second") == 0, (
        "before the first checkpoint it is taken again"
    )
    assert "took 4 tensors" in capsys.readouterr().err


def test_a_run_of_the_same_method_is_taken_whole(teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command(monkeypatch, *f"train toyland/guided --network teacher={teacher} --out runs/a --quiet".split()) == 0
    method, trained = build(guided("runs/a")), load_run("runs/a").method
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in method.state_dict().items())
    mean: Any = method.mean
    assert not torch.equal(mean.module[0].weight, method.encoder[0].weight), "its EMA, too"  # type: ignore[index, union-attr]


def test_another_shape_names_the_setting_and_the_remedy_works(
    teacher: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "toyland/guided", "--network", f"teacher={teacher}", "--init", teacher, "--out", "runs/b"]
    assert command(monkeypatch, *arguments, "--set", "model.encoder.dim=6", "--quiet") == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "the encoder of toyland/plain does not fit that of toyland/guided" in said
    assert "model.encoder.dim is 8 there and 6 here" in said and "0.weight is 8 x 4 there and 6 x 4 here" in said
    remedy = shlex.split(said.split("trained with: ")[1])
    assert remedy == ["--set", "model.encoder.dim=8"]
    assert command(monkeypatch, *arguments, *remedy, "--quiet") == 0


def test_rates_may_differ_and_what_weights_mean_may_not(teacher: str) -> None:
    assert build(guided(teacher, **{"model.encoder.rate": 0.5}), say=lambda text: None)
    with pytest.raises(UnmaskError, match=r"model.encoder.kind is .*a.* there and .*b.* here.*what the weights mean"):
        build(guided(teacher, **{"model.encoder.kind": "b"}), say=lambda text: None)


def test_the_network_that_transfers(teacher: str) -> None:
    method: Any = load_run(teacher).method
    assert encoder_of(method) is method.encoder
    method.encoder_of = lambda: method.head
    assert encoder_of(method) is method.head
    with pytest.raises(UnmaskError, match="which network of Linear transfers"):
        encoder_of(torch.nn.Linear(2, 2))


def test_a_run_of_another_domain(teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from unmask.core import registry

    recipe = guided(teacher)
    monkeypatch.setattr(registry, "domains", lambda: {"toyland": "toyland", "other": "toyland"})
    method = build(guided(None))  # type: ignore[arg-type]
    text = Path("runs/first/recipe.yaml").read_text()
    Path("runs/first/recipe.yaml").write_text(text.replace("toyland/plain", "other/plain"))
    with pytest.raises(
        UnmaskError, match="a run of other/plain has no encoder for toyland/guided; give a run of a toy"
    ):
        take_encoder(method, recipe, Path(teacher))
