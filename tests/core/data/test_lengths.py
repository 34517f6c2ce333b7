"""Parts of long samples, and batches of about the same length."""

from __future__ import annotations

import torch

from unmask.core.data.lengths import by_length, cut_lengths


def test_even_parts_cover_a_sample_and_begin_on_the_grid() -> None:
    parts = cut_lengths(torch.tensor([7, 100, 40]), 10, 45, step=5)
    assert parts.sample.tolist() == [0, 1, 1, 1, 2] and parts.number.tolist() == [0, 0, 1, 2, 0]
    assert parts.starts.tolist() == [0, 0, 30, 65, 0] and parts.stops.tolist() == [7, 30, 65, 100, 40]


def test_a_rest_is_left_out_where_even_parts_would_be_too_short() -> None:
    parts = cut_lengths(torch.tensor([25]), 15, 20)
    assert parts.starts.tolist() == [0] and parts.stops.tolist() == [20]


def test_batches_by_length_hold_every_sample_once() -> None:
    lengths = torch.tensor([10, 40, 1, 30, 10, 100])
    batches = list(by_length(lengths, 60))
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    assert batches[0] == [5] and batches[1] == [1]
    assert all(len(batch) * int(lengths[batch].max()) <= 60 for batch in batches[1:])
