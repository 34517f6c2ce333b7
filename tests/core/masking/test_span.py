"""Span masking: the published properties, a plain reference, every switch, short clips, padding."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from unmask.core.masking import Masking, SpanMasking
from unmask.core.masking.span import _choose
from unmask.core.randomness import Key

FRAMES = 781  # the 15.6 s that HuBERT crops to

SWITCHES = [
    SpanMasking(),
    SpanMasking(0.65, 5, min_spans=0),
    SpanMasking(kind="uniform", other=2.0),
    SpanMasking(kind="normal", other=4.0),
    SpanMasking(kind="poisson"),
    SpanMasking(overlap=False),
    SpanMasking(0.5, overlap=False, min_space=3),
    SpanMasking(0.5, kind="poisson", overlap=False, min_space=1),
    SpanMasking(0.4, kind="uniform", overlap=False),
]


def keys(n: int, seed: int = 0, first: int = 0) -> Key:
    return Key.of(seed, torch.arange(first, first + n))


def prefix(lengths: list[int], frames: int) -> torch.Tensor:
    return torch.arange(frames) < torch.tensor(lengths)[:, None]


def runs(row: np.ndarray) -> list[tuple[int, int]]:
    """First frame and length of every run of hidden frames."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(int), [0]])))
    return [(int(a), int(b - a)) for a, b in edges.reshape(-1, 2)]


def reference(rng: np.random.Generator, size: int, ratio: float = 0.8, length: int = 10, least: int = 2) -> np.ndarray:
    """The published rule for one clip, in plain NumPy."""
    count = max(int(ratio * size / length + rng.random()), least)
    shortest = length if size - length > count else size - count - 1
    starts = rng.choice(size - shortest, count, replace=False)
    hidden = np.zeros(size, dtype=bool)
    for start in starts:
        hidden[start : start + length] = True
    return hidden


# --- HuBERT's mask ---


def test_coverage_is_that_of_the_closed_form() -> None:
    mask = SpanMasking()(keys(1000), (FRAMES,))
    assert mask.num_visible is None
    assert mask.hidden.float().mean().item() == pytest.approx(1 - (1 - 0.08) ** 10, abs=0.01)


def test_equal_counts_thin_to_the_smallest_of_the_batch() -> None:
    plain, thinned = SpanMasking(), SpanMasking(equal_counts=True)
    shares = []
    for batch in range(60):
        key = keys(8, first=8 * batch)
        before, after = plain(key, (FRAMES,)).hidden, thinned(key, (FRAMES,)).hidden
        assert after.sum(1).tolist() == [int(before.sum(1).min())] * 8
        assert not (after & ~before).any()
        shares.append(after.float().mean().item())
    assert np.mean(shares) == pytest.approx(0.534, abs=0.01)


def test_equal_counts_ignore_clips_that_hide_nothing() -> None:
    valid = prefix([200, 1, 300, 0], 300)
    hidden = SpanMasking(equal_counts=True)(keys(4), (300,), valid).hidden
    counts = hidden.sum(1).tolist()
    assert counts[1] == counts[3] == 0 and counts[0] == counts[2] > 50
    nothing = SpanMasking(equal_counts=True)(keys(2), (300,), prefix([1, 0], 300)).hidden
    assert not nothing.any()


@pytest.mark.parametrize("frames", [FRAMES, 100, 40, 25])
def test_every_clip_has_a_whole_span(frames: int) -> None:
    hidden = SpanMasking()(keys(500), (frames,)).hidden.numpy()
    assert all(max(n for _, n in runs(row)) >= 10 for row in hidden)
    assert all(n >= 10 for row in hidden for _, n in runs(row))  # and nothing shorter: no start is near the end


def test_positions_are_covered_as_often_as_by_the_reference() -> None:
    rng, n = np.random.default_rng(0), 6000
    theirs = np.mean([reference(rng, 60) for _ in range(n)], axis=0)
    ours = SpanMasking()(keys(n), (60,)).hidden.double().mean(0).numpy()
    deviation = np.sqrt(2 * 0.25 / n)
    assert np.abs(ours - theirs).max() < 4.5 * deviation
    assert ours[-1] == theirs[-1] == 0 and ours[0] == pytest.approx(0.1, abs=0.02)  # 4.8 of 50 starts


def test_counts_are_distributed_as_the_references() -> None:
    rng, n = np.random.default_rng(0), 4000
    theirs = np.array([reference(rng, 120).sum() for _ in range(n)])
    ours = SpanMasking()(keys(n), (120,)).hidden.sum(1).numpy()
    assert ours.mean() == pytest.approx(theirs.mean(), abs=4.5 * theirs.std() * np.sqrt(2 / n))
    assert ours.std() == pytest.approx(theirs.std(), rel=0.06)


def test_the_share_is_rounded_at_random() -> None:
    """0.8 * 40 / 10 = 3.2 spans: three in 80 %, four in 20 % of the clips (length 1 makes them countable)."""
    counts = SpanMasking(0.08, 1)(keys(5000), (40,)).hidden.sum(1)
    assert counts.unique().tolist() == [3, 4]
    assert (counts == 4).float().mean().item() == pytest.approx(0.2, abs=0.025)


