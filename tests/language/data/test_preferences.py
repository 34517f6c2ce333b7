"""Pairs of responses: what is read, what is refused and named, and how long they are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from unmask.core.errors import UnmaskError
from unmask.language.data.pairs import made_pairs
from unmask.language.data.preferences import Preferences, Settings, collate, keep, open_split, resolve, tokenizer_of

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))


def pair(i: int = 0, **changes: Any) -> dict[str, Any]:
    words = f"number {i} of many"
    return {"prompt": f"Say {words}:", "chosen": f" {words}, gladly", "rejected": f" no {words}"} | changes


def write(folder: Path, rows: list[Any], name: str = "pairs.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def settings(source: Path, **changes: Any) -> Settings:
    return resolve(Settings(str(source), vocabulary_size=300, **{"length": 96, "prompt_length": 48, **changes}))


def pairs_of(rows: list[Any], tmp_path: Path, split: Any = "all", **changes: Any) -> tuple[Preferences, Settings]:
    made = settings(write(tmp_path / "data", rows), **changes)
    return open_split(made, split), made


def read(pairs: Preferences, made: Settings, index: int) -> list[str]:
    sample, tokenizer = pairs[index, 0], tokenizer_of(made)
    return [tokenizer.decode(ids) for ids in (sample.prompt, sample.chosen, sample.rejected)]


def test_texts(tmp_path: Path) -> None:
    pairs, made = pairs_of([pair(i) for i in range(8)], tmp_path)
    assert len(pairs) == 8 and not pairs.problems and not pairs.notes(4)
    wanted = ["[BOS]Say number 3 of many:", " number 3 of many, gladly[EOS]", " no number 3 of many[EOS]"]
    assert read(pairs, made, 3) == wanted
    assert pairs.name_of(int(pairs.ids[3])) == "pairs.jsonl:4"
    assert [int(pairs.ids[i]) for i in (5, 2)] == pairs.view([5, 2]).ids.tolist()
    assert pairs.lengths[3] == len(pairs[3, 0].prompt) + max(len(pairs[3, 0].chosen), len(pairs[3, 0].rejected))


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "data").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist([pair(i) for i in range(4)]), tmp_path / "data" / "p.parquet")
    made = settings(tmp_path / "data")
    assert read(open_split(made, "all"), made, 0)[0] == "[BOS]Say number 0 of many:"


def test_a_batch(tmp_path: Path) -> None:
    """Responses are what follows the prompt, padding what follows them."""
    pairs, _ = pairs_of([pair(0, rejected=" n"), pair(1), pair(2, prompt="P")], tmp_path)
    samples = [pairs[i, 0] for i in range(3)]
    batch = collate(samples)
    assert batch.tokens.shape == (3, 2, int(batch.lengths.max())) and batch.ids.tolist() == pairs.ids.tolist()
    for i, sample in enumerate(samples):
        for side, response in enumerate((sample.chosen, sample.rejected)):
            assert batch.tokens[i, side][batch.response[i, side]].tolist() == response.tolist()
            assert batch.tokens[i, side, : batch.prompts[i]].tolist() == sample.prompt.tolist()
            assert not batch.tokens[i, side, batch.lengths[i, side] :].any()


def test_long_pairs_are_cut_and_counted(tmp_path: Path) -> None:
    """Prompts from the left, but for the token that begins a text; the whole from the right."""
    long = "".join(f" {i}" for i in range(60))
    pairs, made = pairs_of(
        [pair(0, prompt=long + " end"), pair(1, chosen=long), pair(2)], tmp_path, length=40, prompt_length=12
    )
    whole = open_split(replace(made, length=400, prompt_length=300), "all")
    first, full = pairs[0, 0], whole[0, 0]
    assert len(first.prompt) == 12 and first.prompt[0] == full.prompt[0]
    assert first.prompt[1:].tolist() == full.prompt[-11:].tolist()
    cut = pairs[1, 0]
    assert len(cut.prompt) + len(cut.chosen) == 40
    assert cut.chosen.tolist() == whole[1, 0].chosen[: len(cut.chosen)].tolist()
    assert pairs.lengths.max() == 40
    assert pairs.notes(2)[0].startswith("1 of 3 prompts lose their beginning at data.prompt_length=12")
    assert "responses lose their end at data.length=40" in pairs.notes(2)[1]
    with pytest.raises(ValueError, match="48 leaves no room for a response in data.length=48"):
        Settings(length=48, prompt_length=48)


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    good = [pair(i) for i in range(3)]
    bad = [
        {"prompt": "x", "chosen": "y"}, pair(chosen=" "), pair(prompt=""), pair(rejected=None), pair(chosen=["a"]),
        pair(chosen=" same", rejected=" same"), "{not json", [1, 2],
    ]  # fmt: skip
    pairs, _ = pairs_of([*good, *bad], tmp_path)
    assert len(pairs) == 3
    reasons = {problem.name.rpartition(":")[2]: problem.reason for problem in pairs.problems}
    wanted = {
        "4": "no rejected; fields there: prompt, chosen", "5": "chosen is empty", "6": "prompt is empty",
        "7": "rejected is null; expected text", "8": "chosen is a list; expected text", "9": "are the same",
        "10": "not JSON", "11": "expected a JSON object",
    }  # fmt: skip
    assert len(reasons) == len(wanted)
    for number, reason in wanted.items():
        assert reason in reasons[number], number


def test_responses_that_are_the_same_where_they_are_seen(tmp_path: Path) -> None:
    long = "".join(f" {i}" for i in range(60))
    rows = [pair(0), pair(1), pair(2, chosen=long + " yes", rejected=long + " no")]
    pairs, made = pairs_of(rows, tmp_path)
    assert len(pairs) == 2 and "as far as data.length shows them" in pairs.problems[0].reason
    assert pairs.problems[0].name == "pairs.jsonl:3"
    assert len(open_split(replace(made, length=600), "all")) == 3


def test_pairs_of_one_prompt_stay_in_one_split(tmp_path: Path) -> None:
    rows = [pair(i // 4, chosen=f" answer {i}") for i in range(80)]
    made = settings(write(tmp_path / "data", rows), val_share=0.2)
    prompts = [{tuple(s[i, 0].prompt) for i in range(len(s))} for s in (open_split(made, n) for n in ("train", "val"))]
    assert len(prompts[1]) == 4 and not prompts[0] & prompts[1]


def test_given_splits(tmp_path: Path) -> None:
    write(tmp_path / "data", [pair(i) for i in range(5)], "train.jsonl")
    made = settings(write(tmp_path / "data", [pair(i) for i in range(7, 9)], "val.jsonl"))
    assert len(open_split(made, "val")) == 2


def test_nothing_to_use(tmp_path: Path) -> None:
    with pytest.raises(UnmaskError, match="nothing in its 1 files can be used: pairs.jsonl:1: no prompt and no chosen"):
        pairs_of([{"text": "x"}], tmp_path)
    with pytest.raises(UnmaskError, match="has no val pairs among its 1"):
        pairs_of([pair()], tmp_path, "val")


# ---- conversations -------------------------------------------------------------------------------------------------


def says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def conversation(i: int = 0, **changes: Any) -> dict[str, Any]:
    prompt = [says("system", "Be kind."), says("user", f"Number {i}?")]
    responses = {"chosen": [says("assistant", f"It is {i}.")], "rejected": [says("assistant", "No.")]}
    return {"prompt": prompt, **responses, **changes}


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One that was trained, with the marks of a chat template as special tokens."""
    from transformers import AutoTokenizer

    from unmask.language.data.vocabulary import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["Number 1? It is 2. No. Be kind."], 280, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_conversations(tmp_path: Path, chat_tokenizer: str) -> None:
    """Through the chat template, whose marks are special tokens; nothing is added around them."""
    pairs, made = pairs_of([conversation(i) for i in range(4)], tmp_path, tokenizer=chat_tokenizer)
    prompt, chosen, rejected = read(pairs, made, 2)
    wanted = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nNumber 2?<|im_end|>\n<|im_start|>assistant\n"
    assert (prompt, chosen, rejected) == (wanted, "It is 2.<|im_end|>\n", "No.<|im_end|>\n")
    marks = tokenizer_of(made).fast.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    tokens = torch.from_numpy(pairs[2, 0].prompt)
    assert [(tokens == mark).sum().item() for mark in marks] == [3, 2]
    assert tokenizer_of(made).encode(["<|im_end|>"])[0] != [marks[1]]  # in a text it is text
    keep(made, tmp_path)
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file()


