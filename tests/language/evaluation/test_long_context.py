"""Multi-document questions and key-value retrieval: prompts, places, matches."""

from __future__ import annotations

import json

import pytest

from unmask.core.errors import UnmaskError
from unmask.language.evaluation.long_context import (
    GOLD_PLACES,
    Document,
    answered,
    documents_prompt,
    key_value_question,
    normalised,
    put_at,
    retrieved,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("U.S.", "us"),
        ("state-of", "stateof"),
        ("The  Cat,\tan animal; a pet", "cat animal pet"),
        ("theatre another", "theatre another"),
        ("A.", ""),  # punctuation goes first
        ("“quoted”", "“quoted”"),  # only ASCII punctuation goes
    ],
)
def test_normalised(text: str, expected: str) -> None:
    assert normalised(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("It is Eiffel tower.\nParis", ["the Eiffel Tower"], 1),
        ("I do not know\nEiffel Tower", ["the Eiffel Tower"], 0),
        ("\nEiffel Tower", ["the Eiffel Tower"], 0),
        ("  in 1889 ", ["1888", "1889"], 1),
        ("Big Ben", ["the Eiffel Tower"], 0),
        ("Eiffel", ["the Eiffel Tower"], 0),
        ("anything", [], 0),
    ],
)
def test_an_answer_counts_in_the_first_line_alone(prediction: str, answers: list[str], expected: int) -> None:
    assert answered(prediction, answers) == expected


def test_the_prompt_numbers_documents_from_1() -> None:
    prompt = documents_prompt("Where?", [Document("T", "one."), Document("S", "two.")], "Do it.")
    assert prompt == ("Do it.\n\nDocument [1](Title: T) one.\nDocument [2](Title: S) two.\n\nQuestion: Where?\nAnswer:")


def test_without_documents_only_the_question_is_left() -> None:
    assert documents_prompt("Where?", []) == "Question: Where?\nAnswer:"


def test_the_gold_document_goes_where_it_is_put() -> None:
    assert put_at("gold", ["a", "b"], 0) == ["gold", "a", "b"]
    assert put_at("gold", ["a", "b"], 2) == ["a", "b", "gold"]
    for place in (-1, 3):
        with pytest.raises(UnmaskError, match="place is 0 to 2"):
            put_at("gold", ["a", "b"], place)
    for count, places in GOLD_PLACES.items():
        assert all(put_at(-1, range(count - 1), place).index(-1) == place for place in places)


@pytest.mark.parametrize("count", [1, 75])
def test_a_key_value_question_asks_for_the_pair_at_its_place(count: int) -> None:
    asked = key_value_question(count, count - 1, seed=3)
    pairs = json.loads(asked.prompt[asked.prompt.index("{") : asked.prompt.index("}") + 1])
    assert len(pairs) == count
    assert list(pairs)[count - 1] == asked.key
    assert pairs[asked.key] == asked.value
    assert asked.prompt.count(asked.key) == 2
    assert asked == key_value_question(count, count - 1, seed=3)
    assert asked.value != key_value_question(count, count - 1, seed=4).value


def test_a_place_behind_the_last_pair_is_an_error() -> None:
    with pytest.raises(UnmaskError, match="place is 0 to 74"):
        key_value_question(75, 75, seed=0)


def test_a_value_is_found_whatever_its_case() -> None:
    value = key_value_question(5, 0, seed=0).value
    assert retrieved(f"It is {value.upper()}.", value) == 1
    assert retrieved(value[:-1], value) == 0
