"""The collapse monitor: it sees a collapse, its remedies help, and it changes nothing that is trained."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import metrics
from torch import Tensor, nn
from toy import TOKENS, ToyBatch, ToyMethod, ToySet, run_toy, toy_recipe

from unmask.core.evaluation import deviation, rankme
from unmask.core.evaluation.rankme import Spread
from unmask.core.losses import l2, mean_term
from unmask.core.method import Clock, Features, Output, Plan
from unmask.core.targets import EMATeacher, SharedTeacher, teachers
from unmask.core.training.checkpoint import newest
from unmask.core.training.collapse import CollapseMonitor, is_watched, some_tokens
from unmask.core.training.launch import make_fabric
from unmask.core.training.monitor import Display
from unmask.core.training.recipe import Recipe

DIM = 16
NUMBERS = {"rankme", "deviation", "token_rankme", "token_deviation", "target_rank"}


class Clear(ToySet):
    """Samples that differ in every direction, each with six noisy tokens."""

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        sample = int(self.ids[item[0]])
        draws = torch.randn(TOKENS + 1, DIM, generator=torch.Generator().manual_seed(sample))
        return draws[:1] + 0.5 * draws[1:], sample


class Latent(nn.Module):
    """Predicts features of hidden tokens by the mean of visible ones: with no predictor between, it collapses."""

    def __init__(self, decay: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        norm = nn.LayerNorm(DIM, elementwise_affine=False)
        self.encoder = nn.Sequential(nn.Linear(DIM, DIM), nn.GELU(), nn.Linear(DIM, DIM), norm, nn.Dropout(0.1))
        self.teacher = EMATeacher(self.encoder, decay)

    draw = ToyMethod.draw

    def forward(self, batch: ToyBatch, plan: Plan) -> Output:
        visible = plan.mask.visible[..., None]
        answer = (self.encoder(batch.x) * visible).sum(1, keepdim=True) / visible.sum(1, keepdim=True).clamp(min=1)
        return Output(
            {"loss": mean_term(l2(answer.expand(-1, TOKENS, -1), self.target(batch, plan)), plan.mask.hidden)}
        )

    def target(self, batch: ToyBatch, plan: Plan) -> Tensor:
        return self.teacher(batch.x)

    def encode(self, batch: ToyBatch) -> Features:
        return Features(self.encoder(batch.x), (TOKENS,))

    def after_step(self, clock: Clock) -> None:
        self.teacher.update(self.encoder, clock)


def recipe(lr: float = 0.1, steps: int = 75, **training: Any) -> Recipe:
    made = toy_recipe(steps=steps, **{"log_every": 30, "validate_every_epochs": 5} | training)
    optimizer = replace(made.optimizer, base_lr=lr, weight_decay=0.6)
    return replace(made, optimizer=optimizer, schedule=replace(made.schedule, decay="constant"))


def measured(run: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k in NUMBERS} for line in metrics(run) if "val_loss" in line]


def train(out: Path, made: Recipe, method: nn.Module, **options: Any) -> Path:
    return run_toy(out, made, method=method, train=Clear(28), val=Clear(40, 900), **options)


@pytest.mark.parametrize(("decay", "lr", "collapses"), [(0.0, 0.1, True), (0.0, 0.001, False), (0.9999, 0.1, False)])
def test_a_collapse_is_said_once_and_its_remedies_help(
    decay: float, lr: float, collapses: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(Display, "say", lambda self, text: said.append(text))
    found = measured(train(tmp_path / "run", recipe(lr), Latent(decay)))
    assert len(found) == 5 and all(set(line) == NUMBERS for line in found)
    assert (found[-1]["rankme"] < 2) == collapses
    warnings = [text for text in said if "collapse" in text]
    assert len(warnings) == collapses
    if collapses:
        assert re.search(
            r"step \d+: the features use [\d.]+ of 16 dimensions \(RankMe\), under a quarter of the [\d.]+ before; "
            r"the targets use .*: a collapse\. .* a lower optimizer\.base_lr, and a decay of the EMA \(teacher\) that "
            r"is nearer to 1$",
            warnings[0],
        )


def test_the_fall_is_seen_when_it_comes_before_the_first_validation(tmp_path: Path, monkeypatch: Any) -> None:
    said: list[str] = []
    monkeypatch.setattr(Display, "say", lambda self, text: said.append(text))
    train(tmp_path / "run", recipe(validate_every_epochs=100), Latent())
    assert [text[:8] for text in said if "collapse" in text] == ["step 75:"]


def test_losses_are_bit_for_bit_those_of_a_run_without_a_monitor(tmp_path: Path) -> None:
    runs = [
        train(tmp_path / name, recipe(steps=9, monitor=on), Latent()) for name, on in (("on", True), ("off", False))
    ]
    watched, plain = (
        [{k: v for k, v in line.items() if k not in NUMBERS | {"time"}} for line in metrics(run)] for run in runs
    )
    assert watched == plain
    assert measured(runs[0])[-1].keys() == NUMBERS and measured(runs[1])[-1] == {}
    one, two = (newest(run / "checkpoints") for run in runs)
    assert one is not None and two is not None
    assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in two.tensors)


def test_auto_is_for_methods_with_a_teacher() -> None:
    class Own(nn.Module):
        """A teacher that is not of `unmask.core.targets`."""

        kind = "ema"

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    shared, plain, own = ToyMethod(), ToyMethod(), ToyMethod()
    shared.teacher, own.teacher = SharedTeacher(shared.embed), Own(nn.Linear(2, 2))
    plain.kind = "ema"  # type: ignore[assignment]  # without a network it is none
    for method, expected in ((Latent(), True), (shared, True), (own, True), (plain, False)):
        assert is_watched(method, toy_recipe()) is expected, list(teachers(method))
        assert is_watched(method, toy_recipe(monitor=False)) is False
        assert is_watched(method, toy_recipe(monitor=True)) is True


def test_a_method_without_vectors_as_target_has_no_target_rank(tmp_path: Path) -> None:
    class Ids(ToyMethod):
        def target(self, batch: ToyBatch, plan: Plan) -> Tensor:
            return batch.x[..., 0].long()

    for method in (ToyMethod(), Ids()):
        run = run_toy(tmp_path / type(method).__name__, toy_recipe(steps=3, monitor=True), method=method)
        assert measured(run)[0].keys() == NUMBERS - {"target_rank"}


def test_what_is_not_finite_is_null_and_no_alarm(tmp_path: Path) -> None:
    recipe = toy_recipe(steps=3, monitor=True)
    (line,) = measured(run_toy(tmp_path / "run", recipe, val=ToySet(10, 900, broken=2)))
    assert line["rankme"] is None and line["deviation"] is None


def test_an_alarm_needs_a_fall_or_features_that_are_all_alike_and_is_repeated_after_a_recovery() -> None:
    monitor = CollapseMonitor(None, ToyMethod(), [{"rankme": 8.0}, {"loss": 1.0}, {"rankme": None}])
    monitor.dims = {"rankme": 16}
    low, high, alike = ({"rankme": r, "deviation": d} for r, d in ((1.9, 0.3), (2.1, 0.3), (2.1, 0.009)))
    said = [monitor.alarm(numbers) for numbers in (high, low, low, high, alike, high)]
    assert [text is not None for text in said] == [False, True, False, False, True, False]
    assert said[1] == (
        "the features use 1.9 of 16 dimensions (RankMe), under a quarter of the 8.0 before: a collapse. "
        "A low loss means little now; what helps most is a lower optimizer.base_lr"
    )
    assert said[4] is not None and said[4].startswith("all samples have nearly the same feature (deviation 0.009 of 1)")


def test_sums_of_parts_give_what_the_whole_gives() -> None:
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 13) + 2
    spread = Spread()
    for part in x.split(7):
        spread.add(part)
    fabric = make_fabric(toy_recipe(), ".", accelerator="cpu")
    assert spread.finish(fabric) == (pytest.approx(rankme(x), rel=1e-9), pytest.approx(deviation(x), rel=1e-9), 12)


def test_tokens_are_spread_over_the_sample_and_padding_is_left_out() -> None:
    tokens = torch.arange(64.0)[None, :, None].repeat(2, 1, 3)
    assert some_tokens(Features(tokens, (64,)))[:16, 0].tolist() == [round(63 * i / 15) for i in range(16)]
    valid = torch.arange(64)[None] < torch.tensor([[64], [20]])
    assert some_tokens(Features(tokens, (64,), valid=valid))[16:, 0].tolist() == [0, 4, 8, 13, 17]
