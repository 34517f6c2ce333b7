"""A method under test, and the operations that the checks run on it."""

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
    """A method under test: a private copy of it, a batch, and how to overwrite hidden input.

    `original` is the method that was given, to be read only: a copy does not show which storage is shared.
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
        """The same case without the normalisations that may see hidden input: the method's `norms_over_all`.

        Without them nothing hidden may get through, which shows that there is no other path.
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
        """The values to overwrite hidden input with: large and small numbers and NaN, or ids where the input is ids."""
        entries, inputs = self.hidden_entries(plan), tensors(self.batch)
        real = any(where.any() and inputs[name].is_floating_point() for name, where in entries.items())
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
        """The terms that score tokens, with the same dropout each time; regularisers of features left out."""
        torch.manual_seed(0)
        output = self.method(batch, plan)
        regions = loss_regions(self.method, output)
        return {name: term.total for name, term in output.terms.items() if regions[name] != "features"}


def loss_regions(method: Any, output: Output) -> dict[str, str]:
    """The tokens that each term of the loss is taken on, by the method's `loss_on`; "hidden" where it has none."""
    declared = getattr(method, "loss_on", "hidden")
    regions = dict.fromkeys(output.terms, declared if isinstance(declared, str) else "hidden")
    if not isinstance(declared, str):
        unknown = set(declared) - set(output.terms)
        assert not unknown, f"loss_on names {', '.join(sorted(unknown))}; the terms are {', '.join(output.terms)}"
        regions |= declared
    wrong = set(regions.values()) - {"hidden", "visible", "all", "features"}
    assert not wrong, f"loss_on says {', '.join(map(repr, sorted(wrong)))}; expected hidden, visible, all or features"
    return regions


@contextmanager
def target_held(method: Any, plan: Any, target: Any) -> Iterator[None]:
    """While the block runs, the method's `target` returns `target` for plans with this mask, whatever the batch."""
    own, mask = method.target, mask_of(plan)
    method.target = lambda batch, other: target if same(mask_of(other), mask) else own(batch, other)
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
