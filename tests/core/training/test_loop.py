"""The training loop: exact gradients however a batch is cut, and everything that stops a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toy import ToyBatch, ToyMethod, ToySet, run_toy, toy_recipe

from unmask.core.errors import UnmaskError
from unmask.core.method import Clock, Output, Plan
from unmask.core.randomness import Key
from unmask.core.training.checkpoint import newest, read, write
from unmask.core.training.groups import make_optimizer, param_groups
from unmask.core.training.launch import make_fabric
from unmask.core.training.position import Position, batches, loading_errors, validation_sampler
from unmask.core.training.recipe import Optimizer, Schedule
from unmask.core.training.startup import GradientCheck, StartupError, check_groups


class Recording(ToyMethod):
    """Keeps the first step's gradients, and a draw that all of it shares."""

    gradients: dict[str, Tensor]
    shared: Tensor

    def draw(self, batch: ToyBatch, clock: Clock, key: Key) -> Plan:
        self.shared = key.stream("size").shared(clock.step).uniform(2)
        return super().draw(batch, clock, key)

    def after_step(self, clock: Clock) -> None:
        if clock.step == 0:
            self.gradients = {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}
            self.gradients["shared"] = self.shared


def gradients(out: Path, micro_batch: int, terms: int) -> dict[str, Tensor]:
    method = Recording(terms=terms)
    recipe = toy_recipe(steps=1, batch_size=32, micro_batch=micro_batch)
    run_toy(out, replace(recipe, optimizer=Optimizer(clip_norm=None)), method=method, train=ToySet(40))
    return method.gradients


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class Changing(ToyMethod):
    """One loss term in the first step, two from then on; it says their counts itself."""

    def draw(self, batch: ToyBatch, clock: Clock, key: Key) -> Plan:
        self.terms = 1 if clock.step == 0 else 2
        return super().draw(batch, clock, key)

    def counts(self, batch: ToyBatch, plan: Plan) -> dict[str, Tensor]:
        both = {"hidden": plan.mask.hidden.sum(), "visible": plan.mask.visible.sum()}
        return dict(list(both.items())[: self.terms])


class Severed:
    """A batch whose worker is killed while it is on its way: reading it meets a broken connection."""

    def __reduce__(self) -> Any:
        return reset, ()


def reset() -> None:
    raise ConnectionResetError(104, "Connection reset by peer")


@pytest.mark.parametrize("terms", [1, 2])
def test_accumulation_is_exact_with_ragged_counts(terms: int, tmp_path: Path) -> None:
    whole, cut = gradients(tmp_path / "a", 32, terms), gradients(tmp_path / "b", 8, terms)
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], rtol=1e-5, atol=1e-7, msg=name)
    first, second = lines(tmp_path / "a")[0], lines(tmp_path / "b")[0]
    assert first["hidden_share"] == second["hidden_share"]
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-6)


def test_the_counts_are_ragged_enough_for_that_to_mean_something() -> None:
    """Averaging the means of micro-batches, which is the usual mistake, gives other gradients here."""
    from toy import collate

    samples, method = ToySet(32), ToyMethod()
    means = []
    for begin in range(0, 32, 8):
        batch = collate([samples[i, 0] for i in range(begin, begin + 8)])
        means.append(method(batch, method.draw(batch, Clock(), Key.of(3, batch.ids))).loss)
    batch = collate([samples[i, 0] for i in range(32)])
    whole = method(batch, method.draw(batch, Clock(), Key.of(3, batch.ids))).loss
    assert abs(torch.stack(means).mean() - whole) > 1e-3


def train_on_ranks(out: Path, world: int, terms: int) -> None:
    """The same run of 16 samples a step and micro-batches of 4, on one process or cut over several."""
    torch.set_num_threads(1)
    recipe = toy_recipe(batch_size=16, micro_batch=4, threads=1, log_every=1, monitor=True, probe_every_epochs=1)
    fabric = make_fabric(recipe, out, devices=world, accelerator="cpu")
    method = Recording(terms=terms)
    train, val = ToySet(50), ToySet(11, 900)
    for samples in (train, val):
        samples.labels = samples.ids % 5  # type: ignore[attr-defined]
    run_toy(out, recipe, fabric=fabric, method=method, train=train, val=val)
    save_file(method.gradients, f"{out}-gradients-{fabric.global_rank}.safetensors")


