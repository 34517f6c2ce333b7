"""Checks of teachers: they behave as their `kind` declares, and no other frozen weight changes.

A teacher is a submodule with ``kind`` ("frozen", "shared" or "ema") and ``module``, the network; an EMA has
``decay(clock) -> float`` too (`unmask.core.targets` has all three). The student of an EMA is the one trained module of
the method that has the teacher's parameters, names and shapes; where there is no such module, or several, the method
names it in ``students() -> dict``, from the teacher's path to the student.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from unmask.core.checks.case import Case, changed, jolt, snapshot
from unmask.core.method import Clock
from unmask.core.targets.teachers import teachers


def teachers_are_what_they_say(case: Case) -> None:
    """A teacher is always in eval mode, gets no gradient, and shares weights only if its kind is "shared"."""
    method = case.method.train()
    declared = teachers(method)
    copies = [path for path in _frozen_copies(method) if not any(path.startswith(f"{name}.") for name in declared)]
    assert not copies, (
        f"{', '.join(copies)} is a frozen copy of the encoder, and does not say whether it stays or follows: a teacher "
        'has `kind`, "frozen" or "ema" (`unmask.core.targets`)'
    )
    trainable = {p.untyped_storage().data_ptr() for p in case.original.parameters() if p.requires_grad}
    for path, teacher in declared.items():
        weights = case.original.get_submodule(path).module.named_parameters()
        shared = [name for name, p in weights if p.untyped_storage().data_ptr() in trainable]
        if teacher.kind == "shared":
            assert shared, f"{path} says it is shared, and has weights of its own"
            continue
        wanting = [name for name, p in teacher.module.named_parameters() if p.requires_grad]
        assert not wanting, f"{path} is a teacher, and {', '.join(wanting)} of it is trainable"
        assert not shared, f"{path} says it is {teacher.kind}, and shares {', '.join(shared)} with what is trained"
        awake = [name or "itself" for name, module in teacher.module.named_modules() if module.training]
        assert not awake, f"{path}: {', '.join(awake)} is in train mode when the method is"
    jolt(method)  # a teacher that equals its student would not be seen to follow
    before = {name: p.detach().clone() for name, p in method.named_parameters() if not p.requires_grad}
    method(case.batch, case.draw()).loss.backward()
    parameters = dict(method.named_parameters())
    pulled = [name for name in before if parameters[name].grad is not None]
    assert not pulled, f"a gradient reaches {', '.join(pulled)}, which is frozen"
    moved = [name for name, value in before.items() if not torch.equal(value, parameters[name])]
    assert not moved, f"forward changed {', '.join(moved)}, which is frozen; teachers move in after_step"


def after_step_moves_teachers_as_declared(case: Case) -> None:
    """After a step an EMA is ``decay * teacher + (1 - decay) * student``, and nothing else has moved.

    Buffers are averaged too, or copied. The student's weights are set far from the teacher's, at several times of the
    run, so that a decay near 1 shows.
    """
    method = case.method
    averages = {path: teacher for path, teacher in teachers(method).items() if teacher.kind == "ema"}
    students = {path: student_of(method, path, teacher) for path, teacher in averages.items()}
    for path, student in students.items():
        _check_related(path, averages[path].module, student)
    total = case.clock.total_steps
    clocks = [replace(case.clock, step=step) for step in sorted({0, case.clock.step, total // 4, 3 * total // 4})]
    moving = {path for path, teacher in averages.items() if any(decay_of(teacher, clock) < 1 for clock in clocks)}
    assert moving == set(averages), f"{', '.join(set(averages) - moving)} is an EMA with a decay of 1: it never moves"
    for clock in clocks:
        _scatter(method)
        before = snapshot(method)
        old = {path: _state(teacher.module) for path, teacher in averages.items()}
        if hasattr(method, "after_step"):
            method.after_step(clock)
        _check_untouched(method, before, averages)
        for path, teacher in averages.items():
            _check_average(path, old[path], teacher, _state(students[path]), decay_of(teacher, clock))


def _frozen_copies(method: Any) -> list[str]:
    """Paths of modules that have the encoder's parameters, names and shapes, and none that is trained."""
    encoder = method.encoder_of() if hasattr(method, "encoder_of") else getattr(method, "encoder", None)
    shapes = _shapes(encoder) if isinstance(encoder, nn.Module) else {}
    alike = [(path, m) for path, m in method.named_modules() if shapes and m is not encoder and _shapes(m) == shapes]
    return [path for path, m in alike if not any(p.requires_grad for p in m.parameters())]


