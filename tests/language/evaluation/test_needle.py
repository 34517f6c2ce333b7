"""Needles: where they go, how much filler is left, what a response scores."""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
import pytest

from unmask.core.errors import UnmaskError
from unmask.language.evaluation.needle import (
    Cell,
    bury,
    depths,
    full_stop_ids,
    grid,
    lengths,
    needlebench_score,
    secret_code,
    strict_score,
)

WORDS = ["the", "cat", "sat", "on", "a", "mat", ".", "dog", ".\n", "NEEDLE", "!"]
STOPS = frozenset({6, 8})
NEEDLE = [9, 10]


def decode(ids: list[int]) -> str:
    return " ".join(WORDS[i] for i in ids)


def filler(count: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(0).integers(0, 9, count)]


@pytest.mark.parametrize("size", [3, 7, 40, 500])
@pytest.mark.parametrize("length", [30, 101])
@pytest.mark.parametrize("depth", [0, 3, 10, 50, 99, 100])
def test_the_needle_stands_behind_a_full_stop_or_at_the_start_and_all_of_it_fits(
    size: int, length: int, depth: float
) -> None:
    hay = bury(filler(size), NEEDLE, length=length, depth=depth, full_stops=STOPS, buffer=20)
    assert len(hay.ids) == length - 20
    assert hay.ids[hay.start : hay.start + 2] == NEEDLE
    without = hay.ids[: hay.start] + hay.ids[hay.start + 2 :]
    assert without == [filler(size)[i % size] for i in range(length - 22)]
    before = decode(hay.ids[: hay.start]).rstrip()
    if depth == 100:
        assert hay.start == length - 22
        return
    assert before == "" or before.endswith(".")
    aim = int(len(without) * depth / 100)
    assert hay.start <= aim  # and no full stop is nearer
    assert not any(i in STOPS for i in without[hay.start : aim])


def test_without_alignment_the_needle_stands_where_the_depth_says() -> None:
    hay = bury([0] * 10, NEEDLE, length=100, depth=37, full_stops=None, buffer=8)
    assert hay.start == int(90 * 0.37) == 33
    assert hay.ids == [0] * 33 + NEEDLE + [0] * 57


def test_a_filler_without_full_stop_puts_the_needle_first() -> None:
    assert bury([0] * 10, NEEDLE, length=100, depth=60, full_stops=STOPS, buffer=8).start == 0


def test_the_buffer_is_200_tokens_and_a_needle_may_be_all_there_is() -> None:
    assert len(bury([0], NEEDLE, length=1000, depth=50, full_stops=None).ids) == 800
    assert bury([0], NEEDLE, length=202, depth=50, full_stops=STOPS) == (NEEDLE, 0)


@pytest.mark.parametrize(("size", "length", "depth"), [(0, 300, 50), (5, 201, 50), (5, 300, -1), (5, 300, 100.5)])
def test_what_does_not_fit_is_an_error(size: int, length: int, depth: float) -> None:
    with pytest.raises(UnmaskError, match="does not fit"):
        bury([0] * size, NEEDLE, length=length, depth=depth, full_stops=None)


def test_tokens_that_end_in_a_full_stop_are_found_with_what_is_joined_to_them() -> None:
    assert full_stop_ids(decode, len(WORDS)) == STOPS


def test_the_original_grid() -> None:
    assert (len(lengths()), lengths()[0], lengths()[1], lengths()[-1]) == (35, 1000, 1441, 16_000)
    assert (len(depths()), depths()[0], depths()[-1]) == (35, 0, 100)
    assert depths(11) == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]
    curved = depths(11, "sigmoid")
    assert (curved[0], curved[5], curved[-1]) == (0, 50, 100)
    assert curved[6] == pytest.approx(100 / (1 + np.exp(-1)))
    assert curved == sorted(curved)


def test_a_secret_code_has_its_six_digits_in_the_needle_only() -> None:
    needles = [secret_code(seed) for seed in range(50)]
    for needle in needles:
        assert len(needle.keyword) == 6 and needle.keyword.isdigit()
        assert needle.keyword in needle.text and needle.keyword not in needle.question
    assert secret_code(7) == needles[7]
    assert len({n.keyword for n in needles}) == 50


def test_a_response_with_the_keyword_scores_100_and_a_wholly_different_one_0() -> None:
    assert strict_score("It is 123456!", "123456") == needlebench_score("It is 123456!", "abc", "123456") == 100
    assert strict_score("abc", "ABC") == 0
    assert needlebench_score("xxxx", "abcd", "b!") == 0
    assert needlebench_score("a b\ncx", "ab c d", "!") == pytest.approx(0.2 * 75)
    assert needlebench_score(" ", "\n", "!") == pytest.approx(20)
    assert needlebench_score("", "abc", "!") == 0


def test_similarity_is_levenshteins() -> None:
    @cache
    def distance(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        change = distance(a[1:], b[1:]) + (a[0] != b[0])
        return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, change)

    texts = ["".join(t) for n in range(1, 5) for t in product("ab", repeat=n)]
    for a, b in product(texts, texts):
        expected = 20 * (1 - distance(a, b) / max(len(a), len(b)))
        assert needlebench_score(a, b, "!") == pytest.approx(expected, abs=1e-12)


def test_the_grid_has_the_mean_of_each_place_and_of_all_scores() -> None:
    means, overall = grid([Cell(1000, 0, 100), Cell(1000, 50, 0), Cell(1000, 0, 50), Cell(500, 0, 10)])
    assert means == {(500, 0): 10, (1000, 0): 75, (1000, 50): 0}
    assert overall == 40
    with pytest.raises(UnmaskError, match="no scores"):
        grid([])
