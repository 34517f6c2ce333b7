"""The words of a collection, counted: what the language model of a document is smoothed with.

A document is a bag of words; its language model is its own counts, smoothed towards the collection by a Dirichlet prior
(Zhai and Lafferty, SIGIR 2001)::

    p(w|D) = (tf(w, D) + mu p(w|C)) / (|D| + mu)

`fit` counts in one pass. Its memory is bounded, whatever the text: counts of more than a million different words are
written to sorted files, which are merged at the end.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int, Num
from safetensors.numpy import load_file, save_file

from unmask.core.errors import UnmaskError
from unmask.language.data.words import WordReader

Collection = Literal["tf", "df"]
_HELD = 1_000_000  # different words in memory


class DocumentModelError(UnmaskError):
    """A collection that no document model can be fitted to, or one that is not there."""


@dataclass(frozen=True)
class DocumentModel:
    """Counts of a collection's words (or stems).

    Args:
        words: those that are known, in alphabetical order.
        tf: how often each occurs.
        df: how many documents hold it.
        total_tf: occurrences of all words, unknown ones included.
        total_df: the sum of all words' document frequencies, unknown ones included.
        documents: how many were counted.
        surfaces: forms that words have in text, word by word; the words themselves where nothing is stemmed.
        surface_offsets: the first form of each word, and the end of the last.
        surface_counts: how often each form occurs.
    """

    words: list[str]
    tf: Int[np.ndarray, "words"]
    df: Int[np.ndarray, "words"]
    total_tf: int
    total_df: int
    documents: int
    surfaces: list[str]
    surface_offsets: Int[np.ndarray, "words_plus_1"]
    surface_counts: Int[np.ndarray, "surfaces"]

    @cached_property
    def index(self) -> dict[str, int]:
        """The number of each known word."""
        return {word: number for number, word in enumerate(self.words)}

    @property
    def mean_length(self) -> float:
        """Words of a document, on average."""
        return self.total_tf / self.documents

    def collection(self, kind: Collection) -> Float[np.ndarray, "words"]:
        """p(w|C): the share of each known word in all occurrences, or with "df" in all document frequencies.

        Unknown words have their share in the whole, so that the sum is slightly under 1.
        """
        return self.tf / self.total_tf if kind == "tf" else self.df / self.total_df

    def keep(self, threshold: float, least: int) -> Float[np.ndarray, "words"]:
        """The probability that a drawn word is kept: word2vec's sub-sampling of frequent words (arXiv 1310.4546).

        Args:
            threshold: t in min(1, sqrt(t / f) + t / f), where f is the word's share of all occurrences.
            least: words that occur less often are always kept.
        """
        ratio = threshold / (self.tf / self.total_tf)
        return np.where(self.tf < least, 1.0, np.minimum(1.0, np.sqrt(ratio) + ratio))

    def counts(self, units: Iterable[str]) -> tuple[Int[np.ndarray, "known"], Int[np.ndarray, "known"]]:
        """The known words among a document's, in order of their numbers, and how often each is there."""
        counted = Counter(number for unit in units if (number := self.index.get(unit)) is not None)
        numbers = np.array(sorted(counted), dtype=np.int64)
        return numbers, np.array([counted[n] for n in numbers.tolist()], dtype=np.int64)

    @property
    def digest(self) -> str:
        """Of everything it holds."""
        digest = hashlib.blake2b(json.dumps(self._plain()).encode(), digest_size=8)
        for _, array in sorted(self._arrays().items()):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write ``words.json`` and ``counts.safetensors``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "words.json").write_text(json.dumps(self._plain()), encoding="utf-8")
        save_file(self._arrays(), folder / "counts.safetensors")

    @classmethod
    def open(cls, folder: Path) -> DocumentModel:
        """Read what `save` wrote.

        Raises:
            DocumentModelError: it is not there, or damaged.
        """
        try:
            plain = json.loads((folder / "words.json").read_text(encoding="utf-8"))
            arrays: dict[str, Any] = load_file(folder / "counts.safetensors")
            return cls(**plain, **arrays)
        except Exception as error:  # safetensors and json raise a dozen kinds here; all mean "not readable"
            raise DocumentModelError(
                f"{folder}: holds no document model ({error}); delete it to fit it again"
            ) from None

    def _arrays(self) -> dict[str, np.ndarray]:
        names = ("tf", "df", "surface_offsets", "surface_counts")
        return {name: np.asarray(getattr(self, name), np.int64) for name in names}

    def _plain(self) -> dict[str, Any]:
        names = ("words", "total_tf", "total_df", "documents", "surfaces")
        return {name: getattr(self, name) for name in names}


