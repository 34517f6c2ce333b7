"""Per-token losses, and means that stay exact when a batch is cut in pieces."""

from __future__ import annotations

import pytest
import torch

from unmask.core.losses import l1, l2, mean_term, regression, smooth_l1
from unmask.core.method import Output

P, T = torch.tensor([[[0.0, 3.0], [1.0, 1.0]]]), torch.tensor([[[1.0, 1.0], [1.0, 1.5]]])


def test_values_by_hand() -> None:
    assert l1(P, T).tolist() == [[1.5, 0.25]]
    assert l2(P, T).tolist() == [[2.5, 0.125]]
    assert smooth_l1(P, T).tolist() == [[1.0, 0.0625]]
    assert smooth_l1(P, T, beta=4.0)[0, 0].item() == pytest.approx((0.125 + 0.5) / 2)


def test_regression_by_name() -> None:
    for kind, function in (("l1", l1), ("l2", l2), ("smooth_l1", smooth_l1)):
        assert torch.equal(regression(kind, P, T), function(P, T))


def test_half_precision_is_computed_in_float32() -> None:
    x = torch.full((1, 1, 4), 300.0, dtype=torch.float16)
    assert l2(x, -x).item() == 360_000 and l2(x, -x).dtype == torch.float32


def test_mean_over_what_counts() -> None:
    values = torch.tensor([[1.0, float("nan"), 5.0]], requires_grad=True)
    term = mean_term(values, torch.tensor([[True, False, True]]), weight=2.0)
    assert term.mean.item() == 3.0 and float(term.count) == 2
    output = Output({"a": term, "b": mean_term(torch.ones(2, 2))})
    assert output.loss.item() == 7.0
    output.loss.backward()
    assert values.grad is not None and values.grad.tolist() == [[1.0, 0.0, 1.0]]


def test_totals_and_counts_add_up_over_pieces() -> None:
    values, where = torch.rand(8, 5), torch.rand(8, 5) > 0.6
    whole = mean_term(values, where)
    pieces = [mean_term(v, w) for v, w in zip(values.split(3), where.split(3), strict=True)]
    total, count = sum(p.total for p in pieces), sum(p.count for p in pieces)
    torch.testing.assert_close(total / count, whole.mean)
