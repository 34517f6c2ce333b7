"""The maskings: counts, units, uniformity, padding, blocks, coloured noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from unmask.core.mask import Mask
from unmask.core.masking import BernoulliMasking, BlockMasking, Masking, NoiseMasking, RandomMasking
from unmask.core.masking.noise import color_filter, equalize, keep_highest
from unmask.core.masking.random import hidden_count, units_of
from unmask.core.randomness import Key

ALL = [
    RandomMasking(0.75),
    RandomMasking(0.6, "ceil_hide", unit=2),
    BernoulliMasking(0.5),
    BlockMasking(0.4),
    BlockMasking(0.4, exact=True),
    NoiseMasking("green", slices=2, size=32),
]


def keys(n: int, seed: int = 0) -> Key:
    return Key.of(seed, torch.arange(n))


@pytest.mark.parametrize("masking", ALL, ids=str)
def test_a_sample_keeps_its_mask_in_any_batch(masking: Masking) -> None:
    whole = masking(keys(64), (8, 8))
    for i in (0, 17, 63):
        alone = masking(Key.of(0, torch.tensor([i])), (8, 8))
        assert torch.equal(alone.hidden[0], whole.hidden[i]) and torch.equal(alone.order[0], whole.order[i])
    assert len({tuple(row) for row in whole.hidden.tolist()}) > 55


# --- random ---


@pytest.mark.parametrize(
    ("tokens", "ratio", "rounding", "hidden"),
    [
        (196, 0.75, "floor_keep", 147),
        (256, 0.75, "floor_keep", 192),
        (100, 0.9, "floor_keep", 91),  # 100 * (1 - 0.9) is 9.999...: the float floor keeps 9
        (196, 0.9, "floor_keep", 177),
        (36, 0.6, "ceil_hide", 22),
        (49, 0.6, "ceil_hide", 30),
        (49, 0.6, "round", 29),
        (196, 0.9, "floor_hide", 176),  # CroCo's and VideoMAE's
        (100, 0.29, "floor_hide", 28),  # 100 * 0.29 is 28.999...
        (10, 0.25, "round", 2),
        (49, 0.75, "floor_keep", 37),
    ],
)
def test_counts(tokens: int, ratio: float, rounding: str, hidden: int) -> None:
    assert hidden_count(tokens, ratio, rounding) == hidden
    mask = RandomMasking(ratio, rounding)(keys(5), (tokens,))
    assert mask.hidden.sum(1).tolist() == [hidden] * 5 and mask.num_visible == tokens - hidden


@pytest.mark.parametrize(("grid", "unit"), [((12, 12), 2), ((8, 12), 4), ((4, 4, 4), 2), ((12,), 3)])
def test_units_are_hidden_as_a_whole(grid: tuple[int, ...], unit: int) -> None:
    hidden = RandomMasking(0.6, "ceil_hide", unit)(keys(20), grid).hidden.view(20, *grid)
    for axis, n in enumerate(grid, start=1):
        hidden = hidden.unflatten(axis + (axis - 1), (n // unit, unit))
    axes = (*range(1, 2 * len(grid), 2), *range(2, 2 * len(grid) + 1, 2))
    cells = hidden.permute(0, *axes).reshape(20, -1, unit ** len(grid))
    assert torch.equal(cells.all(2), cells.any(2))
    assert cells.any(2).sum(1).tolist() == [hidden_count(cells.shape[1], 0.6, "ceil_hide")] * 20


def test_a_unit_that_does_not_divide_names_those_that_do() -> None:
    with pytest.raises(ValueError, match="does not divide the token grid 6 x 9; units of 1, 3 do"):
        units_of((6, 9), 2)


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1.2, -0.1])
def test_a_ratio_outside_is_refused(ratio: float) -> None:
    for make in (RandomMasking, BernoulliMasking, BlockMasking, lambda r: NoiseMasking("green", r)):
        with pytest.raises(ValueError, match="is not between 0 and 1"):
            make(ratio)


def test_pairs_of_positions_are_hidden_together_as_often_as_they_should() -> None:
    n, draws = 12, 20_000
    hidden = RandomMasking(0.5)(keys(draws), (n,)).hidden.double()
    together = hidden.T @ hidden / draws
    expected = torch.full((n, n), 0.5 * 5 / 11, dtype=torch.float64).fill_diagonal_(0.5)
    assert (together - expected).abs().max() < 4.5 * 0.5 / draws**0.5


@pytest.mark.parametrize("rounding", ["floor_keep", "ceil_hide", "round"])
def test_padding_is_not_counted(rounding: str) -> None:
    lengths = torch.tensor([5, 12, 8, 20])
    valid = torch.arange(20) < lengths[:, None]
    mask = RandomMasking(0.6, rounding)(keys(4), (20,), valid)
    assert mask.hidden.sum(1).tolist() == [hidden_count(n, 0.6, rounding) for n in lengths.tolist()]
    assert not (mask.hidden & ~valid).any() and torch.equal(mask.visible | mask.hidden, valid)
    for i, n in enumerate(lengths.tolist()):  # order: visible, hidden, padding
        assert set(mask.order[i, n:].tolist()) == set(range(n, 20))
        assert not mask.hidden[i, mask.order[i, : int(mask.visible[i].sum())]].any()


def test_bernoulli_is_a_coin_per_token() -> None:
    counts = BernoulliMasking(0.3)(keys(4000), (10, 10)).hidden.sum(1).double()
    assert abs(float(counts.mean()) - 30) < 4 * (21 / 4000) ** 0.5
    assert abs(float(counts.var()) - 21) < 2.5


# --- blocks ---


def blocks_by_loop(rng: np.random.Generator, side: int, target: int, smallest: int) -> np.ndarray:
    """The published generator in plain loops, for its statistics."""
    mask, count = np.zeros((side, side), bool), 0
    while count < target:
        limit, new = target - count, 0
        for _ in range(10):
            area = rng.uniform(min(smallest, limit), max(smallest, limit))
            aspect = np.exp(rng.uniform(np.log(0.3), -np.log(0.3)))
            h, w = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if h < side and w < side:
                top, left = rng.integers(0, side - h + 1), rng.integers(0, side - w + 1)
                part = mask[top : top + h, left : left + w]
                if 0 < part.size - part.sum() <= limit:
                    new = part.size - part.sum()
                    part[:] = True
                    break
        if not new:
            break
        count += new
    return mask


def touching(hidden: np.ndarray) -> float:
    """The share of a hidden token's 4-neighbours (inside the grid) that are hidden."""
    pairs = (hidden[:, 1:] & hidden[:, :-1]).sum() + (hidden[:, :, 1:] & hidden[:, :, :-1]).sum()
    places = np.pad(np.ones(hidden.shape[1:]), 1)
    neighbours = places[2:, 1:-1] + places[:-2, 1:-1] + places[1:-1, 2:] + places[1:-1, :-2]
    return float(2 * pairs / (hidden * neighbours).sum())


