"""Checks of methods that hide tokens: hidden input reaches no prediction, by any path."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unmask.core.checks.case import Case, loss_regions, target_held
from unmask.core.checks.plans import inverse, mask_of, same, tensors
from unmask.core.checks.trace import trains_on_difference
from unmask.core.mask import Mask
from unmask.core.method import Plan, map_tensors


def hidden_input_does_not_leak(case: Case) -> None:
    """`predict` gives the same bits whatever the hidden input is, NaN included, in eval and in train mode."""
    assert hasattr(case.method, "predict"), "a method that hides tokens offers `predict(batch, plan)`"
    case, plan = case.sealed(), case.draw()
    assert any(where.any() for where in case.hidden_entries(plan).values()), "corrupt changed nothing: it is blind"
    for mode in ("eval", "train"):
        case.method.train(mode == "train")
        expected = case.answer(case.batch, plan)
        for value in case.values(plan):
            got = case.answer(case.overwrite(plan, value), plan)
            assert same(expected, got), f"predict changes when hidden input becomes {value} ({mode} mode)"


def hidden_input_does_not_leak_in_forward(case: Case) -> None:
    """The loss does not change with hidden input while its target is held fixed, in eval and in train mode.

    The target is what `target` gives. Where a method has none, every operation of two forward passes is compared
    instead: what depends on hidden input may be compared with a prediction, but may not pass a trainable weight.
    """
    case, plan = case.sealed(), case.draw()
    for mode in ("eval", "train"):
        case.method.train(mode == "train")
        for value in case.values(plan) if hasattr(case.method, "target") else (3.0, 1.0):
            _assert_forward_is_clean(case, plan, case.overwrite(plan, value), plan, f"{value} ({mode} mode)")


def _assert_forward_is_clean(case: Case, plan: Any, batch: Any, other: Any, what: str) -> None:
    if not hasattr(case.method, "target"):
        assert not trains_on_difference(case, (case.batch, plan), (batch, other)), (
            f"when hidden input becomes {what}, so does what a trainable weight works on, and the loss with it; if "
            "that is where prediction and target are compared, offer `target(batch, plan)`, which is then held fixed"
        )
        return
    torch.manual_seed(0)
    with torch.no_grad():
        target = case.method.target(case.batch, plan)
    with target_held(case.method, plan, target):
        expected, got = case.totals(case.batch, plan), case.totals(batch, other)
    names = [name for name in expected if not torch.equal(expected[name], got[name])]
    assert not names, (
        f"{', '.join(names)} changes when hidden input becomes {what} and `target` stays: forward sees it, or takes "
        "its target from elsewhere than `target`"
    )


def hidden_input_does_not_leak_through_the_plan(case: Case) -> None:
    """A plan drawn from other hidden input gives the same prediction and, its target held fixed, the same loss.

    Plans may depend on hidden input: scores may choose the mask, and the plan may hold targets and structure. So only
    draws with the same mask are compared: draws after large changes at all hidden tokens or at one, and after small
    changes. What draw stores in the method counts as part of its plan.
    """
    case = case.sealed()
    plan, predicts = case.draw(), hasattr(case.method, "predict")
    expected = case.answer(case.batch, plan)
    for i, batch in enumerate(_other_hidden_input(case, plan)):
        other = case.draw(batch)
        if same(mask_of(plan), mask_of(other)) and (i == 0 or not same(plan, other)):
            assert not predicts or same(expected, case.answer(case.batch, other)), (
                "with the same mask, predict changes with what draw computed from hidden input"
            )
            _assert_forward_is_clean(case, plan, case.batch, other, "something else for draw alone")


def _other_hidden_input(case: Case, plan: Any) -> Iterator[Any]:
    """Batches whose hidden input differs: all of it by much, one token by much, all by little."""
    whole = case.overwrite(plan, 3.0)
    yield from (whole, case.overwrite(plan, 1.0))
    mask = mask_of(plan)
    if isinstance(mask, Mask):
        most = int(mask.hidden.sum(1).max())
        rank = (mask.hidden.long().cumsum(1) - 1).masked_fill(~mask.hidden, -1)
        for chosen in sorted({0, most // 2, most - 1}):
            yield case.overwrite(Plan(Mask.from_hidden(rank == chosen, mask.valid)), 3.0)
    yield from (_blend(case.batch, whole, share) for share in (0.1, 1e-2, 1e-3))


def _blend(batch: Any, other: Any, share: float) -> Any:
    """`batch`, a share of the way to `other`; integers stay."""
    ends = iter(tensors(other).values())
    return map_tensors(
        batch, lambda t: torch.lerp(t, next(ends), share) if t.is_floating_point() else (next(ends), t)[1]
    )


def hidden_input_gets_no_gradient(case: Case) -> None:
    """No gradient of the loss reaches hidden input: not through the network, not through a target.

    Integer input has no gradient, nor has input that the method makes into ids; there the other checks must do.
    """
    case, plan = case.sealed(), case.draw()
    batch = map_tensors(case.batch, lambda t: t.clone().requires_grad_() if t.is_floating_point() else t)
    output = case.method(batch, plan)
    regions = loss_regions(case.method, output)
    terms = {name: term for name, term in output.terms.items() if regions[name] != "features"}
    if terms:
        replace(output, terms=terms).loss.backward()
    reached, where = [], case.hidden_entries(plan)
    for name, tensor in tensors(batch).items():
        if tensor.grad is not None:
            reached.append(bool((tensor.grad != 0).any()))
            assert not tensor.grad[where[name]].any(), (
                f"the loss has a gradient with respect to hidden entries of {name}"
            )
    assert any(reached) or not reached, "the loss has no gradient with respect to visible input"
    if hasattr(case.method, "target"):
        targets = tensors(case.method.target(case.batch, plan))
        assert not any(t.requires_grad for t in targets.values()), "the target carries a gradient"


def predict_uses_visible_input(case: Case) -> None:
    """`predict` changes when what is visible changes (a mask of the wrong polarity is caught here and above)."""
    plan = case.draw()
    expected = case.answer(case.batch, plan)
    got = case.answer(case.overwrite(inverse(plan), 3.0), plan)
    assert not same(expected, got), "predict does not change when all visible input changes"


def pictures_are_images(case: Case) -> None:
    """`picture`, where there is one, gives the input and the masked input, in one shape: finite, nothing hidden shown.

    A reconstruction has that shape too; other pictures have any size. Where the input is images, they keep their shape.
    """
    if not hasattr(case.method, "picture"):
        return
    plan = case.draw()
    images: dict[str, Tensor] = case.method.picture(case.batch, plan)
    missing = {"input", "masked"} - set(images)
    assert not missing, f"picture has no {', '.join(sorted(missing))}"
    for name, image in images.items():
        shape = tuple(image.shape)
        assert len(shape) == 4 and len(image) == len(case.batch.ids), f"picture {name!r} has shape {shape}"
        if name in ("masked", "reconstruction"):
            assert image.shape == images["input"].shape, f"picture {name!r} has shape {shape}, not the input's"
        assert image.isfinite().all() and not image.requires_grad, f"picture {name!r} is not finite or has a gradient"
    shapes = {tuple(t.shape) for t in tensors(case.batch).values() if t.dim() == 4}
    assert not shapes or tuple(images["input"].shape) in shapes, "the pictures' shape is not the input's"
    other = case.method.picture(case.overwrite(plan, 3.0), plan)
    assert torch.equal(images["masked"], other["masked"]), "the masked picture shows what is hidden"
