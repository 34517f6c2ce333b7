"""Pairs of word sets: exact draws, two sets of one length, the likelier first."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from collection_words import FACTS, GOLDEN, STOP, TEXTS, aligned, some_texts

from unmask.core.randomness import SampleKey
from unmask.language.data.document_model import DocumentModel, fit, log_likelihood, smoothed
from unmask.language.data.word_sets import Bag, WordSetSampler, WordSettings, pick, positive_poisson
from unmask.language.data.words import WordReader

CANDIDATES = pytest.mark.parametrize("candidates", [None, 12])


@pytest.fixture(scope="module")
def model() -> DocumentModel:
    return fit(TEXTS, WordReader(STOP), least=10)


def bag_of(model: DocumentModel, text: str) -> Bag:
    found = WordReader(STOP).words(text)
    return Bag(*model.counts(found), len(found))


def key(i: int, visit: int = 0) -> SampleKey:
    return SampleKey.of(3, i, visit)


def within_3_deviations(counts: np.ndarray, share: np.ndarray) -> None:
    total = counts.sum()
    deviation = (counts - total * share) / np.sqrt(np.maximum(total * share * (1 - share), 1e-12))
    assert (np.abs(deviation[share > 0]) > 3).sum() <= 1  # of some 50, about 0.1 are expected
    assert np.abs(deviation[share > 0]).max() < 4.5
    assert counts[share == 0].sum() == 0


def test_draws_follow_the_smoothed_model_times_what_is_kept(model: DocumentModel) -> None:
    """100,000 words, all at once: over every known word of the collection."""
    sampler, bag = WordSetSampler(model), bag_of(model, TEXTS[2])
    drawn = np.concatenate([sampler.draw(bag, 10_000, key(i)) for i in range(10)])
    every = np.arange(len(model.words))
    tf = np.zeros(len(every))
    tf[bag.words] = bag.counts
    share = smoothed(tf, bag.length, model.mean_length, model.collection("tf")) * model.keep(1e-4, 100)
    within_3_deviations(np.bincount(drawn, minlength=len(every)), share / share.sum())


def test_draws_among_candidates(model: DocumentModel) -> None:
    """With the release's restriction the document's words are always among them, and the rest is a sample."""
    sampler, bag = WordSetSampler(model, WordSettings(candidates=30)), bag_of(model, TEXTS[2])
    for i in range(5):
        words = sampler.candidates(bag, key(i))
        assert set(bag.words) <= set(words.tolist())
        assert len(words) == len(set(words.tolist())) <= max(30, len(bag.words) + 100)
        drawn = sampler.draw(bag, 20_000, key(i))
        weights = np.zeros(len(model.words))
        weights[words] = sampler.probability(bag, words) * sampler.keep[words]
        within_3_deviations(np.bincount(drawn, minlength=len(weights)), weights / weights.sum())
    few = WordSetSampler(model, WordSettings(candidates=1))
    assert len(few.candidates(bag, key(0))) > len(bag.words)  # 100 more are drawn where a document has too many words


def test_the_authors_sampler(model: DocumentModel) -> None:
    """The shares that the release's rejection loop draws in, and those of the probabilities that ours cumulates."""
    collection = aligned(model, model.collection("df"))
    shares, wanted = GOLDEN["sampler/q"], GOLDEN["sampler/expected_share"]
    keep = aligned(model, model.keep(1e-4, 100))
    ours = np.where(shares > 0, shares * keep, 0)
    np.testing.assert_allclose(ours / ours.sum(), wanted, rtol=1e-4, atol=1e-7)
    within_3_deviations(GOLDEN["sampler/word_counts"].astype(float), ours / ours.sum())
    cells = GOLDEN["sampler/negative_table_cells"]
    exact = collection / np.nansum(collection)
    table = np.where(cells < 0, np.nan, cells / GOLDEN["sampler/negative_table_size"])
    first = FACTS["words"].index(FACTS["negative_table_word0"])
    assert table[first] > 1.5 * exact[first]  # the release's unfilled cells; ours draws in proportion
    others = ~np.isnan(table) & (np.arange(len(table)) != first)
    np.testing.assert_allclose(table[others], collection[others], atol=1e-4)


