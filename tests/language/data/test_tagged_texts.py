"""Word classes, how they reach tokens, how hard blocks are, and which of them a curriculum lets training draw."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from unmask.core.errors import UnmaskError
from unmask.core.training.pacing import Pacing
from unmask.language.data import tagged_texts
from unmask.language.data.difficulty import (
    GRAMMATICAL_FIRST,
    SPOKEN_FIRST,
    cut,
    easiest,
    source_scores,
    unigram_perplexities,
)
from unmask.language.data.documents import Document
from unmask.language.data.tagged_texts import Curriculum, Settings, TaggedTexts, open_split, resolve, token_tags
from unmask.language.data.vocabulary import open_tokenizer
from unmask.language.data.word_classes import CLASSES, NUMBER, SEPARATOR, UNKNOWN, aligned, by_rules, untagged

TAGGED = "the__<label>__DET dog__<label>__NOUN runs__<label>__VERB .__<label>__."


def classes(text: str) -> list[tuple[str, str]]:
    return [(text[a:b], CLASSES[number]) for a, b, number in by_rules(text)]


def test_rules() -> None:
    wanted = {
        "The": "DET", "quiet": "NOUN", "whale": "NOUN", "swam": "NOUN", "slowly": "ADV", "and": "CONJ", "we": "PRON",
        "watched": "VERB", "it": "PRON", "with": "ADP", "dangerous": "ADJ", "2": "NUM", "boats": "NOUN", ",": ".",
        "not": "PRT", "don't": "NOUN", "—": ".", "red": "NOUN", "bed": "NOUN",
    }  # fmt: skip
    assert classes(" ".join(wanted)) == list(wanted.items())
    assert classes("") == [] and classes(" \n ") == []


def test_tagged_words_are_read() -> None:
    text, spans = untagged(f"{TAGGED}\nhe__<label>__PRON dares__<label>__QQQ")
    assert text == "the dog runs .\nhe dares\n"
    assert [(text[a:b], CLASSES[n]) for a, b, n in spans] == [
        ("the", "DET"), ("dog", "NOUN"), ("runs", "VERB"), (".", "."), ("he", "PRON"), ("dares", "X"),
    ]  # fmt: skip
    for wrong in ("dog", f"dog{SEPARATOR}NOUN cat", f"{SEPARATOR}NOUN"):
        with pytest.raises(ValueError, match="has no tag"):
            untagged(wrong)


def test_tagged_words_are_looked_for_in_the_text() -> None:
    """A word that the text does not have is passed over, and the next ones are found all the same."""
    text = "The  dog (mine) runs."
    spans = aligned(text, "The__<label>__DET dog__<label>__NOUN cat__<label>__NOUN runs__<label>__VERB")
    assert [(text[a:b], CLASSES[n]) for a, b, n in spans] == [("The", "DET"), ("dog", "NOUN"), ("runs", "VERB")]
    assert aligned("a" + " " * 300 + "dog", "dog__<label>__NOUN") == [], "a like word far away is another"


@pytest.fixture(scope="module")
def corpus_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of easy lines and one of hard ones, as BabyLM has them."""
    folder = tmp_path_factory.mktemp("tagged")
    rng = np.random.default_rng(0)
    easy = "\n".join([TAGGED] * 600)
    hard = "\n".join(" ".join(f"w{i}__<label>__NOUN" for i in rng.integers(0, 400, 8)) for _ in range(400))
    for split in ("train", "dev"):
        (folder / f"aochildes.{split}").write_text(easy)
        (folder / f"gutenberg.{split}").write_text(hard)
    (folder / "aochildes.test").write_text(easy)
    return folder


def opened(folder: Path, **more: object) -> TaggedTexts:
    settings = resolve(Settings(str(folder), vocabulary_size=300, length=16, **more))  # type: ignore[arg-type]
    return open_split(settings, "train")


def test_every_token_has_the_class_of_its_word(corpus_of_two: Path) -> None:
    train = opened(corpus_of_two)
    settings = resolve(Settings(str(corpus_of_two), vocabulary_size=300, length=16))
    tokenizer = tagged_texts._tokenizer_of(settings)
    words = {"the": "DET", "dog": "NOUN", "runs": "VERB", ".": "."}
    wanted = {f"{space}{word}": NUMBER[tag] for word, tag in words.items() for space in ("", " ")}
    batch = tagged_texts.collate([train[i, 0] for i in range(len(train))])
    special = torch.isin(batch.tokens, torch.tensor(tokenizer.vocabulary.special))
    assert special.any() and (batch.tags[special] == UNKNOWN).all()
    seen = 0
    for token, tag in zip(batch.tokens.flatten().tolist(), batch.tags.flatten().tolist(), strict=True):
        piece = tokenizer.decode([token])
        if piece in wanted:
            assert tag == wanted[piece], piece
            seen += 1
        assert tag in (UNKNOWN, *map(NUMBER.__getitem__, words.values()))
    assert seen > 1000
    assert torch.equal(tagged_texts.collate([pickle.loads(pickle.dumps(train))[3, 0]]).tags, batch.tags[3:4])


