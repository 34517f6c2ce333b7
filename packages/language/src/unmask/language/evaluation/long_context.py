"""Questions about long contexts: one of many documents has the answer, or one of many pairs the value.

Liu et al., "Lost in the Middle" (TACL 2024, arXiv 2307.03172). Where the answer stands is varied, and accuracy reported
for each place. Places count from 0 here; papers often count from 1. The model answers greedily with at most 100 new
tokens. Scores are 0 or 1.
"""

from __future__ import annotations

import json
import random
import re
import string
import uuid
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from unmask.core.errors import UnmaskError

# By number of documents, the answer's included: the places of the document that has the answer.
GOLD_PLACES = {10: (0, 4, 9), 20: (0, 4, 9, 14, 19), 30: (0, 4, 9, 14, 19, 24, 29)}
PAIR_COUNTS = (75, 140, 300)  # of key-value retrieval

DOCUMENTS_INSTRUCTION = (
    "Answer the question briefly and well, from the search results below alone; some of them may be irrelevant."
)
PAIRS_INSTRUCTION = "Find the value that belongs to the given key in this JSON object."

_DROPPED = str.maketrans("", "", string.punctuation)
_T = TypeVar("_T")


class Document(NamedTuple):
    """A search result."""

    title: str
    text: str


class KeyValue(NamedTuple):
    """A question for the value of one key.

    Attributes:
        prompt: the whole of it.
        key: what is asked.
        value: the answer.
    """

    prompt: str
    key: str
    value: str


# ---- many documents ------------------------------------------------------------------------------------------------


def put_at(gold: _T, distractors: Sequence[_T], place: int) -> list[_T]:
    """The distractors in their order with the document that has the answer at index `place`, counted from 0.

    Raises:
        UnmaskError: if there are too few distractors for that place.
    """
    if not 0 <= place <= len(distractors):
        raise UnmaskError(f"with {len(distractors)} distractors the place is 0 to {len(distractors)}, not {place}")
    return [*distractors[:place], gold, *distractors[place:]]


def documents_prompt(question: str, documents: Sequence[Document], instruction: str = DOCUMENTS_INSTRUCTION) -> str:
    """Instruction, documents numbered from 1, question; it ends in ``Answer:``.

    With the one document that has the answer it is the oracle prompt; without any, the question alone (closed book).
    """
    results = "\n".join(f"Document [{i}](Title: {d.title}) {d.text}" for i, d in enumerate(documents, 1))
    asked = f"Question: {question}\nAnswer:"
    return f"{instruction}\n\n{results}\n\n{asked}" if documents else asked


def answered(prediction: str, answers: Sequence[str]) -> int:
    """1 if any of the answers is in the prediction's first line, both normalised, as a substring (best-subspan match).

    Only what stands before the first newline counts, so copying the context does not help; a prediction that begins
    with a newline is empty. An answer of which nothing is left when it is normalised is found everywhere.
    """
    said = normalised(prediction.split("\n", 1)[0].strip())
    return int(any(normalised(answer) in said for answer in answers))


def normalised(text: str) -> str:
    """Lower case, then without ASCII punctuation, then without the words a, an, the, then with single spaces.

    Punctuation is deleted, not replaced: "U.S." becomes "us", "state-of" becomes "stateof".
    """
    text = text.lower().translate(_DROPPED)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


# ---- key-value retrieval -------------------------------------------------------------------------------------------


def key_value_question(count: int, place: int, seed: int, instruction: str = PAIRS_INSTRUCTION) -> KeyValue:
    """A JSON object of `count` random UUID pairs, of which the one at index `place` is asked for.

    Raises:
        UnmaskError: if there is no such place.
    """
    if not 0 <= place < count:
        raise UnmaskError(f"of {count} pairs the place is 0 to {count - 1}, not {place}")
    draw = random.Random(seed)
    drawn = [str(uuid.UUID(int=draw.getrandbits(128), version=4)) for _ in range(2 * count)]
    pairs = dict(zip(drawn[::2], drawn[1::2], strict=True))
    key = drawn[2 * place]
    data = json.dumps(pairs, indent=0)  # a pair a line
    return KeyValue(f'{instruction}\n\n{data}\n\nKey: "{key}"\nValue:', key, pairs[key])


def retrieved(prediction: str, value: str) -> int:
    """1 if the value is in the prediction, whatever the case."""
    return int(value.lower() in prediction.lower())
