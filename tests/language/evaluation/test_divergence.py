"""Estimators of the sequence KL against enumeration; the frontier and pass@k against their definitions."""

from __future__ import annotations

import math
from itertools import combinations, product

import pytest
import torch
from torch import Tensor

from unmask.core.errors import UnmaskError
from unmask.language.evaluation.divergence import Point, kl_full, kl_k1, kl_k3, pareto, pass_at_k, reward_at

STEPS = 3


def toy(seed: int) -> Tensor:
    """A policy over two tokens and three steps: logits [2 ** 3, 2] by the prefix, read as a number behind a 1."""
    return torch.randn(2**STEPS, 2, generator=torch.Generator().manual_seed(seed))


def logits_along(policy: Tensor, tokens: Tensor) -> Tensor:
    """[sequences, 3] tokens to the logits [sequences, 3, 2] that predict them."""
    prefix, steps = torch.ones(len(tokens), dtype=torch.long), []
    for t in range(STEPS):
        steps.append(policy[prefix])
        prefix = 2 * prefix + tokens[:, t]
    return torch.stack(steps, 1)


def of_tokens(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def test_all_estimators_are_the_enumerated_kl_within_three_standard_errors() -> None:
    policy, reference = toy(1), toy(2)
    every = torch.tensor(list(product([0, 1], repeat=STEPS)))
    log_p, log_r = (of_tokens(logits_along(x, every), every).sum(1).double() for x in (policy, reference))
    exact = float((log_p.exp() * (log_p - log_r)).sum())
    drawn = every[torch.multinomial(log_p.exp(), 4000, replacement=True)]
    p, r = logits_along(policy, drawn), logits_along(reference, drawn)
    valid = torch.ones(drawn.shape, dtype=torch.bool)
    full = kl_full(p, r, valid)
    k1, k3 = (f(of_tokens(p, drawn), of_tokens(r, drawn), valid) for f in (kl_k1, kl_k3))
    for estimate in (full, k1, k3):
        assert abs(estimate.value - exact) < 3 * estimate.error
    assert abs(k1.value - k3.value) < 3 * math.hypot(k1.error, k3.error)
    assert full.error < k1.error


def test_one_step_is_exact_without_sampling() -> None:
    policy, reference = torch.tensor([[[0.3, 0.7]]]).log(), torch.tensor([[[0.6, 0.4]]]).log()
    expected = 0.3 * math.log(0.3 / 0.6) + 0.7 * math.log(0.7 / 0.4)
    estimate = kl_full(policy + 5, reference - 2, torch.ones(1, 1, dtype=torch.bool))  # logits, not normalised
    assert estimate.value == pytest.approx(expected, abs=1e-6)
    assert math.isnan(estimate.error)


def test_a_policy_that_is_its_reference_has_kl_exactly_0() -> None:
    logits = torch.randn(5, 4, 7)
    logits[0, 0, 0] = float("-inf")
    tokens = torch.randint(1, 7, (5, 4))
    valid = torch.rand(5, 4) < 0.7
    logs = of_tokens(logits, tokens)
    for estimate in (kl_k1(logs, logs, valid), kl_k3(logs, logs, valid), kl_full(logits, logits, valid)):
        assert estimate == (0, 0)


def test_estimators_are_their_formulas_and_only_valid_tokens_count() -> None:
    policy, reference = -torch.rand(6, 5), -torch.rand(6, 5)
    valid = torch.arange(5) < torch.tensor([1, 5, 3, 2, 4, 0])[:, None]
    broken = policy.where(valid, float("nan"))
    ratios = [float((policy[n] - reference[n])[valid[n]].sum()) for n in range(6)]
    assert kl_k1(broken, reference, valid).value == pytest.approx(sum(ratios) / 6, abs=1e-6)
    k3 = [math.exp(-r) - 1 + r for r in ratios]
    estimate = kl_k3(broken, reference, valid)
    assert estimate.value == pytest.approx(sum(k3) / 6, abs=1e-6)
    assert estimate.error == pytest.approx(float(torch.tensor(k3).std()) / 6**0.5, abs=1e-6)


def test_the_full_estimator_runs_from_policy_to_reference() -> None:
    p, r = torch.randn(4, 3, 9), torch.randn(4, 3, 9)
    valid = torch.rand(4, 3) < 0.6
    tokenwise = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=r)
    )
    expected = float(tokenwise.where(valid, 0.0).sum(1).mean())
    assert kl_full(p, r, valid).value == pytest.approx(expected, abs=1e-5)
    assert kl_full(r, p, valid).value != pytest.approx(expected, abs=1e-2)


def test_a_token_the_policy_never_takes_adds_nothing_and_one_the_reference_never_takes_is_infinite() -> None:
    half, one = torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[1.0, 0.0]]]).log()
    valid = torch.ones(1, 1, dtype=torch.bool)
    assert kl_full(one, half, valid).value == pytest.approx(math.log(2))
    assert kl_full(half, one, valid).value == math.inf


def test_no_sequences_are_an_error() -> None:
    with pytest.raises(UnmaskError, match="no sequences"):
        kl_k1(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool))


# ---- frontier ------------------------------------------------------------------------------------------------------


def test_the_frontier_of_the_worked_case() -> None:
    points = [Point(1, 0.5, "a"), Point(2, 0.4, "b"), Point(2, 0.6, "c"), Point(3, 0.6, "d")]
    assert pareto(points) == [Point(1, 0.5, "a"), Point(2, 0.6, "c")]


def test_the_frontier_is_its_definition() -> None:
    draw = torch.Generator().manual_seed(3)
    for _ in range(50):
        values = torch.randint(0, 6, (12, 2), generator=draw).tolist()
        points = [Point(*v, name=str(i)) for i, v in enumerate(values)]
        kept = [p for p in points if not any(q.kl <= p.kl and q.reward >= p.reward and q[:2] != p[:2] for q in points)]
        assert sorted(pareto(points)) == sorted(kept)
        assert [p.kl for p in pareto(points)] == sorted(p.kl for p in kept)
    assert pareto([]) == []


def test_rewards_between_frontier_points_are_linear_and_unknown_outside() -> None:
    points = [Point(1, 0.5), Point(2, 0.4), Point(3, 0.9)]
    assert [reward_at(points, kl) for kl in (1.0, 2.0, 2.5, 3.0)] == pytest.approx([0.5, 0.7, 0.8, 0.9])
    assert all(math.isnan(reward_at(points, kl)) for kl in (0.5, 3.1))
    assert math.isnan(reward_at([], 1.0))


# ---- pass@k --------------------------------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_draws_with_a_correct_sample() -> None:
    for n in range(1, 7):
        for c, k in product(range(n + 1), range(1, n + 1)):
            draws = list(combinations(range(n), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(min(d) < c for d in draws) / len(draws))
        assert pass_at_k(n, n // 2, 1) == pytest.approx(n // 2 / n)
        assert pass_at_k(n, 1, n) == 1
    assert pass_at_k(100, 0, 10) == 0


@pytest.mark.parametrize(("n", "c", "k"), [(5, 6, 1), (5, -1, 1), (5, 2, 0), (5, 2, 6)])
def test_impossible_counts_are_an_error(n: int, c: int, k: int) -> None:
    with pytest.raises(UnmaskError, match="expected c <= n"):
        pass_at_k(n, c, k)
