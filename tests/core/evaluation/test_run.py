"""Evaluation by task: a domain's module measures, core does the rest."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import toyland

from unmask.core import cli, registry
from unmask.core.domain import check_domain
from unmask.core.errors import UnmaskError
from unmask.core.evaluation.embedding import embed
from unmask.core.evaluation.run import evaluate
from unmask.core.training.checkpoint import load_run
from unmask.core.training.loop import train
from unmask.core.training.recipe import load_recipe


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A run of a method that is no pre-training, in a domain that evaluates its task in a module of its own."""
    toyland.install(monkeypatch)
    methods = registry.methods()
    card = replace(methods["toyland/plain"], kind="generate", task="generation")
    monkeypatch.setattr(registry, "methods", lambda: methods | {"toyland/plain": card})
    return train(load_recipe("toyland/plain", "tiny"), tmp_path / "run", progress=False)


def with_task(monkeypatch: pytest.MonkeyPatch) -> None:
    domain = replace(toyland.DOMAIN, tasks={"generation": "toyland.generation"})
    monkeypatch.setattr(toyland, "DOMAIN", domain)
    check_domain(domain)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["unmask", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_a_task_of_another_kind_is_measured_by_its_module(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_task(monkeypatch)
    assert command(monkeypatch, "evaluate", run, "--device", "cpu") == 0
    text = capsys.readouterr().out
    assert "what it answers" in text and "the mean" in text and "without training" in text
    found = json.loads((run / "evaluation.json").read_text())
    assert (found["method"], found["data"], found["quick"]) == ("toyland/plain", "toy", False)
    assert list(found["rows"]) == list(found["names"]) == ["trained", "random", "mean"]
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert found["val_loss"] == [line["val_loss"] for line in last if "val_loss" in line][-1]
    assert found["rows"]["trained"]["error"] != found["rows"]["random"]["error"] > 0
    assert f"{found['rows']['trained']['error']:.3f}" in text
    alone = evaluate(run, device="cpu", references=False)
    assert alone["rows"] == {"trained": found["rows"]["trained"]} and list(alone["names"]) == ["trained"]
    again = evaluate(run, device="cpu")
    assert again["rows"] == found["rows"]


def test_a_task_that_no_module_measures_is_refused(run: Path) -> None:
    with pytest.raises(UnmaskError, match="toyland/plain is of the task 'generation', which unmask-toyland does not"):
        evaluate(run, device="cpu")
    assert not (run / "evaluation.json").exists()


def test_a_task_module_without_rows_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "half_a_task", SimpleNamespace(measure=None, table=None))
    with pytest.raises(AssertionError, match="half_a_task has no ROWS"):
        check_domain(replace(toyland.DOMAIN, tasks={"generation": "half_a_task"}))


def test_a_domain_without_an_encoding_of_its_own_is_embedded_all_the_same(run: Path, tmp_path: Path) -> None:
    found = pq.read_table(embed(run, "elsewhere", tmp_path / "features.parquet", device="cpu"))
    dataset = registry.data_kind("toyland/plain").open_split(None, "all")
    assert found["id"].to_pylist() == dataset.ids.tolist()
    assert found["name"].to_pylist()[0] == f"sample-{int(dataset.ids[0])}.png"
    method: Any = load_run(run).method
    batch = registry.data_kind("toyland/plain").collate([dataset[i, 0] for i in range(len(dataset))])
    with torch.no_grad():
        expected = method.encode(batch).pooled
    torch.testing.assert_close(torch.tensor(found["embedding"].to_pylist()), expected)
