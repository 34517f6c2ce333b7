"""Masks and index sets: padded, packed, ragged, with padding; taking, putting and restoring."""

from __future__ import annotations

import pytest
import torch

from unmask.core.mask import Indices, Mask, Packed, Split, check_count
from unmask.core.method import map_tensors

X = torch.arange(24.0).view(2, 6, 2)
HIDDEN = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0]], dtype=torch.bool)
VALID = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], dtype=torch.bool)


def test_from_scores_keeps_the_lowest() -> None:
    scores = torch.tensor([[0.3, 0.1, 0.9, 0.2]])
    mask = Mask.from_scores(scores, 2)
    assert mask.hidden.tolist() == [[True, False, True, False]]
    assert mask.order.tolist() == [[1, 3, 0, 2]]
    assert mask.visible_indices.index.tolist() == [[1, 3]] and mask.hidden_indices.index.tolist() == [[0, 2]]


def test_ties_go_to_the_lower_position() -> None:
    assert Mask.from_scores(torch.zeros(3, 5), 2).visible_indices.index.tolist() == [[0, 1]] * 3


def test_visible_then_hidden_is_the_order() -> None:
    mask = Mask.from_scores(torch.rand(3, 7), 3)
    x = torch.randn(3, 7, 4)
    parts = torch.cat([mask.visible_indices.take(x), mask.hidden_indices.take(x)], dim=1)
    assert torch.equal(Indices(mask.order.argsort(1)).take(parts), x)


def test_ragged_masks_are_padded_with_members_of_the_same_set() -> None:
    mask = Mask.from_hidden(HIDDEN)
    visible, hidden = mask.visible_indices, mask.hidden_indices
    assert visible.lengths.tolist() == [3, 5] and hidden.lengths.tolist() == [3, 1]
    assert visible.index[0].tolist() == [1, 4, 5, 5, 5]
    assert visible.valid is not None and visible.valid[0].tolist() == [True, True, True, False, False]
    assert hidden.index[1].tolist() == [1, 1, 1]
    assert not HIDDEN.gather(1, visible.index).any() and HIDDEN.gather(1, hidden.index).all()


def test_a_known_count_needs_no_flags() -> None:
    mask = Mask.from_hidden(torch.tensor([[1, 0, 1], [0, 1, 1]], dtype=torch.bool), num_visible=1)
    assert mask.visible_indices.valid is None and mask.visible_indices.index.tolist() == [[1], [0]]


def test_padding_is_neither_visible_nor_hidden() -> None:
    mask = Mask.from_hidden(torch.ones_like(HIDDEN) & (torch.arange(6) > 1), VALID)
    assert mask.hidden.sum(1).tolist() == [4, 1] and mask.visible.sum(1).tolist() == [2, 2]
    assert mask.order[1, :3].tolist() == [0, 1, 2]
    assert mask.hidden_indices.lengths.tolist() == [4, 1]
    assert not (mask.hidden & ~VALID).any() and not (mask.visible & ~VALID).any()


@pytest.mark.parametrize("mask", [Mask.from_hidden(HIDDEN), Mask.from_scores(torch.rand(2, 6), 2)])
def test_put_undoes_take(mask: Mask) -> None:
    for indices in (mask.visible_indices, mask.hidden_indices):
        assert torch.equal(indices.put(X, indices.take(X)), X)
        changed = indices.put(X, indices.take(X) + 100)
        members = mask.visible if indices.index is mask.visible_indices.index else None
        moved = (changed != X).any(-1)
        assert moved.sum(1).tolist() == indices.lengths.tolist()
        assert members is None or torch.equal(moved, members)
    assert torch.equal((mask.hidden_indices.put(X, mask.hidden_indices.take(X) + 100) != X).any(-1), mask.hidden)


def test_padded_slots_do_not_write() -> None:
    hidden = Mask.from_hidden(HIDDEN).hidden_indices
    filled = hidden.put(torch.zeros(2, 6), torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    assert filled.tolist() == [[1, 0, 2, 3, 0, 0], [0, 4, 0, 0, 0, 0]]


def test_take_keeps_any_trailing_shape() -> None:
    indices = Mask.from_scores(torch.rand(2, 6), 2).visible_indices
    for shape in ((2, 6), (2, 6, 3), (2, 6, 3, 4)):
        x = torch.randn(shape)
        expected = torch.stack([x[b, i] for b, i in enumerate(indices.index)])
        assert torch.equal(indices.take(x), expected)


def test_packed_takes_the_rows_of_one_sample_after_another() -> None:
    packed = Packed(torch.tensor([1, 4, 6, 7]), torch.tensor([0, 2, 4], dtype=torch.int32))
    assert torch.equal(packed.take(X), torch.cat([X[0, [1, 4]], X[1, [0, 1]]]))


MEMBERS = torch.tensor([[0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 0]], dtype=torch.bool)


def test_indices_from_members_and_back() -> None:
    indices = Indices.from_members(MEMBERS)
    assert indices.lengths.tolist() == [2, 1, 3] and indices.index[2].tolist() == [0, 1, 2]
    assert indices.index[:2].tolist() == [[1, 3, 3], [4, 4, 4]]  # padding repeats a member
    assert torch.equal(indices.members(6), MEMBERS)
    cut = Indices.from_members(MEMBERS, count=1)
    assert cut.valid is None and cut.index.tolist() == [[1], [4], [0]]


def test_a_split_says_what_is_not_seen_and_what_is_asked() -> None:
    context = torch.tensor([[1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1]], dtype=torch.bool)
    split = Split(Indices.from_members(context), (Indices.from_members(MEMBERS), Indices(torch.tensor([[5]] * 3))))
    assert torch.equal(split.hidden(6), ~context)
    assert torch.equal(split.asked(6), MEMBERS | (torch.arange(6) == 5))


def test_split_take_keeps_the_samples_and_no_wider_than_they_need() -> None:
    split = Split(Indices.from_members(~MEMBERS), (Indices.from_members(MEMBERS), Indices(torch.arange(3)[:, None])))
    part = split.take([1, 0])
    assert torch.equal(part.hidden(6), MEMBERS[[1, 0]])
    assert torch.equal(part.targets[0].members(6), MEMBERS[[1, 0]]) and part.targets[0].count == 2
    assert part.targets[1].index.tolist() == [[1], [0]] and part.targets[1].valid is None


def test_a_split_is_mapped_tensor_by_tensor() -> None:
    mask = Mask.from_hidden(HIDDEN)
    split = Split(mask.visible_indices, (mask.hidden_indices,))
    moved = map_tensors(split, lambda t: t.clone())
    assert torch.equal(moved.hidden(6), split.hidden(6)) and moved.context.index is not split.context.index


@pytest.mark.parametrize("visible", [0, 6, 7, -1])
def test_nothing_visible_or_hidden_is_refused(visible: int) -> None:
    with pytest.raises(ValueError, match="of 6 tokens visible: nothing would be"):
        check_count(visible, 6)
    with pytest.raises(ValueError, match="nothing would be"):
        Mask.from_scores(torch.rand(1, 6), visible)
