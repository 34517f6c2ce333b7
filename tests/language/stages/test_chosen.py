"""The fine-tuning before preference optimisation: one run, its network, and taking it up again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from unmask.core.training.checkpoint import load_run
from unmask.core.training.loop import train
from unmask.core.training.recipe import Recipe, load_recipe
from unmask.language.methods.sparsepo import SparsePO, outline


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))
    words = ["the", "whale", "swam", "on", "and", "the", "ship", "went", "after", "it"]
    rows = [
        {"prompt": f"{i}:", "chosen": " " + " ".join(words[i % 5 :]), "rejected": " " + " ".join(words[::-1][i % 5 :])}
        for i in range(24)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes = {
        "data.source": str(tmp_path / "pairs.jsonl"), "data.vocabulary_size": 280, "data.length": 64,
        "data.prompt_length": 16, "data.val_share": 0.2, "training.batch_size": 4, "stages.length": 1.5,
        "model.network.config": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    }  # fmt: skip
    return load_recipe("language/sparsepo", "tiny", changes, steps=2)


def test_the_stages(recipe: Recipe, tmp_path: Path) -> None:
    """The network that the first stage made is where the policy starts, and what it is held against."""
    assert [(stage.name, stage.recipe.schedule.steps) for stage in outline(recipe)] == [("sft", 3), ("training", 2)]  # type: ignore[union-attr]
    run = train(recipe, tmp_path / "run", progress=False)
    made = run / "stages" / "network"
    assert (made / "tokenizer.json").is_file()
    first = yaml.safe_load((run / "stages" / "sft" / "recipe.yaml").read_text())
    assert (first["model"]["loss"], first["optimizer"]["base_lr"]) == ("sft", 1e-3)
    written = yaml.safe_load((run / "recipe.yaml").read_text())
    assert written["networks"]["model"]["source"] == str(made)
    method: Any = load_run(run).method
    assert isinstance(method, SparsePO)
    held = load_file(made / "model.safetensors")["transformer.wte.weight"]
    assert torch.equal(method.reference.module.transformer.wte.weight, held)
    moved = (method.model.transformer.wte.weight - held).abs().max()
    assert 0 < moved < 1e-2
    assert not any(name.startswith("reference") for name in load_file(run / "model.safetensors"))


def test_a_run_is_taken_up_again_in_another_place(recipe: Recipe, tmp_path: Path) -> None:
    """The stage is not repeated, and the steps are those of a run in one go."""
    recipe = replace(recipe, schedule=replace(recipe.schedule, decay="constant"))
    train(recipe, tmp_path / "whole", progress=False)
    stages = replace(recipe.stages, length=3.0)
    short = replace(recipe, schedule=replace(recipe.schedule, steps=1), stages=stages)
    train(short, tmp_path / "part", progress=False)
    (tmp_path / "part").rename(tmp_path / "moved")
    stamp = (tmp_path / "moved" / "stages" / "sft" / "model.safetensors").stat().st_mtime_ns
    written = load_recipe(None, str(tmp_path / "moved" / "recipe.yaml"))
    assert written.networks
    longer = replace(written, schedule=replace(written.schedule, steps=2))
    train(longer, tmp_path / "moved", resume=True, extend=True, progress=False)
    assert (tmp_path / "moved" / "stages" / "sft" / "model.safetensors").stat().st_mtime_ns == stamp
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "moved"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
