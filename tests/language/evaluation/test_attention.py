"""Attention received and its change, against loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2Model

from unmask.core.errors import UnmaskError
from unmask.language.evaluation.attention import attention_change, received


def causal_attention(seed: int, length: int = 6) -> Tensor:
    """[layers 2, batch 3, heads 4, query, key], each query's weights summing to 1."""
    logits = torch.randn(2, 3, 4, length, length, generator=torch.Generator().manual_seed(seed))
    return logits.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf")).softmax(-1)


def test_attention_received_is_the_mean_over_layers_heads_and_later_queries() -> None:
    attention = causal_attention(0)
    found = received(attention)
    for b in range(3):
        for j in range(5):
            each = [attention[a, b, h, i, j] for a in range(2) for h in range(4) for i in range(j + 1, 6)]
            assert float(found[b, j]) == pytest.approx(float(torch.stack(each).mean()), abs=1e-7)
    assert found[:, 5].isnan().all()


def test_even_attention_gives_each_position_the_mean_of_one_over_the_visible() -> None:
    even = torch.ones(5, 5).tril()
    attention = (even / even.sum(1, keepdim=True))[None, None, None]
    expected = [sum(1 / (i + 1) for i in range(j + 1, 5)) / (4 - j) for j in range(4)]
    assert received(attention)[0, :4].tolist() == pytest.approx(expected, abs=1e-7)


def test_the_change_is_its_two_formulas() -> None:
    plain, masked = causal_attention(1), causal_attention(2)
    hidden = torch.rand(3, 6, generator=torch.Generator().manual_seed(0)) < 0.4
    found = attention_change(plain, masked, hidden)
    before, after = received(plain)[:, :5], received(masked)[:, :5]
    chosen = hidden[:, :5]
    mean_before, mean_after = float(before[chosen].mean()), float(after[chosen].mean())
    assert found.decay == pytest.approx((mean_before - mean_after) / mean_before)
    spread = [float(x[~chosen].square().mean() - x[~chosen].mean().square()) for x in (after, before)]
    assert found.variance_increase == pytest.approx(spread[0] - spread[1], abs=1e-12)


def test_a_model_compared_with_itself_has_not_changed_and_half_the_attention_is_a_decay_of_half() -> None:
    attention = causal_attention(3)
    hidden = torch.zeros(3, 6, dtype=torch.bool)
    hidden[:, [1, 5]] = True
    assert attention_change(attention, attention, hidden) == (0, 0)
    halved = attention.clone()
    halved[..., 1] /= 2
    change = attention_change(attention, halved, hidden)
    assert change.decay == pytest.approx(0.5)
    assert change.variance_increase == 0


def test_all_or_no_positions_hidden_is_an_error() -> None:
    attention = causal_attention(4)
    only_last = torch.arange(6).expand(3, 6) == 5
    for hidden in (torch.zeros(3, 6, dtype=torch.bool), torch.ones(3, 6, dtype=torch.bool), only_last):
        with pytest.raises(UnmaskError, match="some of each"):
            attention_change(attention, attention, hidden)


def test_weights_of_a_transformer_are_taken_as_they_come() -> None:
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=4, attn_implementation="eager")
    with torch.no_grad():
        weights = GPT2Model(config).eval()(torch.arange(24).view(2, 12), output_attentions=True).attentions
    found = received(torch.stack(weights))
    assert found.shape == (2, 12)
    assert not found[:, :-1].isnan().any() and math.isnan(found[0, -1])