# --- drawing distinct positions ---


@pytest.mark.parametrize(("room", "count"), [(6, 3), (5, 4), (7, 2), (4, 4), (5, 1)])
def test_every_set_of_positions_is_equally_likely(room: int, count: int) -> None:
    n = 20_000
    one = torch.ones(n, 1, dtype=torch.int64)
    chosen = _choose(keys(n).bits(5), one * count, one * room, 9)
    assert (chosen[:, count:] == 9).all()
    sets, seen = np.unique(np.sort(chosen[:, :count].numpy(), axis=1), axis=0, return_counts=True)
    assert [tuple(s) for s in sets.tolist()] == list(combinations(range(room), count))
    expected = n / len(sets)
    freedom = max(len(sets) - 1, 1)
    assert ((seen - expected) ** 2 / expected).sum() < freedom + 4.5 * np.sqrt(2 * freedom)


def test_many_positions_are_distinct() -> None:
    """Long chains of swaps: nearly all of 200 positions, so that most steps meet earlier ones."""
    one = torch.ones(300, 1, dtype=torch.int64)
    chosen = _choose(keys(300).bits(199), one * 199, one * 200, 200)
    left_out = 199 * 200 // 2 - chosen.sum(1)
    assert (chosen.sort(1).values.diff(dim=1) > 0).all() and chosen.min() >= 0
    assert len(left_out.unique()) > 120  # of 200: 155 expected


# --- keys and padding ---


@pytest.mark.parametrize("masking", SWITCHES, ids=str)
def test_a_sample_keeps_its_mask_in_any_batch_and_padding(masking: SpanMasking) -> None:
    lengths = [1 + (37 * i) % 200 for i in range(64)]
    whole = masking(keys(64), (230,), prefix(lengths, 230)).hidden
    for i in (0, 5, 17, 63):
        alone = Key.of(0, torch.tensor([i]))
        n = lengths[i]
        assert torch.equal(masking(alone, (n,)).hidden[0], whole[i, :n])
        assert torch.equal(masking(alone, (n + 9,), prefix([n], n + 9)).hidden[0, :n], whole[i, :n])
    assert isinstance(masking, Masking)


@pytest.mark.parametrize("masking", [*SWITCHES, SpanMasking(equal_counts=True)], ids=str)
def test_padding_is_never_hidden_and_something_is_visible(masking: SpanMasking) -> None:
    lengths = [*range(60), 150, 200]
    valid = prefix(lengths, 200)
    for seed in range(20):
        mask = masking(keys(len(lengths), seed), (200,), valid)
        assert not (mask.hidden & ~valid).any()
        assert mask.visible.any(1).tolist() == [n > 0 for n in lengths]
        least = torch.tensor([n > 1 and masking.min_spans > 0 for n in lengths])
        assert (mask.hidden.any(1) | ~least).all()
        assert mask.valid is valid


def test_seeds_and_samples_differ() -> None:
    masking = SpanMasking()
    first, second = masking(keys(32), (FRAMES,)).hidden, masking(keys(32, seed=1), (FRAMES,)).hidden
    assert (first != second).any(1).all()
    assert len({row.numpy().tobytes() for row in first}) == 32
    assert torch.equal(first, masking(keys(32), (FRAMES,)).hidden)


# --- short clips ---


@pytest.mark.parametrize("frames", range(1, 26))
def test_short_clips(frames: int) -> None:
    hidden = SpanMasking()(keys(400), (frames,)).hidden
    assert hidden.shape == (400, frames) and not hidden.all(1).any()
    assert hidden.any(1).all() == (frames > 1)


@pytest.mark.parametrize("frames", [13, 14, 16, 20])
def test_short_clips_follow_the_published_range_of_starts(frames: int) -> None:
    """Starts from {0, ..., n} where the clip is hardly longer than a span; covered entirely, one frame shows."""
    rng, n = np.random.default_rng(0), 3000
    theirs = np.array([reference(rng, frames) for _ in range(n)])
    whole = theirs.all(1)
    theirs[whole, rng.integers(0, frames, whole.sum())] = False
    ours = SpanMasking()(keys(n), (frames,)).hidden.numpy()
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 4.5 * np.sqrt(2 * 0.25 / n)


def test_the_visible_frame_of_a_covered_clip_is_any() -> None:
    """Two frames, two spans wanted, one start allowed: one of the frames is hidden."""
    hidden = SpanMasking(length=4)(keys(2000), (2,)).hidden
    assert hidden.sum(1).tolist() == [1] * 2000
    assert hidden[:, 0].float().mean().item() == pytest.approx(0.25, abs=0.04)  # start 1: frame 1; start 0: either


# --- random lengths ---


