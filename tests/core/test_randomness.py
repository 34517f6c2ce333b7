"""Keyed randomness: the same bits for ever, independent of the batch, uniform."""

from __future__ import annotations

import pytest
import torch

from unmask.core.randomness import Key, SampleKey, _signed, epoch_order, stable_id

GOLDEN_BITS = [
    [8186368242743860691, 4287185760320361033],
    [1745211150039182228, 1977472738510267190],
    [5272616730750193764, 2338328119191283887],
]
GOLDEN_STREAM = [[39873348842266199, 3491388116036469083]]
GOLDEN_PERMUTATION = [[5, 1, 7, 6, 3, 4, 0, 2]]
GOLDEN_ORDER = [7, 4, 2, 5, 1, 3, 0, 6]
GOLDEN_ID = 3040670377534444095

IDS = torch.tensor([0, 1, 5, 2**40, stable_id("a/b.png")])


def chi_square(counts: torch.Tensor) -> float:
    """How many standard deviations the chi-square statistic of equally likely cells is from its mean."""
    expected = counts.double().sum() / len(counts)
    statistic = ((counts.double() - expected) ** 2 / expected).sum()
    return float((statistic - (len(counts) - 1)) / (2 * (len(counts) - 1)) ** 0.5)


def test_splitmix64_reference_values() -> None:
    """The first outputs of SplitMix64 from state 0, as published with its reference implementation."""
    words = [word & (2**64 - 1) for word in Key(torch.tensor([0])).bits(3)[0].tolist()]
    assert words == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_golden_values() -> None:
    """A change of any of these would change every mask of every run: never update them."""
    assert Key.of(0, torch.tensor([0, 1, 2**40])).bits(2).tolist() == GOLDEN_BITS
    key = Key.of(7, torch.tensor([5]), 3).stream("mask")
    assert key.bits(2).tolist() == GOLDEN_STREAM
    assert key.stream(2).permutation(8).tolist() == GOLDEN_PERMUTATION
    assert epoch_order(0, 1, 8).tolist() == GOLDEN_ORDER
    assert stable_id("a/b.png") == GOLDEN_ID


def test_sample_key_draws_what_key_draws() -> None:
    for visit in (0, 1, 2**33):
        batch = Key.of(-3, IDS, visit).stream("augment").stream(4)
        for row, sample_id in zip(batch.uniform(6).tolist(), IDS.tolist(), strict=True):
            assert SampleKey.of(-3, sample_id, visit).stream("augment").stream(4).uniform(6) == row


def test_fine_uniforms_are_the_words_of_the_key() -> None:
    for sample_id in IDS.tolist():
        words = Key.of(-3, torch.tensor([sample_id]), 4).bits(300)[0].tolist()
        fine = SampleKey.of(-3, sample_id, 4).fine_uniform(300).tolist()
        assert fine == [((word % 2**64) >> 11) / 2**53 for word in words]
    assert len({value % 2.0**-24 for value in fine}) > 290


def test_draws_do_not_depend_on_the_batch() -> None:
    whole = Key.of(1, IDS).stream("x").bits(5)
    for i in range(len(IDS)):
        assert torch.equal(Key.of(1, IDS[i : i + 1]).stream("x").bits(5)[0], whole[i])
    assert torch.equal(Key.of(1, IDS.flip(0)).stream("x").bits(5), whole.flip(0))


def test_seed_stream_id_and_visit_all_matter() -> None:
    key, one = Key.of(0, torch.tensor([3]), 4), torch.tensor([3])
    others = [
        Key.of(1, one, 4),
        Key.of(0, one + 1, 4),
        Key.of(0, one, 5),
        key.stream("a"),
        key.stream("b"),
        key.stream(0),
    ]
    words = [int(k.bits(1)) for k in (key, *others)]
    assert len(set(words)) == len(words)
    assert int(Key.of(0, torch.tensor([4]), 3).bits(1)) != int(key.bits(1))  # id and visit do not commute


