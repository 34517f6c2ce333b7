"""MEAP: Mask-Enhanced Autoregressive Prediction (Zhuang et al., ICML 2025, arXiv 2502.07490), supervised fine-tuning.

Every prompt with its answer is trained on as it is, by next-token prediction of the answer. A long enough answer gives
a second row, in which a tenth of the answer's tokens are replaced by a mask token, and only these are predicted.

Where the released code differs from the paper or leaves a choice, this file does the following:

* The paper puts both copies into one sequence, in which the second could read its answers off the first; the release
  has two rows that do not see each other, and so has this file.
* Masks are drawn anew at every visit, as the readme says ("dynamic"); ``static`` draws them once, as the code does.
* The loss is the mean over all labelled tokens of the batch, so that a masked token weighs as much as another, as
  released. Both rows of a sample are always in the same batch; the release shuffles rows.
* An answer that is cut keeps its own last token and gets no end-of-text token (the release feeds that token there and
  asks for the true one). The row with masks is for answers of more than 50 tokens, counted before they are cut.
* A prompt that fills the length is left out and named (the release stops); there, nothing of the answer would be left.
* An earlier turn of a chat is part of the prompt (``data.history``); the release trains on every turn by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from unmask.core.losses.vocabulary import IGNORE
from unmask.core.mask import Mask
from unmask.core.method import Clock, Features, Output, Plan, Term
from unmask.core.networks import Network
from unmask.core.randomness import Key
from unmask.language.data.chats import ChatBatch
from unmask.language.data.chats import Settings as DataSettings
from unmask.language.data.vocabulary import Vocabulary, known
from unmask.language.encoders.language_model import ModelSettings, features, language_model, last_hidden
from unmask.language.encoders.output_layer import output_layer

CARD = {
    "title": "Mask-Enhanced Autoregressive Prediction, supervised fine-tuning",
    "paper": "Zhuang et al., ICML 2025, arXiv 2502.07490",
    "summary": "answers as they are, and again with a tenth of their tokens hidden",
    "kind": "finetune",
    "task": "language",
    "evidence": "full",
    "reference": "scitix/MEAP",
    "reference_licence": "MIT",
}
DATA = "chats"
OPTIONAL_NETWORKS = {"model": "the causal language model to fine-tune, saved by transformers; without it one at random"}


@dataclass(frozen=True)
class Settings:
    """What a recipe may set under ``model``.

    Args:
        network: the language model, where none is given with ``--network model=DIR``.
        ratio: share of an answer's tokens that its second row hides, in [0, 1); 0 is plain fine-tuning.
        longer_than: tokens; only answers of more get a second row.
        static: hide the same tokens at every visit, whatever the run's seed.
        chunk: tokens whose scores over the vocabulary exist at a time.
    """

    network: ModelSettings = field(default_factory=ModelSettings)
    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.10
    longer_than: Annotated[int, Field(ge=0)] = 50
    static: bool = False
    chunk: Annotated[int, Field(ge=1)] = 256


def build(settings: Settings, data: DataSettings, networks: Mapping[str, Network]) -> MEAPFineTuning:
    """The model that a recipe describes."""
    vocabulary = known(data.vocabulary)
    model = language_model(settings.network, vocabulary, "causal", data.length, networks.get("model"))
    return MEAPFineTuning(model, vocabulary, settings)


class MEAPFineTuning(nn.Module):
    """A causal language model that learns answers, and the hidden tokens of answers.

    Args:
        model: a causal language model of transformers.
        vocabulary: of its tokenizer.
        settings: what is hidden.
    """

    loss_on = "features"  # the first rows see the whole answer, and the loss on them is meant to: see `predict` instead

    def __init__(self, model: Any, vocabulary: Vocabulary, settings: Settings) -> None:
        super().__init__()
        self.model, self.settings, self.vocabulary = model, settings, vocabulary
        self.head = output_layer(model, settings.chunk)

    def encoder_of(self) -> nn.Module:
        """The language model without its output layer."""
        return self.model.base_model

    def draw(self, batch: ChatBatch, clock: Clock, key: Key) -> Plan:
        """Choose the tokens of the answers that the second rows hide; none where there is no second row."""
        return Plan(Mask.from_hidden(draw_hidden(batch, self.settings, key), batch.valid))

    def inputs(self, batch: ChatBatch, plan: Plan) -> Int[Tensor, "rows length"]:
        """The rows as they are, then those with the mask token where they hide."""
        return input_rows(batch, plan.mask.hidden, self.vocabulary.mask)

    def target(self, batch: ChatBatch, plan: Plan) -> Int[Tensor, "rows length"]:
        """The answers' tokens, then the hidden ones; -100 elsewhere, and for second rows that hide nothing."""
        return label_rows(batch, plan.mask.hidden)

    def predict(self, batch: ChatBatch, plan: Plan) -> Float[Tensor, "batch positions vocabulary"]:
        """Scores of every next token in the second rows."""
        hidden_rows = self.inputs(batch, plan).chunk(2)[1]
        return self.head.scores(self.model, last_hidden(self.model, hidden_rows, batch.valid)[:, :-1])

    def forward(self, batch: ChatBatch, plan: Plan) -> Output:
        """Cross-entropy over the labelled tokens of all rows."""
        tokens, targets = self.inputs(batch, plan), self.target(batch, plan)  # [2 batch, length]
        states = last_hidden(self.model, tokens, torch.cat([batch.valid, batch.valid]))  # [2 batch, length, dim]
        total = self.head.loss(self.model, states[:, :-1], targets[:, 1:])
        return Output({"next_token": Term(total, (targets[:, 1:] != IGNORE).sum())})

    def encode(self, batch: ChatBatch) -> Features:
        """Hidden states of whole rows: nothing is masked, whatever the mode."""
        return features(self.model, batch.tokens, batch.valid)


def draw_hidden(batch: ChatBatch, settings: Settings, key: Key) -> Bool[Tensor, "batch length"]:
    """Draw the tokens of the answers that the second rows hide; none where there is no second row."""
    if settings.static:
        key = Key.of(0, batch.ids).stream("plan")
    where = _answers(batch, settings.longer_than)  # [batch, length]
    count = torch.where(where.any(1), (where.sum(1).double() * settings.ratio).int().clamp(min=1), 0)
    order = key.stream("mask").uniform(where.shape[1]).masked_fill(~where, 2.0).argsort(1).argsort(1)
    return (order < count[:, None]) & where & (settings.ratio > 0)


def _answers(batch: ChatBatch, longer_than: int) -> Bool[Tensor, "batch length"]:
    """The answers' tokens that may be hidden: all but the one that ends the row, where the answer is long."""
    position = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    inside = (position >= batch.prompts[:, None]) & (position < batch.lengths[:, None] - 1)
    return inside & (batch.answers > longer_than)[:, None]


def input_rows(batch: ChatBatch, hidden: Bool[Tensor, "batch length"], mask_id: int) -> Int[Tensor, "rows length"]:
    """All first rows, as they are, then all second rows, with the mask token where they hide."""
    return torch.cat([batch.tokens, batch.tokens.masked_fill(hidden, mask_id)])


def label_rows(batch: ChatBatch, hidden: Bool[Tensor, "batch length"]) -> Int[Tensor, "rows length"]:
    """What `input_rows` are asked for: the answers, then the hidden tokens; -100 elsewhere."""
    position = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    answer = (position >= batch.prompts[:, None]) & batch.valid
    return torch.cat([batch.tokens, batch.tokens]).masked_fill(~torch.cat([answer, hidden]), IGNORE)
