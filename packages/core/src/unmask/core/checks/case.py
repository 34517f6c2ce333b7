"""One method on trial, and what the checks do to it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from unmask.core.checks.plans import mask_of, same, tensors
from unmask.core.method import Clock, Output
from unmask.core.randomness import Key

Corrupt = Callable[[Any, Any, float], Any]
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)


@dataclass(frozen=True)
class Case:
    """One method on trial: a private copy of it, a batch, and how to overwrite hidden input.

    `original` is the method that was given: only to be looked at. A copy does not show which storage is shared.
    """

    original: Any
    method: Any
    batch: Any
    corrupt: Corrupt | None
    clock: Clock
    seed: int

    def key(self, batch: Any = None, visit: int = 0) -> Key:
        return Key.of(self.seed, (self.batch if batch is None else batch).ids, visit)

    @torch.no_grad()
    def draw(self, batch: Any = None, visit: int = 0) -> Any:
        """A plan, drawn as the loop draws it: without gradient."""
        batch = self.batch if batch is None else batch
        return self.method.draw(batch, self.clock, self.key(batch, visit))

    def fresh(self) -> Case:
        """The same case on another copy of the method, for checks that change it."""
        return replace(self, method=copy.deepcopy(self.method))

    def sealed(self) -> Case:
        """The same case without the normalisations that may see hidden input, as the method's `norms_over_all` says.

        With them cut out, nothing hidden may get through: so they are the only way, if there is one.
        """
        case = self.fresh()
        for name in sorted(case.method.norms_over_all()) if hasattr(case.method, "norms_over_all") else ():
            norm = case.method.get_submodule(name)
            assert isinstance(norm, NORMS), (
                f"norms_over_all names {name}, a {type(norm).__name__}: it is for BatchNorm, GroupNorm and InstanceNorm"
            )
            case.method.set_submodule(name, nn.Identity())
        return case

    def overwrite(self, plan: Any, value: float) -> Any:
        """The batch with `value` where `plan` hides the input."""
        assert self.corrupt is not None
        return self.corrupt(self.batch, plan, value)

    def hidden_entries(self, plan: Any) -> dict[str, Tensor]:
        """Which entries of each of the batch's tensors belong to tokens that `plan` hides."""
        one, two = (tensors(self.overwrite(plan, value)) for value in (1.0, 2.0))
        return {name: one[name] != two[name] for name in one}

    def values(self, plan: Any) -> tuple[float, ...]:
        """What hidden input is overwritten with: numbers large and small and NaN, or ids where the input is ids."""
        entries, found = self.hidden_entries(plan), tensors(self.batch)
        real = any(where.any() and found[name].is_floating_point() for name, where in entries.items())
        return (3.0, -1e4, float("nan")) if real else (1.0, 2.0, 3.0)

    @torch.no_grad()
    def answer(self, batch: Any, plan: Any) -> Any:
        """`predict` with the same dropout each time; the loss terms where there is no `predict`."""
        torch.manual_seed(0)
        if hasattr(self.method, "predict"):
            return self.method.predict(batch, plan)
        return {name: term.total for name, term in self.method(batch, plan).terms.items()}

    @torch.no_grad()
    def totals(self, batch: Any, plan: Any) -> dict[str, Tensor]:
        """The terms that answer for tokens, with the same dropout each time; regularisers of features left out."""
        torch.manual_seed(0)
        output = self.method(batch, plan)
        places = loss_places(self.method, output)
        return {name: term.total for name, term in output.terms.items() if places[name] != "features"}


def loss_places(method: Any, output: Output) -> dict[str, str]:
    """Where each term of the loss is taken, by the method's `loss_on`; "hidden" where it does not say."""
    said = getattr(method, "loss_on", "hidden")
    places = dict.fromkeys(output.terms, said) if isinstance(said, str) else {**dict.fromkeys(output.terms, "hidden")}
    if not isinstance(said, str):
        unknown = set(said) - set(output.terms)
        assert not unknown, f"loss_on names {', '.join(sorted(unknown))}; the terms are {', '.join(output.terms)}"
        places |= said
    wrong = set(places.values()) - {"hidden", "visible", "all", "features"}
    assert not wrong, f"loss_on says {', '.join(map(repr, sorted(wrong)))}; expected hidden, visible, all or features"
    return places


@contextmanager
def target_held(method: Any, plan: Any, target: Any) -> Iterator[None]:
    """`target` answers with this for plans with this mask, whatever the batch; for others it answers as always."""
    own, mask = method.target, mask_of(plan)
    method.target = lambda batch, asked: target if same(mask_of(asked), mask) else own(batch, asked)
    try:
        yield
    finally:
        del method.target


def snapshot(method: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in (*method.named_parameters(), *method.named_buffers())}


def changed(before: dict[str, Tensor], method: nn.Module) -> list[str]:
    """Names of the parameters and buffers that are no longer what they were."""
    return [name for name, tensor in snapshot(method).items() if not _equal_with_nan(before[name], tensor)]


def _equal_with_nan(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


@torch.no_grad()
def jolt(method: nn.Module, by: float = 0.05) -> None:
    """Change every floating-point weight a little."""
    for parameter in method.parameters():
        if parameter.is_floating_point():
            parameter.add_(by * torch.randn_like(parameter))