def test_terms_may_come_and_go_where_the_method_counts_them(tmp_path: Path) -> None:
    runs = [
        run_toy(tmp_path / str(micro), toy_recipe(steps=3, micro_batch=micro, log_every=1), method=Changing())
        for micro in (2, 8)
    ]
    cut, whole = (lines(run) for run in runs)
    for a, b in zip(cut[:3], whole[:3], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and ("visible" in a) == ("visible" in b)
    assert ["visible" in line for line in whole[:3]] == [False, True, True]


@pytest.mark.parametrize("terms", [1, 2])
def test_two_processes_equal_one(terms: int, tmp_path: Path) -> None:
    """Same global batch on one process and on two (gloo, DDP), with accumulation: same gradients and metrics."""
    for world in (1, 2):
        assert in_ranks(world, train_on_ranks, tmp_path / str(world), world, terms) == [0] * world
    one = load_file(tmp_path / "1-gradients-0.safetensors")
    for rank in (0, 1):
        two = load_file(tmp_path / f"2-gradients-{rank}.safetensors")
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-7, msg=name)
    for a, b in zip(lines(tmp_path / "1"), lines(tmp_path / "2"), strict=True):
        assert a.pop("time").keys() == b.pop("time").keys()
        assert a == pytest.approx(b, rel=1e-4)
    generators = {k for k in newest(tmp_path / "2/checkpoints").tensors if k.startswith("rng")}  # type: ignore[union-attr]
    assert generators == {"rng/0/cpu", "rng/1/cpu"}


def test_an_epoch_takes_every_sample_once_however_it_is_cut() -> None:
    def epoch(micro: int, world: int) -> list[list[int]]:
        ranks = [list(Position(5, 50, 16, micro, 3, 0, rank, world)) for rank in range(world)]
        per_step = 16 // (micro * world)
        steps = []
        for step in range(3):
            parts = [r[step * per_step + m] for m in range(per_step) for r in ranks]
            assert {visit for part in parts for _, visit in part} == {0}
            steps.append([index for part in parts for index, _ in part])
        return steps

    whole = epoch(16, 1)
    assert epoch(4, 1) == epoch(4, 2) == epoch(8, 2) == whole
    assert len({index for step in whole for index in step}) == 48
    again = list(Position(5, 50, 16, 16, 9, start=4))
    assert again == list(Position(5, 50, 16, 16, 9))[4:], "a resumed run sees what is left"
    assert {visit for _, visit in again[-1]} == {2}


def opening(progress: float) -> torch.Tensor:
    """A toy curriculum: twenty samples, then more and more of fifty."""
    return torch.arange(50) < 20 + 40 * progress


def test_a_curriculum_draws_each_batch_from_what_is_admitted_however_it_is_cut() -> None:
    def steps(micro: int, world: int) -> list[list[int]]:
        ranks = [list(Position(5, 50, 16, micro, 9, 0, rank, world, admitted=opening)) for rank in range(world)]
        per_step = 16 // (micro * world)
        return [[i for m in range(per_step) for r in ranks for i, _ in r[s * per_step + m]] for s in range(9)]

    whole = steps(16, 1)
    assert steps(4, 1) == steps(4, 2) == steps(8, 2) == whole
    for step, batch in enumerate(whole):
        assert len(set(batch)) == 16 and opening(step / 9)[batch].all()
    assert max(max(batch) for batch in whole) > 45 and whole[0] != whole[1]
    position = Position(5, 50, 16, 4, 9, start=4, admitted=opening)
    again = list(position)
    assert again == list(Position(5, 50, 16, 4, 9, admitted=opening))[16:], "a resumed run sees what is left"
    assert {visit for _, visit in again[-1]} == {8}, "a sample may come back at the next step: its visit is the step"
    assert position.indices(8, 3) == [i for i, _ in again[-1]] and position.visit(8) == 8


