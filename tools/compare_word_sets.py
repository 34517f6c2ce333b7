"""How many documents a second get their word sets (PROP): ours beside a straightforward loop, document by document.

The loop does what the released code does, step by step: it looks candidates up in a table of the collection's words,
keeps their scores in a dict, and draws every word of every set with ``numpy.random.choice`` until sub-sampling accepts
it. Ours draws in one go from the same candidates ("unmask, 500 candidates"), or from every known word ("unmask"). The
collection is made up: words by Zipf's law. Documents are bags already, for all of them. Every repetition times all
contenders once, in a new random order; the table shows medians.

    python tools/compare_word_sets.py [--documents 50] [--length 300] [--vocabulary 50000] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from machine import about, interleaved

from unmask.core.randomness import SampleKey
from unmask.language.data.document_model import DocumentModel
from unmask.language.data.word_sets import Bag, WordSetSampler, WordSettings

CANDIDATES, MEAN_LENGTH, CELLS = 500, 3, 1_000_000


def collection(documents: int, length: int, vocabulary: int) -> tuple[DocumentModel, list[Bag]]:
    """A collection of ten times the documents that are timed, and bags of those."""
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, vocabulary + 1)
    share /= share.sum()
    bags, df = [], np.zeros(vocabulary, np.int64)
    for _ in range(documents):
        found, counts = np.unique(rng.choice(vocabulary, length, p=share), return_counts=True)
        df[found] += 1
        bags.append(Bag(found, counts, length))
    tf = np.maximum(1, (share * documents * length * 10).astype(np.int64))
    words = [f"w{i}" for i in range(vocabulary)]
    df = np.maximum(df * 10, 1)
    total = int(tf.sum())
    return DocumentModel(
        words, tf, df, total, int(df.sum()), total // length, words, np.arange(vocabulary + 1), tf
    ), bags


class Loop:
    """The released code's form: dicts, a table of cells, one draw at a time."""

    def __init__(self, sampler: WordSetSampler) -> None:
        self.rng, self.mu = np.random.RandomState(0), sampler.mu
        self.share = dict(enumerate(sampler.collection.tolist()))
        self.keep = dict(enumerate(sampler.keep.tolist()))
        self.table = np.repeat(np.arange(len(self.share)), np.ceil(sampler.collection * CELLS).astype(np.int64))

    def document(self, bag: Bag, pairs: int) -> list[tuple[list[int], list[int], float, float]]:
        counts = Counter(dict(zip(bag.words.tolist(), bag.counts.tolist(), strict=True)))
        lengths = [self.length() for _ in range(pairs)]
        more = CANDIDATES - len(counts) if len(counts) < CANDIDATES else len(counts) + 100
        drawn = {int(self.table[self.rng.randint(len(self.table))]) for _ in range(more)}
        words = [*counts, *(word for word in drawn if word not in counts)]
        scores = {w: (counts[w] + self.mu * self.share[w]) / (bag.length + self.mu) for w in words}
        total = sum(scores.values())
        q = [scores[word] / total for word in words]
        return [self.pair(words, q, scores, length) for length in lengths]

    def length(self) -> int:
        while not (length := self.rng.poisson(MEAN_LENGTH)):
            pass
        return int(length)

    def pair(
        self, words: list[int], q: list[float], scores: dict[int, float], length: int
    ) -> tuple[list[int], list[int], float, float]:
        one, two = (self.draw(words, q, length) for _ in range(2))
        first, second = (sum(math.log(scores[word]) for word in drawn) for drawn in (one, two))
        return (one, two, first, second) if first > second else (two, one, second, first)

    def draw(self, words: list[int], q: list[float], length: int) -> list[int]:
        drawn: list[int] = []
        while len(drawn) < length:
            word = words[self.rng.choice(len(words), p=q)]
            if self.keep[word] >= self.rng.uniform():
                drawn.append(word)
        return drawn


def contenders(model: DocumentModel, bags: list[Bag], pairs: int) -> dict[str, Callable[[], object]]:
    """What is timed: `pairs` pairs of each document."""
    every = WordSetSampler(model, WordSettings())
    some = WordSetSampler(model, WordSettings(candidates=CANDIDATES))
    loop = Loop(every)

    def ours(sampler: WordSetSampler) -> object:
        return [sampler.pair(bag, SampleKey.of(0, i, n)) for i, bag in enumerate(bags) for n in range(pairs)]

    return {
        "unmask": lambda: ours(every),
        f"unmask, {CANDIDATES} candidates": lambda: ours(some),
        "loop": lambda: [loop.document(bag, pairs) for bag in bags],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=50)
    parser.add_argument("--length", type=int, default=300)
    parser.add_argument("--vocabulary", type=int, default=50_000)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, bags = collection(args.documents, args.length, args.vocabulary)
    times = interleaved(contenders(model, bags, args.pairs), args.repeats)
    rates = {name: 1000 * args.documents / ms for name, ms in times.items()}
    print(f"documents a second, {args.pairs} pairs each, {args.length} words, {args.vocabulary:,} known; one process")
    for name, rate in rates.items():
        print(f"  {name:26s} {rate:9.0f}  {rate / rates['loop']:7.1f} x the loop")
    if args.out:
        described = about(packages=("numpy",))
        settings = {name: getattr(args, name) for name in ("documents", "length", "vocabulary", "pairs", "repeats")}
        args.out.write_text(json.dumps({**described, **settings, "documents_per_second": rates}, indent=1) + "\n")


if __name__ == "__main__":
    main()
