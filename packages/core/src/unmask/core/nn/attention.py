"""Self-attention on sequences and on sets of different sizes, and cross-attention.

All of them run torch's fused kernel. Queries, keys and values of self-attention come out of one fused matrix ``qkv``,
as in timm; cross-attention has ``projq``, ``projk`` and ``projv``, as in CroCo. `watch` gives access to queries, keys,
values and attention maps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from unmask.core.nn.packed import grouped_attention
from unmask.core.nn.rotary import Rotary


@dataclass(frozen=True)
class Seen:
    """What one call of `Attention` or `CrossAttention` computed, with gradients; see `watch`.

    Args:
        q: queries, after rotation.
        k: keys, after rotation.
        v: values.
        mask: added to the logits (float) or True where a query attends (bool); None where nothing is masked.
    """

    q: Float[Tensor, "batch heads queries head_dim"]
    k: Float[Tensor, "batch heads keys head_dim"]
    v: Float[Tensor, "batch heads keys head_dim"]
    mask: Tensor | None

    @property
    def logits(self) -> Float[Tensor, "batch heads queries keys"]:
        """The softmax's input, in float32: scaled products, bias added, -inf where a query does not attend."""
        logits = self.q.float() @ self.k.float().transpose(-1, -2) / self.q.shape[-1] ** 0.5
        if self.mask is None:
            return logits
        return logits.masked_fill(~self.mask, float("-inf")) if self.mask.dtype == torch.bool else logits + self.mask

    @property
    def weights(self) -> Float[Tensor, "batch heads queries keys"]:
        """The attention map, before dropout: each query's weights sum to 1."""
        return self.logits.softmax(-1)


@contextmanager
def watch(*layers: Attention | CrossAttention) -> Iterator[list[Seen]]:
    """Collect the queries, keys, values and attention maps of these layers while the block runs.

    The fused kernel still computes the outputs, so they do not change; maps are computed only when they are read.
    Outside the block nothing is kept, at no cost::

        with watch(encoder.blocks[-1].attn) as seen:
            encoder(images)
        attention = seen[0].weights  # [batch, heads, queries, keys]

    Yields:
        one entry for each call of each layer, in the order of the calls.
    """
    seen: list[Seen] = []
    for layer in layers:
        layer.seen = seen
    try:
        yield seen
    finally:
        for layer in layers:
            layer.seen = None


def check_heads(dim: int, heads: int) -> None:
    """Raise ValueError unless `heads` divides `dim`."""
    if dim % heads:
        raise ValueError(f"dim {dim} is not divisible by {heads} heads; choose heads that divide it")


