"""A transformer over letters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from unmask.core.method import Features
from unmask.core.nn.positions import sincos_positions
from unmask.core.nn.transformer import Block
from unmask.letters.data.decode import VOCABULARY


@dataclass(frozen=True)
class EncoderSettings:
    """The shape of the transformer."""

    dim: int = 32
    depth: int = 2
    heads: int = 2


class LetterEncoder(nn.Module):
    """Letters, positions, blocks and a norm; hidden letters are replaced by what is given for them."""

    def __init__(self, settings: EncoderSettings, length: int) -> None:
        super().__init__()
        self.settings, self.length, self.dim = settings, length, settings.dim
        self.embed = nn.Embedding(VOCABULARY, settings.dim)
        self.register_buffer("positions", sincos_positions((length,), settings.dim)[None], persistent=False)
        self.blocks = nn.ModuleList(Block(settings.dim, settings.heads) for _ in range(settings.depth))
        self.norm = nn.LayerNorm(settings.dim)

    def forward(
        self,
        letters: Int[Tensor, "batch length"],
        valid: Bool[Tensor, "batch length"],
        hidden: Bool[Tensor, "batch length"] | None = None,
        mask_token: Float[Tensor, "1 1 dim"] | None = None,
    ) -> Features:
        x = self.embed(letters)  # [batch, length, dim]
        if hidden is not None:
            x = torch.where(hidden[..., None], mask_token, x)
        x = x + self.positions
        for block in self.blocks:
            x = block(x, None, valid)
        return Features(self.norm(x), (self.length,), valid=valid)
