"""Attention within sets of different sizes, concatenated: nothing is padded and nothing is dropped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """Tokens put in an order in which every set stands together, and sets of equal size follow each other.

    Sets of one size are then a rectangle, and dense attention runs on it without a mask. Make one with `Groups.of`.

    Args:
        order: permutation of the tokens; ``x[order]`` is grouped.
        inverse: its inverse; ``grouped[inverse]`` is x again.
        sizes: rows (number of sets, tokens in each), by rising number of tokens; always on the CPU, since the host
            launches one kernel per row. A tensor, because a compiler would take numbers for constants.
    """

    order: Int[Tensor, "tokens"]
    inverse: Int[Tensor, "tokens"]
    sizes: Int[Tensor, "kinds 2"]

    @classmethod
    def of(cls, set_of: Int[Tensor, "tokens"]) -> Groups:
        """Group tokens by the number of their set, which may be any integer. Costs one host sync for the sizes.

        Tokens of a set keep their order, and sets of one size are sorted by number.
        """
        _, dense, counts = set_of.unique(return_inverse=True, return_counts=True)
        order = (counts[dense] * len(counts) + dense).argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        sizes, numbers = counts.cpu().unique(return_counts=True)
        return cls(order, inverse, torch.stack([numbers, sizes], dim=1))


def grouped_attention(
    q: Float[Tensor, "1 heads tokens dim"],
    k: Float[Tensor, "1 heads tokens dim"],
    v: Float[Tensor, "1 heads tokens dim"],
    sizes: Int[Tensor, "kinds 2"],
    dropout: float = 0.0,
) -> Float[Tensor, "1 heads tokens dim"]:
    """Softmax attention within each set of grouped tokens (see `Groups`), through torch's fused kernel.

    The cost is that of the sets' true sizes: one call for each size that occurs.
    """
    # Sizes differ from batch to batch: traced, they would mean a new compilation for each. The function is disabled
    # here, not by a decorator, because that imports torch._dynamo, which takes seconds.
    attend = torch.compiler.disable(_attend_by_size) if torch.compiler.is_compiling() else _attend_by_size
    return attend(q, k, v, sizes, dropout)


def _attend_by_size(q: Tensor, k: Tensor, v: Tensor, sizes: Tensor, dropout: float) -> Tensor:
    rectangles = sizes.tolist()
    lengths = [number * size for number, size in rectangles]
    parts = []
    for (number, size), *one in zip(rectangles, *(x[0].split(lengths, dim=1) for x in (q, k, v)), strict=True):
        q_i, k_i, v_i = (x.unflatten(1, (number, size)).transpose(0, 1) for x in one)  # [number, heads, size, dim]
        out = F.scaled_dot_product_attention(q_i, k_i, v_i, dropout_p=dropout)
        parts.append(out.transpose(0, 1).flatten(1, 2))  # [heads, number * size, dim]
    return torch.cat(parts, dim=1)[None]