def test_the_authors_word_sets_score_the_same(model: DocumentModel) -> None:
    sampler = WordSetSampler(model, WordSettings(collection="df"))
    sets, scores = GOLDEN["output/word_sets_surface_index"], GOLDEN["output/word_set_scores"]
    compared = 0
    for document, text in enumerate(TEXTS):
        bag = bag_of(model, text)
        for pair, (one, two) in enumerate(sets[document]):
            found = []
            for words, wanted in zip((one, two), scores[document, pair], strict=True):
                numbers = np.array([model.index[FACTS["surface_words"][w]] for w in words if w >= 0])
                found.append(log_likelihood(sampler.probability(bag, numbers)))
                assert found[-1] == pytest.approx(float(wanted), rel=1e-5)
            assert (one >= 0).sum() == (two >= 0).sum() >= 1
            assert (found[0] > found[1]) == bool(GOLDEN["output/first_set_positive"][document, pair])
            compared += 1
    assert compared == sets.shape[0] * sets.shape[1]


@CANDIDATES
def test_pairs(model: DocumentModel, candidates: int | None) -> None:
    """One length, the first at least as likely, both in the order drawn, and nothing but the key decides."""
    sampler, bag = WordSetSampler(model, WordSettings(candidates=candidates)), bag_of(model, TEXTS[0])
    lengths, duplicates = Counter[int](), 0
    for i in range(150):
        sets = sampler.pair(bag, key(i))
        lengths[len(sets.positive)] += 1
        assert len(sets.positive) == len(sets.negative) >= 1
        assert sets.scores[0] >= sets.scores[1]
        for words, score in zip((sets.positive, sets.negative), sets.scores, strict=True):
            assert score == pytest.approx(math.log(math.prod(sampler.probability(bag, words))))
            duplicates += len(set(words.tolist())) < len(words)
        again = sampler.pair(bag, key(i))
        assert again.positive.tolist() == sets.positive.tolist()
        assert again.negative.tolist() == sets.negative.tolist()
    assert duplicates
    assert set(range(1, 7)) <= set(lengths)
    assert any(
        sampler.pair(bag, key(0, 1)).positive.tolist() != sampler.pair(bag, key(0)).positive.tolist() for _ in "1"
    )


def test_of_two_equally_likely_sets_the_second_is_positive() -> None:
    model = fit(["b a c b a c"], WordReader(frozenset()), least=1)
    sampler, bag = WordSetSampler(model, WordSettings(mean_length=0.1, mu=1.0)), Bag(np.arange(3), np.full(3, 2), 6)
    for i in range(20):
        sets = sampler.pair(bag, key(i))
        length = len(sets.positive)
        drawn = sampler.draw(bag, 2 * length, key(i))
        if sets.scores[0] == sets.scores[1]:
            assert sets.positive.tolist() == drawn[length:].tolist()


def test_lengths_are_poisson_without_0() -> None:
    lengths = 1 + pick(positive_poisson(3.0), SampleKey.of(0, 1).fine_uniform(50_000))
    share = np.array([math.exp(-3) * 3**k / math.factorial(k) for k in range(1, 16)]) / (1 - math.exp(-3))
    within_3_deviations(np.bincount(lengths, minlength=16)[1:16].astype(float), share)
    theirs = GOLDEN["sampler/length_histogram"].astype(float)
    assert theirs[0] == 0
    within_3_deviations(theirs[1:], share / share.sum())


@CANDIDATES
def test_documents_without_a_known_word_still_have_pairs(model: DocumentModel, candidates: int | None) -> None:
    sampler = WordSetSampler(model, WordSettings(candidates=candidates))
    empty = Bag(np.zeros(0, np.int64), np.zeros(0, np.int64), 4)
    sets = sampler.pair(empty, key(0))
    assert len(sets.positive) == len(sets.negative)
    np.testing.assert_allclose(
        sampler.probability(empty, sets.positive),
        sampler.mu * model.collection("tf")[sets.positive] / (4 + sampler.mu),
    )


def test_forms_of_stems_are_drawn_by_the_logarithm_of_their_counts() -> None:
    model = fit(some_texts(), WordReader(frozenset(), lambda word: word[:2]), least=1)
    sampler = WordSetSampler(model)
    drawn = sampler.surfaces(np.zeros(20_000, np.int64), SampleKey.of(0, 0))
    end = int(model.surface_offsets[1])
    assert drawn.max() < end
    weights = np.log1p(model.surface_counts[:end])
    within_3_deviations(np.bincount(drawn, minlength=end).astype(float), weights / weights.sum())


def test_words_that_are_not_stemmed_are_their_own_forms(model: DocumentModel) -> None:
    words = np.array([3, 1, 1])
    assert WordSetSampler(model).surfaces(words, SampleKey.of(0, 0)) is words


def test_settings_out_of_range() -> None:
    from pydantic import TypeAdapter, ValidationError

    adapter: Any = TypeAdapter(WordSettings)
    for wrong in ({"mu": 0}, {"mean_length": 0}, {"candidates": 0}, {"subsample": 0}, {"collection": "idf"}):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)