def test_parts_of_a_word_have_its_class(corpus_of_two: Path) -> None:
    settings = resolve(Settings(str(corpus_of_two), vocabulary_size=300, length=16))
    tokenizer = tagged_texts._tokenizer_of(settings)
    text = "the éléphant—sang 🐘 ."
    document = Document("a:1", (text,), {"spans": [(0, 3, 5), (4, 12, 0), (13, 17, 1), (20, 21, 10)]})
    (tags,) = token_tags([document], tokenizer)
    ids = tokenizer.encode([text])[0]
    assert len(tags) == len(ids) > 12, "bytes of letters that the tokenizer never saw are tokens of their own"
    runs = [int(tags[0]), *(int(b) for a, b in zip(tags[:-1], tags[1:], strict=True) if a != b)]
    assert runs == [5, UNKNOWN, 0, UNKNOWN, 1, UNKNOWN, 10], "spaces and a dash that is not listed are of no word"


def test_records_and_plain_text(tmp_path: Path) -> None:
    rows = [
        {"text": "the dog runs.", "tagged_text": TAGGED},
        {"text": "no tags"},
        {"text": "a cat", "tagged_text": "a cat"},
        *({"text": "the dog runs.", "tagged_text": TAGGED} for _ in range(300)),
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train = opened(tmp_path)
    assert {p.name: p.reason.split(";")[0] for p in train.problems} == {
        "a.jsonl:2": "no tagged words in the field 'tagged_text' (there: text)",
        "a.jsonl:3": "'a' has no tag",
    }
    assert set(train[0, 0].tags.tolist()) == {NUMBER[n] for n in ("DET", "NOUN", "VERB", ".", "X")}
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "a.txt").write_text("the dog runs\n" * 2000)
    with pytest.raises(UnmaskError, match="'the' has no tag; expected word__<label>__TAG, or set data.tags=rules"):
        opened(plain)
    assert len(opened(plain, tags="rules"))


def test_texts_of_a_user_have_no_classes(corpus_of_two: Path) -> None:
    settings = resolve(Settings(str(corpus_of_two), vocabulary_size=300, length=16))
    folder = corpus_of_two.parent / "tokenizer"
    tagged_texts.keep(settings, corpus_of_two.parent)
    assert open_tokenizer(str(folder)).vocabulary == settings.vocabulary
    batch = tagged_texts.preprocess(["the dog", "the"], tagged_texts.kept(settings, corpus_of_two.parent))
    assert (batch.tags == UNKNOWN).all() and batch.valid is not None and not batch.valid[1].all()


# ---- difficulty ------------------------------------------------------------------------------------------------------


def test_unigram_perplexity_by_hand() -> None:
    blocks = [np.array([0, 0, 1, 2, 0]), np.array([0, 0, 0, 0, 0])]
    p = {0: 8 / 10, 1: 1 / 10, 2: 1 / 10}
    hand = [math.exp(-sum(math.log(p[int(t)]) for t in block) / 5) for block in blocks]
    assert unigram_perplexities(blocks, 3).tolist() == pytest.approx(hand)
    uniform = [np.arange(8)]
    assert unigram_perplexities(uniform, 8).tolist() == pytest.approx([8.0])


def test_levels_of_sources() -> None:
    assert SPOKEN_FIRST.keys() == GRAMMATICAL_FIRST.keys() and len(SPOKEN_FIRST) == 10
    sources, names = torch.tensor([0, 1, 1, 0]), ["aochildes", "gutenberg", "unused"]
    assert source_scores(sources, names, SPOKEN_FIRST).tolist() == [1, 6, 6, 1]
    assert source_scores(sources, names, GRAMMATICAL_FIRST).tolist() == [6, 3, 3, 6]
    with pytest.raises(UnmaskError, match="no level for gutenberg"):
        source_scores(sources, names, {"aochildes": 1})


def test_the_curriculum_of_a_split(corpus_of_two: Path) -> None:
    pacing = Pacing("linear", lowest=0.2)
    plain = opened(corpus_of_two)
    assert plain.admitted is None
    for scores in ("spoken_first", {"aochildes": 0.0, "gutenberg": 9.0}, "unigram"):
        train = opened(corpus_of_two, curriculum=Curriculum(scores, pacing))  # type: ignore[arg-type]
        pools = [train.admitted(step / 20) for step in range(21)]
        assert all((~a | b).all() for a, b in zip(pools[:-1], pools[1:], strict=True)), "the pool only grows"
        assert pools[-1].all() and len(train) == len(plain)
        easy = torch.tensor([train.classes[label] == "aochildes" for label in train.labels.tolist()])
        first = pools[0]
        if scores == "unigram":
            assert first.float().mean() == pytest.approx(0.2, abs=0.15) and easy[first].float().mean() > 0.9
            assert torch.equal(first, train.scores <= cut(train.scores, 0.2))  # type: ignore[operator, arg-type]
        else:
            assert torch.equal(first, easy), "ties are in: a source opens as a whole"
        some = train.view(torch.tensor([5, 2]))
        assert torch.equal(some.scores, train.scores[[5, 2]])  # type: ignore[index, arg-type]


def test_the_cut_is_a_quantile_with_ties() -> None:
    scores = torch.tensor([1.0, 2.0, 2.0, 4.0])
    assert cut(scores, 0.5) == 2.0 and cut(scores, 1.0) == 4.0 and cut(scores, 0.9) == pytest.approx(3.4)
    assert easiest(scores, 0.4).tolist() == [True, True, True, False]
