"""Checks of `loss_on`: a loss declared to be on hidden tokens does not depend on the targets of visible ones."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from unmask.core.checks.case import Case, loss_regions, target_held
from unmask.core.checks.plans import inverse, mask_of, same, tensors
from unmask.core.mask import Mask
from unmask.core.method import map_tensors


def loss_is_taken_where_it_says(case: Case) -> None:
    """Terms on hidden tokens do not count visible tokens, and do not change with their targets.

    Which tokens a term is on is what the method's `loss_on` declares ("hidden" by default). Targets come from `target`,
    from tensors of the batch that are no input (labels), or from the input itself; for the last, the network is made
    blind, so that input can reach the loss as target only.
    """
    plan = case.draw()
    with torch.no_grad():
        output = case.method(case.batch, plan)
    regions = loss_regions(case.method, output)
    hidden = [name for name, region in regions.items() if region == "hidden"]
    if not hidden:
        return
    mask = mask_of(plan)
    if isinstance(mask, Mask):
        if set(regions.values()) <= {"hidden", "features"}:  # else a term may be divided by all predicted tokens
            _check_counts({name: float(output.terms[name].count) for name in hidden}, mask)
        _check_labels(case, plan, mask, hidden)
        _check_target(case, plan, mask, hidden)
    _check_blind(case, plan, hidden)


def _check_counts(counts: dict[str, float], mask: Mask) -> None:
    """A count that is that of all, or of the visible tokens, and cannot be one of hidden tokens."""
    n_hidden, n_visible = int(mask.hidden.sum()), int(mask.visible.sum())
    for name, count in counts.items():
        which = "all" if count == n_hidden + n_visible else "the visible" if count == n_visible else None
        assert which is None or count % n_hidden == 0, (
            f"term {name!r} counts {which} {count:g} tokens, and {n_hidden} are hidden; if that is meant, say so in "
            "`loss_on`"
        )


def _check_labels(case: Case, plan: Any, mask: Mask, names: list[str]) -> None:
    """Labels in the batch, which no `corrupt` touches, are exchanged between samples at visible tokens."""
    entries = (case.hidden_entries(plan), case.hidden_entries(inverse(plan)))
    given = {name for where in entries for name, changes in where.items() if changes.any()}
    for name, label in tensors(case.batch).items():
        if name not in given and label.shape[:2] == mask.hidden.shape:
            moved = _with_rolled(case.batch, label, mask)
            if not _is_input(case, moved, plan):
                _assert_same_loss(case, case.batch, moved, plan, names, "labels")


def _with_rolled(batch: Any, label: Tensor, mask: Mask) -> Any:
    return map_tensors(batch, lambda t: _rolled(t, mask) if t is label else t)


def _is_input(case: Case, moved: Any, plan: Any) -> bool:
    """Whether the answer changes, as with a second view that is seen whole: then what was moved is no label."""
    return hasattr(case.method, "predict") and not same(case.answer(case.batch, plan), case.answer(moved, plan))


def _rolled(tensor: Tensor, mask: Mask) -> Tensor:
    """The next sample's entries at visible tokens; negative labels, which mean "no label", stay."""
    where, other = mask.visible.reshape(*mask.visible.shape, *[1] * (tensor.dim() - 2)), tensor.roll(1, 0)
    if not tensor.is_floating_point():
        where = where & (tensor >= 0) & (other >= 0)
    return torch.where(where, other, tensor)


def _check_target(case: Case, plan: Any, mask: Mask, names: list[str]) -> None:
    """A target for every token is exchanged between samples at visible tokens."""
    if not hasattr(case.method, "target"):
        return
    with torch.no_grad():
        target = case.method.target(case.batch, plan)
    whole = [t for t in tensors(target).values() if t.shape[:2] == mask.hidden.shape]
    if whole:
        moved = map_tensors(target, lambda t: _rolled(t, mask) if any(t is one for one in whole) else t)
        with target_held(case.method, plan, target):
            expected = case.totals(case.batch, plan)
        with target_held(case.method, plan, moved):
            _assert_equal(expected, case.totals(case.batch, plan), names, "targets")


def _check_blind(case: Case, plan: Any, names: list[str]) -> None:
    """With a network whose predictions do not depend on input, the loss does not depend on visible input."""
    case = case.fresh()
    with torch.no_grad():
        target = case.method.target(case.batch, plan) if hasattr(case.method, "target") else None
    _blind(case.method, None if target is None else lambda parameter: parameter.requires_grad)
    other = case.overwrite(inverse(plan), 3.0)
    if hasattr(case.method, "predict") and not same(case.answer(case.batch, plan), case.answer(other, plan)):
        return  # input reaches the prediction past all weights: this check cannot decide
    with nullcontext() if target is None else target_held(case.method, plan, target):
        _assert_same_loss(case, case.batch, other, plan, names, "input")


@torch.no_grad()
def _blind(method: Any, chosen: Callable[[Tensor], bool] | None) -> None:
    """Set every matrix to 0, so that predictions depend on biases only. Of a weight norm, only the gain is set to 0."""
    for name, parameter in method.named_parameters():
        if (chosen is None or chosen(parameter)) and not name.endswith("parametrizations.weight.original1"):
            if parameter.dim() > 1:
                parameter.zero_()
            elif parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn_like(parameter))


def _assert_same_loss(case: Case, batch: Any, other: Any, plan: Any, names: list[str], what: str) -> None:
    _assert_equal(case.totals(batch, plan), case.totals(other, plan), names, what)


def _assert_equal(expected: dict[str, Tensor], got: dict[str, Tensor], names: list[str], what: str) -> None:
    for name in names:
        equal = torch.equal(expected[name], got[name]) or not expected[name].isfinite()
        assert equal, (
            f"term {name!r} changes with the {what} of visible tokens; a loss on hidden tokens does not. If it is "
            "meant, say so in `loss_on`"
        )