@pytest.mark.parametrize(
    ("masking", "mean", "deviation", "lowest", "highest"),
    [
        (SpanMasking(kind="uniform", other=4.0), 12.0, np.sqrt((17**2 - 1) / 12), 4, 20),
        (SpanMasking(kind="normal", other=2.0), 10.0, np.sqrt(4 + 1 / 12), 1, 21),
        (SpanMasking(kind="poisson"), 10.0, np.sqrt(10), 0, 32),
        (SpanMasking(length=1, kind="normal", other=3.0), 2.197, 1.76, 1, 22),  # cut off at 1: 1 + 3 max(0, z)
    ],
)
def test_lengths_have_their_distribution(
    masking: SpanMasking, mean: float, deviation: float, lowest: int, highest: int
) -> None:
    live = torch.ones(2000, 10, dtype=torch.bool)
    length = masking._draw_lengths(keys(2000), torch.full((2000,), 500), live).double()
    assert length.mean().item() == pytest.approx(mean, abs=0.15)
    assert length.std().item() == pytest.approx(deviation, rel=0.05)
    assert length.min() >= lowest and length.max() <= highest


def test_single_spans_show_their_lengths() -> None:
    """One span in a clip: what is hidden is one run of a drawn length, cut at the end of the clip."""
    masking = SpanMasking(0.001, 5, min_spans=1, kind="uniform", other=3.0)
    hidden = masking(keys(2000), (100,)).hidden.numpy()
    found = [runs(row) for row in hidden]
    assert all(len(f) == 1 for f in found)
    lengths = np.array([f[0][1] for f in found])
    assert set(lengths) == set(range(3, 11))
    assert np.bincount(lengths)[3:].min() > 2000 / 8 * 0.75


def test_a_clip_of_spans_without_frames_gets_one_with() -> None:
    masking = SpanMasking(0.01, 1, min_spans=1, kind="poisson")  # P(0 frames) = 1 / e
    assert (masking(keys(500), (20,)).hidden.sum(1) >= 1).all()


# --- spans apart ---


@pytest.mark.parametrize("space", [0, 1, 4])
def test_spans_stay_apart(space: int) -> None:
    masking = SpanMasking(0.5, 5, overlap=False, min_space=space)
    for row in masking(keys(300), (103,)).hidden.numpy():
        found = runs(row)
        assert all(n % 5 == 0 if space == 0 else n == 5 for _, n in found)
        assert sum(n for _, n in found) in (50, 55)  # 10.3 spans
        ends = [a + n for a, n in found]
        assert all(b[0] - a >= space for a, b in zip(ends, found[1:], strict=False))


def test_every_arrangement_of_spans_apart_is_equally_likely() -> None:
    """Two spans of 3 with a gap of at least 1 on 11 frames: 15 arrangements."""
    n = 15_000
    masking = SpanMasking(6 / 11 - 1e-9, 3, overlap=False, min_space=1)
    rows, seen = np.unique(masking(keys(n), (11,)).hidden.numpy(), axis=0, return_counts=True)
    assert len(rows) == 15 and (rows.sum(1) == 6).all()
    assert ((seen - n / 15) ** 2 / (n / 15)).sum() < 14 + 4.5 * np.sqrt(28)


def test_spans_that_do_not_fit_are_left_out() -> None:
    masking = SpanMasking(1.0, 4, overlap=False, min_space=4)
    counts = masking(keys(200), (40,)).hidden.sum(1)
    assert counts.tolist() == [20] * 200  # 10 wanted; 5 spans of 4 with gaps of 4 fill 36 of 40 frames
    random = SpanMasking(1.0, kind="poisson", overlap=False, min_space=2)
    for row in random(keys(200), (100,)).hidden.numpy():
        found = runs(row)
        assert found and all(b[0] - a[0] - a[1] >= 2 for a, b in zip(found, found[1:], strict=False))


def test_spans_that_tile_a_clip_leave_one_frame() -> None:
    hidden = SpanMasking(1.0, 5, overlap=False)(keys(100), (20,)).hidden
    assert hidden.sum(1).tolist() == [19] * 100


# --- settings ---


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ratio": 1.2}, "span ratio 1.2"),
        ({"ratio": 0.0}, "span ratio 0.0"),
        ({"length": 0}, "length >= 1"),
        ({"min_spans": -1}, "min_spans >= 0"),
        ({"min_space": -1, "overlap": False}, "min_space >= 0"),
        ({"min_space": 2}, "overlap=False"),
        ({"other": 1.0}, "static span lengths take no second number"),
        ({"kind": "poisson", "other": 1.0}, "poisson span lengths take no second number"),
        ({"kind": "normal"}, "deviation other > 0"),
        ({"kind": "uniform", "other": 21.0}, "whole number in that range"),
        ({"kind": "uniform", "other": 1.5}, "whole number in that range"),
    ],
)
def test_settings_are_checked(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpanMasking(**wrong)  # type: ignore[arg-type]


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="'geometric' is not one of static, uniform, normal, poisson"):
        SpanMasking(kind="geometric")  # type: ignore[arg-type]


def test_grids_have_one_axis() -> None:
    with pytest.raises(ValueError, match="a grid of one axis; got 4 x 4"):
        SpanMasking()(keys(2), (4, 4))
