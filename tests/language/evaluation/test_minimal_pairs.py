"""Minimal pairs: files, groups, ties, means."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from unmask.core.errors import UnmaskError
from unmask.language.evaluation.minimal_pairs import TERMS, Pair, accuracies, evaluate_pairs, read_pairs


def write(path: Path, *rows: dict[str, Any] | str) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n", encoding="utf-8")
    return path


def pair(paradigm: str, category: str) -> Pair:
    return Pair("it works .", "it work .", paradigm, category, "syntax")


def test_the_67_paradigms_are_in_12_categories() -> None:
    sizes: Counter[str] = Counter()
    for category, paradigms in TERMS.values():
        sizes[category] += paradigms
    assert len(sizes) == 12
    assert sum(sizes.values()) == 67
    assert sorted(sizes.values(), reverse=True) == [9, 8, 8, 7, 7, 7, 6, 5, 4, 2, 2, 2]
    assert sizes["argument_structure"] == 9


def test_blimp_rows_are_read_with_their_names(tmp_path: Path) -> None:
    row = {
        "sentence_good": "a",
        "sentence_bad": "b",
        "UID": "causative",
        "linguistics_term": "s-selection",
        "field": "f",
    }
    assert read_pairs(write(tmp_path / "x.jsonl", row, "")) == [Pair("a", "b", "causative", "argument_structure", "f")]


def test_babylm_files_name_their_category_and_a_folder_is_read_whole(tmp_path: Path) -> None:
    line = "\u2028 is no end of a line"
    plain = f'{{"sentence_good": "{line}", "sentence_bad": "d"}}'  # not escaped, as json.dumps would
    write(tmp_path / "hypernym.json", plain)
    write(tmp_path / "binding.json", {"sentence_good": "a", "sentence_bad": "b"})
    (tmp_path / "notes.txt").write_text("no pairs")
    assert read_pairs(tmp_path) == [
        Pair("a", "b", "binding", "binding"),
        Pair(line, "d", "hypernym", "hypernym"),
    ]


@pytest.mark.parametrize("line", ["{", "[1]", '{"sentence_good": "a"}', "3"])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "x.jsonl", {"sentence_good": "a", "sentence_bad": "b"}, line)
    with pytest.raises(UnmaskError, match=r"x\.jsonl:2 is not a JSON object with sentence_good and sentence_bad"):
        read_pairs(path)


def test_missing_and_empty_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UnmaskError, match="does not exist"):
        read_pairs(tmp_path / "none.jsonl")
    with pytest.raises(UnmaskError, match="no minimal pairs"):
        read_pairs(tmp_path)


def test_accuracies_by_group_and_the_two_means() -> None:
    pairs = [
        pair("p", "binding"),
        pair("p", "binding"),
        pair("p", "binding"),
        pair("q", "binding"),
        pair("r", "ellipsis"),
    ]
    found = accuracies(pairs, [1, 2, -5, 0, 3], [0, 3, -6, -1, 4])
    assert found.paradigm == pytest.approx({"p": 2 / 3, "q": 1, "r": 0})
    assert found.category == {"binding": 0.75, "ellipsis": 0}  # over pairs, not over paradigms
    assert found.field == {"syntax": 0.6}
    assert found.mean == pytest.approx((2 / 3 + 1) / 3)
    assert found.category_mean == 0.375


def test_ties_are_wrong_unless_they_are_to_count_half() -> None:
    pairs = [pair("p", "binding"), pair("p", "binding")]
    assert accuracies(pairs, [1, -math.inf], [1, -math.inf]).mean == 0
    assert accuracies(pairs, [1, 2], [1, 1], ties="half").mean == 0.75


def test_scores_that_are_not_numbers_and_no_pairs_are_errors() -> None:
    with pytest.raises(UnmaskError, match="not a number"):
        accuracies([pair("p", "binding")], [math.nan], [0])
    with pytest.raises(UnmaskError, match="no minimal pairs"):
        accuracies([], [], [])


def test_the_scoring_function_is_called_once_and_lengths_are_not_made_up_for() -> None:
    calls: list[list[str]] = []

    def score(sentences: list[str]) -> list[float]:
        calls.append(sentences)
        return [-float(len(s)) for s in sentences]

    found = evaluate_pairs([Pair("long one", "short", "p", "c"), Pair("a", "bb", "p", "c")], score)
    assert found.mean == 0.5
    assert found.field == {}
    assert calls == [["long one", "a", "short", "bb"]]