def test_blocks_have_the_statistics_of_the_published_loop() -> None:
    ours = BlockMasking(75 / 196)(keys(1500), (14, 14)).hidden.view(-1, 14, 14).numpy()
    rng = np.random.default_rng(0)
    theirs = np.stack([blocks_by_loop(rng, 14, 75, 16) for _ in range(1500)])
    counts, expected = ours.sum((1, 2)), theirs.sum((1, 2))
    assert counts.max() == 75 and abs(counts.mean() - expected.mean()) < 0.15
    assert abs(counts.std() - expected.std()) < 0.15
    assert abs((counts == 75).mean() - (expected == 75).mean()) < 0.06
    assert abs(touching(ours) - touching(theirs)) < 0.01
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 0.09  # 6 standard errors


@pytest.mark.parametrize("grid", [(14, 14), (7, 7), (6, 20)])
def test_exact_blocks_contain_the_published_ones(grid: tuple[int, int]) -> None:
    exact, loose = BlockMasking(0.4, exact=True)(keys(200), grid), BlockMasking(0.4)(keys(200), grid)
    target = hidden_count(grid[0] * grid[1], 0.4, "round")
    assert exact.hidden.sum(1).tolist() == [target] * 200 and exact.num_visible == grid[0] * grid[1] - target
    assert loose.num_visible is None and int(loose.hidden.sum(1).max()) <= target
    assert not (loose.hidden & ~exact.hidden).any()


def test_blocks_are_topped_up_at_their_border() -> None:
    masks = (BlockMasking(0.3, exact=exact)(keys(300), (14, 14)).hidden for exact in (True, False))
    exact, loose = (mask.view(-1, 14, 14).numpy() for mask in masks)
    added = exact & ~loose
    border = np.stack([ndimage.binary_dilation(mask) for mask in loose])
    assert added.any() and not (added & ~border).any()


