"""Heads of masked language models as CLIMB draws them: over words, and over a few classes."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

HEAD_EPS = 1e-12  # of the LayerNorm in a head, whatever the encoder's is


class ClassHead(nn.Module):
    """Scores of word classes from hidden states, built as the head of a RoBERTa is."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.dense, self.layer_norm = nn.Linear(dim, dim), nn.LayerNorm(dim, eps=HEAD_EPS)
        self.decoder = nn.Linear(dim, classes)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, hidden: Float[Tensor, "*lead dim"]) -> Float[Tensor, "*lead classes"]:
        """Scores."""
        return self.decoder(self.layer_norm(nn.functional.gelu(self.dense(hidden))))


def init_head(model: Any) -> None:
    """Draw the word head of a RoBERTa-like model as released; leave other architectures as they are."""
    head = getattr(model, "lm_head", None)
    if head is None or not hasattr(head, "layer_norm"):
        return
    for layer in (head.dense, head.layer_norm, *(() if model.config.tie_word_embeddings else (head.decoder,))):
        layer.reset_parameters()
    nn.init.zeros_(head.decoder.bias)
    head.layer_norm.eps = HEAD_EPS


def freeze_unused_bias(model: Any) -> None:
    """RoBERTa's and BERT's heads have a bias beside that of their linear layer: two, where nothing is tied."""
    for head in (getattr(model, "lm_head", None), getattr(getattr(model, "cls", None), "predictions", None)):
        bias = getattr(head, "bias", None)
        if isinstance(bias, nn.Parameter) and bias is not getattr(getattr(head, "decoder", None), "bias", bias):
            bias.requires_grad_(False)
