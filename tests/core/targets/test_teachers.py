"""Teachers: never trained, never in train mode, and an EMA that is its closed form, also through the loop."""

from __future__ import annotations

import copy
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_ranks
from torch import Tensor, nn
from toy import ToyBatch, ToyMethod, run_toy, toy_recipe

from unmask.core.method import Clock, Output, Plan, Term
from unmask.core.targets import EMATeacher, FrozenTeacher, SharedTeacher
from unmask.core.training.checkpoint import read
from unmask.core.training.groups import make_optimizer
from unmask.core.training.recipe import Optimizer


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))


def teachers(student: nn.Module) -> list[Any]:
    return [FrozenTeacher(network()), SharedTeacher(student), EMATeacher(student, 0.9)]


class Taught(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = network()
        self.frozen, self.shared, self.ema = teachers(self.encoder)


@pytest.mark.parametrize("kind", ["frozen", "shared", "ema"])
def test_a_teacher_is_always_in_eval_mode_and_gives_no_gradient(kind: str) -> None:
    method = Taught().train()
    teacher = getattr(method, kind)
    assert teacher.kind == kind
    x = torch.randn(5, 4, requires_grad=True)
    before = copy.deepcopy(teacher.module.state_dict())
    first, second = teacher(x), teacher(x)
    assert torch.equal(first, second), "dropout is off"
    assert not first.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in teacher.module.state_dict().items()), "statistics do not move"
    assert method.encoder.training and method.encoder[2].training, "the student is as it was"
    with teacher.evaluating() as module:
        assert not module.training and not module[0](x).requires_grad
    assert method.encoder.training


def test_only_the_student_is_optimized_and_a_shared_teacher_is_not_doubled() -> None:
    method = Taught()
    optimizer = make_optimizer(method, Optimizer())
    names = {name for group in optimizer.param_groups for name in group["param_names"]}
    assert names == {f"encoder.{name}" for name, _ in method.encoder.named_parameters()}
    assert not [name for name in method.state_dict() if name.startswith("shared")]
    assert method.shared.module is method.encoder
    twin = copy.deepcopy(method)
    assert twin.shared.module is twin.encoder, "a copied method's shared teacher is its own student"


def hpm(clock: Clock) -> float:
    """HPM's released code: 0.999 to 0.9999 in 100 epochs, then constant."""
    return min(0.999 + clock.epoch / 100 * 0.0009, 0.9999)


def lut(clock: Clock) -> float:
    """LUT: a cosine from 0.996 to 1."""
    return 1 + 0.5 * (0.996 - 1) * (1 + math.cos(math.pi * clock.progress))


def ijepa(clock: Clock) -> float:
    """I-JEPA: a line from 0.996 to 1 over the run (V-JEPA: 0.998 to 1 over 1.25 times the run)."""
    return 0.996 + (1 - 0.996) * clock.progress


def test_schedules_are_asked_at_the_step_that_was_done() -> None:
    teacher = EMATeacher(nn.Linear(2, 2), ijepa)
    assert teacher.decay(Clock(step=0, total_steps=10)) == 0.996
    assert teacher.decay(Clock(step=9, total_steps=10)) == pytest.approx(0.9996), "the last is a step short of 1"
    assert EMATeacher(nn.Linear(2, 2), lut).decay(Clock(step=0, total_steps=10)) == pytest.approx(0.996)
    assert EMATeacher(nn.Linear(2, 2), lut).decay(Clock(step=10, total_steps=10)) == 1
    assert EMATeacher(nn.Linear(2, 2), hpm).decay(Clock(epoch=50)) == pytest.approx(0.99945)
    assert EMATeacher(nn.Linear(2, 2), hpm).decay(Clock(epoch=150)) == 0.9999


@pytest.mark.parametrize("schedule", [hpm, lut, ijepa, 0.5])
def test_closed_form_over_several_steps_buffers_included(schedule: Any) -> None:
    """k_T = (prod m) k_0 + sum_t (1 - m_t) (prod of the later m) q_t, for parameters and running statistics."""
    student = network()
    teacher = EMATeacher(student, schedule)
    expected = {k: v.double() for k, v in student.state_dict().items()}
    for step in range(6):
        with torch.no_grad():
            student.train()(torch.randn(8, 4) * 3 + 1)  # moves the statistics
            for parameter in student.parameters():
                parameter.add_(torch.randn_like(parameter))
        clock = Clock(step=step, total_steps=6, epoch=20 * step)
        m = schedule if isinstance(schedule, float) else schedule(clock)
        expected = {k: m * v + (1 - m) * student.state_dict()[k].double() for k, v in expected.items()}
        teacher.update(student, clock)
    for name, value in teacher.module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert value == 6, "counters are copied"
        else:
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-7)


def test_constant_and_infinite_buffers_stay_as_they_are() -> None:
    student = nn.Linear(2, 2)
    student.register_buffer("causal", torch.full((3, 3), -torch.inf).triu(1), persistent=False)
    student.register_buffer("table", torch.randn(50))
    teacher = EMATeacher(student, 0.37)
    teacher.update(student, Clock())
    assert torch.equal(teacher.module.causal, student.causal)  # type: ignore[arg-type]
    assert torch.equal(teacher.module.table, student.table)  # type: ignore[arg-type]


