"""Recipes: read, overridden, and every problem reported at once."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from unmask.core import registry
from unmask.core.training import changes
from unmask.core.training.build_check import _WithoutWeights
from unmask.core.training.changes import changed_keys, with_defaults
from unmask.core.training.recipe import (
    RecipeError,
    as_dict,
    cross_checks,
    load_recipe,
    make_recipe,
    parse_override,
    to_yaml,
)


def raw(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "method": "vision/mae",
        "model": {"encoder": {"patch_size": 4, "dim": 32, "depth": 1, "heads": 2}, "decoder": {"dim": 16, "heads": 2}},
        "data": {"source": "mnist5k", "image_size": 28, "channels": 1},
        "optimizer": {"base_lr": "1e-4"},
        "training": {"batch_size": 64, "micro_batch": 16},
    }
    return base | changes


def problems(*args: Any, **kwargs: Any) -> list[str]:
    with pytest.raises(RecipeError) as error:
        make_recipe(*args, **kwargs)
    return error.value.problems


def test_round_trip_through_yaml(tmp_path: Path) -> None:
    recipe = make_recipe(raw())
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    assert load_recipe(None, str(tmp_path / "recipe.yaml")) == recipe
    assert recipe.data.image_size == (28, 28)


def test_a_number_that_yaml_takes_for_a_string(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-4 as text and 1.0e-4 as a number; both mean the number."""
    (tmp_path / "r.yaml").write_text(to_yaml(make_recipe(raw())).replace("base_lr: 0.0001", "base_lr: 1e-4"))
    assert "base_lr: 1e-4" in (tmp_path / "r.yaml").read_text()
    assert load_recipe("vision/mae", str(tmp_path / "r.yaml")).optimizer.base_lr == 1e-4


def test_keys_that_an_older_version_did_not_know_count_as_their_defaults() -> None:
    recipe = make_recipe(raw())
    old = as_dict(recipe)
    for section, key in (("schedule", "horizon"), ("training", "monitor"), ("optimizer", "clip_norm")):
        del old[section][key]
    del old["model"]["decoder"]["depth"], old["networks"], old["init"]
    assert changed_keys(old, recipe) == {}
    given = make_recipe(raw(), {"schedule.horizon": 2.0, "model.decoder.depth": 3})
    assert changed_keys(old, given) == {
        "model.decoder.depth": f"model.decoder.depth was {recipe.model.decoder.depth}, now 3",
        "schedule.horizon": "schedule.horizon was 1.0, now 2.0",
    }


def test_a_section_that_is_filled_in_later_is_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """A data setting may be null before the data are opened and a whole dataclass afterwards."""
    recipe = make_recipe(raw())
    before, after = as_dict(recipe), as_dict(recipe)
    before["data"]["found"], after["data"]["found"] = None, {"size": 3, "names": [1, 2]}
    monkeypatch.setattr(changes, "filled_in", lambda recipe: frozenset({"data.found"}))
    monkeypatch.setattr(changes, "as_dict", lambda recipe: after)
    assert changed_keys(before, recipe) == {}
    before["data"]["found"] = {"size": 4, "names": [1, 2]}
    assert list(changed_keys(before, recipe)) == ["data.found.size"]


def test_lists_and_tables_of_an_older_recipe_are_filled_in_too() -> None:
    @dataclass(frozen=True)
    class Part:
        size: int
        kind: str = "plain"

    @dataclass(frozen=True)
    class Whole:
        parts: tuple[Part, ...]
        named: dict[str, Part]
        more: tuple[Part, ...] = field(default_factory=lambda: (Part(7),))

    now = Whole((Part(1), Part(2)), {"a": Part(3)})
    filled = with_defaults({"parts": [{"size": 1}, {"size": 5}], "named": {"a": {"size": 3}}}, now)
    assert filled["parts"] == [{"kind": "plain", "size": 1}, {"kind": "plain", "size": 5}]
    assert (filled["named"], filled["more"]) == ({"a": {"kind": "plain", "size": 3}}, [{"size": 7, "kind": "plain"}])


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("on", True), ("off", False), ("true", True)])
def test_the_monitor_is_on_off_or_auto(text: str, value: object) -> None:
    assert make_recipe(raw(), dict([parse_override(f"training.monitor={text}")])).training.monitor == value
    assert "training.monitor" in problems(raw(), {"training.monitor": "sometimes"})[0]


def test_overrides_are_yaml_and_reach_any_depth() -> None:
    texts = ["model.encoder.depth=3", "training.micro_batch=null", "optimizer.betas=[0.8, 0.9]", "data.flip=0"]
    recipe = make_recipe(raw(), dict(map(parse_override, texts)))
    assert recipe.model.encoder.depth == 3
    assert recipe.training.micro_batch is None
    assert recipe.optimizer.betas == (0.8, 0.9)
    assert recipe.data.flip == 0.0


