"""Cross-entropy over a large vocabulary: scores are made, used and dropped chunk by chunk."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

IGNORE = -100


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum of token losses; gradients are found in the forward pass, while a chunk's scores exist."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk: int,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        total = hidden.new_zeros((), dtype=torch.float32)
        d_hidden = torch.zeros_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and need_bias else None
        kind = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
        cast = weight if kind is None else weight.to(kind)
        for start in range(0, len(targets), chunk):
            rows, wanted = hidden[start : start + chunk], targets[start : start + chunk]
            rows = rows.to(cast.dtype)
            scores = F.linear(rows, cast).float()  # [chunk, vocabulary]
            if bias is not None:
                scores += bias.float()
            if scale != 1.0:
                scores *= scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            counted = wanted != IGNORE
            index = wanted.clamp(min=0)[:, None]
            total += F.cross_entropy(scores, wanted, ignore_index=IGNORE, reduction="sum")
            if not (need_hidden or need_weight or d_bias is not None):
                continue
            slope = scale if softcap is None else scale * (1 - (scores / softcap).square())
            d = scores.softmax(1)
            d.scatter_add_(1, index, torch.full_like(index, -1, dtype=d.dtype))
            d *= counted[:, None]
            if softcap is not None or scale != 1.0:
                d *= slope
            if d_bias is not None:
                d_bias += d.sum(0)
            d = d.to(cast.dtype)
            if d_hidden is not None:
                d_hidden[start : start + chunk] = (d @ cast).to(hidden.dtype)
            if d_weight is not None:
                d_weight.addmm_(d.t().float(), rows.float()) if d.dtype == torch.float32 else d_weight.add_(
                    d.t() @ rows
                )
        ctx.save_for_backward(*(g for g in (d_hidden, d_weight, d_bias) if g is not None))
        ctx.present = [g is not None for g in (d_hidden, d_weight, d_bias)]
        ctx.kinds = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        found = [
            next(saved).mul(grad).to(kind) if there else None
            for there, kind in zip(ctx.present, ctx.kinds, strict=True)
        ]
        return (*found, None, None, None, None)


def linear_cross_entropy(
    hidden: Float[Tensor, "tokens dim"],
    weight: Float[Tensor, "vocabulary dim"],
    targets: Int[Tensor, "tokens"],
    bias: Float[Tensor, "vocabulary"] | None = None,
    *,
    chunk: int = 256,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Float[Tensor, ""]:
    """The sum of the cross-entropies of ``softmax(hidden @ weight.T + bias)`` at the targets, in float32.

    The scores of `chunk` tokens exist at a time, and never in the backward pass: beside the gradients of `hidden` and
    `weight`, memory does not grow with the number of tokens times the vocabulary. The matrix products run in the type
    of autocast, where that is on.

    Args:
        hidden: what the output layer gets.
        weight: of the output layer; an embedding that is tied to it gets both gradients.
        targets: ids; -100 = not counted.
        bias: of the output layer.
        chunk: tokens scored at a time.
        scale: multiplies the scores (``logit_scale`` in some models).
        softcap: bounds the scores by ``softcap * tanh(scores / softcap)`` (Gemma 2, arXiv 2408.00118), after `scale`.
    """
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, chunk, scale, softcap)