def test_weights_stay_in_fp32_when_the_method_is_cast() -> None:
    student = nn.Linear(2, 2)
    method = nn.ModuleDict({"student": student, "teacher": EMATeacher(student, 0.9999)}).to(torch.bfloat16)
    before = method["teacher"].module.weight.clone()
    with torch.no_grad():
        student.weight += 1
    method["teacher"].update(student, Clock())  # type: ignore[operator]
    moved = method["teacher"].module.weight
    assert student.weight.dtype == torch.bfloat16 and moved.dtype == torch.float32
    torch.testing.assert_close(moved, before * 0.9999 + student.weight.float() * 1e-4, rtol=1e-6, atol=1e-8)
    assert not torch.equal(moved, before)
    assert nn.ModuleDict({"teacher": method["teacher"]}).to("meta")["teacher"].module.weight.is_meta  # type: ignore[union-attr]


def test_student_and_teacher_of_different_structure() -> None:
    teacher = EMATeacher(nn.ModuleDict({"encoder": nn.Linear(2, 2), "head": nn.Linear(2, 3)}), 0.9)
    other = nn.ModuleDict({"encoder": nn.Linear(2, 5), "predictor": nn.Linear(2, 3)})
    with pytest.raises(ValueError, match="teacher and student differ") as error:
        teacher.update(other, Clock())
    for part in ("only in the teacher: head.weight", "only in the student: predictor.weight", "shape: encoder.weight"):
        assert part in str(error.value)
    teacher.update(nn.ModuleDict({"encoder": nn.Linear(2, 2), "head": nn.Linear(2, 3)}), Clock())


@pytest.mark.parametrize("decay", [1.5, -0.1])
def test_a_decay_that_is_none(decay: float) -> None:
    student = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"decay is .* at step 3; expected a value in \[0, 1\]"):
        EMATeacher(student, lambda clock: decay).update(student, Clock(step=3, total_steps=9))


# ---- through the loop ----------------------------------------------------------------------------------------------


class Distilled(ToyMethod):
    """The toy, with an EMA of its embedding as the target; it keeps every student that the teacher was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.normalise = nn.BatchNorm1d(8)
        self.teacher = EMATeacher(nn.ModuleDict({"embed": self.embed, "normalise": self.normalise}), ijepa)
        self.seen: list[tuple[Clock, dict[str, Tensor]]] = []

    def student(self) -> nn.ModuleDict:
        return nn.ModuleDict({"embed": self.embed, "normalise": self.normalise})

    def forward(self, batch: ToyBatch, plan: Plan) -> Output:
        with self.teacher.evaluating() as network:
            target = network.normalise(network.embed(batch.x).flatten(0, 1))
        answer = self.normalise(self.embed(batch.x).flatten(0, 1))
        error = ((answer - target + self.mask_token[0] + self.norm(answer)) ** 2).mean(-1)
        error = error + self.head(answer).mean(-1) ** 2
        return Output({"distillation": Term(error.sum(), float(len(error)))})

    def after_step(self, clock: Clock) -> None:
        self.seen.append((clock, {k: v.clone() for k, v in self.student().state_dict().items()}))
        self.teacher.update(self.student(), clock)


@pytest.mark.parametrize("micro_batch", [8, 2])
def test_closed_form_through_the_loop_and_once_per_step(micro_batch: int, tmp_path: Path) -> None:
    method = Distilled()
    expected = {k: v.double() for k, v in method.student().state_dict().items()}
    run_toy(tmp_path / "run", toy_recipe(steps=6, micro_batch=micro_batch), method=method)
    assert [clock.step for clock, _ in method.seen] == list(range(6))
    for clock, student in method.seen:
        m = ijepa(clock)
        expected = {k: m * v + (1 - m) * student[k].double() for k, v in expected.items()}
    saved = read(tmp_path / "run" / "model.safetensors").tensors
    for name in expected:
        if "num_batches" not in name:
            torch.testing.assert_close(saved[f"teacher.module.{name}"].double(), expected[name], rtol=1e-6, atol=1e-7)
    assert not torch.equal(saved["embed.weight"], saved["teacher.module.embed.weight"])


def test_a_resumed_run_has_the_same_teacher(tmp_path: Path) -> None:
    run_toy(tmp_path / "whole", toy_recipe(steps=6), method=Distilled())
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").unlink()
    (tmp_path / "cut" / "checkpoints" / "step-00000006.safetensors").unlink()
    run_toy(tmp_path / "cut", toy_recipe(steps=6), method=Distilled(), resume=True)
    whole, cut = (read(tmp_path / name / "model.safetensors").tensors for name in ("whole", "cut"))
    assert "teacher.module.embed.weight" in cut
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)


def teacher_of_a_rank(out: Path) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    student = network()
    teacher = EMATeacher(student, 0.5)
    student.train()(torch.randn(8, 4) + rank)  # every rank its own samples
    teacher.update(student, Clock())
    torch.save(teacher.module.state_dict(), out / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ranks_have_the_same_teacher(tmp_path: Path) -> None:
    assert in_ranks(2, teacher_of_a_rank, tmp_path) == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["1.running_mean"].abs().max() > 0
