"""The one transformer block, with timm's parameter names: on sequences, on sets, and with a memory.

Pre-norm as in ViT (arXiv 2010.11929) or post-norm as in the first Transformer (arXiv 1706.03762) and in BERT.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from unmask.core.nn.attention import Attention, CrossAttention, GroupedAttention
from unmask.core.nn.rotary import Rotary

Norm = Literal["pre", "post"]


class Mlp(nn.Module):
    """Two linear layers with a GELU between, and dropout after the GELU and at the end."""

    def __init__(
        self, dim: int, hidden: int, *, bias: bool = True, activation_dropout: float = 0.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.drop1 = nn.Dropout(activation_dropout)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)
        self.drop2 = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "*lead dim"]) -> Float[Tensor, "*lead dim"]:
        x = self.drop1(F.gelu(self.fc1(x)))  # [*lead, hidden]
        return self.drop2(self.fc2(x))


class SwiGLU(nn.Module):
    """The gated MLP of LLaMA (arXiv 2002.05202), ``fc2(silu(fc1_g(x)) * fc1_x(x))``, with timm's parameter names.

    In LLaMA's weights ``fc1_g``, ``fc1_x`` and ``fc2`` are called ``gate_proj``, ``up_proj`` and ``down_proj``; in
    V-JEPA 2's ``fc1``, ``fc2`` and ``fc3``.
    """

    def __init__(
        self, dim: int, hidden: int, *, bias: bool = True, activation_dropout: float = 0.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.fc1_g = nn.Linear(dim, hidden, bias=bias)
        self.fc1_x = nn.Linear(dim, hidden, bias=bias)
        self.drop1 = nn.Dropout(activation_dropout)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)
        self.drop2 = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "*lead dim"]) -> Float[Tensor, "*lead dim"]:
        x = self.drop1(F.silu(self.fc1_g(x)) * self.fc1_x(x))  # [*lead, hidden]
        return self.drop2(self.fc2(x))


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
        gate = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(keep)  # [batch, 1, ...]
        return x * gate / keep


class _Branches(nn.Module):
    """Attention and MLP, each on a residual branch; the subclass says which attention.

    Args:
        dim: width.
        heads: attention heads; must divide `dim`.
        mlp_ratio: width of the MLP's hidden layer over `dim`.
        layer_scale: initial gain of both branches, or None for no gain.
        drop_path: probability of dropping a branch in training.
        eps: the norms' epsilon.
        norm: ``pre`` normalises the input of each branch, ``post`` the sum after it.
        rms_norm: root mean square norms (arXiv 1910.07467) instead of LayerNorms.
        swiglu: a gated MLP (`SwiGLU`) instead of the one with a GELU.
        bias: whether linear layers have biases.
        dropout: probability of dropping a value at the end of each branch in training.
        attention_dropout: probability of dropping an attention weight in training.
        activation_dropout: probability of dropping a value of the MLP's hidden layer in training.
    """

    attention: type[Attention] | type[GroupedAttention]

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
        rms_norm: bool = False,
        swiglu: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        activation_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if norm not in ("pre", "post"):
            raise ValueError(f"norm {norm!r} is neither 'pre' nor 'post'")
        self.post_norm = norm == "post"
        make_norm, make_mlp = nn.RMSNorm if rms_norm else nn.LayerNorm, SwiGLU if swiglu else Mlp
        hidden = int(dim * mlp_ratio)
        self.norm1 = make_norm(dim, eps=eps)
        self.attn = self.attention(dim, heads, bias=bias, attention_dropout=attention_dropout, dropout=dropout)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = make_norm(dim, eps=eps)
        self.mlp = make_mlp(dim, hidden, bias=bias, activation_dropout=activation_dropout, dropout=dropout)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def _attention_input(self, x: Tensor) -> Tensor:
        return x if self.post_norm else self.norm1(x)

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Both residual sums, given the output of attention."""
        x = x + self.drop_path(self.ls1(attended))
        if self.post_norm:
            x = self.norm1(x)
            return self.norm2(x + self.drop_path(self.ls2(self.mlp(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class Block(_Branches):
    """The transformer block on sequences; see `_Branches` for the arguments.

    With ``rms_norm=True, swiglu=True, bias=False``, rotary positions and ``causal=True`` it is LLaMA's.
    """

    attention = Attention

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
        """See `Attention.forward` for the arguments."""
        x_in = self._attention_input(x)
        attended = self.attn(x_in, bias, valid, last=last, rotary=rotary, causal=causal)  # [batch, out_tokens, dim]
        return self._finish(x if last is None else x[:, -last:], attended)


class GroupedBlock(_Branches):
    """The transformer block on sets of any size, concatenated; see `_Branches` for the arguments."""

    attention = GroupedAttention

    def forward(
        self,
        x: Float[Tensor, "1 tokens dim"],
        sizes: Int[Tensor, "kinds 2"],
        position: Float[Tensor, "1 tokens dim"] | None = None,
    ) -> Float[Tensor, "1 tokens dim"]:
        """See `GroupedAttention.forward` for the arguments."""
        return self._finish(x, self.attn(self._attention_input(x), sizes, position))


class CrossBlock(nn.Module):
    """CroCo's decoder block (arXiv 2210.10716), with its parameter names: self-attention, cross-attention, MLP.

    Pre-norm. The memory has a norm of its own in every block, ``norm_y``, and stays as it is.

    Args:
        dim: width of tokens and memory.
        heads: attention heads; must divide `dim`.
        mlp_ratio: width of the MLP's hidden layer over `dim`.
        eps: LayerNorm's epsilon.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads)
        self.cross_attn = CrossAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.norm3 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.norm_y = nn.LayerNorm(dim, eps=eps)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        memory: Float[Tensor, "batch memory_tokens dim"],
        valid: Bool[Tensor, "batch tokens"] | None = None,
        *,
        memory_valid: Bool[Tensor, "batch memory_tokens"] | None = None,
        last: int | None = None,
        rotary: Rotary | None = None,
        memory_rotary: Rotary | None = None,
    ) -> Float[Tensor, "batch out_tokens dim"]:
        """See `Attention.forward` and `CrossAttention.forward` for the arguments."""
        attended = self.attn(self.norm1(x), None, valid, last=last, rotary=rotary)  # [batch, out_tokens, dim]
        x = (x if last is None else x[:, -last:]) + attended
        rotary = None if rotary is None else rotary.last(x.shape[1])
        x = x + self.cross_attn(
            self.norm2(x), self.norm_y(memory), memory_valid, rotary=rotary, memory_rotary=memory_rotary
        )
        return x + self.mlp(self.norm3(x))