def smoothed(
    counts: Num[np.ndarray, "*words"], length: int, mu: float, collection: Float[np.ndarray, "*words"]
) -> Float[np.ndarray, "*words"]:
    """p(w|D) of words with `counts` in a document of `length` words.

    Args:
        counts: tf(w, D); 0 of words that are not there.
        length: |D|, unknown words included.
        mu: the prior's weight, in words, over 0.
        collection: p(w|C).
    """
    return (counts + mu * collection) / (length + mu)


# ---- fitting -------------------------------------------------------------------------------------------------------


def fit(texts: Iterable[str], reader: WordReader, least: int, held: int = _HELD) -> DocumentModel:
    """Count the words of a collection.

    Args:
        texts: its documents.
        reader: text to words.
        least: words that occur less often are unknown.
        held: different words in memory.

    Raises:
        DocumentModelError: no word occurs often enough.
    """
    with TemporaryDirectory() as folder:
        units, forms = (SpilledCounts(Path(folder) / name, held) for name in ("units", "forms"))
        documents = 0
        for text in texts:
            words = reader.words(text)
            documents += 1
            counted = Counter(map(reader.unit, words))
            units.add({unit: (count, 1) for unit, count in counted.items()})
            if reader.stem is not None:
                forms.add({f"{reader.unit(w)} {w}": (n, 1) for w, n in Counter(words).items()})
        known, totals = _known(units, least)
        if not known:
            raise DocumentModelError(
                f"no word occurs {least} times in the {documents} documents for training; give more text, or a smaller "
                "data.words.least"
            )
        return _model(known, totals, documents, None if reader.stem is None else forms)


def _known(counts: SpilledCounts, least: int) -> tuple[list[tuple[str, int, int]], tuple[int, int]]:
    """Words that occur often enough, and the totals of all."""
    known, total_tf, total_df = [], 0, 0
    for word, tf, df in counts.merged():
        total_tf, total_df = total_tf + tf, total_df + df
        if tf >= least:
            known.append((word, tf, df))
    return known, (total_tf, total_df)


def _model(
    known: list[tuple[str, int, int]], totals: tuple[int, int], documents: int, forms: SpilledCounts | None
) -> DocumentModel:
    words = [word for word, _, _ in known]
    tf, df = (np.array([row[i] for row in known], np.int64) for i in (1, 2))
    if forms is None:
        return DocumentModel(words, tf, df, *totals, documents, words, np.arange(len(words) + 1), tf)
    index, surfaces, counts, of = set(words), [], [], Counter[str]()
    for name, count, _ in forms.merged():  # in the order of the stems: the space sorts before every letter
        unit, _, surface = name.partition(" ")
        if unit in index:
            surfaces.append(surface)
            counts.append(count)
            of[unit] += 1
    offsets = np.cumsum([0, *(of[word] for word in words)])
    return DocumentModel(words, tf, df, *totals, documents, surfaces, offsets, np.array(counts, np.int64))


class SpilledCounts:
    """Pairs of counts by name, sorted on disk where they are too many for memory.

    Args:
        folder: for the files.
        held: names in memory.
    """

    def __init__(self, folder: Path, held: int) -> None:
        self.folder, self.held, self.files = folder, held, 0
        self.counts: dict[str, tuple[int, int]] = {}
        folder.mkdir()

    def add(self, more: dict[str, tuple[int, int]]) -> None:
        """Add counts to those there are."""
        for name, (first, second) in more.items():
            one, two = self.counts.get(name, (0, 0))
            self.counts[name] = (one + first, two + second)
        if len(self.counts) > self.held:
            lines = "".join(f"{name}\t{one}\t{two}\n" for name, (one, two) in sorted(self.counts.items()))
            (self.folder / f"{self.files}.tsv").write_text(lines, encoding="utf-8")
            self.files += 1
            self.counts.clear()

    def merged(self) -> Iterator[tuple[str, int, int]]:
        """Every name once, in order, with its counts."""
        rest = [(name, *pair) for name, pair in sorted(self.counts.items())]
        every = heapq.merge(*(self._read(i) for i in range(self.files)), rest)
        for name, rows in itertools.groupby(every, key=lambda row: row[0]):
            pairs = list(rows)
            yield name, sum(row[1] for row in pairs), sum(row[2] for row in pairs)

    def _read(self, number: int) -> Iterator[tuple[str, int, int]]:
        with (self.folder / f"{number}.tsv").open(encoding="utf-8") as file:
            for line in file:
                name, one, two = line.rstrip("\n").split("\t")
                yield name, int(one), int(two)


def log_likelihood(probabilities: Float[np.ndarray, "words"]) -> float:
    """The logarithm of the probability of drawing these words, one after another: how representative the set is."""
    return math.fsum(np.log(probabilities))
