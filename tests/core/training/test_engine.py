"""A method with a backward of its own: exact on any number of ranks, refused where it would not be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import in_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy import ToyBatch, ToyMethod, ToySet, run_toy, toy_recipe

from unmask.core.errors import UnmaskError
from unmask.core.method import Clock, Output, Plan
from unmask.core.training.engine import Engine
from unmask.core.training.launch import make_fabric
from unmask.core.training.recipe import Optimizer


class Gated(ToyMethod):
    """As R-AMT: the gradient of the first loss, dropped where the second one's has another sign."""

    gradients: dict[str, Tensor]

    def __init__(self) -> None:
        super().__init__(terms=2)

    def backward(self, output: Output, engine: Engine) -> None:
        parameters = list(self.parameters())
        wanted = engine.gradients(engine.mean("hidden"), parameters)
        other = engine.gradients(engine.mean("visible"), parameters)
        for parameter, a, b in zip(parameters, wanted, other, strict=True):
            parameter.grad = torch.where(a * b >= 0, a, 0.0)

    def after_step(self, clock: Clock) -> None:
        if clock.step == 0:
            self.gradients = {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}


def train(out: Path, world: int) -> None:
    torch.set_num_threads(1)
    recipe = toy_recipe(steps=2, batch_size=16, threads=1, log_every=1)
    recipe = replace(recipe, optimizer=Optimizer(clip_norm=None))
    method = Gated()
    run_toy(out, recipe, fabric=make_fabric(recipe, out, devices=world, accelerator="cpu"), method=method, val=None)
    save_file(method.gradients, f"{out}-{torch.distributed.get_rank() if world > 1 else 0}.safetensors")


def test_a_rule_that_is_not_linear_is_the_same_on_two_ranks(tmp_path: Path) -> None:
    for world in (1, 2):
        assert in_ranks(world, train, tmp_path / str(world), world) == [0] * world
    one = load_file(tmp_path / "1-0.safetensors")
    assert any((gradient == 0).any() and (gradient != 0).any() for gradient in one.values()), "some are dropped"
    for rank in (0, 1):
        two = load_file(tmp_path / f"2-{rank}.safetensors")
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-7, msg=name)


def test_parts_that_each_follow_a_loss_of_their_own(tmp_path: Path) -> None:
    """As COMET: what a loss reaches on its way to its own part gets nothing from it."""

    class Players(Gated):
        def backward(self, output: Output, engine: Engine) -> None:
            hidden, visible = engine.mean("hidden"), engine.mean("visible")
            judge = [self.head.weight, self.head.bias]
            rest = [p for p in self.parameters() if all(p is not q for q in judge)]
            engine.backward(hidden, judge)
            engine.backward(visible, rest)
            engine.backward(hidden, rest)

    recipe = replace(toy_recipe(steps=1, batch_size=16), optimizer=Optimizer(clip_norm=None))
    players = Players()
    run_toy(tmp_path / "run", recipe, method=players, val=None)
    sums = {}
    for name, weights in {"hidden": (1.0, 0.0), "both": (1.0, 1.0)}.items():
        method = Weighted(weights)
        run_toy(tmp_path / name, recipe, method=method, val=None)
        sums[name] = method.gradients
    for name, gradient in players.gradients.items():
        expected = sums["hidden" if name.startswith("head") else "both"][name]
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7, msg=name)


class Weighted(ToyMethod):
    """The two losses by given weights and the ordinary backward pass."""

    gradients: dict[str, Tensor]

    def __init__(self, weights: tuple[float, float]) -> None:
        super().__init__(terms=2)
        self.weights = weights

    def forward(self, batch: ToyBatch, plan: Plan) -> Output:
        output = super().forward(batch, plan)
        terms = zip(output.terms.items(), self.weights, strict=True)
        return Output({name: replace(term, weight=weight) for (name, term), weight in terms})

    def after_step(self, clock: Clock) -> None:
        self.gradients = {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}


def test_several_passes_a_step_are_refused_and_the_remedy_works(tmp_path: Path) -> None:
    recipe = toy_recipe(steps=1, micro_batch=4)
    with pytest.raises(UnmaskError, match=r"a step is 2 passes; set training\.micro_batch=null"):
        run_toy(tmp_path / "run", recipe, method=Gated(), train=ToySet(28))
    assert not (tmp_path / "run/recipe.yaml").exists(), "nothing is left that would refuse the corrected command"
    run_toy(tmp_path / "run", replace(recipe, training=replace(recipe.training, micro_batch=None)), method=Gated())