def test_a_curriculum_draws_admitted_samples_alike() -> None:
    """Uniform frequencies over the pool, by a chi-square test at one in a thousand."""
    position = Position(1, 50, 5, 5, 1000, admitted=lambda progress: torch.arange(50) < 20)
    counts = torch.bincount(torch.tensor([i for batch in position for i, _ in batch]), minlength=50)
    assert not counts[20:].any()
    expected = 1000 * 5 / 20
    assert ((counts[:20] - expected).square() / expected).sum() < 43.8  # 19 degrees of freedom


def test_a_curriculum_that_admits_less_than_a_batch() -> None:
    with pytest.raises(UnmaskError, match="step 0: the data's curriculum admits 20 of 50 samples, fewer than"):
        next(iter(Position(5, 50, 32, 32, 9, admitted=opening)))


def test_batches_of_like_lengths_are_still_an_epoch_of_random_order() -> None:
    lengths = torch.randint(10, 1000, (640,), generator=torch.Generator().manual_seed(0))
    plain, bucketed = Position(5, 640, 16, 4, 80), Position(5, 640, 16, 4, 80, lengths=lengths)

    def steps(position: Position, epoch: int) -> list[list[int]]:
        parts = [[i for i, _ in part] for part in position]
        return [sum(parts[4 * s : 4 * s + 4], []) for s in range(40 * epoch, 40 * epoch + 40)]

    spread = [max(lengths[b]) - min(lengths[b]) for b in steps(bucketed, 0)]
    assert torch.stack(spread).float().mean() < 60, "the lengths in a batch are alike"
    assert sorted(sum(steps(bucketed, 0), [])) == sorted(sum(steps(plain, 0), [])), "every sample once"
    assert steps(bucketed, 0) != steps(bucketed, 1)
    mean = torch.tensor([float(lengths[b].float().mean()) for b in steps(bucketed, 0)])
    assert not torch.equal(mean, mean.sort().values), "batches come in a random order"
    assert bucketed.indices(3, 2) == [i for i, _ in list(bucketed)[3 * 4 + 2]]
    batches = validation_sampler(640, 16, 0, 1, lengths)
    assert sorted(i for b in batches for i, _ in b) == list(range(640))
    assert all(lengths[b[0][0]] <= lengths[b[-1][0]] for b in batches)


def test_validation_batches_cover_the_split_over_ranks() -> None:
    parts = [validation_sampler(10, 4, rank, 2) for rank in (0, 1)]
    assert sorted(i for part in parts for batch in part for i, visit in batch if visit == 0) == list(range(10))


def validate_on_ranks(out: Path, world: int) -> None:
    torch.set_num_threads(1)
    recipe = toy_recipe(steps=3, threads=1)
    run_toy(out, recipe, fabric=make_fabric(recipe, out, devices=world, accelerator="cpu"), val=ToySet(1, 900))


def test_a_rank_may_have_nothing_to_validate(tmp_path: Path) -> None:
    for world in (1, 2):
        assert in_ranks(world, validate_on_ranks, tmp_path / str(world), world) == [0] * world
    one, two = ([line["val_loss"] for line in lines(tmp_path / w) if "val_loss" in line] for w in "12")
    assert one == pytest.approx(two, rel=0.05)  # they differ by the ranks' dropout in training
    assert len(one) == 1


