"""Numbers of a run that have to be right: metrics, validation, and what is not finite."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from faults import metrics as lines
from toy import ToyBatch, ToyMethod, ToySet, run_toy, toy_recipe

from unmask.core.mask import Mask
from unmask.core.method import Clock, Metric, Output, Plan
from unmask.core.randomness import Key
from unmask.core.training.checkpoint import newest
from unmask.core.training.loop import Loop
from unmask.core.training.numbers import FiniteWatch, NotFiniteError
from unmask.core.training.position import Position
from unmask.core.training.recipe import Optimizer
from unmask.core.training.startup import StartupError


class Measuring(ToyMethod):
    """Metrics whose counts are ragged: a share of the hidden tokens, and one that batches without a sample lack."""

    sample = 100 + next(iter(Position(3, 28, 8, 8, 3)))[0][0]  # of the first step

    def forward(self, batch: ToyBatch, plan: Plan) -> Output:
        output = super().forward(batch, plan)
        right = (batch.x.mean(-1) > 2)[plan.mask.hidden]
        chosen = batch.x[batch.ids == self.sample]
        metrics = {"accuracy": Metric(right.sum(), right.numel()), "chosen": Metric(chosen.sum(), chosen.numel())}
        return Output(output.terms, metrics)


def test_metrics_do_not_depend_on_the_cut_and_are_left_out_where_nothing_counted(tmp_path: Path) -> None:
    base = replace(toy_recipe(steps=3, log_every=1), optimizer=Optimizer(base_lr=0.0))
    runs = []
    for micro in (8, 4, 2):
        recipe = replace(base, training=replace(base.training, micro_batch=micro))
        runs.append(lines(run_toy(tmp_path / str(micro), recipe, method=Measuring())))
    for whole, *cuts in zip(*runs, strict=True):
        for cut in cuts:
            assert cut.keys() == whole.keys()
            assert {k: v for k, v in cut.items() if "accuracy" in k} == {
                k: v for k, v in whole.items() if "accuracy" in k
            }
            assert cut.get("chosen", 0.0) == pytest.approx(whole.get("chosen", 0.0), rel=1e-6)
    losses = [line for line in runs[0] if "loss" in line]
    assert len({line["accuracy"] for line in losses}) == 3 and 0 < losses[0]["accuracy"] < 1
    assert ["chosen" in line for line in losses] == [True, False, False], "a sample is in one batch of an epoch"
    (validated,) = [line for line in runs[0] if "val_loss" in line]
    assert 0 < validated["val_accuracy"] < 1 and "val_chosen" not in validated


def test_a_metric_that_is_no_metric_is_named(tmp_path: Path, unchecked: None) -> None:
    class Bare(ToyMethod):
        def forward(self, batch: ToyBatch, plan: Plan) -> Output:
            return replace(super().forward(batch, plan), metrics={"scale": batch.x.mean()})

    with pytest.raises(StartupError, match=r"metric 'scale' is a Tensor; give Metric\(total, count\)"):
        run_toy(tmp_path / "run", method=Bare())


def test_metrics_are_strict_json_whatever_they_are(tmp_path: Path) -> None:
    """A validation sample that is NaN, and a metric that is infinite, are null: neither JSON nor readers know NaN."""

    class Infinite(ToyMethod):
        def forward(self, batch: ToyBatch, plan: Plan) -> Output:
            return replace(super().forward(batch, plan), metrics={"odds": Metric(torch.tensor(torch.inf), 1)})

    run = run_toy(tmp_path / "run", toy_recipe(steps=3, log_every=1), method=Infinite(), val=ToySet(10, 900, broken=2))
    text = (run / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    *trained, validated = lines(run)
    assert [line["odds"] for line in trained] == [None] * 3
    assert validated["val_loss"] is None


def test_a_curriculum_does_not_move_the_validation_masks(tmp_path: Path) -> None:
    """Its draws are those of the run's end, at visit 0, each time; training follows the clock."""
    clocks: dict[bool, list[Clock]] = {True: [], False: []}

    class Curriculum(ToyMethod):
        def draw(self, batch: ToyBatch, clock: Clock, key: Key) -> Plan:
            clocks[int(batch.ids.max()) < 900].append(clock)
            noise = key.stream("mask").uniform(6) + 0.3 * clock.progress
            return Plan(Mask.from_hidden(noise <= noise[:, :1].clamp(min=0.2)))

    recipe = replace(toy_recipe(), optimizer=Optimizer(base_lr=0.0))
    run = run_toy(tmp_path / "run", recipe, method=Curriculum())
    assert clocks[True] == [Clock(step, 9, step // 3, 3) for step in range(9)]
    assert set(clocks[False]) == {Clock(9, 9, 3, 3)} and clocks[False][0].progress == 1.0
    values = [line["val_loss"] for line in lines(run) if "val_loss" in line]
    assert len(values) == 3 and len(set(values)) == 1


def test_nan_input_stops_names_the_batch_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    broken = ToySet(28, broken=5)
    order = list(Position(3, 28, 8, 4, 3))
    first = next(i for i, items in enumerate(order) if any(index == 5 for index, _ in items))
    recipe = toy_recipe(micro_batch=4, checkpoint_every_steps=1)
    with pytest.raises(NotFiniteError) as error:
        run_toy(tmp_path / "run", recipe, train=broken)
    names = ", ".join(f"sample-{100 + index}.png" for index, _ in order[first])
    assert f"the loss is NaN or infinite at step {first // 2 + 1}, in the batch with {names}" in str(error.value)
    saved = newest(tmp_path / "run/checkpoints")
    assert (saved.meta["step"] if saved else 0) == first // 2
    assert saved is None or str(saved.path) in str(error.value)


def test_a_gradient_that_is_not_finite_never_reaches_a_checkpoint(tmp_path: Path) -> None:
    """The loss is fine and the gradient is not: the weights are lost, so saving them must not happen."""

    class Poison(ToyMethod):
        def forward(self, batch: ToyBatch, plan: Plan) -> Output:
            output = super().forward(batch, plan)
            if self.training and self.steps == 4:
                output.terms["hidden"].total.register_hook(lambda gradient: gradient * torch.nan)
            return output

        steps = 0

        def after_step(self, clock: Clock) -> None:
            self.steps += 1

    recipe = toy_recipe(log_every=100, checkpoint_every_steps=5)
    with pytest.raises(NotFiniteError, match="the gradient is NaN or infinite at step 5"):
        run_toy(tmp_path / "run", replace(recipe, optimizer=Optimizer(clip_norm=None)), method=Poison())
    assert newest(tmp_path / "run/checkpoints") is None


def test_what_is_looked_at_late_names_the_right_batch_and_has_spared_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where nobody looks before something is written: here a gradient of step 4, at the save of step 7."""

    class Poison(ToyMethod):
        def forward(self, batch: ToyBatch, plan: Plan) -> Output:
            output = super().forward(batch, plan)
            if self.training and self.steps == 3:
                output.terms["hidden"].total.register_hook(lambda gradient: gradient * torch.nan)
            return output

        steps = 0

        def after_step(self, clock: Clock) -> None:
            self.steps += 1

    check, save, late = FiniteWatch.check, Loop._save, []
    monkeypatch.setattr(FiniteWatch, "check", lambda self: check(self) if late else None)
    monkeypatch.setattr(Loop, "_save", lambda self: (late.append(1), save(self)))
    method = Poison()
    with pytest.raises(NotFiniteError, match="the gradient is NaN or infinite at step 4, in the batch with") as error:
        run_toy(tmp_path / "run", toy_recipe(log_every=100, checkpoint_every_steps=7), method=method, val=None)
    order = list(Position(3, 28, 8, 8, 9))
    for index, _ in order[3]:
        assert f"sample-{100 + index}.png" in str(error.value)
    assert method.steps == 7
    assert all(p.isfinite().all() for p in method.parameters())
