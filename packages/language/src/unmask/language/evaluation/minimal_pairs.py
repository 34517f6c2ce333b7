"""Minimal pairs: how often a model finds the acceptable of two sentences more likely (BLiMP).

Warstadt et al., TACL 2020: 67 paradigms of 1000 pairs, in 12 categories; BabyLM's evaluation (Warstadt et al., 2023)
keeps a file per category, filtered to words that its corpus has, and adds supplements in the same form. A sentence's
score is its whole log-likelihood, or pseudo-log-likelihood of a masked model (`scoring`), whatever its length: pairs
that differ in their number of tokens are not normalised. Accuracies are shares from 0 to 1; chance is 0.5.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from unmask.core.errors import UnmaskError

TERMS = {  # BLiMP's ``linguistics_term``: the category that it is reported in, and its number of paradigms
    "anaphor_agreement": ("anaphor_agreement", 2),
    "argument_structure": ("argument_structure", 7),
    "binding": ("binding", 7),
    "control_raising": ("control_raising", 5),
    "determiner_noun_agreement": ("determiner_noun_agreement", 8),
    "ellipsis": ("ellipsis", 2),
    "filler_gap_dependency": ("filler_gap_dependency", 7),
    "irregular_forms": ("irregular_forms", 2),
    "island_effects": ("island_effects", 8),
    "npi_licensing": ("npi_licensing", 7),
    "quantifiers": ("quantifiers", 4),
    "s-selection": ("argument_structure", 2),
    "subject_verb_agreement": ("subject_verb_agreement", 6),
}
SUPPLEMENT = (  # BabyLM's additions, each a category of its own
    "hypernym",
    "qa_congruence_easy",
    "qa_congruence_tricky",
    "subject_aux_inversion",
    "turn_taking",
)


class Pair(NamedTuple):
    """Two sentences that differ in one point.

    Attributes:
        good: the acceptable sentence.
        bad: the other.
        paradigm: which of BLiMP's 67 (its ``UID``), or the name of the file.
        category: which of the 12, or the name of the file.
        field: of linguistics: morphology, syntax, semantics or syntax_semantics; empty where the file does not say.
    """

    good: str
    bad: str
    paradigm: str
    category: str
    field: str = ""


class Accuracies(NamedTuple):
    """Shares of pairs that are right.

    Attributes:
        paradigm: of each paradigm's pairs.
        category: of each category's pairs, each pair weighing the same.
        field: of each field's pairs, likewise.
        mean: unweighted mean over paradigms, the original BLiMP average.
        category_mean: unweighted mean over categories, BabyLM's average.
    """

    paradigm: dict[str, float]
    category: dict[str, float]
    field: dict[str, float]
    mean: float
    category_mean: float


# ---- reading -------------------------------------------------------------------------------------------------------


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of one file of JSON lines, or of every ``*.jsonl`` and ``*.json`` file in a folder, sorted by name.

    A line needs ``sentence_good`` and ``sentence_bad``; ``UID``, ``linguistics_term`` and ``field`` are read where they
    are there, and the first two are otherwise the file's name without its ending. Blank lines are skipped.

    Raises:
        UnmaskError: if there is no such file or no pair in it, or a line is not of that form.
    """
    files = sorted(p for p in path.iterdir() if p.suffix in (".jsonl", ".json")) if path.is_dir() else [path]
    pairs = [pair for file in files for pair in _read_file(file)]
    if not pairs:
        raise UnmaskError(f"{path} has no minimal pairs: expected JSON lines with sentence_good and sentence_bad")
    return pairs


def _read_file(path: Path) -> list[Pair]:
    if not path.is_file():
        raise UnmaskError(f"{path} does not exist: give a file or a folder of minimal pairs")
    with path.open(encoding="utf-8") as lines:
        return [_pair(line, f"{path}:{number}", path.stem) for number, line in enumerate(lines, 1) if line.strip()]


def _pair(line: str, place: str, name: str) -> Pair:
    try:
        row: dict[str, Any] = json.loads(line)
        good, bad = row["sentence_good"], row["sentence_bad"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UnmaskError(f"{place} is not a JSON object with sentence_good and sentence_bad: {error!r}") from None
    term = row.get("linguistics_term", name)
    category, _ = TERMS.get(term, (term, 0))
    return Pair(good, bad, row.get("UID", name), category, row.get("field", ""))


# ---- measuring -----------------------------------------------------------------------------------------------------

Ties = Literal["wrong", "half"]


def evaluate_pairs(
    pairs: Sequence[Pair], score: Callable[[list[str]], Sequence[float]], ties: Ties = "wrong"
) -> Accuracies:
    """`accuracies` under a function that scores sentences, larger where more likely; it is called once with all."""
    scores = score([p.good for p in pairs] + [p.bad for p in pairs])
    return accuracies(pairs, scores[: len(pairs)], scores[len(pairs) :], ties)


def accuracies(pairs: Sequence[Pair], good: Sequence[float], bad: Sequence[float], ties: Ties = "wrong") -> Accuracies:
    """How often the good sentence of a pair has the larger score.

    Args:
        pairs: one or more.
        good: the score of each pair's good sentence.
        bad: of its bad one.
        ties: equal scores count as wrong, or as half right, which is what guessing makes of them.

    Raises:
        UnmaskError: if there is no pair, or a score is not a number.
    """
    if not pairs:
        raise UnmaskError("no minimal pairs to measure")
    right = [_right(pair, g, b, ties) for pair, g, b in zip(pairs, good, bad, strict=True)]
    paradigm = _means([p.paradigm for p in pairs], right)
    category = _means([p.category for p in pairs], right)
    field = _means([p.field for p in pairs], right)
    field.pop("", None)
    return Accuracies(paradigm, category, field, _mean(paradigm.values()), _mean(category.values()))


def _right(pair: Pair, good: float, bad: float, ties: Ties) -> float:
    if math.isnan(good) or math.isnan(bad):
        raise UnmaskError(f"the model's score of {pair.good!r} or {pair.bad!r} is not a number")
    return 0.5 * (ties == "half") if good == bad else float(good > bad)


def _means(groups: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    members: dict[str, list[float]] = defaultdict(list)
    for group, value in zip(groups, values, strict=True):
        members[group].append(value)
    return {group: _mean(members[group]) for group in sorted(members)}


def _mean(values: Any) -> float:
    return math.fsum(values) / len(values)
