"""Text as blocks of tokens: what is read and left out, splits, packing, tokenizers, and what a loaded run does."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from unmask.core.data.kinds import SourceError
from unmask.core.errors import UnmaskError
from unmask.language.data import chats, texts
from unmask.language.data.documents import Document, read_documents
from unmask.language.data.texts import Settings
from unmask.language.data.vocabulary import TokenizerError, open_tokenizer, train_tokenizer

SMALL = {"vocabulary_size": 300, "length": 16, "val_share": 0.2}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(20):
        text = " ".join(f"word{(i * j) % 31} is number {j}." for j in range(40))
        (folder / f"{i:02d}.txt").write_text(text, encoding="utf-8")
    return folder


def opened(folder: Path, split: str = "train", **changes: object) -> texts.Texts:
    settings = texts.resolve(Settings(source=str(folder), **{**SMALL, **changes}))  # type: ignore[arg-type]
    return texts.open_split(settings, split)  # type: ignore[arg-type]


def test_blocks_are_the_documents_one_after_another(corpus: Path) -> None:
    settings = texts.resolve(Settings(source=str(corpus), **SMALL))  # type: ignore[arg-type]
    assert settings.vocabulary is not None and settings.vocabulary.size <= 300
    every, tokenizer = texts.open_split(settings, "all"), texts.tokenizer_of(settings)
    stream: list[int] = []
    for path in sorted(corpus.iterdir()):
        stream += [settings.vocabulary.bos or 0, *tokenizer.encode([path.read_text()])[0], settings.vocabulary.eos]
    blocks = np.stack([every[i, 0].tokens for i in range(len(every))])
    assert blocks.shape == (len(stream) // 17, 17) and blocks.flatten().tolist() == stream[: blocks.size]
    assert len(set(every.ids.tolist())) == len(every)
    assert every.name_of(int(every.ids[0])) == "00.txt:1@0"
    assert (
        tokenizer.decode(blocks[0, 1:6].tolist())
        == corpus.joinpath("00.txt").read_text()[: len(tokenizer.decode(blocks[0, 1:6].tolist()))]
    )


def test_splits_are_by_document_and_disjoint(corpus: Path) -> None:
    parts = {split: opened(corpus, split) for split in ("train", "val", "test")}
    documents = {name: set(part._documents.tolist()) for name, part in parts.items()}
    assert [len(d) for d in documents.values()] == [12, 4, 4]
    assert not documents["train"] & documents["val"] and not documents["test"] & (documents["train"] | documents["val"])


def test_a_view_and_a_pickled_split_give_the_same_blocks(corpus: Path) -> None:
    split = opened(corpus)
    view, copied = split.view(torch.tensor([3, 5])), pickle.loads(pickle.dumps(split))
    assert np.array_equal(view[1, 0].tokens, split[5, 0].tokens) and view.ids.tolist() == split.ids[[3, 5]].tolist()
    assert np.array_equal(copied[7, 2].tokens, split[7, 0].tokens)


def test_what_cannot_be_used_is_counted_and_named(corpus: Path) -> None:
    (corpus / "empty.txt").write_bytes(b"")
    (corpus / "blank.txt").write_text(" \n ")
    (corpus / "latin.txt").write_bytes("caf\xe9 au lait".encode("latin-1"))
    (corpus / "picture.png").write_bytes(b"x")
    lines = [
        json.dumps({"text": "fine " * 30}),
        "{broken",
        json.dumps([1]),
        json.dumps({"body": "x"}),
        json.dumps({"text": ""}),
    ]
    (corpus / "rows.jsonl").write_text("\n".join(lines))
    (corpus / "bad.parquet").write_bytes(b"not parquet")
    parquet.write_table(pa.table({"text": ["good " * 20, None]}), corpus / "good.parquet")
    split = opened(corpus)
    reasons = {problem.name: problem.reason for problem in split.problems}
    assert set(reasons) == {
        "empty.txt", "blank.txt:1", "latin.txt", "rows.jsonl:2", "rows.jsonl:3", "rows.jsonl:4", "rows.jsonl:5",
        "bad.parquet", "good.parquet:2",
    }  # fmt: skip
    assert "iconv" in reasons["latin.txt"] and "fields there: body" in reasons["rows.jsonl:4"]
    assert any("1 .png" in note for note in split.notes(4))


def test_a_long_file_is_cut_at_blank_lines(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {i}. " + "words " * 30 for i in range(40)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    found = [d for d in read_documents(tmp_path / "book.txt", "book.txt", piece=1000) if isinstance(d, Document)]
    assert len(found) > 5 and "".join(d.parts[0] for d in found) == (tmp_path / "book.txt").read_text()
    assert all(d.parts[0].startswith("Paragraph") for d in found)
    lines = [d for d in read_documents(tmp_path / "book.txt", "book.txt", unit="line") if isinstance(d, Document)]
    assert [d.parts[0] for d in lines] == paragraphs


def test_babylm_suffixes_are_splits(tmp_path: Path) -> None:
    for suffix in ("train", "dev", "test"):
        (tmp_path / f"aochildes.{suffix}").write_text(f"{suffix} words here. " * 200)
    parts = {split: opened(tmp_path, split) for split in ("train", "val", "test")}
    assert all(part.classes == ["aochildes"] * 3 for part in parts.values())
    assert {split: part.name_of(int(part.ids[0])).split(":")[0] for split, part in parts.items()} == {
        "train": "aochildes.train", "val": "aochildes.dev", "test": "aochildes.test",
    }  # fmt: skip


@pytest.mark.parametrize(
    "prepare, message",
    [
        (lambda folder: None, "no texts in"),
        (lambda folder: (folder / "a.txt").write_bytes(b""), "none of its files can be used: a.txt: empty file"),
        (lambda folder: (folder / "a.jsonl").write_text('{"body": "x"}'), "Set data.text_field"),
        (lambda folder: (folder / "a.txt").write_text("short"), "fill no block of 17 tokens.*a smaller data.length$"),
    ],
)
def test_nothing_to_train_on_says_why(tmp_path: Path, prepare: object, message: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    prepare(folder)  # type: ignore[operator]
    with pytest.raises(SourceError, match=message):
        opened(folder)


def test_the_remedy_for_another_field_works(tmp_path: Path) -> None:
    rows = [json.dumps({"body": f"row {i} " * 30}) for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    assert len(opened(tmp_path, text_field="body")) > 0


def test_special_tokens_in_a_text_stay_text(tmp_path: Path) -> None:
    train_tokenizer(["some words [MASK] and more words"] * 10, 280, tmp_path / "tokenizer")
    tokenizer = open_tokenizer(str(tmp_path / "tokenizer"))
    ids = tokenizer.encode(["words [MASK] [EOS]"])[0]
    assert not set(ids) & set(tokenizer.vocabulary.special) and tokenizer.decode(ids) == "words [MASK] [EOS]"


def test_a_tokenizer_without_a_mask_token_gets_an_id_more(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path)
    found = open_tokenizer(str(tmp_path))
    assert (found.vocabulary.size, found.vocabulary.mask, found.vocabulary.special) == (5, 4, (0, 4))
    assert found.decode([1, 4, 2]).count("[MASK]") == 1


def test_tokenizers_that_cannot_be_used(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(UnmaskError, match="no such directory"):
        opened(corpus, tokenizer=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(TokenizerError, match="save_pretrained"):
        opened(corpus, tokenizer=str(tmp_path / "empty"))
    settings = texts.resolve(Settings(source=str(corpus), **SMALL))  # type: ignore[arg-type]
    train_tokenizer(["other words"] * 10, 270, tmp_path / "other")
    with pytest.raises(TokenizerError, match="not the one that the run was started with"):
        texts.resolve(replace(settings, tokenizer=str(tmp_path / "other")))


def test_a_network_brings_its_tokenizer_unless_another_is_named() -> None:
    assert texts.for_networks(Settings(), {"model": "dir"}).tokenizer == "dir"
    assert texts.for_networks(Settings(tokenizer="mine"), {"model": "dir"}).tokenizer == "mine"
    assert texts.for_networks(Settings(), {}).tokenizer is None


def test_a_loaded_run_uses_its_own_tokenizer(corpus: Path, tmp_path: Path) -> None:
    settings = texts.resolve(Settings(source=str(corpus), **SMALL))  # type: ignore[arg-type]
    run = tmp_path / "run"
    run.mkdir()
    texts.keep(settings, run)
    kept = texts.kept(settings, run)
    assert kept.tokenizer == str(run / "tokenizer") and texts.resolve(kept).vocabulary == settings.vocabulary
    batch = texts.preprocess(["word1 is", "word2 is number 3."], kept)
    assert batch.valid is not None and batch.valid.sum(1).tolist() == [len(r[r != 0]) for r in batch.tokens]
    with pytest.raises(UnmaskError, match="this run's model takes 16"):
        texts.preprocess("word " * 100, kept)
    with pytest.raises(UnmaskError, match="expected texts"):
        texts.preprocess(["fine", " "], kept)


# ---- chats -----------------------------------------------------------------------------------------------------------


def chat_rows(folder: Path, rows: list[object], **changes: object) -> chats.Chats:
    folder.mkdir(exist_ok=True)
    (folder / "chats.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    sizes = {"vocabulary_size": 300, "length": 64, "val_share": 0.1}
    settings = chats.resolve(chats.Settings(source=str(folder), **{**sizes, **changes}))  # type: ignore[arg-type]
    return chats.open_split(settings, "all")


def test_prompts_and_answers(tmp_path: Path) -> None:
    rows: list[object] = [{"prompt": f"Question {i}?", "answer": f" Answer {i}."} for i in range(10)]
    rows += [{"prompt": "x"}, {"prompt": "long " * 80, "answer": "y"}, {"prompt": "q", "answer": "z " * 100}]
    found = chat_rows(tmp_path / "data", rows)
    assert len(found) == 11 and any("1 of 11 answers are cut" in note for note in found.notes(4))
    reasons = {p.name: p.reason for p in found.problems}
    assert "set data.prompt_field and data.answer_field" in reasons["chats.jsonl:11"]
    assert "the prompt fills data.length=64" in reasons["chats.jsonl:12"]
    batch = chats.collate([found[i, 0] for i in range(len(found))])
    eos = found._vocabulary.eos
    last = batch.tokens.gather(1, batch.lengths[:, None] - 1)[:, 0]
    assert (last[:10] == eos).all() and last[10] != eos, "an answer that is cut does not end"
    assert (batch.tokens[:, 0] == found._vocabulary.bos).all() and (batch.prompts < batch.lengths).all()


def test_every_turn_of_the_assistant_is_a_sample(tmp_path: Path) -> None:
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "See you")]
    rows: list[object] = [{"messages": [{"role": r, "content": c} for r, c in turns]}, {"messages": "no"}]
    found = chat_rows(tmp_path / "data", rows, length=200)
    decode = open_tokenizer(str(next((tmp_path / "cache" / "tokenizers").iterdir()))).decode
    prompts = [decode(found[i, 0].tokens[1 : found[i, 0].prompt].tolist()) for i in range(2)]
    assert found.name_of(int(found.ids[1])) == "chats.jsonl:1, turn 2"
    assert prompts == ["User: Hi\nAssistant: ", "User: Hi\nAssistant: Hello\nUser: Bye\nAssistant: "]
    alone = chat_rows(tmp_path / "data", rows, length=200, history=False)
    assert len(alone) == 2 and alone[1, 0].prompt < found[1, 0].prompt
    assert any("expected a list of role" in problem.reason for problem in found.problems)
