"""Comparing every operation of two forward passes: does anything that differs pass a trainable weight?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unmask.core.checks.case import Case, loss_regions
from unmask.core.checks.plans import tensors

_Id = tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class _Step:
    """One operation: its arguments, those of them that require gradients, its results, and their values."""

    taken: set[_Id]
    trained: set[_Id]
    given: list[_Id]
    values: list[Tensor]


class _Recorder(TorchDispatchMode):
    """Records every operation. Tensors are kept alive, so that no two of them share an address."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[_Step] = []
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        taken, given = (list(tensors(value).values()) for value in ([args, kwargs or {}], [result]))
        self.kept += [*taken, *given]
        trained = {_id(t) for t in taken if t.requires_grad and torch.is_grad_enabled()}
        self.steps.append(_Step({_id(t) for t in taken}, trained, [_id(t) for t in given], [t.clone() for t in given]))
        return result


def _id(tensor: Tensor) -> _Id:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def trains_on_difference(case: Case, one: tuple[Any, Any], two: tuple[Any, Any]) -> bool:
    """Whether what differs between two pairs of batch and plan reaches the loss through a trainable weight.

    A result is tainted if it differs and was computed, with gradient, from a weight and something that differs, or from
    something tainted. To embed all tokens before the hidden ones are replaced is clean: after that nothing differs. So
    is the comparison of prediction and target, which has no weight in it.
    """
    first, second = (_record(case, *pair) for pair in (one, two))
    if [len(step.values) for step in first] != [len(step.values) for step in second]:
        return False  # the two passes ran different operations, which cannot be compared
    weights = {_id(p) for p in case.method.parameters() if p.requires_grad}
    pairs = zip(_inputs(*one), _inputs(*two), strict=True)
    differs, tainted = {_id(a) for a, b in pairs if not _equal(a, b)}, set[_Id]()
    for step, other in zip(first, second, strict=True):
        if step.trained and step.taken <= weights:
            weights |= set(step.given)  # a view or a cast of a weight
        works = bool(step.trained & weights) and bool(step.taken & differs)
        carries = works or bool(step.trained & tainted)
        for i, value, changed in zip(step.given, step.values, other.values, strict=True):
            unequal = not _equal(value, changed)
            (differs.add if unequal else differs.discard)(i)
            (tainted.add if unequal and carries else tainted.discard)(i)
    return bool(tainted & set(first[-1].given))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _inputs(batch: Any, plan: Any) -> list[Tensor]:
    return [*tensors(batch).values(), *tensors(plan).values()]


def _record(case: Case, batch: Any, plan: Any) -> list[_Step]:
    """The operations of one forward pass; the last one is the sum of all terms that score tokens."""
    torch.manual_seed(0)
    with _Recorder() as recorder:
        output = case.method(batch, plan)
        regions = loss_regions(case.method, output)
        torch.stack([term.total for name, term in output.terms.items() if regions[name] != "features"]).sum()
    return recorder.steps
