"""MEAP's statistics of attention: how much less the masked positions get, and how much more uneven the rest becomes.

Zhuang et al., "Mask-Enhanced Autoregressive Prediction" (ICML 2025, arXiv 2502.07490): on the same inputs, with the
same positions chosen, once with a model trained on next tokens and once with one trained with masks. How the paper
averages is not known; here every statistic is over the chosen positions of all sequences together. Its figures are in
per cent (decay 53.34, variance + 7.80 at length 4096), of what for the variance is not known.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unmask.core.errors import UnmaskError

Weights = Float[Tensor, "layers batch heads query key"]


class AttentionChange(NamedTuple):
    """What training with masks did to attention.

    Attributes:
        decay: (mean of the plain model - mean of the masked model) / mean of the plain model, at the masked positions.
        variance_increase: variance of the masked model - variance of the plain model, at the others; the variance is
            the mean squared deviation.
    """

    decay: float
    variance_increase: float


def received(attention: Weights) -> Float[Tensor, "batch key"]:
    """The attention that each position gets: its mean over layers, heads and later queries, in float64.

    The position's attention to itself does not count. The last position has no later query and is NaN.

    Args:
        attention: weights of a causal model, each query's summing to 1, of sequences without padding.
    """
    total = attention.mean((0, 2), dtype=torch.float64).tril(-1).sum(1)  # [batch, query, key], then over queries
    later = torch.arange(total.shape[1] - 1, -1, -1, device=total.device)  # queries after each position
    return total / later  # 0 / 0 at the last


def attention_change(plain: Weights, masked: Weights, hidden: Bool[Tensor, "batch key"]) -> AttentionChange:
    """Compare two models' attention on the same inputs.

    Args:
        plain: weights of the model trained on next tokens.
        masked: of the model trained with masks; its layers and heads may be others.
        hidden: the positions chosen for masking. The last position never counts.

    Raises:
        UnmaskError: if all positions are hidden or none is.
    """
    before, after = received(plain), received(masked)
    counted = ~before.isnan()
    chosen, rest = hidden & counted, ~hidden & counted
    if not chosen.any() or not rest.any():
        raise UnmaskError(
            "attention is compared at masked and at other positions: expected some of each, the last apart"
        )
    decay = 1 - after[chosen].mean() / before[chosen].mean()
    increase = after[rest].var(correction=0) - before[rest].var(correction=0)
    return AttentionChange(float(decay), float(increase))
