"""Checks of every trained method: its forward pass, its learning, its state."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import jaxtyping
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from unmask.core.checks.case import Case, changed, jolt, snapshot
from unmask.core.checks.quiet import quiet
from unmask.core.method import Output


def forward_is_pure(case: Case) -> None:
    """The same batch and plan give the same bits twice, in eval mode and, dropout apart, in train mode.

    In eval mode nothing in the method changes. BatchNorm keeps to its running statistics for the comparison.
    """
    plan, before = case.draw(), snapshot(case.method)
    with torch.no_grad():
        first, second = case.method(case.batch, plan), case.method(case.batch, plan)
        for name, term in first.terms.items():
            assert torch.equal(term.total, second.terms[name].total), f"term {name!r} differs between two calls"
        assert not changed(before, case.method), (
            f"forward in eval mode changed {', '.join(changed(before, case.method))}"
        )
        with quiet(case.method):
            trained = case.method(case.batch, plan)
    for name, term in first.terms.items():
        assert torch.equal(term.total, trained.terms[name].total), (
            f"term {name!r} differs between eval and train mode, dropout and batch statistics apart"
        )


def output_is_well_formed(case: Case) -> None:
    """Terms are finite scalars with positive counts; metrics carry no gradient."""
    output = case.method(case.batch, case.draw())
    assert output.terms, "no loss terms"
    for name, term in output.terms.items():
        assert term.total.dim() == 0, f"term {name!r}: total has shape {tuple(term.total.shape)}, not a scalar"
        assert torch.isfinite(term.total), f"term {name!r}: total is {float(term.total)}"
        assert float(term.count) > 0, f"term {name!r}: count is {float(term.count)}"
    for name, value in output.metrics.items():
        total = value.total
        assert total.numel() == 1 and not total.requires_grad, f"metric {name!r} is no scalar without gradient"


def counts_depend_on_the_plan_alone(case: Case) -> None:
    """Counts stay when weights change: otherwise means over micro-batches and ranks would not be exact."""
    plan = case.draw()
    before = _counts(case.method(case.batch, plan))
    jolt(case.method)
    assert before == _counts(case.method(case.batch, plan)), "a term's count changed with the weights"
    if hasattr(case.method, "counts"):
        declared = {name: float(count) for name, count in case.method.counts(case.batch, plan).items()}
        assert list(declared.items()) == list(before.items()), f"counts gives {declared}, and the terms have {before}"


def _counts(output: Output) -> dict[str, float]:
    return {name: float(term.count) for name, term in output.terms.items()}


def bf16_is_close(case: Case) -> None:
    """Under bfloat16 autocast the loss is finite and within 5 % of float32's."""
    plan, device = case.draw(), case.batch.ids.device.type
    with torch.no_grad():
        exact = float(case.method(case.batch, plan).loss)
        with torch.autocast(device, torch.bfloat16):
            loss = float(case.method(case.batch, plan).loss)
    assert math.isfinite(loss), f"the loss is {loss} in bfloat16"
    assert abs(loss - exact) <= 0.05 * abs(exact), f"the loss is {loss:.4g} in bfloat16 and {exact:.4g} in float32"


def compiles(case: Case) -> None:
    """torch.compile traces the method, forward and backward (aot_eager), and the loss stays."""
    plan = case.draw()
    eager = case.method(case.batch, plan).loss
    torch._dynamo.reset()
    with _only_tracing():
        compiled = torch.compile(case.method, backend="aot_eager")(case.batch, plan).loss
        compiled.backward()
    torch._dynamo.reset()
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


@contextmanager
def _only_tracing() -> Iterator[None]:
    """Without checks of shapes at run time, which cannot be traced, and without the warnings of tracing itself."""
    was = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", was)


def every_trainable_parameter_learns(case: Case) -> None:
    """Two AdamW steps without decay: finite gradients, every trainable parameter moves, no frozen one does."""
    method = case.method.train()
    before = snapshot(method)
    trainable = {name: p for name, p in method.named_parameters() if p.requires_grad}
    assert trainable, "nothing is trainable"
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-3, weight_decay=0.0)
    for visit in range(2):
        optimizer.zero_grad()
        method(case.batch, case.draw(visit=visit)).loss.backward()
        if visit == 0:
            unused = [name for name, p in trainable.items() if p.grad is None]
            assert not unused, f"no gradient reaches {', '.join(unused)}"
        wild = [name for name, p in trainable.items() if p.grad is not None and not p.grad.isfinite().all()]
        assert not wild, f"the gradient of {', '.join(wild)} is not finite"
        optimizer.step()
    parameters = dict(method.named_parameters())
    still = [name for name in trainable if torch.equal(before[name], parameters[name])]
    assert not still, f"two steps do not move {', '.join(still)}"
    moved = [name for name in parameters if name not in trainable and not torch.equal(before[name], parameters[name])]
    assert not moved, f"training changed {', '.join(moved)}, which is frozen"


def state_survives_a_round_trip(case: Case) -> None:
    """state_dict through safetensors into a method with other weights gives the same loss, bit for bit."""
    plan = case.draw()
    with torch.no_grad():
        expected = case.method(case.batch, plan).loss
        stored = save_tensors({name: t.clone() for name, t in case.method.state_dict().items()})
        other = copy.deepcopy(case.method)
        jolt(other)
        other.load_state_dict(load_tensors(stored))
        assert torch.equal(expected, other(case.batch, plan).loss), "the loss differs after save and load"
