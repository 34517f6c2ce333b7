"""How far a tuned policy has moved from its reference, what reward that bought, and pass@k.

Methods are compared by the frontier of mean reward against the sequence KL to the reference, KL(policy || reference),
over their strengths and checkpoints: at equal KL, never at equal beta, which methods scale differently. Responses are
sampled from the policy at temperature 1 and top-p 1, and its log-probabilities are taken at the same temperature with
dropout off. ``valid`` marks the tokens that count: the response with the EOS that ends it, not the prompt, not padding.

The token KL that TDPO and SparsePO use in their losses is KL(reference || policy), the other direction.

Everything is computed in float64, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unmask.core.errors import UnmaskError

TokenLogs = Float[Tensor, "sequences tokens"]
Valid = Bool[Tensor, "sequences tokens"]


class Estimate(NamedTuple):
    """A mean over sampled sequences.

    Attributes:
        value: the mean.
        error: its standard error; NaN of one sequence.
    """

    value: float
    error: float


# ---- sequence KL ---------------------------------------------------------------------------------------------------


def kl_k1(policy: TokenLogs, reference: TokenLogs, valid: Valid) -> Estimate:
    """Mean over sequences of R = sum over tokens of log policy - log reference: unbiased, may be negative.

    Args:
        policy: the log-probability of each sampled token under the policy.
        reference: under the reference.
        valid: tokens that count.
    """
    return _estimate(_log_ratios(policy, reference, valid))


def kl_k3(policy: TokenLogs, reference: TokenLogs, valid: Valid) -> Estimate:
    """Mean over sequences of exp(-R) - 1 + R, with R as in `kl_k1`: unbiased, never negative.

    Schulman, "Approximating KL divergence" (2020), on whole sequences as in ODPO's code (which counts prompt tokens
    too). Where R is far from 0 a few samples decide it: see the error. A sum over tokens of the same expression of each
    token is another quantity.
    """
    ratios = _log_ratios(policy, reference, valid)
    return _estimate(torch.expm1(-ratios) + ratios)


def kl_full(
    policy: Float[Tensor, "sequences tokens vocabulary"],
    reference: Float[Tensor, "sequences tokens vocabulary"],
    valid: Valid,
) -> Estimate:
    """Mean over sequences of the sum over tokens of the exact KL of the two next-token distributions.

    Unbiased, never negative, and of the least variance. Sequences are worked on one by one, so that the float64 copies
    are of one sequence.

    Args:
        policy: logits, or log-probabilities, at the place that predicts each token.
        reference: likewise.
        valid: tokens that count.
    """
    return _estimate(torch.stack(list(_full(policy, reference, valid))))


def _full(policy: Tensor, reference: Tensor, valid: Tensor) -> Iterator[Tensor]:
    for p, r, kept in zip(policy, reference, valid, strict=True):
        log_p, log_r = (x[kept].double().log_softmax(-1) for x in (p, r))  # [kept, vocabulary]
        # A token that the policy never takes adds nothing, also where its logits are -inf.
        yield (log_p.exp() * (log_p - log_r)).where(log_p > float("-inf"), 0.0).sum()


def _log_ratios(policy: TokenLogs, reference: TokenLogs, valid: Valid) -> Float[Tensor, "sequences"]:
    return (policy.double() - reference.double()).where(valid, 0.0).sum(1)


def _estimate(values: Float[Tensor, "sequences"]) -> Estimate:
    if not len(values):
        raise UnmaskError("no sequences to estimate a KL divergence from")
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(float(values.mean()), error)


# ---- frontier ------------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """One policy: a strength and a checkpoint of a method.

    Attributes:
        kl: sequence KL to the reference, in nats.
        reward: mean reward of its responses.
        name: what it is.
    """

    kl: float
    reward: float
    name: str = ""


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats, by rising KL.

    One beats another with no more KL and no less reward, one of them strictly. Equal points do not beat each other.
    """
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.kl, -p.reward)):
        if not kept or point.reward > kept[-1].reward or point[:2] == kept[-1][:2]:
            kept.append(point)
    return kept


def reward_at(points: Sequence[Point], kl: float) -> float:
    """The reward of the frontier at a given KL, linear between its points; NaN where it does not reach."""
    frontier = pareto(points)
    if not frontier or not frontier[0].kl <= kl <= frontier[-1].kl:
        return math.nan
    return float(np.interp(kl, [p.kl for p in frontier], [p.reward for p in frontier]))


# ---- pass@k --------------------------------------------------------------------------------------------------------


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The chance that one of k samples solves a problem, unbiased: 1 - C(n - c, k) / C(n, k).

    Chen et al., arXiv 2107.03374. The mean over problems is reported.

    Args:
        samples: n, drawn for the problem.
        correct: c, those that pass.
        k: from 1 to n.

    Raises:
        UnmaskError: if there are more correct ones than samples, or k is out of range.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise UnmaskError(f"pass@{k} of {samples} samples with {correct} correct: expected c <= n and 1 <= k <= n")
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)