def decay_of(teacher: Any, clock: Clock) -> float:
    return float(teacher.decay(clock) if callable(teacher.decay) else teacher.decay)


def student_of(method: Any, path: str, teacher: Any) -> nn.Module:
    """The module that an EMA follows; see this file's head."""
    if hasattr(method, "students") and path in method.students():
        return method.students()[path]
    inside = {id(m) for t in teachers(method).values() for m in t.modules()}
    shapes = _shapes(teacher.module)
    others = [m for m in method.modules() if id(m) not in inside and any(p.requires_grad for p in m.parameters())]
    fit = [m for m in others if shapes and _shapes(m) == shapes]
    assert len(fit) == 1, (
        f"{len(fit)} modules have the parameters of the teacher {path}; name its student in `students() -> dict`, as "
        f"{{{path!r}: module}}"
    )
    return fit[0]


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in module.named_parameters()}


@torch.no_grad()
def _check_related(path: str, teacher: nn.Module, student: nn.Module) -> None:
    """A teacher that was made of its student points the same way; one with weights of its own does not."""
    theirs = dict(student.named_parameters())
    pairs = [(p.flatten(), theirs[name].flatten()) for name, p in teacher.named_parameters() if p.dim() > 1]
    if pairs:
        one, two = (torch.cat(side).float() for side in zip(*pairs, strict=True))
        cosine = float(torch.cosine_similarity(one, two, dim=0))
        assert cosine > 0.5, f"{path} is an EMA, and unrelated to its student (cosine {cosine:.2f}); start it as a copy"


@torch.no_grad()
def _scatter(method: nn.Module) -> None:
    """Set everything that is trained, and floating-point buffers in the state dict, far from where they are."""
    own = {id(m) for teacher in teachers(method).values() if teacher.kind != "shared" for m in teacher.modules()}
    kept = set(method.state_dict(keep_vars=True))
    for path, module in method.named_modules():
        tensors = [p for p in module.parameters(recurse=False) if p.requires_grad]
        buffers = module.named_buffers(recurse=False)
        tensors += [b for name, b in buffers if id(module) not in own and f"{path}.{name}".lstrip(".") in kept]
        for tensor in tensors:
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor))


def _check_untouched(method: nn.Module, before: dict[str, Tensor], averages: dict[str, Any]) -> None:
    """Nothing but declared averages, and buffers, moves after a step."""
    parameters = dict(method.named_parameters())
    own = {id(p) for teacher in averages.values() for p in teacher.parameters()}
    moved = [name for name in changed(before, method) if name in parameters and id(parameters[name]) not in own]
    trained = [name for name in moved if parameters[name].requires_grad]
    assert not trained, f"after_step changed {', '.join(trained)}, which the optimizer trains"
    assert not moved, (
        f"after_step changed {', '.join(moved)}, which is frozen; a network that follows another is declared as an EMA "
        "teacher (`unmask.core.checks.teachers`)"
    )


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in module.state_dict().items() if t.is_floating_point()}


def _check_average(path: str, old: dict[str, Tensor], teacher: Any, student: dict[str, Tensor], decay: float) -> None:
    weights = {name for name, _ in teacher.module.named_parameters()}
    for name, new in _state(teacher.module).items():
        assert name in student, f"the student of {path} has no {name}"
        expected = old[name] * decay + student[name].to(old[name]) * (1 - decay)
        close = _close(new, expected, old[name] - student[name].to(old[name]), decay)
        if not close and name not in weights:
            close = torch.equal(new, student[name].to(new))
        still = ", but is what it was" if torch.equal(new, old[name]) else ""
        assert close, (
            f"{path}: after_step leaves {name} other than {decay:.6g} * teacher + {1 - decay:.3g} * student{still}"
        )


def _close(new: Tensor, expected: Tensor, gap: Tensor, decay: float) -> bool:
    """Within a hundredth of the way moved, and rounding."""
    if not new.numel():
        return True
    bound = 0.01 * (1 - decay) * float(gap.abs().max()) + 2.0**-21 * float(expected.abs().max())
    return float((new - expected).abs().max()) <= bound
