"""Ranking measures: worked cases, brute force, trec_eval itself where its binding is installed, files, BM25."""

from __future__ import annotations

import math
import random
from itertools import permutations
from pathlib import Path

import pytest

from unmask.core.errors import UnmaskError
from unmask.language.evaluation.bm25 import bm25, words
from unmask.language.evaluation.ranking import (
    by_query,
    mean_ndcg,
    mean_precision,
    mrr,
    ndcg,
    precision,
    ranked_documents,
    read_qrels,
    read_run,
    read_texts,
    reciprocal_rank,
)

Runs = tuple[dict[str, dict[str, float]], dict[str, dict[str, int]]]


def random_runs(seed: int) -> Runs:
    """Runs with many ties, unjudged documents, grades from -1 to 3, and queries that only one side has."""
    draw = random.Random(seed)
    names = [f"d{i}" for i in range(40)]
    run = {f"q{q}": {d: draw.choice([0.5, 1.0, draw.random()]) for d in draw.sample(names, 30)} for q in range(12)}
    qrels = {f"q{q}": {d: draw.randint(-1, 3) for d in draw.sample(names, 15)} for q in range(2, 14)}
    qrels["q5"] = dict.fromkeys(qrels["q5"], 0)  # nothing relevant
    return run, qrels


# ---- one query -----------------------------------------------------------------------------------------------------


def test_ndcg_of_the_worked_case() -> None:
    ideal = 3 + 2 / math.log2(3) + 1 / 2
    assert ideal == pytest.approx(4.7619, abs=5e-5)
    assert ndcg([3, 0, 2], [3, 2, 1], 3) == pytest.approx(4 / ideal)
    assert ndcg([3, 0, 2], [3, 2, 1], 3) == pytest.approx(0.8400, abs=5e-5)
    assert ndcg([3, 0, 2], [3, 2, 1], 3, "exponential") == pytest.approx(0.9049, abs=5e-5)


@pytest.mark.parametrize("gain", ["linear", "exponential"])
def test_the_best_order_has_ndcg_1_and_no_order_more(gain: str) -> None:
    judged = [0, 3, 1, -1, 2]
    values = {order: ndcg(order, judged, 3, gain) for order in permutations(judged)}
    assert max(values.values()) == pytest.approx(1)
    assert all((value > 1 - 1e-12) == (order[:3] == (3, 2, 1)) for order, value in values.items())


def test_no_relevant_document_scores_0_and_negative_grades_count_as_0() -> None:
    assert ndcg([0, 0], [0, -1], 2) == 0
    assert ndcg([-2, 1], [1, -2], 2) == ndcg([0, 1], [1, 0], 2) == pytest.approx(1 / math.log2(3))
    assert reciprocal_rank([-1, 0, 2]) == pytest.approx(1 / 3)


def test_precision_always_divides_by_k() -> None:
    assert precision([1, 0, 2], 20) == 0.1
    assert precision([1, 0, 2, 1], 2) == 0.5
    assert precision([], 5) == 0


def test_equal_scores_are_ranked_by_falling_id_and_scores_are_float32() -> None:
    assert ranked_documents({"a": 1.0, "b": 1.0, "c": 2.0}) == ["c", "b", "a"]
    assert ranked_documents({"d2": 0.0, "d10": 0.0}) == ["d2", "d10"]
    assert ranked_documents({"a": 1.0 + 1e-9, "b": 1.0}) == ["b", "a"]
    with pytest.raises(UnmaskError, match="not a number"):
        ranked_documents({"a": math.nan})


# ---- means ---------------------------------------------------------------------------------------------------------


def run_with_relevant_at(rank: int) -> dict[str, float]:
    return {"relevant" if place == rank else f"other{place}": -float(place) for place in range(1, 21)}


def test_mrr_of_the_worked_case() -> None:
    run = {"q1": run_with_relevant_at(1), "q2": run_with_relevant_at(4), "q3": run_with_relevant_at(11)}
    qrels = {q: {"relevant": 1} for q in run}
    assert mrr(run, qrels) == pytest.approx((1 + 0.25 + 0) / 3)
    assert mrr(run, qrels, k=None) == pytest.approx((1 + 0.25 + 1 / 11) / 3)


