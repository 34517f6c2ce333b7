"""Optimizer groups: a method's own, and a weight decay that moves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from toy import ToyMethod, run_toy, toy_recipe

from unmask.core.method import Clock
from unmask.core.training.groups import make_optimizer, set_rates
from unmask.core.training.recipe import Optimizer
from unmask.core.training.schedules import Scheduled
from unmask.core.training.startup import StartupError, check_groups


def named(prefix: str, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(f"{prefix}.{name}", p) for name, p in module.named_parameters()]


class Layered(ToyMethod):
    """Layers that learn at rates of their own: the embedding slowest, the mask token without decay whatever it is."""

    extra: dict[str, Any] = {}

    def param_groups(self) -> list[dict[str, Any]]:
        return [
            {"params": named("embed", self.embed), "lr_scale": 0.25, **self.extra},
            {"params": named("norm", self.norm), "lr_scale": 0.5},
            {"params": [("mask_token", self.mask_token)], "weight_decay": 0.3},
            {"params": named("head", self.head)},
        ]


def rates(method: nn.Module, settings: Optimizer, learning_rate: float, weight_decay: float) -> dict[str, Any]:
    optimizer = make_optimizer(method, settings)
    check_groups(method, optimizer)
    set_rates(optimizer, learning_rate, weight_decay)
    return {name: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for name in g["param_names"]}


def test_layers_with_rates_of_their_own() -> None:
    assert rates(Layered(), Optimizer(weight_decay=0.1), 1.0, 0.2) == {
        "embed.weight": (0.25, 0.2),
        "embed.bias": (0.25, 0.0),
        "norm.weight": (0.5, 0.0),
        "norm.bias": (0.5, 0.0),
        "mask_token": (1.0, 0.3),
        "head.weight": (1.0, 0.2),
        "head.bias": (1.0, 0.0),
    }


def test_a_parameter_that_is_left_out_is_named() -> None:
    class Forgetful(Layered):
        def param_groups(self) -> list[dict[str, Any]]:
            return super().param_groups()[:-1]

    method = Forgetful()
    with pytest.raises(StartupError, match=r"in no optimizer group: head\.weight, head\.bias"):
        check_groups(method, make_optimizer(method, Optimizer()))


def test_a_key_that_means_nothing_is_refused() -> None:
    class Misspelt(Layered):
        extra = {"lr": 0.1}

    with pytest.raises(StartupError, match="unknown key 'lr'; a group has decay_all, lr_scale, params, weight_decay"):
        make_optimizer(Misspelt(), Optimizer())


def test_a_decay_that_moves_reaches_the_weights(tmp_path: Path) -> None:
    seen: list[list[float]] = []

    class Watched(ToyMethod):
        optimizer: Any

        def after_step(self, clock: Clock) -> None:
            seen.append([group["weight_decay"] for group in self.optimizer.param_groups])

    schedule = Scheduled(0.04, 0.4, "cosine")
    method = Watched()
    recipe = toy_recipe(steps=4)
    recipe = replace(recipe, optimizer=replace(recipe.optimizer, weight_decay=schedule))

    from unmask.core.training import loop

    def spy(*args: Any) -> Any:
        method.__dict__["optimizer"] = make_optimizer(*args)
        return method.optimizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_optimizer", spy)
        run_toy(tmp_path / "run", recipe, method=method)
    assert seen == [[schedule(Clock(step, 4)), 0.0] for step in range(4)]
    assert seen[0][0] == pytest.approx(0.04)
