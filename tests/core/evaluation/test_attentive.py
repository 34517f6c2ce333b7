"""The attentive probe: it finds the token that knows, where a mean over tokens is blind; padding, seeds and choice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from unmask.core.errors import UnmaskError
from unmask.core.evaluation import AttentiveProbe, FeatureSplit, Splits, TokenSplit, attentive_probe, linear_probe
from unmask.core.evaluation.attentive import AttentiveClassifier

CLASSES, REPEATS, DIM = 3, 3, 16
TOKENS = CLASSES * REPEATS
SHORT = AttentiveProbe(heads=2, learning_rates=(1e-3, 5e-3), weight_decays=(0.01,), batch_size=64, epochs=2)
LONG = replace(SHORT, learning_rates=(1e-6, 5e-3), batch_size=32, epochs=20)


def hidden_in_one(seed: int, n: int) -> TokenSplit:
    """Every sample has the same tokens in another order, but for a key that marks one: that one's kind is the class.

    All kinds are there equally often, so the mean over tokens is the same in every class.
    """
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (n,), generator=generator)
    order = torch.rand(n, TOKENS, generator=generator).argsort(1)
    kind = (torch.arange(TOKENS) % CLASSES)[order]  # [n, tokens]
    marked = (kind == y[:, None]).int().argmax(1)  # the first token of the sample's class
    x = 0.3 * torch.randn(n, TOKENS, DIM, generator=generator)
    x[..., :CLASSES] += 2 * torch.nn.functional.one_hot(kind, CLASSES)
    x[torch.arange(n), marked, CLASSES] += 4
    return TokenSplit(x, torch.arange(n) + 10_000 * seed, y)


def three(n: int = 448) -> tuple[TokenSplit, TokenSplit, TokenSplit]:
    return hidden_in_one(1, n), hidden_in_one(2, 150), hidden_in_one(3, 300)


def padded(split: TokenSplit, fill: float) -> TokenSplit:
    """Two tokens more in every sample, and the last one of the first half made padding as well."""
    x = torch.cat([split.x, torch.full((len(split), 2, DIM), fill)], 1)
    valid = (torch.arange(TOKENS + 2) < TOKENS).repeat(len(split), 1)
    valid[: len(split) // 2, TOKENS - 1] = False
    return replace(split, x=x.masked_fill(~valid[..., None], fill), valid=valid)


def test_it_finds_the_token_that_knows_where_a_mean_is_blind() -> None:
    train, val, test = three()
    means = Splits(*(FeatureSplit(s.x.mean(1), s.ids, s.y) for s in (train, val, test)))
    assert linear_probe(means).accuracy < 0.45
    found = attentive_probe(train, val, test, LONG, 0)
    assert found.accuracy > 0.8
    assert found.val_accuracy > 0.8
    assert (found.learning_rate, found.weight_decay, found.labels) == (5e-3, 0.01, 448)


def test_more_blocks_train_too() -> None:
    deep = replace(SHORT, blocks=4, learning_rates=(5e-3,))
    assert len(AttentiveClassifier(DIM, CLASSES, deep).blocks) == 3
    train, val, test = (padded(s, 0.0) for s in three(128))
    assert 0 <= attentive_probe(train, val, test, deep, 0).accuracy <= 1


@pytest.mark.parametrize("blocks", [1, 2])
def test_padding_has_no_influence(blocks: int) -> None:
    protocol = replace(SHORT, blocks=blocks)
    results, logits = [], []
    for fill in (0.0, 1e4, float("nan"), float("inf")):
        train, val, test = (padded(s, fill) for s in three(256))
        results.append(attentive_probe(train, val, test, protocol, 0))
        torch.manual_seed(0)
        x, valid, _ = test.batch(torch.arange(20), "cpu")
        logits.append(AttentiveClassifier(DIM, CLASSES, protocol)(x, valid))
    assert len(set(results)) == 1
    assert all(torch.equal(other, logits[0]) for other in logits)


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_padded_sample_gets_the_logits_of_the_short_one(blocks: int) -> None:
    torch.manual_seed(0)
    classifier = AttentiveClassifier(DIM, CLASSES, replace(SHORT, blocks=blocks))
    x = torch.randn(4, 5, DIM)
    longer = torch.cat([x, 100 * torch.randn(4, 3, DIM)], 1)
    valid = (torch.arange(8) < 5).repeat(4, 1)
    torch.testing.assert_close(classifier(longer, valid), classifier(x))
    assert not torch.allclose(classifier(longer), classifier(x))


def test_a_sample_of_padding_alone_is_refused_until_it_is_left_out() -> None:
    x, ids, y = torch.randn(3, 4, DIM), torch.tensor([7, 8, 9]), torch.tensor([0, 1, 0])
    valid = torch.ones(3, 4, dtype=torch.bool)
    valid[1] = False
    with pytest.raises(UnmaskError, match="sample 8 has no valid token.*leave out"):
        TokenSplit(x, ids, y, valid)
    assert len(TokenSplit(x[::2], ids[::2], y[::2], valid[::2])) == 2


def test_it_repeats_draws_nothing_and_follows_the_seed() -> None:
    before = torch.get_rng_state()
    splits = three(256)
    first = attentive_probe(*splits, SHORT, 3)
    torch.manual_seed(99)
    assert attentive_probe(*splits, SHORT, 3) == first
    torch.set_rng_state(before)
    with torch.no_grad():
        attentive_probe(*splits, SHORT, 3)
    assert torch.equal(before, torch.get_rng_state())
    assert len({attentive_probe(*splits, SHORT, seed).accuracy for seed in range(4)}) > 1


def test_the_order_of_the_training_samples_does_not_matter() -> None:
    train, val, test = three(256)
    other = TokenSplit(train.x.flip(0), train.ids.flip(0), train.y.flip(0))
    assert attentive_probe(other, val, test, SHORT, 0) == attentive_probe(train, val, test, SHORT, 0)


def relabelled(split: TokenSplit, y: Tensor) -> TokenSplit:
    return replace(split, y=y)


def test_test_labels_have_no_part_in_the_choice() -> None:
    train, val, test = three(256)
    plain = attentive_probe(train, val, test, SHORT, 0)
    for wrong in ((test.y + 1) % CLASSES, test.y + CLASSES):
        other = attentive_probe(train, val, relabelled(test, wrong), SHORT, 0)
        assert replace(other, accuracy=plain.accuracy) == plain
        assert other.accuracy != plain.accuracy
    assert other.accuracy == 0  # classes that train does not have


def test_the_validation_split_chooses_and_the_first_of_equals_wins() -> None:
    train, val, test = three(256)
    rates = (1e-6, 5e-3)
    alone = [attentive_probe(train, val, test, replace(SHORT, learning_rates=(r,)), 0) for r in rates]
    together = attentive_probe(train, val, test, replace(SHORT, learning_rates=rates), 0)
    assert together == max(alone, key=lambda probed: probed.val_accuracy)
    nothing = relabelled(val, val.y + CLASSES)
    assert attentive_probe(train, nothing, test, replace(SHORT, learning_rates=rates), 0).learning_rate == rates[0]


def test_a_member_that_diverges_is_not_chosen() -> None:
    train, val, test = three(128)
    zeros = relabelled(val, torch.zeros_like(val.y))  # where a diverged classifier's argmax would be right
    found = attentive_probe(train, zeros, test, replace(SHORT, learning_rates=(1e30, 1e-3)), 0)
    assert found.learning_rate == 1e-3


def test_half_precision_tokens_and_odd_sizes_do() -> None:
    train, val, test = (replace(s, x=s.x.half()) for s in three(70))
    assert attentive_probe(train, val, test, SHORT, 0).labels == 70


def test_the_pooling_is_the_formula() -> None:
    """V-JEPA's: q + softmax(q k / sqrt d) v without an output projection, then the MLP's branch."""
    torch.manual_seed(0)
    classifier = AttentiveClassifier(DIM, CLASSES, replace(SHORT, heads=1))
    x, c = torch.randn(2, 5, DIM), classifier.cross_attn
    tokens = torch.nn.functional.layer_norm(x, (DIM,), eps=1e-6)
    weights = (c.projq(classifier.query) @ c.projk(tokens).transpose(1, 2) / DIM**0.5).softmax(-1)
    q = classifier.query + weights @ c.projv(tokens)
    torch.testing.assert_close(classifier.pool(x), (q + classifier.mlp(classifier.norm2(q)))[:, 0])


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="dim 16 is not divisible by 3 heads"):
        attentive_probe(*three(8), replace(SHORT, heads=3), 0)
