"""The task ``retrieval``: how well a cross-encoder re-ranks documents for queries, without having seen a labelled one.

Of data in BEIR's layout (``corpus.jsonl``, ``queries.jsonl``, ``qrels/test.tsv``) the judged queries are asked. Of
other documents the titles of the test split are asked, and the document that a title was taken from should come first;
one without a title gives its first sentence. Candidates are the best 20 that BM25 finds; where the library bm25s is not
installed, the document that is looked for and 19 others by chance, and the note says so.

MRR@10 and nDCG@10 are means over all queries, those with a relevant document that is no candidate counting 0. The rows
beside the trained model are the same model at random weights, BM25's own order, and a random order. ``ordered`` is how
often the more representative of two word sets gets the higher score on the test split; chance is one half.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unmask.core.data.kinds import SourceError
from unmask.core.evaluation.run import Job
from unmask.core.evaluation.tables import percent, row_table
from unmask.core.method import to_device
from unmask.core.randomness import SampleKey, stable_id
from unmask.language.data.document_pairs import Row, build_row, collate, pad_rows, titled_documents, tokenizer_of
from unmask.language.data.vocabulary import Tokenizer, begins_word, known
from unmask.language.evaluation.bm25 import bm25
from unmask.language.evaluation.ranking import Qrels, Run, mean_ndcg, mrr, read_qrels, read_texts

NO_FINE_TUNING = (
    "no classifier is put on a re-ranker. Export it with `unmask export RUN --out DIR`; transformers opens DIR as "
    "BertForSequenceClassification, with a new head to be trained on judged documents"
)
ROWS = {
    "trained": "trained model",
    "random": "untrained model",
    "bm25": "BM25",
    "shuffled": "random order",
}
CANDIDATES, QUERIES, QUICK, _DEPTH = 20, 500, 50, 10
HAS_BM25 = importlib.util.find_spec("bm25s") is not None


@dataclass(frozen=True)
class Collection:
    """Documents and judged queries, texts by id."""

    documents: Mapping[str, str]
    queries: Mapping[str, str]
    qrels: Qrels


def measure(job: Job) -> dict[str, Any]:
    """Re-rank each query's candidates; see the head of this file."""
    tokenizer = tokenizer_of(job.run.recipe.data)  # the run's, whatever data it is measured on
    collection = thinned(
        judged(job.data.source) or titles(job.data, tokenizer), QUICK if job.quick else QUERIES, job.seed
    )
    found, note = candidates(collection, job.seed)
    runs = {name: rerank(method, job, tokenizer, collection, found) for name, method in job.methods.items()}
    if job.references:
        runs |= ({"bm25": found} if not note else {}) | {"shuffled": shuffled(found, job.seed)}
    rows = {name: scored(run, collection.qrels) for name, run in runs.items()}
    splits = {"queries": len(collection.queries), "documents": len(collection.documents)}
    if job.data.source == job.run.recipe.data.source:
        for name, method in job.methods.items():
            rows[name] |= ordering(method, job)
    protocol = {"candidates": CANDIDATES, "depth": _DEPTH, "bm25": {"k1": 0.9, "b": 0.4}, "labels": "none"}
    return {"rows": rows, "labelled": False, "note": note, "splits": splits, "protocol": protocol}


def table(result: dict[str, Any]) -> str:
    """What `measure` found, as text."""
    columns = [("MRR@10", percent("mrr")), ("nDCG@10", percent("ndcg")), ("word sets ordered", percent("ordered"))]
    return row_table(result, columns, [result["note"]] if result["note"] else [])


def scored(run: Run, qrels: Qrels) -> dict[str, float]:
    """The measures of a run."""
    return {"mrr": mrr(run, qrels, _DEPTH), "ndcg": mean_ndcg(run, qrels, _DEPTH, over="judged")}


# ---- queries and candidates ----------------------------------------------------------------------------------------


