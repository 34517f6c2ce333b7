"""SimMIM's masks: the published squares, counted in pixels, whatever the model's patch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from unmask.core.masking import RandomMasking
from unmask.core.randomness import Key

CASES = [(224, 16, 32, 30 * 4), (192, 4, 32, 22 * 64), (64, 4, 16, 10 * 16), (32, 4, 4, 39), (32, 4, 8, 10 * 4)]


def published(order: list[int], n: int, scale: int, count: int) -> Tensor:
    """One mask as the paper makes it: mark `count` squares of an n x n grid, blow each up to scale x scale tokens."""
    rows = [[0] * (n * scale) for _ in range(n * scale)]
    for square in order[:count]:
        top, left = square // n * scale, square % n * scale
        for i in range(scale):
            for j in range(scale):
                rows[top + i][left + j] = 1
    return torch.tensor(rows).bool()


@pytest.mark.parametrize(("image", "patch", "unit", "hidden"), CASES)
def test_counts_and_whole_squares(image: int, patch: int, unit: int, hidden: int) -> None:
    side, scale = image // patch, unit // patch
    mask = RandomMasking(0.6, "ceil_hide", scale)(Key.of(0, torch.arange(16)), (side, side))
    assert hidden == math.ceil((image // unit) ** 2 * 0.6) * scale**2
    assert mask.hidden.sum(1).tolist() == [hidden] * 16
    assert mask.num_visible == side * side - hidden
    squares = mask.hidden.view(16, side // scale, scale, side // scale, scale).transpose(2, 3).flatten(3)
    assert torch.equal(squares.all(-1), squares.any(-1))
    assert len({tuple(row) for row in mask.hidden.tolist()}) > 1  # samples are hidden independently


@pytest.mark.parametrize(("image", "patch", "unit", "hidden"), CASES)
def test_equal_to_the_published_rule_on_the_same_permutation(image: int, patch: int, unit: int, hidden: int) -> None:
    n, scale = image // unit, unit // patch
    key = Key.of(3, torch.arange(4))
    mask = RandomMasking(0.6, "ceil_hide", scale)(key, (image // patch, image // patch))
    count = math.ceil(n * n * 0.6)
    for order, row in zip(key.permutation(n * n).tolist(), mask.hidden, strict=True):
        # Ours keeps the first squares of the permutation, the published rule hides them: read it from the end.
        assert torch.equal(published(order[::-1], n, scale, count).flatten(), row)


def test_a_samples_mask_is_its_own() -> None:
    masking = RandomMasking(0.6, "ceil_hide", 2)
    together = masking(Key.of(0, torch.arange(64)), (14, 14)).hidden
    alone = [masking(Key.of(0, torch.tensor([i])), (14, 14)).hidden[0] for i in (0, 17, 63)]
    assert torch.equal(together[[0, 17, 63]], torch.stack(alone))
    assert not torch.equal(masking(Key.of(0, torch.arange(64), 1), (14, 14)).hidden, together)


def test_every_square_is_hidden_equally_often() -> None:
    draws = 10_000
    mask = RandomMasking(0.6, "ceil_hide", 2)(Key.of(0, torch.arange(draws)), (14, 14))
    share = 30 / 49
    deviation = (mask.hidden.double().mean(0) - share) / (share * (1 - share) / draws) ** 0.5
    assert deviation.abs().max() < 4


@pytest.mark.parametrize("grid", [(4, 8), (2, 3)])
def test_rectangles(grid: tuple[int, int]) -> None:
    rows, columns = 2 * grid[0], 2 * grid[1]
    mask = RandomMasking(0.6, "ceil_hide", 2)(Key.of(0, torch.arange(3)), (rows, columns))
    assert mask.hidden.sum(1).tolist() == [4 * math.ceil(grid[0] * grid[1] * 0.6)] * 3
    squares = mask.hidden.view(3, grid[0], 2, grid[1], 2).transpose(2, 3).flatten(3)
    assert torch.equal(squares.all(-1), squares.any(-1))
