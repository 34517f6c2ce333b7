"""The one transformer block (pre-norm, as in ViT, arXiv 2010.11929), with timm's parameter names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention through torch's fused kernel.

    A relative-position bias and padding may be given; neither costs anything when it is not.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not divisible by {heads} heads; choose heads that divide it")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        bias: Float[Tensor, "heads tokens tokens"] | None = None,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        last: int | None = None,
    ) -> Float[Tensor, "batch out_tokens dim"]:
        """Attend from every token to every valid one.

        Args:
            x: tokens.
            bias: added to the attention logits.
            valid: False = padding, which nothing attends to.
            last: compute the answers of this many tokens at the end only; they attend to all.
        """
        q, k, v = self._queries_keys_values(x, last)
        bias = bias if bias is None or last is None else bias[:, -last:]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=_attention_mask(bias, valid, q.dtype))
        return self.proj(out.transpose(1, 2).flatten(2))

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


def _attention_mask(bias: Tensor | None, valid: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What torch's fused attention takes: a boolean mask (True = attend), an additive one, or nothing."""
    if valid is None:
        return None if bias is None else bias.to(dtype)
    attend = valid[:, None, None, :]
    if bias is None:
        return attend
    return bias.to(dtype).masked_fill(~attend, float("-inf"))


class Mlp(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "*lead dim"]) -> Float[Tensor, "*lead dim"]:
        return self.fc2(F.gelu(self.fc1(x)))


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
    """Pre-norm attention and MLP, each on a residual branch.

    Args:
        dim: width.
        heads: attention heads; must divide `dim`.
        mlp_ratio: width of the MLP's hidden layer over `dim`.
        layer_scale: initial gain of both branches, or None for no gain.
        drop_path: probability of dropping a branch in training.
        eps: LayerNorm's epsilon.
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
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        bias: Float[Tensor, "heads tokens tokens"] | None = None,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        last: int | None = None,
    ) -> Float[Tensor, "batch out_tokens dim"]:
        """See `Attention.forward` for the arguments."""
        attended = self.drop_path(self.ls1(self.attn(self.norm1(x), bias, valid, last)))
        x = (x if last is None else x[:, -last:]) + attended
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