def test_conversations_that_are_wrong(tmp_path: Path, chat_tokenizer: str) -> None:
    rows = [
        conversation(), conversation(prompt=[{"content": "x"}]), conversation(chosen=[says("assistant", " ")]),
        conversation(rejected=[says("assistant", "<|im_end|>")]), pair(), conversation(chosen=[]),
        conversation(chosen=[says("assistant", "No.")]),
    ]  # fmt: skip
    pairs, _ = pairs_of(rows, tmp_path, tokenizer=chat_tokenizer)
    assert len(pairs) == 1
    for problem, wanted in zip(
        pairs.problems,
        ["role and content", "a message is empty", "'<|im_end|>', which would be read as a special token",
         "prompt is text; expected a list of messages", "chosen is empty", "are the same"],
        strict=True,
    ):  # fmt: skip
        assert wanted in problem.reason


def test_conversations_without_a_template(tmp_path: Path) -> None:
    with pytest.raises(UnmaskError, match="the tokenizer has no chat template to write them as text"):
        pairs_of([conversation()], tmp_path)


# ---- synthetic pairs -----------------------------------------------------------------------------------------------


def test_synthetic_pairs() -> None:
    """The rejected response has the chosen one's words in another order, the same every time."""
    words = [f"w{i}" for i in range(70)]
    made = list(made_pairs(" ".join(words), "x"))
    assert made == list(made_pairs(" ".join(words), "x")) and len(made) == 2
    for number, (prompt, chosen, rejected) in enumerate(made):
        assert (prompt + chosen).split() == words[number * 32 : number * 32 + 32]
        assert sorted(rejected.split()) == sorted(chosen.split()) and rejected != chosen


def test_the_embedded_text() -> None:
    made = resolve(Settings(vocabulary_size=300, length=96, prompt_length=48))
    pairs = open_split(made, "val")
    assert len(pairs) > 50
    assert any("synthetic" in note for note in pairs.notes(4))
