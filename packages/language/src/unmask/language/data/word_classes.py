"""Word classes (parts of speech) of the words in a text: given with the text, or told by simple rules for English.

The classes are the universal ones (Petrov, Das and McDonald, LREC 2012) in the order of CLIMB's release. The rules are
ours, and no tagger: closed classes from word lists, open ones from endings, nouns where nothing else is known. They
know no context (``run`` is always a noun), so they are for trying a method out, not for reporting results.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

CLASSES = ("NOUN", "VERB", "ADJ", "ADV", "PRON", "DET", "ADP", "NUM", "CONJ", "PRT", ".", "X")
UNKNOWN = len(CLASSES) - 1  # X: unknown words, special tokens, spaces
NUMBER = {name: number for number, name in enumerate(CLASSES)}
SEPARATOR = "__<label>__"  # of BabyLM-style lines: "the__<label>__DET dog__<label>__NOUN"

Span = tuple[int, int, int]  # first character, the one after the last, class

_WORD = re.compile(r"\d[\d.,]*|[^\W\d_]+(?:['’][^\W\d_]+)*|[^\w\s]|_")
_CLOSED = {
    "DET": "a an the this that these those each every some any no both all either neither another such",
    "PRON": "i you he she it we they me him her us them my your his its our their mine yours hers ours theirs myself "
    "yourself himself herself itself ourselves themselves who whom whose which what thou thee thy ye one someone "
    "something anyone anything everyone everything nobody nothing none",
    "ADP": "of in on at by for with from into upon over under through between against among about after before during "
    "without within along across behind beyond near toward towards than like till until since beneath above below off",
    "CONJ": "and or but nor yet so if because while though although whether as unless lest",
    "PRT": "to not up out n't",
    "ADV": "very now then here there when where why how never always often again still too almost only just soon ever "
    "even also perhaps quite rather once away down far well",
    "NUM": "two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty hundred thousand "
    "million first second third",
    "VERB": "is are was were be been being am do does did done has have had having will would shall should can could "
    "may might must say says said see saw seen go goes went gone come came make made take took know knew known think "
    "thought let seem get got give gave tell told stand stood",
}
_WORDS = {word: NUMBER[name] for name, words in _CLOSED.items() for word in words.split()}
_ENDINGS = (
    (("ly",), NUMBER["ADV"]),
    (("ing", "ed", "ize", "ise", "ify"), NUMBER["VERB"]),
    (("ous", "ful", "less", "able", "ible", "ive", "ish", "ic", "al"), NUMBER["ADJ"]),
)


def class_of(word: str) -> int:
    """The class of one word by the rules, as an index of `CLASSES`."""
    lowered = word.lower()
    if not word[0].isalnum():
        return NUMBER["."]
    if word[0].isdigit():
        return NUMBER["NUM"]
    if lowered in _WORDS:
        return _WORDS[lowered]
    long = len(word) > 4
    return next((number for endings, number in _ENDINGS if long and lowered.endswith(endings)), NUMBER["NOUN"])


def by_rules(text: str) -> Iterator[Span]:
    """Every word and punctuation mark of a text with its class by the rules."""
    for found in _WORD.finditer(text):
        yield found.start(), found.end(), class_of(found[0])


def untagged(tagged: str) -> tuple[str, list[Span]]:
    """Lines of ``word__<label>__TAG`` as the text they are of, words a space apart, and its spans.

    A tag that is none of `CLASSES` counts as X.

    Raises:
        ValueError: an item without a tag.
    """
    text, spans = "", []
    for line in tagged.splitlines():
        for item in line.split():
            word, mark, tag = item.rpartition(SEPARATOR)
            if not mark or not word:
                raise ValueError(f"{item[:40]!r} has no tag")
            text += "" if not text or text.endswith("\n") else " "
            spans.append((len(text), len(text) + len(word), NUMBER.get(tag, UNKNOWN)))
            text += word
        text += "\n"
    return text, spans


def aligned(text: str, tagged: str) -> list[Span]:
    """Spans of `text` from its tagged words: each is looked for after the one before; one that is not there has none.

    Raises:
        ValueError: an item without a tag.
    """
    at, spans = 0, []
    words, given = untagged(tagged)
    for start, end, number in given:
        found = text.find(words[start:end], at)
        if found >= 0 and found - at <= 200:  # a word that is missing here must not skip to a like one far away
            at = found + end - start
            spans.append((found, at, number))
    return spans