def test_the_two_means_differ_by_queries_that_the_run_lacks() -> None:
    run = {"q1": {"a": 1.0}, "unjudged": {"a": 1.0}}
    qrels = {"q1": {"a": 1}, "q2": {"a": 1}}
    assert mrr(run, qrels) == 0.5
    assert mrr(run, qrels, over="found") == 1
    assert mean_ndcg(run, qrels) == 1
    assert mean_ndcg(run, qrels, over="judged") == 0.5
    assert mean_precision(run, qrels, k=1) == 1
    with pytest.raises(UnmaskError, match="no judged query"):
        mrr({"unjudged": {}}, qrels, over="found")


def test_a_query_without_relevant_documents_counts() -> None:
    run, qrels = {"q1": {"a": 1.0}, "q2": {"a": 1.0}}, {"q1": {"a": 1}, "q2": {"a": 0}}
    assert mean_ndcg(run, qrels) == mean_precision(run, qrels, k=1) == mrr(run, qrels) == 0.5


@pytest.mark.parametrize("seed", range(3))
def test_measures_agree_with_their_definitions_written_out(seed: int) -> None:
    run, qrels = random_runs(seed)
    for query in set(run) & set(qrels):
        grades = qrels[query]
        order = sorted(run[query], reverse=True)  # by id; sorted() is stable
        order.sort(key=lambda d, scores=run[query]: -scores[d])
        gains = [max(grades.get(d, 0), 0) for d in order]
        ideal = sorted((max(g, 0) for g in grades.values()), reverse=True)
        best = sum(g / math.log2(r + 2) for r, g in enumerate(ideal[:10]))
        expected = sum(g / math.log2(r + 2) for r, g in enumerate(gains[:10])) / best if best else 0
        one = ({query: run[query]}, {query: grades})
        assert mean_ndcg(*one, k=10) == pytest.approx(expected, abs=1e-12)
        assert mean_precision(*one, k=10) == sum(g > 0 for g in gains[:10]) / 10
        first = [r for r, g in enumerate(gains, 1) if g > 0]
        assert mrr(*one, k=None) == (1 / first[0] if first else 0)


@pytest.mark.parametrize("seed", range(3))
def test_measures_are_trec_evals(seed: int) -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval", reason="pytrec_eval (trec_eval's binding) is not installed")
    run, qrels = random_runs(seed)
    names = {"recip_rank", "ndcg_cut.3,10", "P.5,20"}
    expected = pytrec_eval.RelevanceEvaluator(qrels, names).evaluate(run)
    found = {
        "recip_rank": by_query(run, qrels, lambda ranked, _: reciprocal_rank(ranked, None), "found"),
        "ndcg_cut_3": by_query(run, qrels, lambda ranked, judged: ndcg(ranked, judged, 3), "found"),
        "ndcg_cut_10": by_query(run, qrels, lambda ranked, judged: ndcg(ranked, judged, 10), "found"),
        "P_5": by_query(run, qrels, lambda ranked, _: precision(ranked, 5), "found"),
        "P_20": by_query(run, qrels, lambda ranked, _: precision(ranked, 20), "found"),
    }
    for name, values in found.items():
        assert values == pytest.approx({q: e[name] for q, e in expected.items()}, abs=1e-9)


# ---- files ---------------------------------------------------------------------------------------------------------


def test_trec_files_are_read_and_the_rank_column_is_not(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("1 Q0 a 1 0.5 tag\n1 Q0 b 2 1e1 tag\n\n2\tQ0\ta\t1\t-3\ttag\n")
    (tmp_path / "qrels").write_text("1 0 a 2\n1 0 b -1\n2\t0\ta\t0\n")
    assert read_run(tmp_path / "run") == {"1": {"a": 0.5, "b": 10}, "2": {"a": -3}}
    assert read_qrels(tmp_path / "qrels") == {"1": {"a": 2, "b": -1}, "2": {"a": 0}}


def test_beir_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\ta\t1\nq\tb\t2\n")
    (tmp_path / "corpus.jsonl").write_text('{"_id": "a", "title": "T", "text": "x"}\n{"_id": "b", "text": "y"}\n')
    assert read_qrels(tmp_path / "test.tsv") == {"q": {"a": 1, "b": 2}}
    assert read_texts(tmp_path / "corpus.jsonl") == {"a": "T x", "b": "y"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 Q0 a 1 0.5", ":1 has 5 fields: expected query Q0 document rank score tag"),
        ("1 Q0 a 1 high tag", ":1: 'high' is not a number"),
        ("1 Q0 a 1 2 t\n1 Q0 a 2 1 t", ":2: document a stands twice under query 1"),
    ],
)
def test_bad_lines_of_a_run_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run").write_text(text)
    with pytest.raises(UnmaskError, match=message):
        read_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 0 a 1 2", ":1 has 5 fields"),
        ("1 0 a 1.5", ":1: '1.5' is not a whole number"),
        ("1 0 a 1\n1 0 a 1", ":2: document a stands twice under query 1"),
    ],
)
def test_bad_lines_of_judgements_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "qrels").write_text(text)
    with pytest.raises(UnmaskError, match=message):
        read_qrels(tmp_path / "qrels")


