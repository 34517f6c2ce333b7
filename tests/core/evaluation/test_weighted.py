"""The probe on a weighted sum of layers: equal to the linear probe for one layer, and finds the layer that knows."""

from __future__ import annotations

import pytest
import torch

from unmask.core.evaluation import FeatureSplit, LinearProbe, Splits, WeightedProbe, linear_probe, weighted_probe
from unmask.core.evaluation.weighted import layer_of

QUICK = WeightedProbe(LinearProbe(strengths=(1e-3, 1e-2, 1.0, 100.0), max_iterations=60))


def noisy(seed: int, n: int, useful: int, layers: int = 3, dim: int = 6, noise: float = 0.3) -> FeatureSplit:
    """Noise in every layer, and the class in one of them, which is also scaled down a hundredfold."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = torch.randn(n, layers, dim, generator=generator)
    x[:, useful] = 0.01 * (torch.eye(dim)[y] + noise * x[:, useful])
    return FeatureSplit(x.flatten(1), torch.arange(n) + 1000 * seed, y)


def three(useful: int, **options: float) -> Splits:
    return Splits(noisy(1, 150, useful, **options), noisy(2, 60, useful, **options), noisy(3, 90, useful, **options))  # type: ignore[arg-type]


def test_one_layer_is_the_linear_probe() -> None:
    splits = three(0, layers=1, noise=1.0)
    one, plain = weighted_probe(splits, 1), linear_probe(splits)
    assert (one.accuracy, one.val_accuracy, one.strength, one.labels) == (
        plain.accuracy,
        plain.val_accuracy,
        plain.strength,
        plain.labels,
    )
    assert one.weights == [1.0]
    assert 0.4 < one.accuracy < 1


@pytest.mark.parametrize("useful", [0, 2])
def test_the_layer_that_knows_gets_the_weight(useful: int) -> None:
    found = weighted_probe(three(useful), 3, QUICK)
    assert found.accuracy > 0.9
    assert sum(found.weights) == pytest.approx(1.0, abs=1e-5)
    assert found.weights[useful] > 0.8
    other = Splits(
        *(layer_of(s, (useful + 1) % 3, 3) for s in (three(useful).train, three(useful).val, three(useful).test))
    )
    assert linear_probe(other, QUICK.linear).accuracy < 0.5


def test_two_layers_that_know_halves_beat_either() -> None:
    """Classes 0 and 1 differ in the first layer only, 1 and 2 in the second only."""

    def split(seed: int, n: int) -> FeatureSplit:
        generator = torch.Generator().manual_seed(seed)
        y = torch.arange(n) % 3
        x = 0.2 * torch.randn(n, 2, 4, generator=generator)
        x[:, 0, 0] += (y == 0).float()
        x[:, 1, 1] += (y == 2).float()
        return FeatureSplit(x.flatten(1), torch.arange(n), y)

    splits = Splits(split(1, 150), split(2, 60), split(3, 90))
    both = weighted_probe(splits, 2, QUICK)
    single = [
        linear_probe(Splits(*(layer_of(s, i, 2) for s in (splits.train, splits.val, splits.test))), QUICK.linear)
        for i in range(2)
    ]
    assert both.accuracy > max(s.accuracy for s in single) + 0.1
    assert min(both.weights) > 0.2


def test_scales_of_layers_do_not_matter_and_a_constant_layer_does_no_harm() -> None:
    splits = three(1)
    scale = torch.tensor([1e-3, 1.0, 1e3]).repeat_interleave(6)
    scaled = Splits(*(FeatureSplit(s.x * scale, s.ids, s.y) for s in (splits.train, splits.val, splits.test)))
    a, b = weighted_probe(splits, 3, QUICK), weighted_probe(scaled, 3, QUICK)
    assert a.weights == pytest.approx(b.weights, abs=0.02)
    assert a.accuracy == pytest.approx(b.accuracy, abs=0.03)
    keep = torch.ones(18)
    keep[:6] = 0
    flat = Splits(*(FeatureSplit(s.x * keep + 7, s.ids, s.y) for s in (splits.train, splits.val, splits.test)))
    assert weighted_probe(flat, 3, QUICK).accuracy > 0.9


def test_it_repeats_and_draws_nothing() -> None:
    before = torch.get_rng_state()
    assert weighted_probe(three(1), 3, QUICK) == weighted_probe(three(1), 3, QUICK)
    assert torch.equal(before, torch.get_rng_state())


def test_features_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="18 values do not divide into 4 layers"):
        weighted_probe(three(1), 4)


def test_layers_count_from_the_end_too() -> None:
    split = noisy(1, 6, 0)
    assert layer_of(split, -1, 3).x.equal(split.x[:, 12:])
    assert layer_of(split, 1, 3).x.equal(split.x[:, 6:12])
