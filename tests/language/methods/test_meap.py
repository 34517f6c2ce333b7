"""MEAP, pre-training and fine-tuning: the authors' numbers, exact properties, and the checks of their kinds."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from unmask.core import registry
from unmask.core.method import Clock
from unmask.core.randomness import Key
from unmask.core.training.launch import build, open_data
from unmask.core.training.recipe import load_recipe
from unmask.language.data.chats import ChatBatch
from unmask.language.data.texts import TextBatch
from unmask.language.data.vocabulary import Vocabulary
from unmask.language.methods.meap import MEAP, Settings, init_weights, shared_positions
from unmask.language.methods.meap_sft import MEAPFineTuning
from unmask.language.methods.meap_sft import Settings as TuningSettings

GOLDEN = load_file(Path(__file__).parents[2] / "golden" / "meap.safetensors")
VOCABULARY = Vocabulary(64, 60, 1, 2, 0, None, (0, 1, 2, 60), "golden")


def llama(**changes: Any) -> Any:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 128}
    config = transformers.LlamaConfig(**{**sizes, **heads, "tie_word_embeddings": False, **changes})
    return transformers.LlamaForCausalLM(config)


@pytest.fixture
def model() -> Any:
    model = llama()
    model.load_state_dict({k.removeprefix("weights/"): v for k, v in GOLDEN.items() if k.startswith("weights/")})
    return model


def blocks(micro: int = 0) -> TextBatch:
    tokens = GOLDEN["input/pretrain/blocks"][micro].long()
    return TextBatch(tokens, torch.arange(len(tokens)), torch.zeros(len(tokens), dtype=torch.long))


def key(batch: Any, visit: int = 0) -> Key:
    return Key.of(0, batch.ids, visit).stream("plan")


def test_the_authors_step(model: Any) -> None:
    """Positions, inputs, targets, loss and every gradient of a recorded step."""
    method = MEAP(model, VOCABULARY, Settings(share_positions=True, chunk=7), 24)
    for micro in range(2):
        batch = blocks(micro)
        plan = method.draw(batch, Clock(int(GOLDEN["plan/pretrain/step_count"]), 100), key(batch))
        assert (plan.mask.hidden == GOLDEN["plan/pretrain/mask"]).all()
        assert torch.equal(method.inputs(batch, plan), GOLDEN["output/pretrain/input_ids"][micro].long())
        assert torch.equal(method.target(batch, plan), GOLDEN["output/pretrain/targets"][micro].long())
        loss = method(batch, plan).loss
        torch.testing.assert_close(loss, GOLDEN["output/pretrain/loss_micro"][micro], rtol=1e-6, atol=0)
        (loss / 2).backward()
    for name, parameter in model.named_parameters():
        wanted = GOLDEN[f"grad/{name}"]
        assert parameter.grad is not None
        assert (parameter.grad - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name


def test_the_authors_sampler() -> None:
    for step, wanted in enumerate(GOLDEN["sampler/table_step_to_mask"]):
        assert wanted.nonzero()[:, 0].tolist() == sorted(shared_positions(step, 24, 3)), step
    for step, positions in enumerate(GOLDEN["sampler/positions_L4096_first5"]):
        assert sorted(shared_positions(step, 4096, 614)) == positions.tolist()
    assert shared_positions(0, 24, 3) == shared_positions(51, 24, 3)
    for length, per_mille, count in GOLDEN["sampler/count_table_L_ratio1000_n"].tolist():
        assert max(1, int(length * (per_mille / 1000))) == count


def test_the_authors_packing(model: Any) -> None:
    """Documents with both special tokens around them, one after another, in blocks of length + 1."""
    documents = [GOLDEN[f"input/packing/doc{i}"].long() for i in range(8)]
    assert all(d[0] == 1 and d[-1] == 2 for d in documents)
    stream = torch.cat(documents)
    wanted = GOLDEN["output/packing/blocks_noshuffle"].long()
    ours = stream[: len(stream) // 25 * 25].view(-1, 25)
    assert torch.equal(ours[:6], wanted[:6]), "the release packs chunk by chunk; within the first chunk the two agree"


def test_ratio_0_is_the_models_own_loss_bit_for_bit(model: Any) -> None:
    method, batch = MEAP(model, VOCABULARY, Settings(ratio=0.0), 24), blocks()
    plan = method.draw(batch, Clock(), key(batch))
    assert not plan.mask.hidden.any()
    tokens = batch.tokens[:, :24]
    targets = batch.tokens[:, 1:].contiguous()
    own = model(input_ids=tokens, labels=targets, shift_labels=targets).loss
    assert torch.equal(method(batch, plan).loss, own)


@pytest.mark.parametrize("ratio", [0.01, 0.15, 0.5, 0.95])
def test_counts_and_positions(model: Any, ratio: float) -> None:
    method, batch = MEAP(model, VOCABULARY, Settings(ratio=ratio), 24), blocks()
    hidden = torch.stack([method.draw(batch, Clock(), key(batch, visit)).mask.hidden for visit in range(200)])
    assert (hidden.sum(-1) == max(1, int(24 * ratio))).all() and not hidden[..., -1].any()
    assert hidden[..., :-1].any(0).all(), "every other position is hidden at some visit"
    assert ratio > 0.9 or not torch.equal(hidden[0, 0], hidden[0, 1]), "drawn independently per sample"


def test_special_tokens_can_be_left_alone(model: Any) -> None:
    method, batch = MEAP(model, VOCABULARY, Settings(ratio=0.9, keep_special=True), 24), blocks()
    special = torch.isin(batch.tokens[:, :24], torch.tensor(VOCABULARY.special))
    assert special.any()
    hidden = method.draw(batch, Clock(), key(batch)).mask.hidden
    assert not (hidden & special).any() and hidden.any(1).all()


def test_a_hidden_token_changes_nothing_before_it(model: Any) -> None:
    method, batch = MEAP(model.eval(), VOCABULARY, Settings(), 24), blocks()
    plan = method.draw(batch, Clock(), key(batch))
    clean = model(input_ids=batch.tokens[:, :24]).logits
    for row, hidden in enumerate(plan.mask.hidden):
        first = int(hidden.nonzero()[0])
        torch.testing.assert_close(method.predict(batch, plan)[row, :first], clean[row, :first])


def test_a_word_that_is_only_hidden_gets_no_gradient_as_input(model: Any) -> None:
    method, batch = MEAP(model, VOCABULARY, Settings(), 24), blocks()
    plan = method.draw(batch, Clock(), key(batch))
    tokens = batch.tokens.clone()
    tokens[tokens == 40] = 41
    position = int(plan.mask.hidden[0, 1:].nonzero()[0]) + 1
    tokens[0, position] = 40
    method(replace(batch, tokens=tokens), plan).loss.backward()
    assert not model.model.embed_tokens.weight.grad[40].any() and model.lm_head.weight.grad[40].any()


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = llama(hidden_size=128, intermediate_size=256, num_hidden_layers=3)
    init_weights(model)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == 1).all()
            continue
        residual = "o_proj" in name or "down_proj" in name
        wanted = 1 / (math.sqrt(128) * 3) if residual else math.sqrt(2 / (5 * 128))
        assert parameter.std().item() == pytest.approx(wanted, rel=0.05), name
    (group,) = MEAP(model, VOCABULARY, Settings(), 24).param_groups()
    assert group["decay_all"] and len(group["params"]) == len(list(model.parameters()))


# ---- fine-tuning -----------------------------------------------------------------------------------------------------


def chats(rows: list[int], length: int = 80) -> tuple[ChatBatch, Tensor]:
    """Clean rows of the record as a batch, and what their second rows hide."""
    tokens = GOLDEN["output/sft/input_ids"].long()[rows]
    labels = GOLDEN["output/sft/labels"].long()[rows]
    lengths = (labels != -100).long().cumsum(1).argmax(1) + 1
    prompts = (labels != -100).long().argmax(1)
    return ChatBatch(tokens, torch.arange(len(rows)), prompts, lengths, lengths - prompts - 1), labels


def test_the_authors_rows(model: Any) -> None:
    """Rows 0 (with a second row, 1), 2, and 3: inputs, labels and the loss of every token."""
    batch, labels = chats([0, 2, 3])
    method = MEAPFineTuning(model, VOCABULARY, TuningSettings())
    plan = method.draw(batch, Clock(), key(batch))
    assert plan.mask.hidden.sum(1).tolist() == [5, 5, 0], "55 and 51 tokens hide a tenth; 50 tokens hide none"
    plan.mask.hidden[0] = GOLDEN["plan/sft/mask"][1]
    inputs, targets = method.inputs(batch, plan), method.target(batch, plan)
    assert torch.equal(inputs[3], GOLDEN["output/sft/input_ids"][1].long())
    assert torch.equal(targets[:3], labels) and torch.equal(targets[3], GOLDEN["output/sft/labels"][1].long())
    plan.mask.hidden[1] = GOLDEN["plan/sft/mask"][4]
    output = method(batch, plan)
    wanted = GOLDEN["output/sft/token_ce"][[0, 1, 2, 3, 4]].double().sum()
    torch.testing.assert_close(output.terms["next_token"].total.double(), wanted, rtol=1e-5, atol=0)


def test_second_rows(model: Any) -> None:
    batch, _ = chats([0, 2, 3])
    method = MEAPFineTuning(model, VOCABULARY, TuningSettings(longer_than=0, ratio=0.3))
    for visit in range(20):
        hidden = method.draw(batch, Clock(), key(batch, visit)).mask.hidden
        position = torch.arange(80)
        inside = (position >= batch.prompts[:, None]) & (position < batch.lengths[:, None] - 1)
        assert not (hidden & ~inside).any() and hidden.sum(1).tolist() == [16, 15, 15]
    static = MEAPFineTuning(model, VOCABULARY, TuningSettings(static=True))
    first, second = (static.draw(batch, Clock(), key(batch, visit)).mask.hidden for visit in (0, 1))
    assert torch.equal(first, second) and first.any()


@pytest.mark.parametrize("name", ["meap", "meap_sft"])
def test_the_suite(name: str) -> None:
    recipe, train, _, collate = open_data(load_recipe(f"language/{name}"), lambda text: None)
    batch = collate([train[i, 0] for i in range(4)])
    registry.part(f"language/{name}", "checks").check_method(build(recipe), batch)  # type: ignore[union-attr]


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "gemma2"])
def test_other_architectures(architecture: str) -> None:
    shape = {"gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4}}.get(architecture) or {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    }  # fmt: skip
    overrides = {"model.network": {"architecture": architecture, "config": shape}}
    recipe, train, _, collate = open_data(load_recipe("language/meap", "tiny", overrides), lambda text: None)
    method: Any = build(recipe)
    batch = collate([train[i, 0] for i in range(2)])
    method(batch, method.draw(batch, Clock(), key(batch))).loss.backward()
    assert all(p.grad is not None for p in method.parameters())
