"""Latent-target methods whose teacher is not what it says; `TEACHERS` says which check names each."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from tests.core.checks.sound import DIM, EMA, WIDTH, Encoder, Latent
from unmask.core.method import Clock, Output

WHAT, STEP = "teachers_are_what_they_say", "after_step_moves_teachers_as_declared"


class Forgotten(Latent):
    """The teacher never moves."""

    def after_step(self, clock: Clock) -> None:
        pass


class Reversed(Latent):
    """The student follows the teacher."""

    @torch.no_grad()
    def after_step(self, clock: Clock) -> None:
        for mine, other in zip(self.encoder.parameters(), self.teacher.module.parameters(), strict=True):
            mine.lerp_(other, 0.01)


class SwappedDecay(Latent):
    """decay and 1 - decay change places."""

    @torch.no_grad()
    def after_step(self, clock: Clock) -> None:
        for mine, other in zip(self.teacher.module.parameters(), self.encoder.parameters(), strict=True):
            mine.lerp_(other, self.teacher.decay(clock))


class Rerolled(Latent):
    """The teacher is drawn anew after every step."""

    def after_step(self, clock: Clock) -> None:
        fresh = Encoder(nn.Linear(WIDTH, DIM))
        self.teacher.module.load_state_dict(fresh.state_dict())


class Unrelated(Latent):
    """The teacher starts with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = EMA(Encoder(nn.Linear(WIDTH, DIM)))


class Tied(Latent):
    """The teacher is the student."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher.module = self.encoder


class TiedByStorage(Latent):
    """The teacher's parameters are views of the student's, frozen."""

    def __init__(self) -> None:
        super().__init__()
        for mine, other in zip(self.teacher.module.parameters(), self.encoder.parameters(), strict=True):
            mine.data = other.data


class BuffersForgotten(Latent):
    """Parameters follow, buffers do not."""

    @torch.no_grad()
    def after_step(self, clock: Clock) -> None:
        for mine, other in zip(self.teacher.module.parameters(), self.encoder.parameters(), strict=True):
            mine.lerp_(other, 1 - self.teacher.decay(clock))


class Trained(Latent):
    """The teacher is trained along."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher.module.requires_grad_(True)


class AwakeEMA(EMA):
    train = nn.Module.train  # type: ignore[assignment]


class Awake(Latent):
    """The teacher goes into train mode with the method."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher.__class__ = AwakeEMA


class NeverSaid(Latent):
    """The teacher is a plain frozen copy: nobody can tell whether it was meant to follow."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)

    def after_step(self, clock: Clock) -> None:
        pass


class MovesInForward(Latent):
    """The teacher follows in forward, once per micro-batch."""

    def forward(self, batch: Any, plan: Any) -> Output:
        if self.training:
            self.teacher.update(self.encoder, Clock())
        return super().forward(batch, plan)


class Undeclared(Latent):
    """A frozen network that moves, and no word of it."""

    def __init__(self) -> None:
        super().__init__()
        self.other = copy.deepcopy(self.encoder).requires_grad_(False)

    @torch.no_grad()
    def after_step(self, clock: Clock) -> None:
        super().after_step(clock)
        for mine, other in zip(self.other.parameters(), self.encoder.parameters(), strict=True):
            mine.lerp_(other, 0.1)


TEACHERS: dict[type[nn.Module], str] = {
    Forgotten: STEP,
    Reversed: STEP,
    SwappedDecay: STEP,
    Rerolled: STEP,
    Unrelated: STEP,
    Tied: WHAT,
    TiedByStorage: WHAT,
    BuffersForgotten: STEP,
    Trained: WHAT,
    Awake: WHAT,
    NeverSaid: WHAT,
    MovesInForward: WHAT,
    Undeclared: STEP,
}