def test_the_first_block_is_a_rectangle_within_its_limits() -> None:
    """With smallest block = target nothing is left after the first, so masks are single rectangles."""
    hidden = BlockMasking(40 / 400, min_block=40)(keys(400), (20, 20)).hidden.view(-1, 20, 20)
    rows, columns = hidden.any(2).sum(1), hidden.any(1).sum(1)
    area, count = rows * columns, hidden.flatten(1).sum(1)
    single = area == count
    assert single.float().mean() > 0.3
    aspect = rows[single] / columns[single]
    assert aspect.min() > 0.3 * 0.75 and aspect.max() < 1 / (0.3 * 0.75)  # sides are rounded


def test_blocks_respect_max_block() -> None:
    def largest(masking: BlockMasking) -> float:
        masks = masking(keys(200), (14, 14)).hidden.view(-1, 14, 14).numpy()
        erased = [ndimage.binary_opening(m, np.ones((6, 6))).any() for m in masks]
        return float(np.mean(erased))

    assert largest(BlockMasking(0.3, min_block=4, max_block=6)) < 0.02 < largest(BlockMasking(0.3))


@pytest.mark.parametrize("wrong", [{"min_block": 0}, {"max_block": 3}, {"min_aspect": 0.0}])
def test_block_settings_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="block|aspect"):
        BlockMasking(0.4, **wrong)
    with pytest.raises(ValueError, match="2-d token grid"):
        BlockMasking(0.4)(keys(2), (9,))


# --- coloured noise ---

STATISTICS = {  # P(neighbour visible | visible), visible components, mean distance hidden to visible; 14 x 14, 75 %
    "random": (0.25, 27, 1.25),
    "blue": (0.01, 48, 1.23),
    "green": (0.54, 9, 1.49),
    "purple": (0.09, 41, 1.57),
    "red": (0.87, 1.4, 4.3),
}


@pytest.mark.parametrize("color", STATISTICS)
def test_neighbourhoods_of_each_color(color: str) -> None:
    masking = RandomMasking(0.75) if color == "random" else NoiseMasking(color, slices=16)
    visible = masking(keys(400), (14, 14)).visible.view(-1, 14, 14).numpy()
    neighbour, components, distance = STATISTICS[color]
    assert visible.sum((1, 2)).tolist() == [49] * 400
    assert touching(visible) == pytest.approx(neighbour, abs=0.02)
    assert np.mean([ndimage.label(v)[1] for v in visible]) == pytest.approx(components, rel=0.08)
    away = [ndimage.distance_transform_edt(~v)[~v].mean() for v in visible]
    assert np.mean(away) == pytest.approx(distance, rel=0.04)


def spectrum(bank: torch.Tensor, low: float, high: float) -> float:
    """Mean amplitude between two radial frequencies, in cycles per token."""
    f = torch.fft.fftfreq(bank.shape[-1])
    radius = (f[:, None] ** 2 + f**2).sqrt()
    return float(torch.fft.fft2(bank - bank.mean()).abs().mean(0)[(radius >= low) & (radius < high)].mean())


def test_green_noise_peaks_near_a_fifth_of_a_cycle_per_token() -> None:
    bank = NoiseMasking("green", slices=8).bank()
    bands = {f: spectrum(bank, f - 0.02, f + 0.02) for f in (0.05, 0.1, 0.15, 0.19, 0.25, 0.3, 0.45, 0.6)}
    assert max(bands, key=lambda f: bands[f]) == 0.19
    assert 10 * bands[0.05] < bands[0.19] and 10 * bands[0.45] < bands[0.19]


def test_blue_and_red_are_opposite_ends() -> None:
    blue, red = NoiseMasking("blue", slices=4).bank(), NoiseMasking("red", slices=4).bank()
    assert spectrum(blue, 0.0, 0.2) < 0.05 * spectrum(blue, 0.45, 0.6)
    assert spectrum(red, 0.45, 0.6) < 0.05 * spectrum(red, 0.01, 0.05)


def test_the_bank_is_uniform_without_ties_and_seeded() -> None:
    masking = NoiseMasking("green", slices=3, size=64)
    bank = masking.bank()
    values = ((torch.arange(64 * 64) + 0.5) / 64**2).expand(3, -1)
    torch.testing.assert_close(bank.flatten(1).sort(1).values, values)
    assert masking.bank() is bank
    assert not torch.equal(NoiseMasking("green", slices=3, size=64, seed=1).bank(), bank)
    assert torch.equal(NoiseMasking("green", slices=2, size=64).bank(), bank[:2])