class _SelfAttention(nn.Module):
    """The weights of self-attention, with timm's names.

    Args:
        dim: width.
        heads: must divide `dim`.
        bias: whether the two linear layers have biases.
        attention_dropout: probability of dropping an attention weight in training, inside the fused kernel.
        dropout: probability of dropping a value of the result in training.
    """

    def __init__(
        self, dim: int, heads: int, *, bias: bool = True, attention_dropout: float = 0.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.attn_drop = nn.Dropout(attention_dropout)
        self.proj = nn.Linear(dim, dim, bias=bias)
        self.proj_drop = nn.Dropout(dropout)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = _split_heads(self.qkv(x), self.heads, 3)
        return q, k, v

    def _rows(self, sizes: list[int]) -> list[tuple[Tensor, Tensor | None]]:
        """The fused matrix and bias, in parts."""
        weights = self.qkv.weight.split(sizes)
        biases = [None] * len(sizes) if self.qkv.bias is None else self.qkv.bias.split(sizes)
        return list(zip(weights, biases, strict=True))

    def _output(self, out: Tensor) -> Tensor:
        """[batch, heads, tokens, head_dim] to [batch, tokens, dim]."""
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class Attention(_SelfAttention):
    """Multi-head self-attention; see `_SelfAttention` for the arguments.

    A relative-position bias, padding, rotary positions and a causal mask are optional, and cost nothing when not used.
    """

    seen: list[Seen] | None = None  # what `watch` collects

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        bias: Float[Tensor, "heads tokens tokens"] | None = None,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        *,
        last: int | None = None,
        rotary: Rotary | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "batch out_tokens dim"]:
        """Attend from every token to every valid one.

        Args:
            x: tokens.
            bias: added to the attention logits.
            valid: False = padding, which nothing attends to.
            last: compute outputs for this many tokens at the end only; they attend to all.
            rotary: rotates queries and keys by the tokens' positions.
            causal: a token attends to itself and those before it.
        """
        q, k, v = self._project(x) if last is None else self._project_last(x, last)  # [batch, heads, tokens, head_dim]
        if rotary is not None:
            q, k = rotary.last(q.shape[2]).rotate(q), rotary.rotate(k)
        bias = bias if bias is None or last is None else bias[:, -last:]  # [heads, queries, keys]
        square = causal and bias is None and valid is None and last is None  # the kernel's own causal mask will do
        mask = None if square else _attention_mask(bias, valid, _lower_triangle(q, k) if causal else None, q.dtype)
        if self.seen is not None:
            self.seen.append(Seen(q, k, v, _lower_triangle(q, k) if square else mask))
        dropout = self.attn_drop.p if self.attn_drop.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=square)  # [batch, heads, out, head_dim]
        return self._output(out)

    def _project_last(self, x: Tensor, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the last tokens only."""
        of_q, of_kv = self._rows([x.shape[2], 2 * x.shape[2]])
        (q,) = _split_heads(F.linear(x[:, -last:], *of_q), self.heads, 1)
        k, v = _split_heads(F.linear(x, *of_kv), self.heads, 2)
        return q, k, v


class GroupedAttention(_SelfAttention):
    """Self-attention within sets of any size, concatenated; see `_SelfAttention` for the arguments."""

    def forward(
        self,
        x: Float[Tensor, "1 tokens dim"],
        sizes: Int[Tensor, "kinds 2"],
        position: Float[Tensor, "1 tokens dim"] | None = None,
    ) -> Float[Tensor, "1 tokens dim"]:
        """Attend from every token to those of its own set.

        Args:
            x: one row of sets, grouped by `unmask.core.nn.packed.Groups`.
            sizes: the groups' sizes.
            position: added to what queries and keys are computed from, and not to what values are (as in DETR, arXiv
                2005.12872, and SST, arXiv 2112.06375).
        """
        q, k, v = self._project(x) if position is None else self._project_with(x, position)  # [1, heads, tokens, ...]
        dropout = self.attn_drop.p if self.attn_drop.training else 0.0
        return self._output(grouped_attention(q, k, v, sizes, dropout))

    def _project_with(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        of_qk, of_v = self._rows([2 * x.shape[2], x.shape[2]])
        q, k = _split_heads(F.linear(x + position, *of_qk), self.heads, 2)
        (v,) = _split_heads(F.linear(x, *of_v), self.heads, 1)
        return q, k, v


class CrossAttention(nn.Module):
    """Multi-head attention from one sequence to another, with CroCo's parameter names.

    Args:
        dim: width of both sequences.
        heads: must divide `dim`.
        project: end with a linear layer over all heads; False leaves it out, as V-JEPA's attentive pooling does.
    """

    seen: list[Seen] | None = None  # what `watch` collects

    def __init__(self, dim: int, heads: int, *, project: bool = True) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.heads = heads
        self.projq, self.projk, self.projv = (nn.Linear(dim, dim) for _ in range(3))
        self.proj = nn.Linear(dim, dim) if project else nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        memory: Float[Tensor, "batch memory_tokens dim"],
        valid: Bool[Tensor, "batch memory_tokens"] | None = None,
        *,
        rotary: Rotary | None = None,
        memory_rotary: Rotary | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Attend from every token of `x` to every valid one of `memory`.

        Args:
            x: the tokens that queries are computed from.
            memory: the tokens that keys and values are computed from.
            valid: False = padding of the memory.
            rotary: rotates the queries by the positions of `x`.
            memory_rotary: rotates the keys by the positions of the memory.
        """
        (q,) = _split_heads(self.projq(x), self.heads, 1)  # [batch, heads, tokens, head_dim]
        (k,), (v,) = (_split_heads(of(memory), self.heads, 1) for of in (self.projk, self.projv))
        q, k = q if rotary is None else rotary.rotate(q), k if memory_rotary is None else memory_rotary.rotate(k)
        mask = _attention_mask(None, valid, None, q.dtype)
        if self.seen is not None:
            self.seen.append(Seen(q, k, v, mask))
        out = F.scaled_dot_product_attention(q, k, v, mask)  # [batch, heads, tokens, head_dim]
        return self.proj(out.transpose(1, 2).flatten(2))


def _split_heads(x: Tensor, heads: int, parts: int) -> Tensor:
    """[batch, tokens, parts * dim] to [parts, batch, heads, tokens, head_dim]."""
    return x.unflatten(2, (parts, heads, -1)).permute(2, 0, 3, 1, 4)


def _lower_triangle(q: Tensor, k: Tensor) -> Bool[Tensor, "queries keys"]:
    """True where a query may attend; the queries are the last of the keys' tokens."""
    queries, keys = q.shape[2], k.shape[2]
    return torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)


def _attention_mask(
    bias: Tensor | None, valid: Tensor | None, causal: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """What torch's fused attention takes: a boolean mask (True = attend), an additive one, or nothing."""
    attend = None if valid is None else valid[:, None, None, :]
    if causal is not None:
        attend = causal if attend is None else attend & causal
    if bias is None or attend is None:
        return attend if bias is None else bias.to(dtype)
    return bias.to(dtype).masked_fill(~attend, float("-inf"))
