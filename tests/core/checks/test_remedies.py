"""What the checks' messages tell people to do helps: each remedy, followed to its end."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.core.checks.broken import Nameless
from tests.core.checks.broken_teachers import Undeclared
from tests.core.checks.sound import (
    EMA,
    IDS,
    TOKENS,
    Batch,
    Latent,
    Normalised,
    Sound,
    Words,
    corrupt,
    sentences,
    vectors,
)
from unmask.core.checks import CHECKS, check_method
from unmask.core.method import Clock, Output, Plan, Term
from unmask.core.registry import KINDS


def hold(method: nn.Module, *names: str) -> None:
    """Only these checks."""
    batch: Any = sentences() if isinstance(method, Words) else vectors()
    check_method(method, batch, corrupt, skip={check.__name__ for check in CHECKS} - set(names))


class TwoStudents(Latent):
    """Two networks look like the teacher; the method does not say which it follows."""

    def __init__(self) -> None:
        super().__init__()
        self.twin = copy.deepcopy(self.encoder)


class NamesItsStudent(TwoStudents):
    def students(self) -> dict[str, nn.Module]:
        return {"teacher": self.encoder}


def test_name_the_student() -> None:
    check = "after_step_moves_teachers_as_declared"
    with pytest.raises(AssertionError, match=r"2 modules have the parameters of the teacher teacher; .*`students\(\)"):
        hold(TwoStudents(), check)
    hold(NamesItsStudent(), check)


class Declared(Undeclared):
    """The frozen network that moves is declared, with its decay."""

    def __init__(self) -> None:
        super().__init__()
        self.other = Slow(self.encoder)

    def after_step(self, clock: Clock) -> None:
        Latent.after_step(self, clock)
        self.other.update(self.encoder, clock)


class Slow(EMA):
    def decay(self, clock: Clock) -> float:
        return 0.9


def test_declare_the_average() -> None:
    check = "after_step_moves_teachers_as_declared"
    with pytest.raises(AssertionError, match="other.* is frozen; a network that follows another is declared as an EMA"):
        hold(Undeclared(), check)
    hold(Declared(), check, "teachers_are_what_they_say")


class Named(Nameless):
    def encoder_of(self) -> nn.Module:
        return self.net


def test_name_the_encoder() -> None:
    with pytest.raises(AssertionError, match="Name it `encoder`, or offer `encoder_of"):
        hold(Nameless(), "encode_runs_the_encoder")
    hold(Named(), "encode_runs_the_encoder")


class Contrastive(Sound):
    """Tells hidden tokens apart by their values, with a learned temperature where answer and target meet."""

    target = property()  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(1))

    def asked(self, batch: Batch, plan: Any) -> Tensor:
        return plan.mask.hidden_indices.take(batch.x).detach()

    def forward(self, batch: Batch, plan: Any) -> Output:
        logits = self.predict(batch, plan) @ self.asked(batch, plan).transpose(1, 2) * self.temperature
        loss = -logits.log_softmax(2).diagonal(dim1=1, dim2=2)
        return Output({"loss": Term(loss.sum(), float(loss.numel()))})


class ContrastiveWithTarget(Contrastive):
    def target(self, batch: Batch, plan: Any) -> Tensor:  # type: ignore[override]
        return plan.mask.hidden_indices.take(batch.x).detach()

    def asked(self, batch: Batch, plan: Any) -> Tensor:
        return self.target(batch, plan)


def test_offer_the_target() -> None:
    with pytest.raises(AssertionError, match="offer `target.batch, plan.`"):
        hold(Contrastive(), "hidden_input_does_not_leak_in_forward")
    hold(ContrastiveWithTarget(), "hidden_input_does_not_leak_in_forward")


def test_declarations_are_held_to_what_there_is() -> None:
    normalised = Normalised()
    normalised.norms_over_all = lambda: {"encoder.norm"}  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="norms_over_all names encoder.norm, a LayerNorm: it is for BatchNorm"):
        hold(normalised, "hidden_input_does_not_leak")
    said = Sound()
    said.loss_on = "somewhere"
    with pytest.raises(AssertionError, match="loss_on says 'somewhere'; expected hidden, visible, all or features"):
        hold(said, "loss_is_taken_where_it_says")
    said.loss_on = {"other": "all"}
    with pytest.raises(AssertionError, match="loss_on names other; the terms are loss"):
        hold(said, "loss_is_taken_where_it_says")


class WithoutMask(Sound):
    def draw(self, batch: Batch, clock: Clock, key: Any) -> Any:
        return {"noise": key.uniform(TOKENS)}

    def forward(self, batch: Batch, plan: Any) -> Output:
        hidden = plan["noise"] > 0.5
        loss = (self.decoder(self.encoder(batch.x, hidden, self.token)) - batch.x) ** 2
        return Output({"loss": Term(loss.sum(), float(loss.numel()))})


def test_a_pretraining_needs_a_mask_and_other_kinds_do_not() -> None:
    with pytest.raises(
        AssertionError, match="fails 1 of .*\n  - masks_are_consistent: the plan holds no Mask and no Split"
    ):
        check_method(WithoutMask(), vectors(), skip={"compiles"})
    for kind in set(KINDS) - {"pretrain"}:
        check_method(WithoutMask(), vectors(), kind=kind, skip={"compiles"})


class WithoutPredict(Sound):
    """A classification with hidden tokens: it answers for the whole."""

    predict = target = property()  # type: ignore[assignment]

    def forward(self, batch: Batch, plan: Any) -> Output:
        loss = self.decoder(self.latent(batch, plan)).mean((1, 2)).square()
        return Output({"loss": Term(loss.sum(), float(len(loss)))})


def test_other_kinds_may_hide_tokens_without_predict() -> None:
    said = WithoutPredict()
    said.loss_on = "all"
    check_method(said, vectors(), corrupt, kind="supervised", skip={"compiles"})
    with pytest.raises(AssertionError, match="- hidden_input_does_not_leak: a method that hides tokens offers"):
        check_method(said, vectors(), corrupt, skip={"compiles"})


def test_hidden_tokens_of_a_plan_with_a_mask_anywhere() -> None:
    from unmask.core.checks import hidden_tokens

    plan: Plan = Sound().draw(vectors(), Clock(), _key())
    assert torch.equal(hidden_tokens({"first": [plan]}, TOKENS), plan.mask.hidden)


def _key() -> Any:
    from unmask.core.randomness import Key

    return Key.of(0, IDS)
