"""Schedules: values at the corners, published values, and what they depend on."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from pydantic import TypeAdapter
from toy import toy_recipe

from unmask.core.method import Clock
from unmask.core.training.recipe import Optimizer, Schedule
from unmask.core.training.schedules import NumberOrSchedule, Scheduled, learning_rate, total_steps, value_at
from unmask.core.training.validation import section


def rate(schedule: Schedule, step: int, total: int = 100, batch_size: int = 512) -> float:
    recipe = replace(toy_recipe(batch_size=batch_size), optimizer=Optimizer(base_lr=1e-3), schedule=schedule)
    return learning_rate(recipe)(Clock(step=step, total_steps=total))


def test_warmup_then_cosine_and_linear_scaling() -> None:
    schedule = Schedule(epochs=10, warmup_epochs=2, start_lr=1e-5, min_lr=1e-4)
    assert rate(schedule, 0) == pytest.approx(2e-5)
    assert rate(schedule, 10) == pytest.approx((2e-5 + 2e-3) / 2)
    assert rate(schedule, 20) == pytest.approx(2e-3)  # 512 / 256 times the base
    assert rate(schedule, 60) == pytest.approx(2e-4 + (2e-3 - 2e-4) / 2)
    assert rate(schedule, 100) == pytest.approx(2e-4)


def test_mae_formula_per_step() -> None:
    """Equal to warm-up and half-cosine of the fractional epoch, as published, at every step."""
    schedule, per_epoch = Schedule(epochs=8, warmup_epochs=3), 7
    for step in range(56):
        epoch = step / per_epoch
        expected = 2e-3 * epoch / 3 if epoch < 3 else 1e-3 * (1 + math.cos(math.pi * (epoch - 3) / 5))
        assert rate(schedule, step, 56) == pytest.approx(expected, abs=1e-12)


def test_cosine_from_the_start_is_cut_into_by_the_warmup() -> None:
    schedule = Schedule(epochs=10, warmup_epochs=2, cosine_from="start")
    assert rate(schedule, 20) == pytest.approx(1e-3 * (1 + math.cos(math.pi * 0.2)))


def test_a_smooth_warm_up_and_a_cosine_are_torchs_one_cycle() -> None:
    schedule = Schedule(epochs=10, warmup_epochs=2, warmup="cosine", start_lr=1e-5, min_lr=1e-8)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=101, pct_start=21 / 101, div_factor=100, final_div_factor=1e3, cycle_momentum=False
    )
    for step in range(101):
        assert rate(schedule, step) == pytest.approx(cycle.get_last_lr()[0], rel=1e-6), step
        optimizer.step()
        cycle.step() if step < 100 else None


def test_steps_drop_tenfold() -> None:
    schedule = Schedule(epochs=10, decay="step", step_at=(5, 8))
    assert [rate(schedule, s) for s in (0, 49, 50, 80)] == pytest.approx([2e-3, 2e-3, 2e-4, 2e-5])


def test_a_run_cut_short_keeps_the_shape() -> None:
    """--steps squeezes the same schedule: equal rates at equal progress."""
    schedule = Schedule(epochs=10, warmup_epochs=2)
    short = replace(schedule, steps=50)
    assert [rate(short, s, 50) for s in range(50)] == pytest.approx([rate(schedule, 2 * s) for s in range(50)])


def test_total_steps_drops_incomplete_batches() -> None:
    assert total_steps(toy_recipe(epochs=3, batch_size=8), 31) == 9
    assert total_steps(toy_recipe(steps=5, batch_size=8), 31) == 5


def test_linear_decay_is_a_line_from_the_warm_up_to_the_end() -> None:
    schedule = Schedule(epochs=100, warmup_epochs=8, decay="linear", min_lr=1e-4)
    assert [rate(schedule, s) for s in (4, 8, 54, 100)] == pytest.approx([1e-3, 2e-3, (2e-3 + 2e-4) / 2, 2e-4])


def at(schedule: Scheduled, step: int, total: int, epoch: int = 0) -> float:
    return schedule(Clock(step, total, epoch))


def test_a_horizon_beyond_the_run_stops_on_the_way() -> None:
    """V-JEPA: 90,000 steps of schedules laid over 1.25 times as many; the values at its end, as published."""
    lr = Schedule(epochs=90, warmup_epochs=12, start_lr=1e-4, min_lr=5e-7, horizon=1.25)  # doubled by the batch size
    assert rate(replace(lr, min_lr=5e-7), 12_000, 90_000) == pytest.approx(2e-3)
    published = Scheduled(6.25e-4, 1e-6, "cosine", warmup=12 / 90, warmup_start=2e-4, horizon=1.25)
    assert at(published, 0, 90_000) == pytest.approx(2e-4)
    assert at(published, 90_000, 90_000) == pytest.approx(7.5e-5, rel=0.01)
    assert rate(lr, 90_000, 90_000) == pytest.approx(2e-3 * at(published, 90_000, 90_000) / 6.25e-4, rel=0.01)
    assert at(Scheduled(0.04, 0.4, "cosine", horizon=1.25), 90_000, 90_000) == pytest.approx(0.366, abs=5e-4)
    assert at(Scheduled(0.998, 1.0, horizon=1.25), 90_000, 90_000) == pytest.approx(0.9996)


def test_momentum_of_the_teachers() -> None:
    """I-JEPA's line, LUT's cosine, and HPM's line over 100 epochs whatever the run's length."""
    assert at(Scheduled(0.996, 1.0), 25, 100) == pytest.approx(0.997)
    cosine = Scheduled(0.996, 1.0, "cosine")
    for step in (0, 30, 100):
        expected = 1 + 0.5 * (0.996 - 1) * (1 + math.cos(math.pi * step / 100))
        assert at(cosine, step, 100) == pytest.approx(expected, abs=1e-12)
    ramp = Scheduled(0.999, 0.9999, epochs=100)
    assert at(ramp, 5, 10**6, epoch=40) == pytest.approx(0.999 + 0.4 * 0.0009)
    assert at(ramp, 5, 10**6, epoch=700) == 0.9999


def test_a_constant_keeps_its_value_after_the_warm_up() -> None:
    assert [rate(Schedule(epochs=10, warmup_epochs=2, decay="constant"), s) for s in (10, 20, 100)] == pytest.approx(
        [1e-3, 2e-3, 2e-3]
    )
    assert value_at(0.99, Clock(7, 10)) == 0.99
    assert value_at(Scheduled(0.5), Clock(7, 10)) == 0.5


@dataclass(frozen=True)
class Settings:
    """A method's settings with a momentum that is a number or a schedule."""

    momentum: NumberOrSchedule = Scheduled(0.996, 1.0)


def test_a_setting_may_be_a_number_or_a_schedule() -> None:
    read = TypeAdapter(Settings).validate_python
    assert read({}).momentum == Scheduled(0.996, 1.0)
    assert read({"momentum": 0.99925}).momentum == 0.99925
    assert read({"momentum": {"start": 0.9, "end": 1, "shape": "cosine"}}).momentum == Scheduled(0.9, 1.0, "cosine")
    problems: list[str] = []
    for value in ("much", -1, {"start": "much"}, {"start": 0.9, "edn": 1.0}, {"end": 1.0}):
        section("model", Settings, {"momentum": value}, problems)
    assert [problem.split(" (")[0] for problem in problems] == [
        "model.momentum: input should be a valid number, unable to parse string as a number",
        "model.momentum: input should be greater than or equal to 0",
        "model.momentum.start: input should be a valid number, unable to parse string as a number",
        "model.momentum.edn: unknown key; did you mean end?",
        "model.momentum.start: missing",
    ]


def test_schedules_are_cheap_to_import() -> None:
    code = "import sys, unmask.core.training.schedules; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