@pytest.mark.parametrize(("color", "sigma"), [("red", (2.0,)), ("green", (1.0, 2.0)), ("purple", (0.5, 3.0))])
def test_one_pass_is_the_published_formula(color: str, sigma: tuple[float, ...]) -> None:
    """Against a periodic blur in the pixel domain by another library, up to a hundredth of the ranks."""
    white = torch.rand(64, 64, dtype=torch.float64)
    blurred = [ndimage.gaussian_filter(white.numpy(), s, mode="wrap", truncate=8) for s in sigma]
    passed = blurred[0] if len(blurred) == 1 else blurred[0] - blurred[1]
    expected = passed if color in ("red", "green") else white.numpy() - passed
    ours = torch.fft.irfft2(torch.fft.rfft2(white) * color_filter(color, sigma, 64), s=(64, 64))
    torch.testing.assert_close(ours, torch.from_numpy(expected), rtol=0, atol=1e-9)
    assert torch.equal(equalize(ours).flatten().argsort(), ours.flatten().argsort())


def released_rule(window: np.ndarray, ratio: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the released code makes of a window [n, W, W], written from its description: mask, restore, keep."""
    scores = window / window.max((1, 2), keepdims=True)
    scores = scores.reshape(len(scores), -1)
    order = np.argsort(-scores, axis=1, kind="stable")
    restore = np.argsort(order, axis=1)
    keep = int(scores.shape[1] * (1 - ratio))
    return restore >= keep, restore, order[:, :keep]


@pytest.mark.parametrize("ratio", [0.75, 0.6, 0.9])
def test_given_a_window_the_mask_is_the_released_codes(ratio: float) -> None:
    window = np.stack([np.random.default_rng(i).permutation(196).reshape(14, 14) + 1.0 for i in range(6)])
    hidden, restore, keep = released_rule(window, ratio)
    mask = keep_highest(torch.from_numpy(window).flatten(1).float(), 196 - hidden_count(196, ratio, "floor_keep"))
    assert np.array_equal(mask.hidden.numpy(), hidden)
    assert np.array_equal(mask.order.argsort(1).numpy(), restore)
    assert np.array_equal(mask.visible_indices.index.numpy(), keep)


def test_white_noise_either_way_up_is_mae() -> None:
    noise = torch.rand(4, 49)
    assert torch.equal(keep_highest(noise, 12).hidden, Mask.from_scores(-noise, 12).hidden)


def test_windows_are_windows_of_the_bank() -> None:
    """Every window is a piece of some slice, continued periodically, in one of four mirror images; all occur."""
    masking = NoiseMasking("green", slices=2, size=32)
    bank, scores = masking.bank(), masking.scores(keys(40), (5, 7)).view(-1, 5, 7)
    seen = set()
    for window in scores:
        starts = (bank == window[0, 0]).nonzero().tolist()  # a value occurs once in every slice
        flips = [(1, 1), (1, -1), (-1, 1), (-1, -1)]
        found = [(k, f) for k, y, x in starts for f in flips if torch.equal(_walk(bank[k], y, x, f, (5, 7)), window)]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) == 8


def _walk(slice_: torch.Tensor, y: int, x: int, flips: tuple[int, int], shape: tuple[int, int]) -> torch.Tensor:
    rows, columns = (y + flips[0] * torch.arange(shape[0])) % 32, (x + flips[1] * torch.arange(shape[1])) % 32
    return slice_[rows][:, columns]


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_color_is_refused() -> None:
    with pytest.raises(ValueError, match="'pink' is not one of red, green, blue, purple"):
        NoiseMasking("pink")


def test_noise_settings_and_grids_are_checked() -> None:
    with pytest.raises(ValueError, match="green noise takes 2 positive, ascending"):
        NoiseMasking("green", sigma=(2.0, 1.0))
    with pytest.raises(ValueError, match="n_pass=0"):
        NoiseMasking("green", n_pass=0)
    for grid in ((8,), (2, 40)):
        with pytest.raises(ValueError, match="2-d token grid of at most 32 x 32"):
            NoiseMasking("green", slices=1, size=32)(keys(2), grid)
