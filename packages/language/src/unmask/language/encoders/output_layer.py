"""The output layer of a causal language model as a cross-entropy that never holds the scores of a whole batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unmask.core.errors import UnmaskError
from unmask.core.losses import linear_cross_entropy
from unmask.language.encoders.language_model import last_hidden

_CLOSE = 1e-4


@dataclass(frozen=True)
class OutputLayer:
    """How hidden states become scores over the vocabulary, beside the linear layer itself.

    Args:
        scale: multiplies the scores.
        softcap: bounds them; None where the model does not.
        chunk: tokens that are scored at a time.
    """

    scale: float = 1.0
    softcap: float | None = None
    chunk: int = 256

    def loss(self, model: Any, hidden: Float[Tensor, "*lead dim"], targets: Int[Tensor, "*lead"]) -> Float[Tensor, ""]:
        """The sum of the cross-entropies at `targets` (-100 = not counted); see `linear_cross_entropy`."""
        layer = model.get_output_embeddings()
        bias = getattr(layer, "bias", None)
        return linear_cross_entropy(
            hidden.flatten(0, -2), layer.weight, targets.flatten(), bias,
            chunk=self.chunk, scale=self.scale, softcap=self.softcap,
        )  # fmt: skip

    def scores(self, model: Any, hidden: Float[Tensor, "*lead dim"]) -> Float[Tensor, "*lead vocabulary"]:
        """The scores themselves, in float32."""
        scores = model.get_output_embeddings()(hidden).float() * self.scale
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)


def output_layer(model: Any, chunk: int = 256) -> OutputLayer:
    """What a model's configuration says of its scores, held against the loss that the model itself computes.

    Args:
        model: a causal language model of transformers, on any device but meta.
        chunk: tokens that are scored at a time.

    Raises:
        UnmaskError: the model does more with its scores than a scale and a softcap.
    """
    config = model.config
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    layer = OutputLayer(float(scale), getattr(config, "final_logit_softcapping", None), chunk)
    if next(model.parameters()).is_meta:
        return layer
    own, ours = _losses(model, layer)
    if abs(own - ours) > _CLOSE * max(1.0, abs(own)):
        raise UnmaskError(
            f"model: the loss of {type(model).__name__} is not a cross-entropy of its output layer (it says {own:.6f}, "
            f"ours is {ours:.6f}): this architecture cannot be trained here"
        )
    return layer


@torch.no_grad()
def _losses(model: Any, layer: OutputLayer) -> tuple[float, float]:
    """The loss of a few tokens, by the model itself and by `layer`."""
    device, was = next(model.parameters()).device, model.training
    rows = model.get_input_embeddings().weight.shape[0]
    tokens = (torch.arange(8, device=device) * 7 % rows)[None]
    model.eval()
    try:
        own = float(model(input_ids=tokens, labels=tokens).loss)
        hidden = last_hidden(model, tokens)
        return own, float(layer.loss(model, hidden[:, :-1], tokens[:, 1:])) / 7
    finally:
        model.train(was)
