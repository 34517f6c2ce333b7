"""MEAP: Mask-Enhanced Autoregressive Prediction (Zhuang et al., ICML 2025, arXiv 2502.07490), pre-training.

Next-token prediction with holes in the history: a small random share of the *input* tokens is replaced by a mask token,
and every next token is predicted all the same. Nothing else of a causal language model changes; there is no second loss
and no mask when the model is used.

Where the released code differs from the paper or leaves a choice, this file does the following:

* Hidden positions are drawn independently per sample. The release shares them over micro-batch, ranks and accumulation,
  and repeats 51 patterns, though the paper says "random"; ``share_positions`` does that, position by position.
* The count is exact, ``max(1, int(length * ratio))``, and the last input position is never hidden, as released.
* `keep_special` leaves the tokenizer's special tokens alone; off as released, where a document's first token may be
  hidden. A sample with fewer ordinary tokens than the count hides all of them.
* All parameters decay, norms included, as released. Random weights of Llama-like models are drawn as released: normal,
  deviation sqrt(2 / (5 dim)), and 1 / (sqrt(dim) layers) for the layers that write into the residual stream. Other
  architectures keep the initialisation of transformers.
* The rate is the recipe's cosine in optimizer steps; the release counts micro-batches and takes the last one's.
* The released model is a Llama with 2 key-value heads in every size; any causal model of transformers will do here.
* A model whose embedding has no row for the mask token gets one: the mean of the others (ours). It is never a target.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from unmask.core.mask import Mask
from unmask.core.method import Clock, Features, Output, Plan, Term
from unmask.core.networks import Network
from unmask.core.randomness import Key
from unmask.language.data.texts import Settings as DataSettings
from unmask.language.data.texts import TextBatch
from unmask.language.data.vocabulary import Vocabulary, known
from unmask.language.encoders.language_model import ModelSettings, features, language_model, last_hidden
from unmask.language.encoders.output_layer import output_layer

CARD = {
    "title": "Mask-Enhanced Autoregressive Prediction: Pay Less Attention to Learn More",
    "paper": "Zhuang et al., ICML 2025, arXiv 2502.07490",
    "summary": "15 % of the input tokens hidden; every next token",
    "kind": "pretrain",
    "task": "language",
    "evidence": "full",
    "reference": "scitix/MEAP",
    "reference_licence": "MIT",
}
DATA = "texts"
OPTIONAL_NETWORKS = {"model": "a causal language model to train on, saved by transformers; without it one at random"}
CYCLE, _FIRST_SEED = 51, 50  # of the release's shared positions
_RESIDUAL = ("o_proj", "down_proj")


@dataclass(frozen=True)
class Settings:
    """What a recipe may set under ``model``.

    Args:
        network: the language model, where none is given with ``--network model=DIR``.
        ratio: share of the input tokens hidden, in [0, 1); 0 is next-token prediction.
        share_positions: hide the same positions in every sample, from 51 patterns in turn, as released.
        keep_special: never hide special tokens.
        chunk: tokens whose scores over the vocabulary exist at a time.
    """

    network: ModelSettings = field(default_factory=ModelSettings)
    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.15
    share_positions: bool = False
    keep_special: bool = False
    chunk: Annotated[int, Field(ge=1)] = 256


def build(settings: Settings, data: DataSettings, networks: Mapping[str, Network]) -> MEAP:
    """The model that a recipe describes."""
    if not data.next_token:
        raise ValueError("data.next_token: MEAP predicts the next token; set it to true")
    if settings.share_positions and settings.keep_special:
        raise ValueError("keep_special: shared positions fall on any token; set share_positions to false")
    vocabulary, given = known(data.vocabulary), networks.get("model")
    model = language_model(settings.network, vocabulary, "causal", data.length, given)
    if given is None:
        init_weights(model)
    return MEAP(model, vocabulary, settings, data.length)


@torch.no_grad()
def init_weights(model: Any) -> None:
    """Draw the weights of a Llama-like model as released; leave other architectures as they are."""
    if not any(name.endswith(_RESIDUAL) for name, _ in model.named_modules()):
        return
    dim, depth = model.config.hidden_size, model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            residual = name.endswith(_RESIDUAL)
            nn.init.normal_(module.weight, std=1 / (math.sqrt(dim) * depth) if residual else math.sqrt(2 / (5 * dim)))


class MEAP(nn.Module):
    """A causal language model that predicts every next token from a history with holes.

    Args:
        model: a causal language model of transformers.
        vocabulary: of its tokenizer.
        settings: what is hidden.
        length: input tokens of a block.
    """

    loss_on = "all"
    special: Tensor

    def __init__(self, model: Any, vocabulary: Vocabulary, settings: Settings, length: int) -> None:
        super().__init__()
        self.model, self.settings, self.length, self.mask_id = model, settings, length, vocabulary.mask
        self.count = hidden_count(length, settings.ratio)
        self.head = output_layer(model, settings.chunk)
        self.register_buffer("special", torch.tensor(vocabulary.special), persistent=False)

    def encoder_of(self) -> nn.Module:
        """The language model without its output layer."""
        return self.model.base_model

    def param_groups(self) -> list[dict[str, Any]]:
        """One group; everything decays."""
        return [{"params": list(self.named_parameters()), "decay_all": True}]

    def draw(self, batch: TextBatch, clock: Clock, key: Key) -> Plan:
        """Choose the input tokens that are hidden (section 3.1)."""
        tokens = batch.tokens[:, : self.length]
        if self.settings.share_positions and self.count:
            hidden = torch.zeros_like(tokens, dtype=torch.bool)
            hidden[:, shared_positions(clock.step, self.length, self.count)] = True
        else:
            hidden = draw_hidden(tokens, self.count, key, self.special if self.settings.keep_special else None)
        return Plan(Mask.from_hidden(hidden))

    def predict(self, batch: TextBatch, plan: Plan) -> Float[Tensor, "batch length vocabulary"]:
        """Scores of every next token; `forward` makes them in chunks."""
        return self.head.scores(self.model, last_hidden(self.model, self.inputs(batch, plan)))

    def inputs(self, batch: TextBatch, plan: Plan) -> Int[Tensor, "batch length"]:
        """The input ids, the mask token's where they are hidden."""
        return batch.tokens[:, : self.length].masked_fill(plan.mask.hidden, self.mask_id)

    def target(self, batch: TextBatch, plan: Plan) -> Int[Tensor, "batch length"]:
        """The clean next token at every position."""
        return batch.tokens[:, 1 : self.length + 1]

    def forward(self, batch: TextBatch, plan: Plan) -> Output:
        """Cross-entropy over all positions (equation 2)."""
        states = last_hidden(self.model, self.inputs(batch, plan))  # [batch, length, dim]
        targets = self.target(batch, plan)  # [batch, length]
        return Output({"next_token": Term(self.head.loss(self.model, states, targets), float(targets.numel()))})

    def encode(self, batch: TextBatch) -> Features:
        """Hidden states of whole texts: nothing is masked, whatever the mode."""
        return features(self.model, batch.tokens[:, : self.length], batch.valid)


def hidden_count(length: int, ratio: float) -> int:
    """How many of `length` input tokens are hidden: one at least, unless the ratio is 0."""
    return max(1, int(length * ratio)) if ratio else 0


def draw_hidden(
    tokens: Int[Tensor, "batch length"], count: int, key: Key, kept: Int[Tensor, "special"] | None = None
) -> Bool[Tensor, "batch length"]:
    """Draw `count` input tokens of every sample, never the last, nor an id of `kept`; fewer where there are fewer."""
    hidden = torch.zeros_like(tokens, dtype=torch.bool)
    if not count:
        return hidden
    order = key.stream("mask").uniform(tokens.shape[1])  # [batch, length]
    order[:, -1] = 2.0
    if kept is not None:
        order = order.masked_fill(torch.isin(tokens, kept), 2.0)
    lowest = order.topk(count, dim=1, largest=False)
    return hidden.scatter_(1, lowest.indices, lowest.values < 2.0)


def shared_positions(step: int, length: int, count: int) -> list[int]:
    """The positions that the release hides in every sample of an optimizer step: Python's own sampler, re-seeded."""
    return random.Random(_FIRST_SEED + step % CYCLE).sample(range(length - 1), count)
