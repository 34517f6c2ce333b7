"""Words as retrieval counts them: runs of letters in lower case, without stop words, whole or as stems."""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from unmask.core.errors import UnmaskError
from unmask.language.data.stop_words import STOP_WORDS

_WORD = re.compile(r"[a-zA-Z]+")
Stem = Callable[[str], str]


@dataclass(frozen=True)
class WordReader:
    """Text to words.

    Stop words are dropped before stemming.

    Args:
        stop: words that are never counted, in lower case.
        stem: the stem of a word; None where words stay whole.
    """

    stop: frozenset[str]
    stem: Stem | None = None

    def words(self, text: str) -> list[str]:
        """The words of a text as it has them, in lower case and in order."""
        return [word for word in _WORD.findall(text.lower()) if word not in self.stop]

    def unit(self, word: str) -> str:
        """What a word is counted as: its stem, or itself."""
        return word if self.stem is None else self.stem(word)

    @property
    def digest(self) -> str:
        """Of all that decides which words a text has."""
        said = repr([_WORD.pattern, sorted(self.stop), self.stem is not None])
        return hashlib.blake2b(said.encode(), digest_size=8).hexdigest()


def word_reader(stop_words: str | None = None, stem: bool = False) -> WordReader:
    """Open the stop list and the stemmer.

    Args:
        stop_words: a text file with a word a line; None takes our own list of English ones.
        stem: count Porter stems (Porter, Program 1980) instead of words.

    Raises:
        UnmaskError: no such file, or no library that stems.
    """
    stop = STOP_WORDS if stop_words is None else _read(Path(stop_words))
    return WordReader(stop, _porter() if stem else None)


def _read(path: Path) -> frozenset[str]:
    try:
        return frozenset(path.expanduser().read_text(encoding="utf-8").lower().split())
    except (OSError, UnicodeDecodeError) as error:
        raise UnmaskError(
            f"data.words.stop_words: {path} cannot be read ({error}); give a text file with a word a line, or null for "
            "the English list that comes along"
        ) from None


def _porter() -> Stem:
    try:
        library = importlib.import_module("snowballstemmer")
    except ImportError:
        raise UnmaskError(
            "data.words.stem: stems need the library snowballstemmer: pip install snowballstemmer, or set it to false"
        ) from None
    return lru_cache(maxsize=1 << 18)(library.stemmer("porter").stemWord)
