"""The chunked cross-entropy: values and gradients are those of the plain one, and memory is a chunk's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from unmask.core.losses import linear_cross_entropy


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    hidden = torch.randn(50, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(30, 8, dtype=dtype, requires_grad=True)
    bias = torch.randn(30, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 30, (50,))
    targets[::7] = -100
    return hidden, weight, bias, targets


@pytest.mark.parametrize("scale, softcap", [(1.0, None), (0.3, None), (1.0, 2.0), (0.5, 3.0)])
@pytest.mark.parametrize("chunk", [7, 50, 1000])
def test_equals_the_plain_loss(chunk: int, scale: float, softcap: float | None) -> None:
    hidden, weight, bias, targets = inputs(torch.float32)
    plain = (hidden @ weight.T + bias) * scale
    plain = plain if softcap is None else softcap * torch.tanh(plain / softcap)
    expected = F.cross_entropy(plain, targets, reduction="sum")
    wanted = torch.autograd.grad(3 * expected, (hidden, weight, bias))
    ours = linear_cross_entropy(hidden, weight, targets, bias, chunk=chunk, scale=scale, softcap=softcap)
    found = torch.autograd.grad(3 * ours, (hidden, weight, bias))
    torch.testing.assert_close(ours, expected)
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_without_gradients_and_for_one_of_them() -> None:
    hidden, weight, _, targets = inputs(torch.float32)
    with torch.no_grad():
        value = linear_cross_entropy(hidden, weight, targets, chunk=9)
    alone = linear_cross_entropy(hidden.detach(), weight, targets, chunk=9)
    alone.backward()
    assert torch.equal(value, alone.detach()) and hidden.grad is None and weight.grad is not None


def test_a_tied_embedding_gets_both_gradients() -> None:
    table = torch.randn(30, 8, requires_grad=True)
    ids = torch.arange(12)
    linear_cross_entropy(table[ids], table, ids, chunk=5).backward()
    found, table.grad = table.grad, None
    F.cross_entropy(table[ids] @ table.T, ids, reduction="sum").backward()
    assert found is not None and table.grad is not None
    assert (found - table.grad).abs().max() <= 1e-5 * table.grad.abs().max()


def test_nothing_counted_is_zero() -> None:
    hidden, weight, bias, targets = inputs(torch.float32)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100), bias)
    loss.backward()
    assert loss == 0 and hidden.grad is not None and not hidden.grad.any()


def test_under_autocast_products_run_in_bf16() -> None:
    hidden, weight, _, targets = inputs(torch.float32)
    exact = linear_cross_entropy(hidden, weight, targets)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = linear_cross_entropy(hidden, weight, targets)
    rounded.backward()
    assert rounded.dtype == torch.float32 and rounded != exact
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0)