def test_a_shared_draw_follows_seed_stream_and_step_and_nothing_else() -> None:
    def draw(seed: int = 1, ids: int = 0, visit: int = 0, stream: str = "size", step: int = 7) -> torch.Tensor:
        key = Key.of(seed, torch.arange(ids, ids + 4), visit)
        return key.stream("plan").stream(stream).shared(step).stream("height").uniform(3)

    assert draw().shape == (1, 3)
    assert torch.equal(draw(), draw(ids=100, visit=3)), "other samples, as on another rank, share it"
    changed = [draw(), draw(seed=2), draw(stream="aspect"), draw(step=8)]
    assert len({tuple(d[0].tolist()) for d in changed}) == 4
    steps = torch.cat([Key.of(1, torch.tensor([5])).shared(step).uniform(1) for step in range(500)])
    assert abs(float(steps.mean()) - 0.5) < 0.05, "uniform over the steps of a run"
    with pytest.raises(ValueError, match="make it with Key.of"):
        Key(torch.tensor([3])).stream("size").shared(0)


def test_visits_may_differ_within_a_batch() -> None:
    mixed = Key.of(0, torch.tensor([3, 3]), torch.tensor([1, 2])).bits(2)
    assert torch.equal(mixed[1], Key.of(0, torch.tensor([3]), 2).bits(2)[0])


def test_no_collisions_among_neighbouring_keys() -> None:
    ids = torch.arange(300).repeat_interleave(300)
    words = Key.of(0, ids, torch.arange(300).repeat(300)).bits(1)
    assert words.unique().numel() == words.numel()


@pytest.mark.parametrize("bit", [0, 7, 31, 32, 40, 62, 63])
def test_every_bit_is_fair_and_flips_with_the_id(bit: int) -> None:
    words = Key.of(0, torch.arange(20_000)).bits(1)[:, 0]
    ones = (words >> bit) & 1
    assert abs(float(ones.double().mean()) - 0.5) < 4 * 0.5 / 20_000**0.5
    changed = ones[1:] ^ ones[:-1]
    assert abs(float(changed.double().mean()) - 0.5) < 5 * 0.5 / 20_000**0.5


def test_uniform_is_uniform() -> None:
    x = Key.of(0, torch.arange(500)).uniform(400)
    assert x.dtype == torch.float32 and float(x.min()) >= 0 and float(x.max()) < 1
    assert abs(chi_square(torch.histc(x, 100, 0, 1))) < 4
    pairs = (x[:, :-1] * 10).long() * 10 + (x[:, 1:] * 10).long()
    assert abs(chi_square(torch.bincount(pairs.flatten(), minlength=100))) < 4
    between = (x[:-1] * 10).long() * 10 + (x[1:] * 10).long()  # neighbouring ids
    assert abs(chi_square(torch.bincount(between.flatten(), minlength=100))) < 4


@pytest.mark.parametrize("high", [1, 2, 7, 100, 256])
def test_integers_are_uniform_and_in_range(high: int) -> None:
    x = Key.of(0, torch.arange(400)).integers(100, high)
    assert int(x.min()) >= 0 and int(x.max()) < high
    counts = torch.bincount(x.flatten(), minlength=high)
    assert len(counts) == high and (high == 1 or abs(chi_square(counts)) < 4)


@pytest.mark.parametrize("high", [2**23, 2**23 + 1, 2**24])
def test_integers_with_a_large_range(high: int) -> None:
    x = Key.of(0, torch.arange(400)).integers(50, high)
    assert 0 <= int(x.min()) < high // 100 and high - high // 100 < int(x.max()) < high


def test_permutations_are_uniform() -> None:
    p = Key.of(0, torch.arange(24_000)).permutation(4)
    assert torch.equal(p.sort(1).values, torch.arange(4).expand(24_000, -1))
    code = (p * torch.tensor([64, 16, 4, 1])).sum(1)
    counts = torch.bincount(code)[torch.bincount(code) > 0]
    assert len(counts) == 24 and abs(chi_square(counts)) < 4


def test_epoch_order_is_a_permutation_that_changes() -> None:
    first = epoch_order(0, 0, 1000)
    assert torch.equal(first.sort().values, torch.arange(1000))
    assert torch.equal(first, epoch_order(0, 0, 1000))
    assert not torch.equal(first, epoch_order(0, 1, 1000)) and not torch.equal(first, epoch_order(1, 0, 1000))


def test_stable_id_fits_int64() -> None:
    names = [f"folder/{i}.png" for i in range(2000)]
    ids = [stable_id(name) for name in names]
    assert len(set(ids)) == len(ids) and all(0 <= i < 2**63 for i in ids)
    assert _signed(2**64 - 1) == -1 and _signed(5) == 5
