"""The one transformer block, with timm's parameter names.

Pre-norm as in ViT (arXiv 2010.11929) or post-norm as in the first Transformer (arXiv 1706.03762) and in BERT.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from unmask.core.nn.packed import grouped_attention

Norm = Literal["pre", "post"]


class Attention(nn.Module):
    """Multi-head self-attention through torch's fused kernel.

    A relative-position bias and padding may be given; neither costs anything when it is not.

    Args:
        dim: width.
        heads: must divide `dim`.
        attention_dropout: probability of dropping an attention weight in training, inside the fused kernel.
        dropout: probability of dropping a value of the result in training.
    """

    def __init__(self, dim: int, heads: int, *, attention_dropout: float = 0.0, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not divisible by {heads} heads; choose heads that divide it")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(attention_dropout)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        bias: Float[Tensor, "heads tokens tokens"] | None = None,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        last: int | None = None,
        position: Float[Tensor, "batch tokens dim"] | None = None,
        sizes: Int[Tensor, "kinds 2"] | None = None,
    ) -> Float[Tensor, "batch out_tokens dim"]:
        """Attend from every token to every valid one.

        Args:
            x: tokens.
            bias: added to the attention logits.
            valid: False = padding, which nothing attends to.
            last: compute the answers of this many tokens at the end only; they attend to all.
            position: added to what queries and keys are computed from, and not to what values are.
            sizes: x is one row of sets, grouped by `unmask.core.nn.packed.Groups`, with these sizes; a token attends to
                its own set only. Goes with none of bias, valid and last.
        """
        if position is not None:
            q, k, v = self._with_position(x, position)
        else:
            q, k, v = self._queries_keys_values(x, last)
        if sizes is not None:
            assert bias is None and valid is None and last is None, "sets go without bias, padding and `last`"
            dropout = self.attn_drop.p if self.attn_drop.training else 0.0
            out = grouped_attention(q, k, v, sizes, dropout)
            return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))
        bias = bias if bias is None or last is None else bias[:, -last:]
        mask = _attention_mask(bias, valid, q.dtype)
        dropout = self.attn_drop.p if self.attn_drop.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def _queries_keys_values(self, x: Tensor, last: int | None) -> tuple[Tensor, Tensor, Tensor]:
        b, n, d = x.shape
        if last is None:
            q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
            return q, k, v
        of_q, of_kv = self.qkv.weight.split([d, 2 * d])
        bias_q, bias_kv = self.qkv.bias.split([d, 2 * d])
        q = F.linear(x[:, -last:], of_q, bias_q).view(b, last, self.heads, d // self.heads).transpose(1, 2)
        k, v = F.linear(x, of_kv, bias_kv).view(b, n, 2, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        return q, k, v

    def _with_position(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, d = x.shape
        of_qk, of_v = self.qkv.weight.split([2 * d, d])
        bias_qk, bias_v = self.qkv.bias.split([2 * d, d])
        q, k = F.linear(x + position, of_qk, bias_qk).view(b, n, 2, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        v = F.linear(x, of_v, bias_v).view(b, n, self.heads, d // self.heads).transpose(1, 2)
        return q, k, v


def _attention_mask(bias: Tensor | None, valid: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What torch's fused attention takes: a boolean mask (True = attend), an additive one, or nothing."""
    if valid is None:
        return None if bias is None else bias.to(dtype)
    attend = valid[:, None, None, :]
    if bias is None:
        return attend
    return bias.to(dtype).masked_fill(~attend, float("-inf"))


class Mlp(nn.Module):
    """Two linear layers with a GELU between, and dropout after the GELU and at the end."""

    def __init__(self, dim: int, hidden: int, *, activation_dropout: float = 0.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.drop1 = nn.Dropout(activation_dropout)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop2 = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "*lead dim"]) -> Float[Tensor, "*lead dim"]:
        return self.drop2(self.fc2(self.drop1(F.gelu(self.fc1(x)))))


class LayerScale(nn.Module):
    """A learned gain per channel (CaiT, arXiv 2103.17239)."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Float[Tensor, "*lead dim"]) -> Float[Tensor, "*lead dim"]:
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth per sample (arXiv 1603.09382): in training, drop a residual branch with probability `rate`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "batch *rest"]) -> Float[Tensor, "batch *rest"]:
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        gate = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(keep)
        return x * gate / keep


class Block(nn.Module):
    """Attention and MLP, each on a residual branch.

    Args:
        dim: width.
        heads: attention heads; must divide `dim`.
        mlp_ratio: width of the MLP's hidden layer over `dim`.
        layer_scale: initial gain of both branches, or None for no gain.
        drop_path: probability of dropping a branch in training.
        eps: LayerNorm's epsilon.
        norm: ``pre`` normalises the input of each branch, ``post`` the sum after it.
        dropout: probability of dropping a value at the end of each branch in training.
        attention_dropout: probability of dropping an attention weight in training.
        activation_dropout: probability of dropping a value of the MLP's hidden layer in training.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float = 4.0,
        *,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        eps: float = 1e-6,
        norm: Norm = "pre",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        activation_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if norm not in ("pre", "post"):
            raise ValueError(f"norm {norm!r} is neither 'pre' nor 'post'")
        self.post_norm = norm == "post"
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, attention_dropout=attention_dropout, dropout=dropout)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), activation_dropout=activation_dropout, dropout=dropout)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        bias: Float[Tensor, "heads tokens tokens"] | None = None,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        last: int | None = None,
        position: Float[Tensor, "batch tokens dim"] | None = None,
        sizes: Int[Tensor, "kinds 2"] | None = None,
    ) -> Float[Tensor, "batch out_tokens dim"]:
        """See `Attention.forward` for the arguments."""
        entering = x if self.post_norm else self.norm1(x)
        attended = self.drop_path(self.ls1(self.attn(entering, bias, valid, last, position, sizes)))
        x = (x if last is None else x[:, -last:]) + attended
        if self.post_norm:
            x = self.norm1(x)
            return self.norm2(x + self.drop_path(self.ls2(self.mlp(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
