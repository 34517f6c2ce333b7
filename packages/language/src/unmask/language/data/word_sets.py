"""Pairs of word sets, drawn from a document's language model: which of two is the more representative (PROP).

As in PROP (arXiv 2010.10137): both sets of a pair have one length, drawn from a Poisson distribution; their words are
independent draws from the smoothed model of the document, duplicates included; frequent words are drawn less often
than the model says (`DocumentModel.keep`), and score as it says. The set with the larger likelihood is the positive.

Where the released code (Albert-Ma/PROP) differs from the paper or has a defect, this file does the following:

* Every known word of the collection can be drawn, as the equations say. The release draws from at most 500 candidates:
  the document's words, and a sample of the collection's; `candidates` does that.
* The prior is the collection's term frequencies. The release takes document frequencies; `collection` does that.
* Draws are exact, by the cumulated probabilities, and sub-sampling is part of them rather than a loop that rejects. The
  release draws the collection's words from a table whose unfilled cells all mean one word.
* Words that occur less often than `always_kept_under` are never rejected; the release stops at them with a KeyError.
* A draw follows from the seed, the document, and the visit; the release's workers all draw the same stream.
* Of two equally likely sets the second is the positive, as released.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated

import numpy as np
from jaxtyping import Float, Int
from pydantic import Field

from unmask.core.randomness import SampleKey
from unmask.language.data.document_model import Collection, DocumentModel, log_likelihood, smoothed


@dataclass(frozen=True)
class WordSettings:
    """What counts as a word, and how word sets are drawn.

    Args:
        stop_words: a text file of words that are not counted, one a line; null takes a list of ours, 274 English
            function words (the paper has 475 words, the lists of NLTK and INQUERY together).
        stem: count Porter stems; a drawn stem becomes one of its forms, likelier where that is more frequent.
        least: words that occur less often in the training split are unknown.
        collection: what p(w|C) is a share of: term frequencies ("tf", the paper) or document frequencies ("df", as
            released).
        mu: weight of the collection, in words; null takes the mean length of a document.
        mean_length: mean words of a set, before sets of none are drawn again.
        candidates: words that a document's sets are drawn from at most; null is all that are known, 500 as released.
        subsample: threshold under which shares of a word are never rejected.
        always_kept_under: words that occur less often are never rejected.
    """

    stop_words: str | None = None
    stem: bool = False
    least: Annotated[int, Field(ge=1)] = 10
    collection: Collection = "tf"
    mu: Annotated[float, Field(gt=0)] | None = None
    mean_length: Annotated[float, Field(gt=0, le=32)] = 3.0
    candidates: Annotated[int, Field(ge=1)] | None = None
    subsample: Annotated[float, Field(gt=0)] = 1e-4
    always_kept_under: Annotated[int, Field(ge=0)] = 100


@dataclass(frozen=True)
class Bag:
    """A document's known words.

    Args:
        words: their numbers, ascending.
        counts: how often each occurs.
        length: words of the document, unknown ones included.
    """

    words: Int[np.ndarray, "known"]
    counts: Int[np.ndarray, "known"]
    length: int


@dataclass(frozen=True)
class WordSets:
    """A pair.

    Args:
        positive: the words of the more representative set, as numbers, in the order drawn.
        negative: those of the other; as many.
        scores: the log-likelihoods of both.
    """

    positive: Int[np.ndarray, "length"]
    negative: Int[np.ndarray, "length"]
    scores: tuple[float, float]


@dataclass(frozen=True)
class WordSetSampler:
    """Draws pairs for documents.

    Args:
        model: the collection's counts.
        settings: how to draw.
    """

    model: DocumentModel
    settings: WordSettings = field(default_factory=WordSettings)

    @cached_property
    def mu(self) -> float:
        """The prior's weight, in words."""
        return self.settings.mu or self.model.mean_length

    @cached_property
    def collection(self) -> Float[np.ndarray, "words"]:
        """p(w|C)."""
        return self.model.collection(self.settings.collection)

    @cached_property
    def keep(self) -> Float[np.ndarray, "words"]:
        """The probability that a draw of a word counts."""
        return self.model.keep(self.settings.subsample, self.settings.always_kept_under)

    @cached_property
    def _sums(self) -> Float[np.ndarray, "words"]:
        return np.cumsum(self.collection)

    @cached_property
    def _kept_sums(self) -> Float[np.ndarray, "words"]:
        return np.cumsum(self.collection * self.keep)

    @cached_property
    def _lengths(self) -> Float[np.ndarray, "lengths"]:
        return positive_poisson(self.settings.mean_length)

    def pair(self, bag: Bag, key: SampleKey) -> WordSets:
        """Two sets of one length, the more representative first."""
        length = 1 + pick(self._lengths, key.stream("length").fine_uniform(1))[0]
        drawn = self.draw(bag, 2 * int(length), key)
        probabilities = self.probability(bag, drawn)
        halves = [(drawn[s], log_likelihood(probabilities[s])) for s in (slice(length), slice(length, None))]
        (one, first), (two, second) = halves if halves[0][1] > halves[1][1] else halves[::-1]
        return WordSets(one, two, (first, second))

    def draw(self, bag: Bag, n: int, key: SampleKey) -> Int[np.ndarray, "n"]:
        """`n` words of a document's model, frequent ones less often."""
        where = key.stream("words").fine_uniform(n)
        if self.settings.candidates is not None:
            words = self.candidates(bag, key)
            return words[pick(np.cumsum(self.probability(bag, words) * self.keep[words]), where)]
        # In proportion to keep * (tf + mu p(w|C)): the document's own part of that mass first, then the collection's.
        own, rest = np.cumsum(bag.counts * self.keep[bag.words]), self._kept_sums
        mass = float(own[-1]) if len(own) else 0.0
        at = where * (mass + self.mu * rest[-1])
        other = np.minimum(np.searchsorted(rest, (at - mass) / self.mu, side="right"), len(rest) - 1)
        if not mass:
            return other
        first = bag.words[np.minimum(np.searchsorted(own, at, side="right"), len(own) - 1)]
        return np.where(at < mass, first, other)

    def candidates(self, bag: Bag, key: SampleKey) -> Int[np.ndarray, "candidates"]:
        """The document's words and, to fill up, a sample of the collection's."""
        most, own = self.settings.candidates or 0, len(bag.words)
        more = most - own if most > own else own + 100
        drawn = pick(self._sums, key.stream("candidates").fine_uniform(more))
        return np.concatenate([bag.words, np.setdiff1d(drawn, bag.words)])

    def probability(self, bag: Bag, words: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
        """p(w|D) of words of the collection."""
        counts = np.zeros(len(words))
        if len(bag.words):
            at = np.minimum(np.searchsorted(bag.words, words), len(bag.words) - 1)
            counts = np.where(bag.words[at] == words, bag.counts[at], 0)
        return smoothed(counts, bag.length, self.mu, self.collection[words])

    def surfaces(self, words: Int[np.ndarray, "n"], key: SampleKey) -> Int[np.ndarray, "n"]:
        """A form of each word, as a number, with probability in proportion to log(count + 1)."""
        if self.model.surfaces is self.model.words or len(self.model.surfaces) == len(self.model.words):
            return words
        at = key.stream("forms").fine_uniform(len(words))
        spans = [self.model.surface_offsets[w : w + 2] for w in words.tolist()]
        weights = [np.cumsum(np.log1p(self.model.surface_counts[a:b])) for a, b in spans]
        picked = [a + pick(w, u[None])[0] for (a, _), w, u in zip(spans, weights, at, strict=True)]
        return np.array(picked, dtype=np.int64)


def positive_poisson(mean: float) -> Float[np.ndarray, "lengths"]:
    """Cumulated weights of 1, 2, ... under a Poisson distribution that is drawn again while it gives 0."""
    counts = range(1, math.ceil(mean + 12 * math.sqrt(mean)) + 32)  # the rest has a mass of less than 1e-20
    return np.cumsum([math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in counts])


def pick(cumulated: Float[np.ndarray, "items"], where: Float[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """The items whose share of the whole holds these points of [0, 1)."""
    return np.minimum(np.searchsorted(cumulated, where * cumulated[-1], side="right"), len(cumulated) - 1)
