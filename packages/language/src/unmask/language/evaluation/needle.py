"""A needle in a haystack: a sentence hidden in long filler text that the model is then asked about.

After G. Kamradt's LLMTest_NeedleInAHaystack (2023) and NeedleBench (Li et al., arXiv 2407.11963), which differ in where
the needle goes (`bury`) and in the score. Positions and lengths count the tested model's tokens. A depth is a
percentage of the filler: 0 puts the needle first, 100 last.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from unmask.core.errors import UnmaskError

NAMES = ("Amara", "Boris", "Chen", "Dalia", "Emil", "Farah", "Goran", "Hana", "Ivo", "Jonas", "Kira", "Leila", "Mateo")


class Needle(NamedTuple):
    """A fact that nothing else in the text tells.

    Attributes:
        text: the sentence to hide, which is also the reference answer.
        question: what is asked about it.
        keyword: what a right answer must have.
    """

    text: str
    question: str
    keyword: str


class Haystack(NamedTuple):
    """Filler with the needle in it.

    Attributes:
        ids: token ids.
        start: where the needle begins.
    """

    ids: list[int]
    start: int


class Cell(NamedTuple):
    """One score at a place of the grid.

    Attributes:
        length: of the context, in tokens.
        depth: of the needle, in per cent.
        score: from 0 to 100.
    """

    length: int
    depth: float
    score: float


# ---- construction --------------------------------------------------------------------------------------------------


def secret_code(seed: int) -> Needle:
    """A needle for small models: somebody's secret code of six digits; name and digits follow from the seed."""
    draw = random.Random(seed)
    name, digits = draw.choice(NAMES), f"{draw.randrange(10**6):06}"
    return Needle(f"The secret code of {name} is {digits}.", f"What is the secret code of {name}?", digits)


def bury(
    filler: Sequence[int],
    needle: Sequence[int],
    *,
    length: int,
    depth: float,
    full_stops: Collection[int] | None,
    buffer: int = 200,
) -> Haystack:
    """Put the needle into filler so that there are ``length - buffer`` tokens in all.

    The filler is repeated until it is long enough and cut to what the needle leaves. The needle goes to the token
    ``int(len(filler) * depth / 100)``; as in the original tool it then moves back until the token before it is a full
    stop, which may be as far as the start. At depth 100 it goes to the end, wherever a sentence ends.

    Args:
        filler: token ids of the text to hide it in.
        needle: its token ids.
        length: of the whole context, the question, the answer and any chat template included.
        depth: 0 to 100.
        full_stops: ids that end a sentence (`full_stop_ids`). None: the needle stays where the depth says, in the
            middle of a sentence or of a word, as in NeedleBench.
        buffer: tokens that are left for question and answer; 200 in the original.

    Raises:
        UnmaskError: if there is no filler, no room for the needle, or a depth out of range.
    """
    room = length - buffer - len(needle)
    if not filler or room < 0 or not 0 <= depth <= 100:
        raise UnmaskError(
            f"a needle of {len(needle)} tokens at depth {depth} does not fit {length} tokens with {buffer} kept free "
            f"and {len(filler)} tokens of filler: expected a depth from 0 to 100, filler, and room for the needle"
        )
    hay = (list(filler) * (room // len(filler) + 1))[:room]
    start = int(len(hay) * depth / 100)
    while full_stops is not None and depth < 100 and start > 0 and hay[start - 1] not in full_stops:
        start -= 1
    return Haystack([*hay[:start], *needle, *hay[start:]], start)


def full_stop_ids(decode: Callable[[list[int]], str], vocabulary: int) -> frozenset[int]:
    """The ids whose text ends in a full stop, white space apart: tokenizers may join it with a letter or a newline.

    Args:
        decode: the tokenizer's function from ids to text.
        vocabulary: the number of ids.
    """
    return frozenset(i for i in range(vocabulary) if decode([i]).rstrip().endswith("."))


def lengths(shortest: int = 1000, longest: int = 16_000, count: int = 35) -> list[int]:
    """Context lengths in equal steps, both ends included; the defaults are the original tool's."""
    return [int(x) for x in np.round(np.linspace(shortest, longest, count))]


def depths(count: int = 35, spacing: Literal["linear", "sigmoid"] = "linear") -> list[float]:
    """Depths from 0 to 100 in equal steps, or in steps that are finer near both ends.

    ``sigmoid`` maps a linear depth x to 100 / (1 + exp(-0.1 (x - 50))); 0 and 100 stay what they are.
    """
    steps = np.linspace(0, 100, count)
    if spacing == "sigmoid":
        steps[1:-1] = 100 / (1 + np.exp(-0.1 * (steps[1:-1] - 50)))
    return [float(x) for x in steps]


# ---- scores --------------------------------------------------------------------------------------------------------


def strict_score(response: str, keyword: str) -> float:
    """100 if the keyword is in the response as it is written, else 0."""
    return 100.0 * (keyword in response)


def needlebench_score(response: str, reference: str, keyword: str) -> float:
    """NeedleBench's score: 100 if the keyword is in the response, else a fifth of the texts' similarity.

    The similarity is 100 (1 - Levenshtein distance / length of the longer), with all white space removed, and 100 if
    nothing is left of both. The response is not cut to the length of the reference, which is an option there.
    """
    if keyword in response:
        return 100.0
    said, wanted = "".join(response.split()), "".join(reference.split())
    longer = max(len(said), len(wanted))
    return 0.2 * 100 * (1 - _edit_distance(said, wanted) / longer if longer else 1.0)


def _edit_distance(a: str, b: str) -> int:
    """Levenshtein's: insertions, deletions and substitutions at 1 each."""
    above = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
        above = row
    return above[-1]


def grid(cells: Iterable[Cell]) -> tuple[dict[tuple[int, float], float], float]:
    """The mean score at each (length, depth), and the mean of all scores, each weighing the same.

    Raises:
        UnmaskError: if there is none.
    """
    scores: dict[tuple[int, float], list[float]] = defaultdict(list)
    for cell in cells:
        scores[cell.length, cell.depth].append(cell.score)
    if not scores:
        raise UnmaskError("no scores to average")
    means = {place: float(np.mean(scores[place])) for place in sorted(scores)}
    return means, float(np.mean([s for group in scores.values() for s in group]))
