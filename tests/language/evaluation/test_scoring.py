"""Sentence scores of tiny random models against the library's loss, closed forms and one sentence at a time."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from unmask.core.errors import UnmaskError
from unmask.language.evaluation.scoring import Scores, causal_scores, masked_scores, perplexity

VOCABULARY = 50
CLS, SEP, PAD, MASK, UNKNOWN = 1, 2, 3, 4, 5
SPECIAL = (CLS, SEP, PAD)
SENTENCES = [
    [10, 11, 12],
    [20, 21, 22, 23, 24, 25, 26],
    [30, 31],
    [40, 10, 41, 12, 43],
    [44, 45, 46, 47, 48, 49, 7, 8, 9],
]
WRAPPED = [[CLS, *s, SEP] for s in SENTENCES]


@pytest.fixture(scope="module")
def causal() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    return GPT2LMHeadModel(config).train()


@pytest.fixture(scope="module")
def masked() -> BertForMaskedLM:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
        initializer_range=0.3,
    )
    return BertForMaskedLM(config).train()


def close(a: Scores, b: Scores) -> bool:
    return torch.allclose(a.log_likelihood, b.log_likelihood, rtol=0, atol=1e-5) and torch.equal(a.tokens, b.tokens)


# ---- causal --------------------------------------------------------------------------------------------------------


def test_a_causal_score_is_minus_the_librarys_loss_times_its_tokens(causal: GPT2LMHeadModel) -> None:
    scores = causal_scores(causal, SENTENCES)
    causal.eval()
    for sentence, score, tokens in zip(SENTENCES, *scores, strict=True):
        ids = torch.tensor([sentence])
        loss = causal(ids, labels=ids).loss.item()
        assert tokens == len(sentence) - 1
        assert float(score) == pytest.approx(-loss * (len(sentence) - 1), abs=1e-5)
    causal.train()


def test_a_start_token_makes_the_first_token_count_and_is_not_scored_itself(causal: GPT2LMHeadModel) -> None:
    scores = causal_scores(causal, SENTENCES, start=0)
    assert scores.tokens.tolist() == [len(s) for s in SENTENCES]
    assert close(scores, causal_scores(causal, [[0, *s] for s in SENTENCES]))
    twice = causal_scores(causal, [[0, *s] for s in SENTENCES], start=0, special=[0])  # the inner one is not scored
    assert torch.equal(twice.tokens, scores.tokens)


def test_special_tokens_are_read_but_not_scored_by_a_causal_model(causal: GPT2LMHeadModel) -> None:
    all_of_it = causal_scores(causal, [[10, SEP, 12, 13, SEP]])
    scores = causal_scores(causal, [[10, SEP, 12, 13, SEP]], special=[SEP])
    causal.eval()
    log_p = causal(torch.tensor([[10, SEP, 12, 13, SEP]])).logits[0].log_softmax(-1)
    causal.train()
    assert scores.tokens.tolist() == [2]
    assert float(scores.log_likelihood) == pytest.approx((log_p[1, 12] + log_p[2, 13]).item(), abs=1e-5)
    assert all_of_it.tokens.tolist() == [4]


def test_neighbours_padding_and_order_do_not_change_causal_scores(causal: GPT2LMHeadModel) -> None:
    together = causal_scores(causal, SENTENCES, start=0)
    for rows in (1, 2, 3):
        assert close(causal_scores(causal, SENTENCES, start=0, rows=rows), together)
    order = [3, 0, 4, 2, 1]
    shuffled = causal_scores(causal, [SENTENCES[i] for i in order], start=0)
    assert close(shuffled, Scores(together.log_likelihood[order], together.tokens[order]))


def test_sentences_without_a_token_to_score_have_score_0(causal: GPT2LMHeadModel, masked: BertForMaskedLM) -> None:
    scores = causal_scores(causal, [[], [10], [10, 11]])
    assert scores.tokens.tolist() == [0, 0, 1]
    assert scores.log_likelihood[:2].tolist() == [0, 0]
    assert scores.perplexities.isnan().tolist() == [True, True, False]
    scores = masked_scores(masked, [[CLS, SEP], [], [CLS, MASK, SEP]], mask=MASK, special=SPECIAL)
    assert (scores.tokens.tolist(), scores.log_likelihood.tolist()) == ([0, 0, 0], [0, 0, 0])
    with pytest.raises(UnmaskError, match="no token to score"):
        perplexity(scores)
    assert len(causal_scores(causal, []).tokens) == len(masked_scores(masked, [], mask=MASK).tokens) == 0


# ---- masked --------------------------------------------------------------------------------------------------------


def one_by_one(model: BertForMaskedLM, sentence: list[int]) -> float:
    """The definition: every token that is not special hidden in turn, in a forward pass of its own."""
    total = 0.0
    for place, token in enumerate(sentence):
        if token not in SPECIAL:
            ids = torch.tensor([sentence])
            ids[0, place] = MASK
            total += model(ids).logits[0, place].log_softmax(-1)[token].item()
    return total


def test_a_masked_score_is_the_sum_over_tokens_hidden_one_at_a_time(masked: BertForMaskedLM) -> None:
    scores = masked_scores(masked, WRAPPED, mask=MASK, special=SPECIAL, rows=4)
    masked.eval()
    expected = [one_by_one(masked, s) for s in WRAPPED]
    masked.train()
    assert scores.log_likelihood.tolist() == pytest.approx(expected, abs=1e-5)
    assert scores.tokens.tolist() == [len(s) for s in SENTENCES]


def test_neighbours_padding_and_order_do_not_change_masked_scores(masked: BertForMaskedLM) -> None:
    together = masked_scores(masked, WRAPPED, mask=MASK, special=SPECIAL, rows=100)
    for rows in (1, 3, 7):
        assert close(masked_scores(masked, WRAPPED, mask=MASK, special=SPECIAL, rows=rows), together)
    order = [3, 0, 4, 2, 1]
    shuffled = masked_scores(masked, [WRAPPED[i] for i in order], mask=MASK, special=SPECIAL)
    assert close(shuffled, Scores(together.log_likelihood[order], together.tokens[order]))


def test_a_uniform_masked_model_has_score_minus_T_ln_V_and_perplexity_V(masked: BertForMaskedLM) -> None:
    uniform = BertForMaskedLM(masked.config)
    nn.init.zeros_(uniform.cls.predictions.decoder.weight)
    nn.init.zeros_(uniform.cls.predictions.decoder.bias)
    scores = masked_scores(uniform, WRAPPED, mask=MASK, special=SPECIAL)
    expected = [-len(s) * math.log(VOCABULARY) for s in SENTENCES]
    assert scores.log_likelihood.tolist() == pytest.approx(expected, abs=1e-5)
    assert perplexity(scores) == pytest.approx(VOCABULARY, rel=1e-5)
    assert scores.perplexities.tolist() == pytest.approx([VOCABULARY] * 5, rel=1e-5)


class Watching(nn.Module):
    """A masked model of even odds that notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        assert not self.training and not torch.is_grad_enabled()
        self.seen.append((input_ids.clone(), attention_mask.clone()))
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, VOCABULARY))


