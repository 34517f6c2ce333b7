"""Documents as rows of word set and text: from files of several kinds, the same in every worker, kept with the run."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from collection_words import FACTS, GOLDEN, PIECES, records, word_piece

from unmask.core.errors import UnmaskError
from unmask.core.randomness import SampleKey
from unmask.language.data import document_pairs
from unmask.language.data.document_model import DocumentModel
from unmask.language.data.document_pairs import Settings, build_row, collate, open_split, resolve
from unmask.language.data.vocabulary import Vocabulary, begins_word, open_tokenizer
from unmask.language.data.word_sets import WordSettings

WORDS = WordSettings(least=2)
VOCABULARY = Vocabulary(len(PIECES), 4, 2, 3, 0, 1, (0, 1, 2, 3, 4), "golden")
BEGINS = np.array([not piece.startswith("##") for piece in PIECES])


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    tokenizer = word_piece(tmp_path / "tokenizer")
    source = str(records(tmp_path / "data"))
    return Settings(source, tokenizer, length=72, thin_short=False, words=WORDS, val_share=0.1)


def test_a_row_is_a_word_set_and_the_document(settings: Settings) -> None:
    settings = resolve(settings)
    pairs = open_split(settings, "all", seed=1)
    assert len(pairs) == len(FACTS["documents"])
    tokenizer, model = open_tokenizer(str(settings.tokenizer)), document_pairs.document_model(settings)
    for i, wanted in zip((0, 5), ("input/doc_token_ids/0", "input/doc_token_ids/5"), strict=True):
        sample = pairs[i, 0]
        for row, words in zip(sample.rows, (sample.sets.positive, sample.sets.negative), strict=True):
            (pieces,) = tokenizer.encode([" ".join(model.words[w] for w in words)])
            head = [2, *pieces, 3]
            room = 72 - len(head) - 1
            assert row.tokens.tolist() == [*head, *GOLDEN[wanted][:room].tolist(), 3]
            assert row.types.tolist() == [0] * len(head) + [1] * (room + 1)
            assert (row.groups >= 0).tolist() == [False] * len(head) + [True] * room + [False]


def test_the_authors_rows() -> None:
    """Ids, segments and documents of the recorded rows, where masks hide nothing."""
    for row in range(12):
        ids, segments = (GOLDEN[f"input/{name}"][row].astype(np.int64) for name in ("input_ids", "segment_ids"))
        labels, length = GOLDEN["input/mlm_labels"][row], int(GOLDEN["input/attention_mask"][row].sum())
        ids = np.where(labels >= 0, labels, ids)[:length]
        end = int(np.flatnonzero(ids == 3)[0])
        document = GOLDEN["input/doc_token_ids/0" if row < 6 else "input/doc_token_ids/5"].astype(np.int64)
        # The release cuts the list that all rows of a document share: later rows may be shorter than they could.
        ours = build_row(ids[1:end], document, length, VOCABULARY, BEGINS)
        assert ours.tokens.tolist() == ids.tolist()
        assert ours.types.tolist() == segments[:length].tolist()
        assert ours.groups.max() + 1 == BEGINS[ids[end + 1 : -1]].sum()


def test_word_sets_are_kept_whole_and_documents_cut() -> None:
    words, document = np.arange(5, 15), np.arange(20, 60)
    for length in (60, 32):
        row = build_row(words, document, length, VOCABULARY, BEGINS)
        assert row.tokens[1:11].tolist() == words.tolist()
        assert len(row.tokens) == min(length, 53)
    assert len(build_row(np.arange(5, 45), document, 32, VOCABULARY, BEGINS).tokens) == 32
    none = replace(VOCABULARY, bos=None)
    assert build_row(words, document, 60, none, BEGINS).tokens[0] == 5


def test_which_pieces_begin_a_word(tmp_path: Path, settings: Settings) -> None:
    assert begins_word(open_tokenizer(word_piece(tmp_path / "bert"))).tolist() == BEGINS.tolist()
    own = resolve(replace(settings, tokenizer=None, vocabulary_size=300))
    tokenizer = document_pairs.tokenizer_of(own)
    begins = begins_word(tokenizer)
    assert len(begins) == 300
    for i in range(5, 300):
        assert begins[i] == (tokenizer.decode([i])[:1] in (" ", "\n", "\t"))
    assert begins[:5].all()


def test_pairs_follow_from_seed_document_and_visit_alone(settings: Settings) -> None:
    settings = resolve(settings)
    pairs, other = open_split(settings, "train", seed=4), open_split(settings, "train", seed=4)
    last = len(pairs) - 1
    wanted = [other[i, 2].rows[0].tokens.tolist() for i in range(last, -1, -1)][::-1]
    assert [pairs[i, 2].rows[0].tokens.tolist() for i in range(last + 1)] == wanted
    assert pairs[0, 2].rows[0].tokens.tolist() != pairs[0, 3].rows[0].tokens.tolist()
    moved = open_split(settings, "train", seed=5)
    assert any(pairs[i, 0].rows[0].tokens.tolist() != moved[i, 0].rows[0].tokens.tolist() for i in range(last))
    copied = pickle.loads(pickle.dumps(pairs))  # as a worker that is spawned gets it
    assert copied[1, 2].rows[0].tokens.tolist() == wanted[1]
    chosen = pairs.view(torch.tensor([3, 1]), seed=4)
    assert chosen[1, 2].rows[0].tokens.tolist() == wanted[1]
    assert pairs.name_of(int(pairs.ids[0])).startswith("news.jsonl:")


def test_several_pairs_of_a_document(settings: Settings) -> None:
    one, three = (open_split(resolve(replace(settings, pairs=n)), "train") for n in (1, 3))
    assert len(three) == 3 * len(one) == len(set(three.ids.tolist()))
    assert three.ids[::3].tolist() == one.ids.tolist()
    names = [three.name_of(int(i)) for i in three.ids[:4]]
    assert names[0] == names[1] == names[2] != names[3]
    first = [three[i, 0].rows[0].tokens.tolist() for i in range(3)]
    assert first[0] != first[1] or first[1] != first[2]


def test_short_documents_are_thinned_alike_in_every_epoch(tmp_path: Path, settings: Settings) -> None:
    short = tmp_path / "short"
    short.mkdir()
    text = "fengruzin dortu tukafen katu mimi"
    (short / "notes.txt").write_text("\n".join(f"{text} {i}" for i in range(200)), encoding="utf-8")
    settings = resolve(replace(settings, source=str(short), unit="line", thin_short=True, length=32))
    pairs = open_split(settings, "train", seed=1)
    assert 0.1 < len(pairs) / pairs.documents < 0.3
    assert pairs.left_out == pairs.documents - len(pairs)
    assert any("under 100 tokens" in note for note in pairs.notes(4))
    expected = [i for i in pairs.ids.tolist() if SampleKey.of(1, i).stream("short documents").uniform(1)[0] < 0.2]
    assert expected == pairs.ids.tolist()
    assert len(open_split(replace(settings, thin_short=False), "train", seed=1)) == pairs.documents
    with pytest.raises(UnmaskError, match=r"no val documents.*data\.thin_short=false"):  # of a single one
        open_split(resolve(replace(settings, val_share=0.005, counted=None)), "val", seed=7)


def test_files_of_other_kinds(tmp_path: Path, settings: Settings) -> None:
    """BEIR's layout, parquet, other fields, plain text."""
    from pyarrow import Table, parquet

    wanted = open_split(resolve(settings), "all")[3, 0].rows[0].tokens[-20:].tolist()
    beir = records(tmp_path / "beir", "corpus.jsonl")
    (beir / "queries.jsonl").write_text('{"_id": "1", "text": "kamilo"}', encoding="utf-8")
    assert len(open_split(resolve(replace(settings, source=str(beir))), "all")) == len(FACTS["documents"])
    table = tmp_path / "table"
    table.mkdir()
    parquet.write_table(Table.from_pylist(FACTS["documents"]), table / "some.parquet")
    found = open_split(resolve(replace(settings, source=str(table))), "all")
    assert found[3, 0].rows[0].tokens[-5:].tolist() and len(found) == len(FACTS["documents"])
    headed = replace(settings, source=str(records(tmp_path / "headed", title="headline")), title_field="headline")
    assert open_split(resolve(headed), "all")[3, 0].rows[0].tokens[-20:].tolist() == wanted
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "book.txt").write_text("\n\n".join(d["text"] for d in FACTS["documents"]), encoding="utf-8")
    assert len(open_split(resolve(replace(settings, source=str(plain), piece=700)), "all")) > 10


