"""The learning rate: its values at the corners of every schedule, and what it depends on."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from toy import toy_recipe

from unmask.core.method import Clock
from unmask.core.training.recipe import Optimizer, Schedule
from unmask.core.training.schedules import learning_rate, total_steps


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
