"""Means over counts that are no whole numbers, or nothing at all."""

from __future__ import annotations

import pytest
import torch

from unmask.core.method import Term


@pytest.mark.parametrize(("count", "expected"), [(0.25, 2.0), (2.0, 0.25)])
def test_a_mean_divides_by_whatever_was_counted(count: float, expected: float) -> None:
    total = torch.tensor(0.5)
    assert Term(total, count).mean.item() == Term(total, torch.tensor(count)).mean.item() == expected


def test_the_mean_of_nothing_is_zero() -> None:
    total = torch.tensor(0.0)
    assert Term(total, 0.0).mean.item() == Term(total, torch.tensor(0)).mean.item() == 0