def test_words_are_counted_on_the_training_split_and_kept_with_the_run(tmp_path: Path, settings: Settings) -> None:
    settings = resolve(settings)
    document_pairs.keep(settings, tmp_path / "run")
    model = DocumentModel.open(tmp_path / "run" / "document_model")
    assert model.digest == settings.counted
    assert model.documents == len(open_split(settings, "train")) < len(FACTS["documents"])
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").is_file()
    assert resolve(settings) == settings
    loaded = document_pairs.kept(settings, tmp_path / "run")
    assert loaded.tokenizer == str(tmp_path / "run" / "tokenizer")
    batch = document_pairs.preprocess(["kamilo dortu", "x"], loaded)
    assert batch.tokens.shape[:2] == (2, 2) and torch.equal(batch.tokens[:, 0], batch.tokens[:, 1])
    assert batch.tokens[1, 0, :3].tolist() == [2, PIECES.index("x"), 3] and batch.valid[1, 0].sum() == 3
    records(tmp_path / "data", "more.jsonl")
    with pytest.raises(UnmaskError, match="words of the training split are not those"):
        resolve(settings)


def test_a_text_without_words_is_an_error(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "numbers").mkdir()
    (tmp_path / "numbers" / "a.txt").write_text("1 2 3\n" * 40, encoding="utf-8")
    with pytest.raises(UnmaskError, match=r"no word occurs 2 times.*data\.words\.least"):
        resolve(replace(settings, source=str(tmp_path / "numbers"), unit="line"))


def test_batches_keep_pairs_together(settings: Settings) -> None:
    pairs = open_split(resolve(settings), "all")
    samples: list[Any] = [pairs[i, 0] for i in (4, 0, 2)]
    batch = collate(samples)
    width = batch.tokens.shape[2]
    assert width == max(len(row.tokens) for sample in samples for row in sample.rows)
    for i, sample in enumerate(samples):
        for j, row in enumerate(sample.rows):
            length = len(row.tokens)
            assert batch.tokens.flatten(0, 1)[2 * i + j, :length].tolist() == row.tokens.tolist()
            assert (batch.tokens[i, j, length:] == 0).all() and (batch.groups[i, j, length:] == -1).all()
            assert batch.valid[i, j].sum() == length
    assert batch.ids.tolist() == [pairs.ids[i] for i in (4, 0, 2)]
    assert pairs.lengths.tolist() == [min(72, n) for n in FACTS["document_bert_lengths"]]
