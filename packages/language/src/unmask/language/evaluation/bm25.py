"""BM25, the word-matching ranking that learnt rankers re-rank and are compared with (on the library bm25s)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np

from unmask.core.errors import UnmaskError
from unmask.language.evaluation.ranking import ranked_documents


def words(text: str) -> list[str]:
    """Lower-case runs of letters, digits and underscores; neither stemmed nor without stop words."""
    return re.findall(r"\w+", text.lower())


def bm25(
    documents: Mapping[str, str],
    queries: Mapping[str, str],
    *,
    k: int = 100,
    k1: float = 0.9,
    b: float = 0.4,
    split: Callable[[str], list[str]] = words,
) -> dict[str, dict[str, float]]:
    """A run: the best k documents of each query, those left out that share no word with it.

    Lucene's form: over the words of the query, repeated ones counting again, the sum of
    ln(1 + (N - df + 0.5) / (df + 0.5)) * tf / (tf + k1 (1 - b + b * length / mean length)), in float32. Robertson and
    Zaragoza, 2009; variants in Kamphuis et al., ECIR 2020; the library: Lù, arXiv 2407.03618.

    Args:
        documents: texts by document id.
        queries: texts by query id.
        k: documents at most per query; which of equal ones goes is settled as in `ranked_documents`.
        k1: how soon repeated words stop counting; 0.9 is Anserini's default.
        b: how much long documents are marked down, from 0 to 1; 0.4 is Anserini's default.
        split: makes the words of a text.

    Raises:
        UnmaskError: if no document has a word.
    """
    import bm25s

    texts = [split(text) for text in documents.values()]
    if not any(texts):
        raise UnmaskError("BM25 needs documents with words in them")
    index = bm25s.BM25(method="lucene", k1=k1, b=b)
    index.index(texts, show_progress=False)
    names = list(documents)
    asked = {query: split(text) for query, text in queries.items()}
    # The library does not score a query without words.
    return {query: _best(index.get_scores(found), names, k) if found else {} for query, found in asked.items()}


def _best(scores: np.ndarray, names: list[str], k: int) -> dict[str, float]:
    """The k largest positive scores, in ranked order."""
    least = np.partition(scores, -k)[-k] if k < len(scores) else 0.0
    found = {names[i]: float(scores[i]) for i in np.flatnonzero((scores >= least) & (scores > 0))}
    return {name: found[name] for name in ranked_documents(found)[:k]}
