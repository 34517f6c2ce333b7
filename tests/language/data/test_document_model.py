"""The words of a collection: counted in bounded memory, smoothed as Zhai and Lafferty have it, the authors' numbers."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from collection_words import FACTS, GOLDEN, STOP, TEXTS, aligned, some_texts

from unmask.core.errors import UnmaskError
from unmask.language.data import words as words_module
from unmask.language.data.document_model import DocumentModel, DocumentModelError, SpilledCounts, fit, smoothed
from unmask.language.data.words import WordReader, word_reader


def test_words_are_lower_case_letters_without_stop_words() -> None:
    reader = word_reader()
    assert {"the", "don", "s", "themselves"} <= reader.stop
    assert reader.words("The cat's 3 hats, naïve-Bayes AND Moby_Dick2") == [
        "cat", "hats", "na", "bayes", "moby", "dick",
    ]  # fmt: skip


def test_a_stop_list_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "stop.txt").write_text("Cat\nhats don't\n", encoding="utf-8")
    reader = word_reader(str(tmp_path / "stop.txt"))
    assert reader.words("the cat hats") == ["the"]
    assert reader.digest != word_reader().digest
    with pytest.raises(UnmaskError, match=r"data\.words\.stop_words: .*missing"):
        word_reader(str(tmp_path / "missing"))


def test_stems_need_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "snowballstemmer", None)
    with pytest.raises(UnmaskError, match="pip install snowballstemmer"):
        word_reader(stem=True)
    stemmer = SimpleNamespace(stemWord=lambda word: word.rstrip("s"))
    monkeypatch.setitem(__import__("sys").modules, "snowballstemmer", SimpleNamespace(stemmer=lambda name: stemmer))
    assert words_module.word_reader(stem=True).unit("hats") == "hat"


@pytest.mark.parametrize("held", [3, 20, 10_000])
def test_counts_are_exact_however_little_fits_into_memory(held: int) -> None:
    texts = some_texts()
    model = fit(texts, WordReader(frozenset({"bal"})), least=40, held=held)
    tf = Counter(word for text in texts for word in text.split() if word != "bal")
    df = Counter(word for text in texts for word in set(text.split()) if word != "bal")
    known = sorted(word for word in tf if tf[word] >= 40)
    assert 0 < len(known) < len(tf)
    assert model.words == known == model.surfaces
    assert model.tf.tolist() == [tf[word] for word in known]
    assert model.df.tolist() == [df[word] for word in known]
    assert (model.total_tf, model.total_df, model.documents) == (tf.total(), df.total(), len(texts))


@pytest.mark.parametrize("held", [3, 10_000])
def test_stems_keep_the_forms_that_they_stand_for(held: int) -> None:
    texts = some_texts()
    model = fit(texts, WordReader(frozenset(), lambda word: word[:2]), least=1, held=held)
    forms = Counter(word for text in texts for word in text.split())
    assert model.words == sorted({word[:2] for word in forms})
    for i, stem in enumerate(model.words):
        span = slice(*model.surface_offsets[i : i + 2])
        assert dict(zip(model.surfaces[span], model.surface_counts[span].tolist(), strict=True)) == {
            word: count for word, count in forms.items() if word[:2] == stem
        }
    assert model.tf.sum() == forms.total()


def test_no_known_word_is_an_error() -> None:
    with pytest.raises(DocumentModelError, match=r"no word occurs 10 times in the 2 documents.*data\.words\.least"):
        fit(["one two", "three"], WordReader(frozenset()), least=10)


def test_saved_without_pickle_and_read_again(tmp_path: Path) -> None:
    model = fit(some_texts(), WordReader(frozenset(), lambda word: word[:2]), least=1)
    model.save(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["counts.safetensors", "words.json"]
    other = DocumentModel.open(tmp_path / "model")
    assert other.digest == model.digest
    assert other.words == model.words
    (tmp_path / "model" / "words.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DocumentModelError, match="holds no document model"):
        DocumentModel.open(tmp_path / "model")


def test_spilled_counts_are_sorted_like_those_in_memory(tmp_path: Path) -> None:
    counts = SpilledCounts(tmp_path / "counts", held=1)
    for names in ("ab", "ba", "cb"):
        counts.add({name: (1, 2) for name in names})
    assert list(counts.merged()) == [("a", 2, 4), ("b", 3, 6), ("c", 1, 2)]


# ---- smoothing -----------------------------------------------------------------------------------------------------


def test_a_hand_case() -> None:
    """D = "a a b", mu = 1, p(w|C) = 1/4 over a, b, c, d."""
    p = smoothed(np.array([2.0, 1, 0, 0]), 3, 1.0, np.full(4, 0.25))
    assert p.tolist() == [2.25 / 4, 1.25 / 4, 0.25 / 4, 0.25 / 4]
    assert math.log(p[0]) + math.log(p[1]) > math.log(p[1]) + math.log(p[2])


@pytest.mark.parametrize("kind", ["tf", "df"])
def test_probabilities_sum_to_1_and_go_to_their_limits(kind: Any) -> None:
    model = fit(some_texts(), WordReader(frozenset()), least=1)
    collection = model.collection(kind)
    assert collection.sum() == pytest.approx(1)
    words, counts = model.counts(["bal", "bal", "dem"])
    tf = np.zeros(len(model.words))
    tf[words] = counts
    for mu in (1e-9, 3.0, 500.0, 1e12):
        assert smoothed(tf, 3, mu, collection).sum() == pytest.approx(1)
    np.testing.assert_allclose(smoothed(tf, 3, 1e-9, collection), tf / 3, atol=1e-9)
    np.testing.assert_allclose(smoothed(tf, 3, 1e12, collection), collection, rtol=1e-9)
    absent = tf == 0
    np.testing.assert_allclose(smoothed(tf, 3, 5.0, collection)[absent], 5 * collection[absent] / 8)


def test_frequent_words_are_kept_less_often() -> None:
    model = fit(some_texts(), WordReader(frozenset()), least=1)
    share = model.tf / model.total_tf
    wanted = np.minimum(1, np.sqrt(1e-4 / share) + 1e-4 / share)
    np.testing.assert_allclose(model.keep(1e-4, 0), wanted)
    assert (model.keep(1e-4, 10**9) == 1).all()
    assert (model.keep(1.0, 0) == 1).all()


# ---- the authors' numbers ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> DocumentModel:
    return fit(TEXTS, WordReader(STOP), least=10)


def test_the_authors_counts(model: DocumentModel) -> None:
    every = fit(TEXTS, WordReader(STOP), least=1)
    assert aligned(every, every.tf).tolist() == GOLDEN["output/corpus_tf"].tolist()
    assert aligned(every, every.df).tolist() == GOLDEN["output/corpus_df"].tolist()
    assert model.total_tf == GOLDEN["output/total_word_num"]
    assert model.mean_length == pytest.approx(float(GOLDEN["output/average_doc_word_num"]))
    for text, counts, length in zip(TEXTS, GOLDEN["output/doc_tf"], GOLDEN["output/doc_word_num"], strict=True):
        found = WordReader(STOP).words(text)
        assert len(found) == length
        assert [found.count(word) for word in FACTS["words"]] == counts.tolist()


def test_the_authors_collection_model_and_sub_sampling(model: DocumentModel) -> None:
    np.testing.assert_allclose(aligned(model, model.collection("df")), GOLDEN["output/collection_model"], rtol=1e-6)
    keep, wanted = aligned(model, model.keep(1e-4, 100)), GOLDEN["output/keep_probability"]
    np.testing.assert_allclose(keep[~np.isnan(wanted)], wanted[~np.isnan(wanted)], rtol=1e-6)
    assert set(keep[np.isnan(wanted) & ~np.isnan(keep)]) == {1.0}  # the release has no entry and stops


def test_the_authors_scores(model: DocumentModel) -> None:
    """p(w|D) of the words that a draw of the release could give, and the shares that it draws from."""
    collection = aligned(model, model.collection("df"))
    rows = (GOLDEN["output/score_p_w_given_D_on_candidates"], GOLDEN["output/q_candidates_normalised"])
    for tf, length, scores, shares in zip(GOLDEN["output/doc_tf"], GOLDEN["output/doc_word_num"], *rows, strict=True):
        ours = smoothed(tf, int(length), model.mean_length, collection)
        there = ~np.isnan(scores)
        np.testing.assert_allclose(ours[there], scores[there], rtol=1e-5)
        np.testing.assert_allclose(ours[there] / ours[there].sum(), shares[there], rtol=1e-5)
