"""Rankings of documents and their measures by trec_eval's conventions: reciprocal rank, nDCG, precision.

A run has, of each query, the score of each document that was found; judgements (qrels) have the grade of each document
that somebody looked at. Conventions, all of them trec_eval's where nothing else is said:

- Documents are ranked by falling score, and where scores are equal by falling document id, compared as strings. Scores
  are compared as float32, as trec_eval stores them. The rank that a run file states is not used.
- A document without a judgement has grade 0. Grades of 1 and more are relevant; negative ones count as 0.
- A query that is judged but has no relevant document scores 0 and counts.
- A query that is not judged is left out.
- Means are over all judged queries, those that the run lacks counting 0 (``over="judged"``; trec_eval's option -c and
  MS MARCO's MRR), or over the judged queries that the run has (``over="found"``; trec_eval's default).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from unmask.core.errors import UnmaskError

Run = Mapping[str, Mapping[str, float]]  # query id: document id: score
Qrels = Mapping[str, Mapping[str, int]]  # query id: document id: grade
Gain = Literal["linear", "exponential"]
Over = Literal["judged", "found"]
# From the grades of a query's documents in ranked order and all grades that it has judged, a value from 0 to 1.
Measure = Callable[[Sequence[int], Sequence[int]], float]
Number = TypeVar("Number", int, float)


# ---- means over queries --------------------------------------------------------------------------------------------


def mrr(run: Run, qrels: Qrels, k: int | None = 10, over: Over = "judged") -> float:
    """Mean of `reciprocal_rank`. k is 10 for MS MARCO's passages, 100 for its documents; trec_eval has no cut-off."""
    return mean(by_query(run, qrels, lambda ranked, _: reciprocal_rank(ranked, k), over))


def mean_ndcg(run: Run, qrels: Qrels, k: int = 20, gain: Gain = "linear", over: Over = "found") -> float:
    """Mean of `ndcg` (trec_eval's ndcg_cut)."""
    return mean(by_query(run, qrels, lambda ranked, judged: ndcg(ranked, judged, k, gain), over))


def mean_precision(run: Run, qrels: Qrels, k: int = 20, over: Over = "found") -> float:
    """Mean of `precision` (trec_eval's P)."""
    return mean(by_query(run, qrels, lambda ranked, _: precision(ranked, k), over))


def by_query(run: Run, qrels: Qrels, measure: Measure, over: Over) -> dict[str, float]:
    """A measure of each query, for `mean` and for comparing runs query by query.

    Raises:
        UnmaskError: if there is none.
    """
    queries = sorted(q for q in qrels if over == "judged" or q in run)
    if not queries:
        raise UnmaskError("no judged query to average over: the run and the judgements name different queries")
    return {q: measure(_grades(run.get(q, {}), qrels[q]), list(qrels[q].values())) for q in queries}


def mean(values: Mapping[str, float]) -> float:
    """The mean of one or more queries' values."""
    return math.fsum(values.values()) / len(values)


def ranked_documents(scores: Mapping[str, float]) -> list[str]:
    """Document ids, the best first.

    Raises:
        UnmaskError: if a score is not a number.
    """
    rounded = np.array(list(scores.values()), dtype=np.float32)
    if np.isnan(rounded).any():
        raise UnmaskError("a document's score is not a number")
    return [name for _, name in sorted(zip(rounded.tolist(), scores, strict=True), reverse=True)]


def _grades(scores: Mapping[str, float], judged: Mapping[str, int]) -> list[int]:
    """Grades in ranked order."""
    return [judged.get(name, 0) for name in ranked_documents(scores)]


# ---- one query -----------------------------------------------------------------------------------------------------


def reciprocal_rank(ranked: Sequence[int], k: int | None = 10) -> float:
    """1 / rank of the first relevant document among the first k (None: all), 0 if there is none."""
    return next((1 / rank for rank, grade in enumerate(ranked[:k], 1) if grade > 0), 0.0)


def precision(ranked: Sequence[int], k: int) -> float:
    """The share of the first k places with a relevant document; places that the run leaves empty count."""
    return sum(grade > 0 for grade in ranked[:k]) / k


def ndcg(ranked: Sequence[int], judged: Sequence[int], k: int, gain: Gain = "linear") -> float:
    """DCG of the first k, divided by that of the best order of all judged documents; 0 if that is 0.

    Järvelin and Kekäläinen, TOIS 2002, with trec_eval's discount: a document at rank r counts its gain / log2(r + 1).
    The gain is the grade; ``exponential`` takes 2^grade - 1 (Burges et al., ICML 2005), as many other tools do.
    """
    ideal = _dcg(sorted(judged, reverse=True)[:k], gain)
    return _dcg(ranked[:k], gain) / ideal if ideal else 0.0


def _dcg(grades: Sequence[int], gain: Gain) -> float:
    gains = [max(grade, 0) if gain == "linear" else 2.0 ** max(grade, 0) - 1 for grade in grades]
    return math.fsum(value / math.log2(rank + 1) for rank, value in enumerate(gains, 1))


# ---- files ---------------------------------------------------------------------------------------------------------


def read_run(path: Path) -> dict[str, dict[str, float]]:
    """A run file of trec_eval: lines ``query Q0 document rank score tag``.

    Raises:
        UnmaskError: if a line is not of that form, or a document stands twice under a query.
    """
    run: dict[str, dict[str, float]] = {}
    for place, line in _lines(path):
        fields = line.split()
        if len(fields) != 6:
            raise UnmaskError(f"{place} has {len(fields)} fields: expected query Q0 document rank score tag")
        _put(run, fields[0], fields[2], _number(fields[4], float, place), place)
    return run


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """Judgements: trec_eval's lines ``query 0 document grade``, or BEIR's ``query-id corpus-id score`` with a header.

    Raises:
        UnmaskError: if a line is of neither form, or a document is judged twice for a query.
    """
    qrels: dict[str, dict[str, int]] = {}
    for place, line in _lines(path):
        fields = line.split()
        if fields == ["query-id", "corpus-id", "score"]:
            continue
        if len(fields) not in (3, 4):
            raise UnmaskError(f"{place} has {len(fields)} fields: expected query 0 document grade, or without the 0")
        _put(qrels, fields[0], fields[-2], _number(fields[-1], int, place), place)
    return qrels


def read_texts(path: Path) -> dict[str, str]:
    """BEIR's corpus.jsonl or queries.jsonl: texts by ``_id``, a title before its text with a space between.

    Raises:
        UnmaskError: if a line is not a JSON object with ``_id`` and ``text``.
    """
    texts = {}
    for place, line in _lines(path):
        try:
            row = json.loads(line)
            texts[row["_id"]] = f"{row.get('title', '')} {row['text']}".strip()
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UnmaskError(f"{place} is not a JSON object with _id and text: {error!r}") from None
    return texts


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Where a line stands, and the line, blank ones left out."""
    if not path.is_file():
        raise UnmaskError(f"{path} does not exist: give a run, judgements or texts")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{path}:{number}", line


def _number(text: str, kind: Callable[[str], Number], place: str) -> Number:
    try:
        return kind(text)
    except ValueError:
        raise UnmaskError(f"{place}: {text!r} is not {'a whole number' if kind is int else 'a number'}") from None


def _put(groups: dict[str, dict[str, Number]], query: str, name: str, value: Number, place: str) -> None:
    group = groups.setdefault(query, {})
    if name in group:
        raise UnmaskError(f"{place}: document {name} stands twice under query {query}")
    group[name] = value
