"""The head of a masked language model, in two steps: only tokens that are asked for are scored, and those in chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from unmask.core.errors import UnmaskError
from unmask.core.losses import linear_cross_entropy
from unmask.language.encoders.language_model import last_hidden

Transform = Callable[[Any, Tensor], Tensor]
# What each family does between the last hidden states and the linear layer, by an attribute that only it has.
_FAMILIES: dict[str, Transform] = {
    "cls.predictions.transform": lambda model, x: model.cls.predictions.transform(x),  # BERT
    "lm_head.layer_norm": lambda model, x: model.lm_head.layer_norm(F.gelu(model.lm_head.dense(x))),  # RoBERTa
    "head.norm": lambda model, x: model.head(x),  # ModernBERT
    "vocab_transform": lambda model, x: _distilbert(model, x),
    "generator_predictions": lambda model, x: model.generator_predictions(x),  # ELECTRA
}
_CLOSE = 1e-4


def _distilbert(model: Any, x: Tensor) -> Tensor:
    return model.vocab_layer_norm(model.activation(model.vocab_transform(x)))


@dataclass(frozen=True)
class MaskedHead:
    """How hidden states of a masked language model become scores over its vocabulary.

    Args:
        family: the key of its transform.
        chunk: tokens that are scored at a time.
    """

    family: str
    chunk: int = 1024

    def transform(self, model: Any, hidden: Float[Tensor, "*lead dim"]) -> Float[Tensor, "*lead width"]:
        """What the linear layer gets."""
        return _FAMILIES[self.family](model, hidden)

    def loss(
        self, model: Any, hidden: Float[Tensor, "tokens dim"], targets: Int[Tensor, "tokens"]
    ) -> Float[Tensor, ""]:
        """The sum of the cross-entropies at `targets`; see `linear_cross_entropy`."""
        layer = model.get_output_embeddings()
        states = self.transform(model, hidden)
        return linear_cross_entropy(states, layer.weight, targets, getattr(layer, "bias", None), chunk=self.chunk)

    def scores(self, model: Any, hidden: Float[Tensor, "*lead dim"]) -> Float[Tensor, "*lead vocabulary"]:
        """The scores themselves, in float32."""
        return model.get_output_embeddings()(self.transform(model, hidden)).float()


def masked_head(model: Any, chunk: int = 1024) -> MaskedHead:
    """The head of a masked language model, held against the scores that the model itself gives.

    Args:
        model: of transformers, on any device but meta.
        chunk: tokens that are scored at a time.

    Raises:
        UnmaskError: a head of another kind.
    """
    names = {name for name, _ in model.named_modules()}
    family = next((name for name in _FAMILIES if name in names), None)
    if family is not None and (next(model.parameters()).is_meta or _difference(model, MaskedHead(family)) < _CLOSE):
        return MaskedHead(family, chunk)
    raise UnmaskError(
        f"model: the head of {type(model).__name__} is none of those known here (BERT, RoBERTa, DistilBERT, ELECTRA, "
        "ModernBERT and their relatives); take one of these architectures"
    )


@torch.no_grad()
def _difference(model: Any, head: MaskedHead) -> float:
    """The largest difference of a few scores, as a share of the largest score."""
    device, was = next(model.parameters()).device, model.training
    rows = model.get_input_embeddings().weight.shape[0]
    tokens = (torch.arange(8, device=device) * 7 % rows)[None]
    model.eval()
    try:
        output = model(input_ids=tokens)
        own = output.prediction_logits if hasattr(output, "prediction_logits") else output.logits
        ours = head.scores(model, last_hidden(model, tokens))
        return float((own.float() - ours).abs().max() / own.float().abs().max().clamp(min=1e-6))
    finally:
        model.train(was)