def test_validation_does_not_depend_on_the_micro_batch_and_leaves_no_trace(tmp_path: Path) -> None:
    """Its masks are the same each time, its numbers exact sums, and training goes on as if it had not been."""
    runs = {
        "a": run_toy(tmp_path / "a", toy_recipe(micro_batch=8)),
        "b": run_toy(tmp_path / "b", toy_recipe(micro_batch=8), val=None),
    }
    assert torch.equal(*(read(run / "model.safetensors").tensors["head.weight"] for run in runs.values()))
    assert len([line for line in lines(runs["a"]) if "val_loss" in line]) == 3
    assert not [line for line in lines(runs["b"]) if "val_loss" in line]
    frozen = replace(toy_recipe(micro_batch=8), optimizer=Optimizer(base_lr=0.0, weight_decay=0.0))
    cut = replace(frozen, training=replace(frozen.training, micro_batch=2))
    still = [*lines(run_toy(tmp_path / "c", frozen)), *lines(run_toy(tmp_path / "d", cut))]
    values = [line["val_loss"] for line in still if "val_loss" in line]
    assert values[0] == values[1] == values[2]
    assert values == pytest.approx([values[0]] * 6, rel=1e-6)


def test_the_last_epoch_of_a_run_may_be_cut_short() -> None:
    position = Position(5, 50, 16, 16, 7)
    assert [position.clock(step).epoch for step in range(8)] == [0, 0, 0, 1, 1, 1, 2, 3]
    assert {position.clock(step).total_epochs for step in range(8)} == {3}


def test_draw_runs_under_the_autocast_of_forward(tmp_path: Path) -> None:
    """So a teacher that is asked there computes in its student's type, and without a graph."""

    class Teaching(ToyMethod):
        def draw(self, batch: ToyBatch, clock: Clock, key: Key) -> Plan:
            answer = self.embed(batch.x)
            assert answer.dtype == torch.bfloat16 and not answer.requires_grad
            return super().draw(batch, clock, key)

    run_toy(tmp_path / "run", toy_recipe(steps=1, precision="bf16-mixed"), method=Teaching())


def test_decay_is_for_matrices_only_and_frozen_parameters_are_left_out() -> None:
    method = ToyMethod()
    method.head.weight.requires_grad_(False)
    decayed, plain = param_groups(method, 0.1)
    assert [name for name, _ in decayed["params"]] == ["embed.weight"]
    assert {name for name, _ in plain["params"]} == {
        "embed.bias", "mask_token", "norm.weight", "norm.bias", "head.bias"
    }  # fmt: skip
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)


def test_group_check_names_missing_and_doubled_parameters() -> None:
    method = ToyMethod()
    optimizer = make_optimizer(method, Optimizer())
    check_groups(method, optimizer)
    optimizer.param_groups[0]["params"].pop()
    optimizer.param_groups[1]["params"].append(method.embed.weight)
    with pytest.raises(StartupError, match=r"no optimizer group: head\.weight; in more than one .*: embed\.weight"):
        check_groups(method, optimizer)


def test_gradient_check_names_what_does_not_learn(tmp_path: Path) -> None:
    class Unused(ToyMethod):
        def __init__(self) -> None:
            super().__init__()
            self.forgotten = nn.Linear(2, 2)

    with pytest.raises(StartupError, match=r"no gradient reaches forgotten\.weight, forgotten\.bias"):
        run_toy(tmp_path / "run", method=Unused())


def test_gradient_check_waits_for_the_second_step() -> None:
    method = nn.Linear(2, 2)
    check = GradientCheck(method)
    check.after_backward()
    method(torch.ones(1, 2)).sum().backward()
    check.after_backward()
    check.after_backward()


def test_a_worker_lost_in_the_middle_of_a_batch_is_named() -> None:
    said = r"process died.*lower training.workers.*go on with: again.*reset by peer"
    with pytest.raises(UnmaskError, match=said), loading_errors("again"):
        list(batches([0], [[0]], lambda _: Severed(), workers=1, pin=False))
    with pytest.raises(FileNotFoundError, match="Caught"):  # an error of the data set's own stays what it is
        list(batches([0], [[0]], lambda _: Path("/nowhere").read_bytes(), workers=1, pin=False))


def test_changed_recipe_on_resume_lists_what_changed(tmp_path: Path) -> None:
    run = run_toy(tmp_path / "run", toy_recipe(steps=3))
    changed = replace(toy_recipe(steps=3, batch_size=4, workers=2), seed=4)
    with pytest.raises(UnmaskError) as error:
        run_toy(run, changed, resume=True)
    assert "seed was 3, now 4; training.batch_size was 8, now 4." in str(error.value)
    assert "workers" not in str(error.value), "loading in other processes changes nothing"


