"""Teachers: networks whose outputs are targets, of one of three kinds.

* ``frozen``: weights from elsewhere, which never change.
* ``shared``: the student itself, run without gradients and without dropout.
* ``ema``: an exponential moving average of the student, ``k <- m k + (1 - m) q``.

Every teacher is in eval mode whatever is done to the method around it, gives no gradient, and is in no optimizer group.
``teacher(x)`` calls the network; to call more than its `forward`, enter `evaluating`::

    with self.teacher.evaluating() as network:
        target = network.head(network.encoder(images).tokens.mean(1))

An EMA is updated in the method's ``after_step(clock)``, that is once per optimizer step and after it, whatever the
number of micro-batches and ranks; `clock` is the one of the step that was done, so that the first update uses the
schedule's value at step 0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from unmask.core.method import Clock

Kind = Literal["frozen", "shared", "ema"]
Decay = float | Callable[[Clock], float]


class FrozenTeacher(nn.Module):
    """A network that never changes.

    Args:
        module: the network; taken as it is, its parameters stop requiring gradients.
    """

    kind: ClassVar[Kind] = "frozen"

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stay in eval mode."""
        return super().train(False)

    @contextmanager
    def evaluating(self) -> Iterator[Any]:
        """The network, without gradients."""
        with torch.no_grad():
            yield self.module

    def forward(self, *args: Any, **options: Any) -> Any:
        """The network's output, without gradient."""
        with self.evaluating() as network:
            return network(*args, **options)


class SharedTeacher(nn.Module):
    """The student as its own teacher. It holds no weights: they stay in the state dict once, under the student's name.

    Args:
        module: the student.
    """

    kind: ClassVar[Kind] = "shared"
    module: nn.Module

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["module"] = module  # not registered, or each of its weights would be saved twice

    @contextmanager
    def evaluating(self) -> Iterator[Any]:
        """The student in eval mode and without gradients; afterwards each of its parts is in the mode it was in."""
        training = [part for part in self.module.modules() if part.training]
        self.module.eval()
        try:
            with torch.no_grad():
                yield self.module
        finally:
            for part in training:
                part.training = True

    def forward(self, *args: Any, **options: Any) -> Any:
        """The student's output in eval mode, without gradient."""
        with self.evaluating() as network:
            return network(*args, **options)


class EMATeacher(FrozenTeacher):
    """An exponential moving average of a student, initialised as an exact copy of it.

    Parameters are averaged, and so are floating-point buffers (running statistics); other buffers (counters), and those
    that are not finite (attention masks of -inf), are copied. Weights stay in fp32, whatever the method is cast to: at
    a decay of 0.9999 an update is below what bf16 resolves. On several ranks buffers are those of the first.

    Args:
        student: the network to average. Several parts together are ``nn.ModuleDict({"encoder": ..., "head": ...})``.
        decay: m in ``k <- m k + (1 - m) q``, in [0, 1]: a number, or a schedule that takes the clock.
    """

    kind: ClassVar[Kind] = "ema"

    def __init__(self, student: nn.Module, decay: Decay) -> None:
        super().__init__(copy.deepcopy(student).float())
        self._decay = decay
        self._copied = {name for name, buffer in self.module.named_buffers() if not _can_be_averaged(buffer)}
        self.__dict__["student"] = student  # not registered: it is the method's

    def decay(self, clock: Clock) -> float:
        """m at a step.

        Raises:
            ValueError: the schedule leaves [0, 1].
        """
        value = float(self._decay(clock)) if callable(self._decay) else self._decay
        if not 0 <= value <= 1:
            raise ValueError(f"the EMA's decay is {value:g} at step {clock.step}; expected a value in [0, 1]")
        return value

    @torch.no_grad()
    def update(self, student: nn.Module, clock: Clock) -> None:
        """Move towards the student. Call it in the method's ``after_step(clock)``, on every rank.

        Args:
            student: of the structure that the teacher was made from.
            clock: of the step that was done.

        Raises:
            ValueError: student and teacher differ in names or shapes; names them.
        """
        mine, theirs = _tensors(self.module), _tensors(student)
        _check_same(mine, theirs)
        averaged = [name for name in mine if name not in self._copied]
        ends = [theirs[name].to(mine[name].dtype) for name in averaged]
        torch._foreach_lerp_([mine[name] for name in averaged], ends, 1 - self.decay(clock))
        for name in self._copied:
            mine[name].copy_(theirs[name])
        _same_on_all_ranks(self.module)

    @torch.no_grad()
    def restart(self) -> None:
        """Become an exact copy of the student again, for weights that were loaded into it afterwards."""
        theirs = _tensors(self.__dict__["student"])
        for name, tensor in _tensors(self.module).items():
            tensor.copy_(theirs[name])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EMATeacher:
        """Follow the method to another device, not to another type."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(moved, recurse)


def teachers(method: nn.Module) -> dict[str, Any]:
    """The declared teachers of a method, by path: whatever has a `kind` of the three and a network `module`."""
    return {
        path: part
        for path, part in method.named_modules()
        if getattr(part, "kind", None) in get_args(Kind) and isinstance(getattr(part, "module", None), nn.Module)
    }


def _can_be_averaged(buffer: Tensor) -> bool:
    """Whether ``a + (1 - m) (b - a)`` makes sense; -inf minus -inf does not. Values on the meta device are unknown."""
    return buffer.is_floating_point() and (buffer.is_meta or bool(torch.isfinite(buffer).all()))


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, those that are not saved included."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _check_same(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    different = {
        "only in the teacher": [name for name in mine if name not in theirs],
        "only in the student": [name for name in theirs if name not in mine],
        "of another shape": [name for name in mine if name in theirs and mine[name].shape != theirs[name].shape],
    }
    said = [f"{what}: {', '.join(names[:6])}" for what, names in different.items() if names]
    if said:
        raise ValueError(
            f"teacher and student differ ({'; '.join(said)}). Give `update` the network that the teacher was made from"
        )


def _same_on_all_ranks(module: nn.Module) -> None:
    """Running statistics differ between ranks until the next forward pass; a teacher in `draw` runs before it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, src=0)