def test_each_copy_hides_one_token_never_a_special_one_and_no_batch_is_larger_than_said() -> None:
    model = Watching()
    masked_scores(model, [*WRAPPED, [CLS, UNKNOWN, SEP, PAD]], mask=MASK, special=SPECIAL, rows=4)
    assert all(len(ids) <= 4 for ids, _ in model.seen)
    copies = [row[kept.bool()].tolist() for ids, valid in model.seen for row, kept in zip(ids, valid, strict=True)]
    expected = [
        [*s[:i], MASK, *s[i + 1 :]]
        for s in [*WRAPPED, [CLS, UNKNOWN, SEP, PAD]]
        for i, token in enumerate(s)
        if token not in SPECIAL
    ]
    assert sorted(copies) == sorted(expected)


# ---- both ----------------------------------------------------------------------------------------------------------


def test_the_mode_of_every_part_is_restored_also_after_an_error(causal: GPT2LMHeadModel) -> None:
    causal.train()
    causal.transformer.h[0].eval()
    modes = [part.training for part in causal.modules()]
    causal_scores(causal, SENTENCES)
    with pytest.raises(IndexError):
        causal_scores(causal, [[10, VOCABULARY]])
    assert [part.training for part in causal.modules()] == modes
    causal.train()


def test_perplexity_weighs_tokens_alike_and_each_sentence_has_its_own() -> None:
    scores = Scores(torch.tensor([-2.0, -9.0]).double(), torch.tensor([1, 3]))
    assert perplexity(scores) == pytest.approx(math.exp(11 / 4))
    assert scores.perplexities.tolist() == pytest.approx([math.exp(2), math.exp(3)])


def test_half_precision_logits_are_summed_in_full_precision(causal: GPT2LMHeadModel) -> None:
    half = GPT2LMHeadModel(causal.config).to(torch.bfloat16)
    scores = causal_scores(half, SENTENCES)
    assert scores.log_likelihood.dtype == torch.float64
    with torch.no_grad():
        log_p = half.eval()(torch.tensor(SENTENCES[2:3])).logits[0].float().log_softmax(-1)
    assert float(scores.log_likelihood[2]) == pytest.approx(float(log_p[0, 31]), abs=0.05)
