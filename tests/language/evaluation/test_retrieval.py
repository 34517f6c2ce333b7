"""Re-ranking without labels: a scorer that knows comes first, chance stays chance, and the rows say what they are."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from collection_words import FACTS, records, word_piece

from unmask.core.errors import UnmaskError
from unmask.core.evaluation.run import Job
from unmask.core.training.build import make_method
from unmask.core.training.checkpoint import LoadedRun
from unmask.core.training.recipe import load_recipe
from unmask.language.data.document_pairs import Settings, resolve
from unmask.language.data.word_sets import WordSettings
from unmask.language.encoders.language_model import ModelSettings
from unmask.language.evaluation import retrieval
from unmask.language.evaluation.retrieval import candidates, first_sentence, judged, measure, shuffled, table, thinned

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture
def without_bm25(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "HAS_BM25", False)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))
    words = WordSettings(least=2)
    source, tokenizer = str(records(tmp_path / "data")), word_piece(tmp_path / "tokenizer")
    data = resolve(Settings(source, tokenizer, length=64, thin_short=False, words=words, val_share=0.3))
    recipe = load_recipe("language/prop", "tiny")
    model = replace(recipe.model, network=ModelSettings("bert", SIZES))
    recipe = replace(recipe, data=data, model=model, training=replace(recipe.training, batch_size=3))
    return Job(LoadedRun(make_method(recipe).eval(), recipe, 0), data, torch.device("cpu"))


@pytest.mark.usefixtures("without_bm25")
def test_every_row_is_measured(job: Job) -> None:
    result = measure(job)
    assert set(result["rows"]) == {"trained", "random", "shuffled"}
    assert "pip install bm25s" in result["note"]
    for name, row in result["rows"].items():
        assert 0 < row["mrr"] <= 1 and 0 < row["ndcg"] <= 1
        assert ("ordered" in row) == (name != "shuffled")
    assert result["splits"] == {"queries": 7, "documents": 7}
    assert set(measure(replace(job, references=False))["rows"]) == {"trained"}
    names = {name: title for name, title in retrieval.ROWS.items() if name in result["rows"]}
    text = table({**result, "names": names, "method": "language/prop", "step": 0, "data": "x"})
    assert "MRR@10" in text and "random order" in text
    assert json.loads(json.dumps(result)) == result


def test_a_scorer_that_knows_comes_first(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that counts how many pieces of the query are in the document, beside one that counts the other way."""
    words = ["fengruzin", "dortu", "tukafen", "katu", "mimi", "fentu"]
    documents = {word: f"about {word} and the rest" for word in words}
    collection = retrieval.Collection(documents, {word: word for word in words}, {word: {word: 1} for word in words})
    found = {word: dict.fromkeys(words, 0.0) for word in words}

    def overlap(method: Any, tokens: torch.Tensor, types: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        rows = zip(tokens.flatten(0, 1), types.flatten(0, 1), strict=True)
        found = [len(set(row[kind == 0].tolist()) & set(row[kind == 1].tolist()) - {0, 3}) for row, kind in rows]
        return torch.tensor(found).float()

    for sign, expected in ((1, 1.0), (-1, 1 / len(words))):
        monkeypatch.setattr(retrieval, "_scores", lambda *parts, sign=sign: sign * overlap(*parts))
        run = retrieval.rerank(job.run.method, job, retrieval.tokenizer_of(job.data), collection, found)
        assert retrieval.scored(run, collection.qrels)["mrr"] == pytest.approx(expected)


@pytest.mark.usefixtures("without_bm25")
def test_scores_belong_to_their_documents(job: Job) -> None:
    """In batches of three and all at once."""
    recipe, tokenizer = job.run.recipe, retrieval.tokenizer_of(job.data)
    collection = retrieval.titles(job.data, tokenizer)
    found, _ = candidates(collection, 0)
    whole = replace(job, run=replace(job.run, recipe=replace(recipe, training=replace(recipe.training, batch_size=99))))
    one, other = (retrieval.rerank(job.run.method, j, tokenizer, collection, found) for j in (job, whole))
    assert {q: list(run) for q, run in one.items()} == {q: list(run) for q, run in found.items()}
    for query, run in one.items():
        assert run == pytest.approx(other[query], abs=1e-5)


@pytest.mark.usefixtures("without_bm25")
def test_data_in_the_layout_of_beir(job: Job, tmp_path: Path) -> None:
    folder = records(tmp_path / "beir", "corpus.jsonl")
    assert judged(str(folder)) is None
    (folder / "qrels").mkdir()
    (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "kamilo"}\n{"_id": "q2", "text": "x"}', "utf-8")
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\t100\t1\n", encoding="utf-8")
    collection = judged(str(folder))
    assert collection is not None
    assert collection.queries == {"q1": "kamilo"} and len(collection.documents) == len(FACTS["documents"])
    result = measure(replace(job, data=replace(job.data, source=str(folder))))
    assert result["splits"] == {"queries": 1, "documents": len(FACTS["documents"])}
    assert not any("ordered" in row for row in result["rows"].values())


@pytest.mark.usefixtures("without_bm25")
def test_candidates_hold_the_document_and_do_not_say_which() -> None:
    texts = {f"d{i}": "text" for i in range(60)}
    queries, qrels = {f"q{i}": "query" for i in range(60)}, {f"q{i}": {f"d{i}": 1} for i in range(60)}
    collection = retrieval.Collection(texts, queries, qrels)
    found, _ = candidates(collection, 0)
    assert all(f"d{i}" in found[f"q{i}"] and len(found[f"q{i}"]) == 20 for i in range(60))
    chance = retrieval.scored(shuffled(found, 0), qrels)["mrr"]
    assert abs(chance - math.fsum(1 / rank for rank in range(1, 11)) / 20) < 0.1
    assert len(thinned(collection, 7, 0).queries) == 7
    assert thinned(collection, 7, 0) == thinned(collection, 7, 0)


def test_first_sentences() -> None:
    assert first_sentence("One two. Three? Four") == ("One two.", "Three? Four")
    assert first_sentence("only one.") == ("", "")


def test_bm25_finds_candidates(job: Job) -> None:
    pytest.importorskip("bm25s")
    assert set(measure(job)["rows"]) == {"trained", "random", "bm25", "shuffled"}


@pytest.mark.usefixtures("without_bm25")
def test_too_few_titles_is_an_error(job: Job, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.txt").write_text("\n".join(f"kamilo {i}" for i in range(12)), encoding="utf-8")
    with pytest.raises(UnmaskError, match="0 of its test documents have a title"):
        measure(replace(job, data=replace(job.data, source=str(tmp_path / "one"), unit="line")))