def test_all_problems_at_once() -> None:
    bad = raw(
        sede=1,
        optimizer={"base_lrr": 1e-3, "weight_decay": -1},
        schedule={"epochs": "many", "decay": "exponential"},
        training={"batch_size": 64, "precison": "auto", "micro_batch": 0},
    )
    bad["model"] |= {"mask_raito": 0.5, "norm_pix": "maybe"}
    bad["model"]["encoder"]["depht"] = 2
    bad["data"] |= {"crop_scale": [0.9, 0.1]}
    found = "\n".join(problems(bad))
    for part in (
        "sede: unknown key; did you mean seed?",
        "optimizer.base_lrr: unknown key; did you mean base_lr?",
        "optimizer.weight_decay: input should be greater than or equal to 0 (got -1)",
        "schedule.epochs: input should be a valid integer",
        "(got 'many')",
        "schedule.decay: input should be 'cosine', 'linear', 'step' or 'constant' (got 'exponential')",
        "training.precison: unknown key; did you mean precision?",
        "training.micro_batch: input should be greater than or equal to 1 (got 0)",
        "model.mask_raito: unknown key; did you mean mask_ratio?",
        "model.encoder.depht: unknown key; did you mean depth?",
        "model.norm_pix: input should be a valid boolean",
        "crop_scale is (0.9, 0.1)",
    ):
        assert part in found, f"{part!r} not in\n{found}"


def test_missing_and_misplaced_sections() -> None:
    found = problems({"method": "vision/mae", "data": {}, "training": 3})
    assert "data.source: missing" in found
    assert "training: expected keys and values, got 3" in found


@pytest.mark.parametrize("ratio", [0, 1.2])
def test_what_the_method_refuses_is_in_the_list(ratio: float) -> None:
    (problem,) = problems(raw(), {"model.mask_ratio": ratio})
    assert problem.startswith("model") and str(ratio) in problem


def test_a_patch_that_does_not_divide_the_image() -> None:
    (problem,) = problems(raw(), {"model.encoder.patch_size": 5})
    assert problem.startswith("model: ") and "5" in problem and "28" in problem


def test_building_for_the_check_takes_no_weights_no_compiler_and_no_random_numbers() -> None:
    """Importing torch's compiler takes seconds, which an error in a recipe should not wait for."""
    program = """
import sys, torch
from unmask.core.training.recipe import load_recipe
before = torch.get_rng_state()
load_recipe("vision/mae", "paper")
assert torch.equal(before, torch.get_rng_state())
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_layers_are_built_without_memory_and_tables_with_values() -> None:
    with _WithoutWeights():
        layer, embedding = nn.Linear(10**6, 10**6), nn.Embedding(10**6, 10**6)
        table = torch.arange(3.0)
        nn.init.trunc_normal_(layer.weight)
        nn.init.zeros_(embedding.weight)
    assert layer.weight.is_meta and embedding.weight.is_meta and table.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "world", "text"),
    [
        ({"training.batch_size": 60}, 1, "60 is not a multiple of micro_batch 16; the nearest is 64"),
        ({}, 3, "64 is not a multiple of micro_batch 16 on 3 devices; the nearest is 48"),
        ({"schedule.epochs": 3, "schedule.warmup_epochs": 4}, 1, "4 is longer than the run of 3 epochs"),
        ({"schedule.decay": "step"}, 1, "schedule.step_at: decay is step, so give"),
        ({"schedule.step_at": [3]}, 1, "only used with decay: step"),
        ({"schedule.decay": "step", "schedule.step_at": [30, 20]}, 1, "should rise and stay within"),
    ],
)
def test_values_that_do_not_fit_together(changes: dict[str, Any], world: int, text: str) -> None:
    (problem,) = problems(raw(), changes, world=world)
    assert text in problem


def test_epochs_and_steps_keep_the_shape_of_the_schedule() -> None:
    base = raw(schedule={"epochs": 100, "warmup_epochs": 10, "decay": "step", "step_at": [50]})
    short = make_recipe(base, epochs=20).schedule
    assert (short.epochs, short.warmup_epochs, short.step_at) == (20, 2.0, (10.0,))
    assert make_recipe(raw(), steps=7).schedule.steps == 7
    assert make_recipe(raw(schedule={"steps": 9}), epochs=2).schedule.steps is None


def test_wrong_files(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    for text, message in (("a: [", "not YAML"), ("- a", "expected keys and values"), ("seed: 1", "method: missing")):
        path.write_text(text)
        with pytest.raises(RecipeError, match=message):
            load_recipe(None, str(path))
    path.write_text(to_yaml(make_recipe(raw())))
    with pytest.raises(RecipeError, match="'vision/mae', but 'vision/simmim' was asked for"):
        load_recipe("vision/simmim", str(path))
    with pytest.raises(registry.UnknownMethodError, match="did you mean 'vision/mae'"):
        load_recipe("vision/mea", "tiny")


@pytest.mark.parametrize("method", sorted(registry.methods()))
def test_every_shipped_recipe_is_sound(method: str) -> None:
    folder = registry.card(method).path.parent.parent / "recipes"
    names = [path.name.split(".")[1] for path in folder.glob(f"{method.split('/')[1]}.*.yaml")]
    assert {"tiny", "paper"} <= set(names)
    for name in names:
        recipe = load_recipe(method, name)
        assert cross_checks(recipe) == []
        assert as_dict(recipe)["method"] == method
