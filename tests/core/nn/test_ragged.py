"""Concatenated sets of different sizes against loops over them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from unmask.core.nn.ragged import rows_of, run_offsets, segment_max, segment_mean, segment_sum, take_ragged, unravel

OFFSETS = torch.tensor([0, 3, 3, 5])


def test_rows_belong_to_their_set_and_sets_can_be_taken_in_any_order() -> None:
    assert rows_of(OFFSETS, 5).tolist() == [0, 0, 0, 2, 2]
    rows, offsets = take_ragged(OFFSETS, [2, 1, 0, 2])
    assert rows.tolist() == [3, 4, 0, 1, 2, 3, 4] and offsets.tolist() == [0, 2, 2, 5, 7]


def test_runs_and_row_major_numbers() -> None:
    assert run_offsets(torch.tensor([4, 4, 7, 9, 9, 9])).tolist() == [0, 2, 3, 6]
    assert run_offsets(torch.empty(0, dtype=torch.int64)).tolist() == [0]
    cells = torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4))
    assert torch.equal(unravel(torch.arange(24), (3, 4)), cells)


REDUCTIONS = {segment_mean: lambda p: p.mean(0), segment_max: lambda p: p.amax(0), segment_sum: lambda p: p.sum(0)}


@pytest.mark.parametrize("ours", REDUCTIONS)
def test_segments_and_their_gradients_as_a_loop_reduces_them(ours: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, starts = torch.randn(40, 5, requires_grad=True), torch.tensor([0, 1, 1, 20, 39, 40, 40])
    parts = [x[a:b] for a, b in itertools.pairwise(starts.tolist())]
    slow = torch.stack([REDUCTIONS[ours](part) if len(part) else torch.zeros(5) for part in parts])
    fast = ours(x, starts)
    torch.testing.assert_close(fast, slow)
    weight = torch.randn_like(slow)
    torch.testing.assert_close(*(torch.autograd.grad((y * weight).sum(), x)[0] for y in (fast, slow)))
    assert ours(torch.randn(0, 5), torch.tensor([0])).shape == (0, 5)


def test_equal_maxima_share_the_gradient() -> None:
    tied = torch.tensor([[2.0], [2.0], [1.0]], requires_grad=True)
    segment_max(tied, torch.tensor([0, 3])).sum().backward()
    assert tied.grad is not None and tied.grad[:, 0].tolist() == [0.5, 0.5, 0.0]