def test_a_run_of_an_older_version_is_resumed(tmp_path: Path) -> None:
    """Its recipes, in recipe.yaml and in the checkpoint, lack keys that came later."""
    recipe, run = toy_recipe(steps=6), tmp_path / "run"
    run_toy(run, toy_recipe(steps=3))
    (path,) = (run / "checkpoints").glob("*.safetensors")
    saved = read(path)
    for key in ("horizon", "cosine_from"):
        del saved.meta["recipe"]["schedule"][key]
    del saved.meta["recipe"]["training"]["monitor"]
    write(path, saved.tensors, saved.meta)
    run_toy(run, recipe, resume=True, extend=True)
    assert read(run / "model.safetensors").meta["step"] == 6


def test_a_longer_run_needs_extend_and_then_goes_on(tmp_path: Path) -> None:
    run = run_toy(tmp_path / "run", toy_recipe(steps=3))
    longer = toy_recipe(steps=6)
    with pytest.raises(UnmaskError, match=r"schedule\.steps was 3, now 6\. Add --extend"):
        run_toy(run, longer, resume=True)
    run_toy(run, longer, resume=True, extend=True)
    assert read(run / "model.safetensors").meta["step"] == 6
    assert [line["step"] for line in lines(run) if "loss" in line] == [1, 2, 3, 4, 6]
    with pytest.raises(UnmaskError, match="is at step 6, beyond the 2 steps"):
        run_toy(run, toy_recipe(steps=2), resume=True, extend=True)


def test_other_data_on_resume(tmp_path: Path) -> None:
    run = run_toy(tmp_path / "run", toy_recipe(steps=3))
    with pytest.raises(UnmaskError, match=r"training samples are not those .* \(28 then, 27 now"):
        run_toy(run, toy_recipe(steps=3), train=ToySet(27), resume=True)


def test_places_that_cannot_hold_a_run(tmp_path: Path) -> None:
    run = run_toy(tmp_path / "run", toy_recipe(steps=1))
    with pytest.raises(UnmaskError, match="already holds a run .* --resume"):
        run_toy(run, toy_recipe(steps=1))
    (tmp_path / "file").write_text("")
    with pytest.raises(UnmaskError, match="cannot write to .*Choose another --out"):
        run_toy(tmp_path / "file" / "run", toy_recipe(steps=1))
    with pytest.raises(UnmaskError, match="no run to resume"):
        run_toy(tmp_path / "empty", toy_recipe(steps=1), resume=True)


def test_too_few_samples_for_a_batch(tmp_path: Path) -> None:
    with pytest.raises(UnmaskError, match="7 training samples do not fill one batch of 8"):
        run_toy(tmp_path / "run", train=ToySet(7))


def test_bf16_and_compile_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches keep full precision under bf16: a target must not be rounded because the network computes in bf16."""
    compiled: list[bool] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, *a, **k: compiled.append(True))

    class Picky(ToyMethod):
        def forward(self, batch: ToyBatch, plan: Plan) -> Output:
            assert batch.x.dtype == torch.float32
            assert not self.training or self.embed(batch.x).dtype == torch.bfloat16
            return super().forward(batch, plan)

    run_toy(tmp_path / "run", toy_recipe(steps=2, precision="bf16-mixed", compile=True), method=Picky())
    assert compiled == [True]
    assert newest(tmp_path / "run/checkpoints").tensors["model/head.weight"].dtype == torch.float32  # type: ignore[union-attr]


def test_schedule_reaches_the_optimizer(tmp_path: Path) -> None:
    recipe = replace(toy_recipe(steps=4, log_every=1), schedule=Schedule(epochs=2, steps=4, warmup_epochs=1))
    assert [line["lr"] for line in lines(run_toy(tmp_path / "run", recipe, val=None))] == pytest.approx(
        [0.0, 0.025, 0.05, 0.025]
    )
