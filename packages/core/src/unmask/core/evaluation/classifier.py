"""A classifier on a pre-trained encoder, as a method that the training loop trains."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from unmask.core.evaluation.encoding import Encoding
from unmask.core.method import Clock, Features, Metric, Output, Term, encoder_of
from unmask.core.nn.transformer import DropPath
from unmask.core.randomness import Key
from unmask.core.training.recipe import Tuning

_POSITIONS = ("cls_token", "pos_embed")  # as in MAE's released fine-tuning, these do not decay


class Classifier(nn.Module):
    """What `Method.encode` gives as one vector per sample, LayerNorm, and a linear layer. Nothing is masked.

    The encoder's own final norm is replaced by the LayerNorm after pooling, as in MAE's released code. Of the method
    only what `encode` runs is kept.

    Args:
        method: pre-trained; copied, not changed.
        encoding: one vector per sample.
        dim: width of these vectors.
        tuning: classes, smoothing, drop path, layer decay and how the head begins.
    """

    def __init__(self, method: nn.Module, encoding: Encoding, dim: int, tuning: Tuning) -> None:
        super().__init__()
        self.method: Any = encoder_alone(method)
        self.encoding, self.tuning, self.classes = encoding, tuning, list(tuning.classes)
        encoder = encoder_of(self.method)
        if hasattr(encoder, "norm"):
            encoder.norm = nn.Identity()
        for parameter in encoder.parameters():  # fixed positions are trained from here on, as in the released code
            parameter.requires_grad_(True)
        _set_drop_path(encoder, tuning.drop_path)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, len(self.classes))
        nn.init.trunc_normal_(self.head.weight, std=tuning.head_std)
        nn.init.zeros_(self.head.bias)

    def draw(self, batch: Any, clock: Clock, key: Key) -> None:
        """Nothing is left to chance but drop path."""

    def predict(self, batch: Any, plan: None = None) -> Float[Tensor, "batch classes"]:
        """Logits of every class."""
        vectors = self.encoding.vectors(self.encode(batch))  # [batch, dim]
        return self.head(self.norm(vectors))  # [batch, classes]

    def forward(self, batch: Any, plan: None = None) -> Output:
        """Cross-entropy with label smoothing, and the accuracy."""
        logits = self.predict(batch).float()
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=self.tuning.label_smoothing, reduction="sum")
        right = (logits.argmax(1) == batch.labels).sum()
        return Output({"classes": Term(loss, len(logits))}, {"accuracy": Metric(right, len(logits))})

    def encode(self, batch: Any) -> Features:
        """What the encoder gives, its final norm left out."""
        return self.method.encode(batch)

    def encoder_of(self) -> nn.Module:
        return encoder_of(self.method)

    def no_weight_decay(self) -> set[str]:
        """Positions and class token, besides vectors and biases."""
        return {name for name, _ in self.named_parameters() if name.endswith(_POSITIONS)}

    def param_groups(self) -> list[dict[str, Any]]:
        """One group per layer, whose learning rate is ``layer_decay`` times that of the layer above; 1 for the head."""
        layers = layers_of(self.encoder_of())
        number = {id(p): i for i, layer in enumerate(layers) for part in layer for p in _parameters(part)}
        groups: dict[int, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(number.get(id(parameter), len(layers)), []).append((name, parameter))
        decay = self.tuning.layer_decay
        return [{"params": named, "lr_scale": decay ** (len(layers) - i)} for i, named in sorted(groups.items())]


Layers = list[list[nn.Module | nn.Parameter]]


def layers_of(encoder: nn.Module) -> Layers:
    """The layers of an encoder, lowest first, for learning rates that fall with depth.

    An encoder says so itself in ``layers_by_depth() -> list[list[nn.Module | nn.Parameter]]``: what embeds comes first,
    and what it leaves out learns as fast as a head. One that does not say is one layer, and of several in a
    ``ModuleDict`` the layers come one after another.
    """
    if hasattr(encoder, "layers_by_depth"):
        return encoder.layers_by_depth()  # type: ignore[operator]
    if isinstance(encoder, nn.ModuleDict):
        return [layer for part in encoder.values() for layer in layers_of(part)]
    return [[encoder]]


def _parameters(part: nn.Module | nn.Parameter) -> Iterable[nn.Parameter]:
    return [part] if isinstance(part, nn.Parameter) else part.parameters()


def _set_drop_path(encoder: nn.Module, rate: float) -> None:
    gates = [module for module in encoder.modules() if isinstance(module, DropPath)]
    for i, gate in enumerate(gates):
        gate.rate = rate * i / max(1, len(gates) - 1)


def encoder_alone(method: nn.Module) -> nn.Module:
    """A copy of a method without what `encode` does not run: decoders, heads, teachers, mask tokens."""
    kept = copy.deepcopy(method)
    inside = {id(tensor) for tensor in _tensors(encoder_of(kept))}
    for name, child in list(kept.named_children()):
        own = [id(tensor) for tensor in _tensors(child)]
        if own and inside.isdisjoint(own):
            delattr(kept, name)
    for name, parameter in list(kept.named_parameters()):
        if id(parameter) not in inside:
            parameter.requires_grad_(False)
            if "." not in name:
                delattr(kept, name)
    return kept


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
