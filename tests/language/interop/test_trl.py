"""TRL: its direct preference optimisation is ours, and its trainer takes our loss."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'unmask-language[trl]'")
datasets = pytest.importorskip("datasets")

from unmask.core.errors import UnmaskError  # noqa: E402
from unmask.language.data.vocabulary import train_tokenizer  # noqa: E402
from unmask.language.encoders.token_masks import MaskSettings  # noqa: E402
from unmask.language.interop.trl import SparsePOTrainer, batch_of  # noqa: E402
from unmask.language.methods.sparsepo import Settings, SparsePO  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # other people's
ROWS = [
    {"prompt": f"Say {i}:", "chosen": f" {i}, gladly" + " and more" * (i % 3), "rejected": " no" * (i + 1)}
    for i in range(6)
]


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    train_tokenizer([" ".join(row.values()) for row in ROWS], 280, tmp_path / "tokenizer")
    args = trl.DPOConfig(
        str(tmp_path / "out"), beta=0.3, per_device_train_batch_size=3, max_steps=2, report_to=[], use_cpu=True,
        save_strategy="no", logging_steps=1, learning_rate=1e-2, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    return {"args": args, "train_dataset": datasets.Dataset.from_list(ROWS), "processing_class": tokenizer}


def model_of(**changes: Any) -> Any:
    sizes = {"vocab_size": 280, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **changes)).eval()


def first_batch(trainer: Any) -> dict[str, torch.Tensor]:
    return dict(next(iter(trainer.get_train_dataloader())))


def test_dpo_as_trl_computes_it(given: dict[str, Any]) -> None:
    """Same models and batch: the loss and every gradient."""
    model, reference = model_of(), model_of()
    ours = SparsePO(copy.deepcopy(model), copy.deepcopy(reference), Settings(loss="dpo", beta=0.3, chunk=7))
    trainer = trl.DPOTrainer(model, ref_model=reference, **given)
    inputs = first_batch(trainer)
    theirs = trainer._compute_loss(trainer.model, inputs, False)
    loss = ours(batch_of(inputs), None).loss
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-6)
    theirs.backward()
    loss.backward()
    wanted = dict(trainer.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        gradient = wanted[name].grad
        assert gradient is not None and parameter.grad is not None
        assert (parameter.grad - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name
    print(f"largest difference of the loss: {abs(float(loss - theirs)):.2g}")


@pytest.mark.parametrize("masks", [MaskSettings(), MaskSettings(kind="activations")], ids=lambda m: m.kind)
def test_the_trainer(masks: MaskSettings, given: dict[str, Any]) -> None:
    trainer = SparsePOTrainer(model_of(), settings=Settings(masks=masks), **given)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    held = [p.clone() for p in trainer.method.reference.parameters()]
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert "transformer.wte.weight" in moved
    assert (masks.kind == "learned") == any(name.startswith("token_masks.") for name in moved)
    assert all(torch.equal(a, b) for a, b in zip(held, trainer.method.reference.parameters(), strict=True))
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(0.6931, abs=1e-3) and "reward_mask" in logged


def test_adapters_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UnmaskError, match="trains whole models, not adapters"):
        SparsePOTrainer(model_of(), peft_config=object(), **given)


@pytest.mark.parametrize("masks", [[[0, 0, 1, 1], [0, 1, 1, 1]], [[0, 0, 0, 0], [0, 0, 1, 1]]])
def test_pairs_whose_prompts_were_cut_apart_are_refused(masks: list[list[int]]) -> None:
    ones = torch.ones(2, 4, dtype=torch.long)
    inputs = {"input_ids": ones, "attention_mask": ones, "completion_mask": torch.tensor(masks)}
    with pytest.raises(UnmaskError, match="truncation_mode='keep_start'"):
        batch_of(inputs)
    inputs["completion_mask"] = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]])
    assert batch_of(inputs).prompts.tolist() == [2]
