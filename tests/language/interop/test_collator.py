"""MEAP's collators: draws and loss of the methods, whatever the batch size and workers, in transformers' trainer."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch.utils.data import DataLoader

from unmask.core.errors import UnmaskError
from unmask.core.method import Clock
from unmask.language.data import chats
from unmask.language.data.texts import TextBatch
from unmask.language.data.vocabulary import Vocabulary
from unmask.language.interop.collator import CountEpochs, MEAPCollator, MEAPFineTuningCollator, content_id
from unmask.language.methods import meap, meap_sft

VOCABULARY = Vocabulary(64, 60, 1, 2, 0, None, (0, 1, 2, 60), "test")
TOKENIZER = SimpleNamespace(mask_token_id=60, eos_token_id=2, all_special_ids=[0, 1, 2, 60])
LENGTH = 24


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def blocks(n: int = 6, length: int = LENGTH) -> list[dict[str, list[int]]]:
    rows = torch.randint(0, 60, (n, length + 1), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row.tolist()} for row in rows]


def answers() -> list[dict[str, list[int]]]:
    """One short answer, a long one, and a long one that was cut before its end."""
    random, rows = torch.Generator().manual_seed(2), []
    for prompt, answer, end in ((5, 20, [2]), (9, 60, [2]), (3, 70, [])):
        tokens = torch.randint(3, 60, (prompt + answer,), generator=random).tolist() + end
        rows.append({"input_ids": tokens, "labels": [-100] * prompt + tokens[prompt:]})
    return rows


@pytest.mark.parametrize(
    "settings", [meap.Settings(), meap.Settings(keep_special=True, ratio=0.5), meap.Settings(ratio=0.0)]
)
def test_the_loss_of_the_method(settings: meap.Settings) -> None:
    model, rows = llama(), blocks()
    collator = MEAPCollator(TOKENIZER, settings, seed=3)
    collator.epoch = 2
    tokens = torch.tensor([row["input_ids"] for row in rows])
    batch = TextBatch(tokens, torch.tensor([content_id(row) for row in tokens]), torch.zeros(len(rows)).long())
    method = meap.MEAP(model, VOCABULARY, settings, LENGTH)
    plan = method.draw(batch, Clock(0, 1), collator.key(batch.ids))
    given = collator(rows)
    assert torch.equal(given["input_ids"][:, :LENGTH], method.inputs(batch, plan))
    assert torch.equal(given["labels"][:, 1:], method.target(batch, plan))
    assert not (given["input_ids"][:, -2:] == 60).any()
    torch.testing.assert_close(model(**given).loss, method(batch, plan).loss, rtol=1e-6, atol=0)


def test_the_loss_of_fine_tuning() -> None:
    model, rows = llama(), answers()
    collator = MEAPFineTuningCollator(TOKENIZER, seed=3)
    samples = [
        chats.Sample(torch.tensor(row["input_ids"]).numpy(), prompt, answer, content_id(row["input_ids"]))
        for row, prompt, answer in zip(rows, (5, 9, 3), (20, 60, 70), strict=True)
    ]
    batch = chats.collate(samples)
    method = meap_sft.MEAPFineTuning(model, VOCABULARY, meap_sft.Settings())
    plan = method.draw(batch, Clock(0, 1), collator.key(batch.ids))
    given = collator(rows)
    assert len(given["labels"]) == 5  # the short answer has no second row
    assert given["labels"][3:].ne(-100).sum(1).tolist() == [6, 6]
    torch.testing.assert_close(model(**given).loss, method(batch, plan).loss, rtol=1e-6, atol=0)


def test_draws_follow_the_content() -> None:
    """Other batches, other workers: the same rows; another epoch or seed: others."""
    rows, collator = blocks(), MEAPCollator(TOKENIZER)
    whole = collator(rows)["input_ids"]
    for options in ({"batch_size": 1}, {"batch_size": 4, "num_workers": 2}):
        loader: Any = DataLoader(rows, collate_fn=collator, **options)  # type: ignore[arg-type]
        assert torch.equal(torch.cat([batch["input_ids"] for batch in loader]), whole)
    assert torch.equal(collator(rows[::-1])["input_ids"].flip(0), whole)
    assert not torch.equal(MEAPCollator(TOKENIZER, seed=1)(rows)["input_ids"], whole)


def test_workers_that_stay_see_the_epoch() -> None:
    rows, collator = blocks(), MEAPCollator(TOKENIZER)
    options: Any = {"batch_size": 3, "num_workers": 1, "persistent_workers": True}
    loader: Any = DataLoader(rows, collate_fn=collator, **options)  # type: ignore[arg-type]
    seen = []
    for epoch in (0, 1, 0):
        collator.epoch = epoch
        seen.append(torch.cat([batch["input_ids"] for batch in loader]))
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed")
@pytest.mark.filterwarnings("default")  # other people's
@pytest.mark.parametrize("form", ["blocks", "answers"])
def test_the_trainer(form: str, tmp_path: Path) -> None:
    """Two epochs of two steps; each has its own draws."""
    rows = blocks(4) if form == "blocks" else answers() + answers()[:1]
    collator: Any = (MEAPCollator if form == "blocks" else MEAPFineTuningCollator)(TOKENIZER)
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, num_train_epochs=2, report_to=[], use_cpu=True,
        save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    epochs: list[int] = []

    def watched(features: Any) -> dict[str, torch.Tensor]:
        epochs.append(collator.epoch)
        return collator(features)

    model = llama()
    before = model.lm_head.weight.detach().clone()
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows, data_collator=watched, callbacks=[CountEpochs(collator)]
    )
    trainer.train()
    assert epochs == [0, 0, 1, 1] and trainer.state.global_step == 4
    assert trainer.state.log_history[0]["loss"] == pytest.approx(4.2, abs=0.3)
    assert not torch.equal(before, model.lm_head.weight.cpu())


def test_what_is_refused() -> None:
    with pytest.raises(UnmaskError, match="it has no mask token"):
        MEAPCollator(SimpleNamespace(mask_token_id=None))
    with pytest.raises(UnmaskError, match=r"1.0 is not in \[0, 1\)"):
        MEAPFineTuningCollator(TOKENIZER, meap_sft.Settings(ratio=1.0))
    with pytest.raises(UnmaskError, match="share_positions"):
        MEAPCollator(TOKENIZER, meap.Settings(share_positions=True))
    collator = MEAPCollator(TOKENIZER)
    with pytest.raises(UnmaskError, match=r"blocks of \[9, 25\] tokens"):
        collator(blocks(1) + blocks(1, 8))
    with pytest.raises(UnmaskError, match="no padding"):
        collator([blocks(1)[0] | {"attention_mask": [1] * 24 + [0]}])
    with pytest.raises(UnmaskError, match="expected -100 for every token of a prompt"):
        MEAPFineTuningCollator(TOKENIZER)([{"input_ids": [1, 2, 3], "labels": [-100, 2, -100]}])