def judged(source: str) -> Collection | None:
    """A collection in BEIR's layout; None where the source is none."""
    folder = Path(source).expanduser()
    files = [folder / name for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv")]
    if not all(file.is_file() for file in files):
        return None
    documents, queries, qrels = read_texts(files[0]), read_texts(files[1]), read_qrels(files[2])
    return Collection(documents, {name: queries[name] for name in qrels if name in queries}, qrels)


def titles(data: Any, tokenizer: Tokenizer) -> Collection:
    """The titles of the test split, each with the document it was taken from.

    Raises:
        SourceError: there are fewer than two.
    """
    documents, queries = {}, {}
    for name, title, text in titled_documents(data, "test", tokenizer):
        query, body = (title, text) if title else first_sentence(text)
        if query and body:
            documents[name], queries[name] = body, query
    if len(queries) < 2:
        raise SourceError(
            f"{data.source}: {len(queries)} of its test documents have a title, or a sentence, and a text beside it; "
            "give documents with titles, or more of them"
        )
    return Collection(documents, queries, {name: {name: 1} for name in queries})


def thinned(collection: Collection, most: int, seed: int) -> Collection:
    """At most so many queries, chosen by their ids."""
    names = sorted(collection.queries, key=lambda name: (_chance(seed, name, "queries"), name))[:most]
    chosen = {name: collection.queries[name] for name in names}
    return replace(collection, queries=chosen, qrels={name: collection.qrels[name] for name in names})


def candidates(collection: Collection, seed: int) -> tuple[dict[str, dict[str, float]], str]:
    """The candidates of each query with BM25's scores, or with none by chance; and what to say of them."""
    if HAS_BM25:
        return bm25(collection.documents, collection.queries, k=CANDIDATES), ""
    names = sorted(collection.documents)
    found = {}
    for query in collection.queries:
        order = np.argsort(SampleKey.of(seed, stable_id(query)).stream("candidates").fine_uniform(len(names)))
        right = [name for name, grade in collection.qrels[query].items() if grade > 0 and name in collection.documents]
        others = [names[i] for i in order if names[i] not in right]
        found[query] = dict.fromkeys([*right[:CANDIDATES], *others][:CANDIDATES], 0.0)
    return found, "candidates by chance: the library bm25s, which finds harder ones, is missing (pip install bm25s)"


def first_sentence(text: str) -> tuple[str, str]:
    """The first sentence of a text, and the rest; both are empty where there is only one."""
    parts = re.split(r"(?<=[.!?])\s+", text.strip(), maxsplit=1)
    return (parts[0], parts[1]) if len(parts) == 2 else ("", "")


def shuffled(found: Run, seed: int) -> dict[str, dict[str, float]]:
    """The candidates in a random order."""
    return {query: {name: _chance(seed, f"{query} {name}", "order") for name in run} for query, run in found.items()}


def _chance(seed: int, name: str, stream: str) -> float:
    return SampleKey.of(seed, stable_id(name)).stream(stream).uniform(1)[0]


# ---- models --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def rerank(
    method: Any, job: Job, tokenizer: Tokenizer, collection: Collection, found: Run
) -> dict[str, dict[str, float]]:
    """The candidates with a cross-encoder's scores."""
    pairs = [(query, name) for query, run in found.items() for name in run]
    scores: dict[str, dict[str, float]] = {query: {} for query in found}
    rows = _rows(pairs, collection, tokenizer, job.run.recipe.data)
    left = iter(pairs)
    while chunk := list(islice(rows, max(1, job.run.recipe.training.batch_size))):
        padded = to_device(pad_rows([[row] for row in chunk], tokenizer.vocabulary.pad), job.device)
        values = _scores(method, padded["tokens"], padded["types"], padded["valid"])
        for (query, name), value in zip(islice(left, len(chunk)), values.tolist(), strict=True):
            scores[query][name] = value
    return scores


def _rows(pairs: Sequence[tuple[str, str]], collection: Collection, tokenizer: Tokenizer, data: Any) -> Iterator[Row]:
    begins, vocabulary = begins_word(tokenizer), known(data.vocabulary)
    for query, name in pairs:
        asked, text = tokenizer.encode([f" {collection.queries[query]}", collection.documents[name]])
        # A query keeps half of the room at most: it may be a sentence of any length.
        words = np.array(asked[: data.length // 2], dtype=np.int64)
        yield build_row(words, np.array(text[: data.length], dtype=np.int64), data.length, vocabulary, begins)


def _scores(method: Any, *parts: Tensor) -> Tensor:
    """Scores of rows, from their tokens, types and validity [samples, rows, length]."""
    return method.rank(method.states(*(part.flatten(0, 1) for part in parts))).float()


@torch.no_grad()
def ordering(method: Any, job: Job) -> dict[str, float]:
    """How often the more representative word set of the test split's pairs gets the higher score."""
    pairs, right = job.open("test"), 0
    for start in range(0, len(pairs), job.run.recipe.training.batch_size):
        index = range(start, min(len(pairs), start + job.run.recipe.training.batch_size))
        batch = to_device(collate([pairs[i, 0] for i in index]), job.device)
        scores = _scores(method, batch.tokens, batch.types, batch.valid).view(-1, 2)
        right += int((scores[:, 0] > scores[:, 1]).sum())
    return {"ordered": right / len(pairs)}