def test_bad_texts_and_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"_id": "a"}')
    with pytest.raises(UnmaskError, match=r"corpus\.jsonl:1 is not a JSON object with _id and text"):
        read_texts(tmp_path / "corpus.jsonl")
    with pytest.raises(UnmaskError, match="does not exist"):
        read_run(tmp_path / "none")


# ---- BM25 ----------------------------------------------------------------------------------------------------------

DOCUMENTS = {
    "a": "The cat sat on the mat.",
    "b": "A dog and a cat and another cat",
    "c": "Nothing of the kind",
    "d": "the cat sat on the mat",
}


def test_words_are_lower_case_runs_of_letters_and_digits() -> None:
    assert words("The U.S. têtes-à-têtes, 42!") == ["the", "u", "s", "têtes", "à", "têtes", "42"]


def test_bm25_is_its_formula() -> None:
    pytest.importorskip("bm25s", reason="bm25s is not installed")
    texts = {name: words(text) for name, text in DOCUMENTS.items()}
    average = sum(map(len, texts.values())) / len(texts)

    def expected(query: str, name: str) -> float:
        total = 0.0
        for word in words(query):
            count, having = texts[name].count(word), sum(word in t for t in texts.values())
            weight = math.log(1 + (len(texts) - having + 0.5) / (having + 0.5))
            total += weight * count / (count + 1.2 * (1 - 0.75 + 0.75 * len(texts[name]) / average))
        return total

    queries = {"1": "cat on a mat", "2": "Cat cat unseen", "3": "unseen", "4": ""}
    run = bm25(DOCUMENTS, queries, k1=1.2, b=0.75)
    assert list(run) == list(queries)
    for query, text in queries.items():
        every = {name: expected(text, name) for name in texts}
        assert run[query] == pytest.approx({n: s for n, s in every.items() if s > 0}, rel=1e-5)
        assert list(run[query]) == ranked_documents(run[query])


def test_bm25_cuts_equal_documents_by_the_order_of_rankings() -> None:
    pytest.importorskip("bm25s", reason="bm25s is not installed")
    run = bm25(DOCUMENTS, {"q": "mat"}, k=1)
    assert list(run["q"]) == ["d"]
    assert list(bm25(DOCUMENTS, {"q": "mat"}, k=2)["q"]) == ["d", "a"]
    with pytest.raises(UnmaskError, match="documents with words"):
        bm25({"a": "?!"}, {"q": "mat"})


def test_bm25_ranks_better_than_chance() -> None:
    pytest.importorskip("bm25s", reason="bm25s is not installed")
    draw = random.Random(0)
    documents = {f"d{i}": " ".join(f"w{draw.randrange(300)}" for _ in range(30)) for i in range(100)}
    queries = {f"q{i}": " ".join(draw.sample(documents[f"d{i}"].split(), 3)) for i in range(50)}
    qrels = {f"q{i}": {f"d{i}": 1} for i in range(50)}
    chance = {q: {d: draw.random() for d in documents} for q in queries}
    assert mrr(bm25(documents, queries), qrels) > 0.9 > 0.2 > mrr(chance, qrels)
