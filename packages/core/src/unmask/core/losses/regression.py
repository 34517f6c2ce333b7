"""Masked regression: a value per token, then a mean over the tokens that count."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from unmask.core.method import Term

RegressionKind = Literal["l1", "l2", "smooth_l1"]


def l1(prediction: Float[Tensor, "*lead dim"], target: Float[Tensor, "*lead dim"]) -> Float[Tensor, "*lead"]:
    """Mean absolute error over the last axis, in float32."""
    return (prediction.float() - target.float()).abs().mean(-1)


def l2(prediction: Float[Tensor, "*lead dim"], target: Float[Tensor, "*lead dim"]) -> Float[Tensor, "*lead"]:
    """Mean squared error over the last axis, in float32."""
    return (prediction.float() - target.float()).square().mean(-1)


def smooth_l1(
    prediction: Float[Tensor, "*lead dim"], target: Float[Tensor, "*lead dim"], beta: float = 1.0
) -> Float[Tensor, "*lead"]:
    """Huber's loss over `beta`, averaged over the last axis, in float32: squared below `beta`, absolute above."""
    return F.smooth_l1_loss(prediction.float(), target.float(), reduction="none", beta=beta).mean(-1)


def regression(
    kind: RegressionKind, prediction: Float[Tensor, "*lead dim"], target: Float[Tensor, "*lead dim"]
) -> Float[Tensor, "*lead"]:
    """One of `l1`, `l2` and `smooth_l1` by name."""
    return {"l1": l1, "l2": l2, "smooth_l1": smooth_l1}[kind](prediction, target)


def mean_term(values: Float[Tensor, "*lead"], where: Bool[Tensor, "*lead"] | None = None, weight: float = 1.0) -> Term:
    """The mean of per-token values as a `Term`: their sum, and how many there are.

    Args:
        values: one loss per token.
        where: True where a token counts; None when all do. Other values are replaced, not multiplied by 0, so that a
            NaN at padding does not reach the sum.
        weight: the term's weight in the loss.
    """
    if where is None:
        return Term(values.sum(), float(values.numel()), weight)
    return Term(values.masked_fill(~where, 0.0).sum(), where.sum(), weight)
