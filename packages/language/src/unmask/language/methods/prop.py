"""PROP: Pre-training with Representative Words Prediction (Ma et al., WSDM 2021, arXiv 2010.10137).

For each document two sets of words are drawn from its language model. A BERT reads ``[CLS] words [SEP] document [SEP]``
and has to score the set higher that is likelier under that model, while it predicts masked words of the document. What
comes out re-ranks documents for queries, before or after fine-tuning on labelled ones.

How pairs are drawn, and what is ours there, is said in `unmask.language.data.word_sets`; the training step is here.
Where the released code (Albert-Ma/PROP) differs from the paper, leaves a choice or has a defect:

* `pairwise`: the paper's loss is a hinge on the two scores, "hinge". The release takes the softmax over both first, and
  so trains mean(1 - p_positive + p_negative), "softmax_margin": smooth, under 2, flat where a pair is badly wrong.
* Masks follow BERT's whole-word rule: of G words of a document ``min(60, max(1, round(0.15 G)))`` pieces, halves to
  even, of whole words in random order, those skipped that no longer fit. Of these pieces 80 % become ``[MASK]``, 10 %
  any piece of the vocabulary (special ones too, as released), 10 % stay. Word sets and special tokens are never masked.
* Both rows of a pair are masked on their own, anew at each visit; the release writes its masks to disk once.
* The document is cut row by row to what its word set leaves. The release cuts the document that all its rows share.
* `score` is dropout and one linear layer on the pooler. The release's class does not run as it stands (it calls
  ``self.rep``); its checkpoints have the score as ``cls.weight`` and ``cls.bias``, which ``--init`` reads.
* With "softmax_margin" the score's bias has no gradient but rounding, and with "hinge" none either: only differences
  count. It is left out of training and stays at 0, or what was loaded.
* BertAdam (no bias correction, gradients clipped tensor by tensor) is AdamW here, with one norm for all gradients.
* Any masked language model of transformers will do; one without token types gets none.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from unmask.core.mask import Mask
from unmask.core.masking import choose_groups
from unmask.core.method import Clock, Features, Metric, Output, Plan, Term
from unmask.core.networks import Network
from unmask.core.randomness import Key
from unmask.language.data.document_pairs import PairBatch
from unmask.language.data.document_pairs import Settings as DataSettings
from unmask.language.data.vocabulary import Vocabulary, known
from unmask.language.encoders.language_model import ModelSettings, language_model, last_hidden
from unmask.language.encoders.masked_head import masked_head

CARD = {
    "title": "PROP: Pre-training with Representative Words Prediction for Ad-hoc Retrieval",
    "paper": "Ma et al., WSDM 2021, arXiv 2010.10137",
    "summary": "15 % of a document's words hidden; these words, and which of two word sets is likelier in it",
    "kind": "pretrain",
    "task": "retrieval",
    "evidence": "part",
    "reference": "Albert-Ma/PROP",
    "reference_licence": "Apache-2.0",
}
DATA = "documents"
OPTIONAL_NETWORKS = {"model": "a masked language model to train on, saved by transformers; without it one at random"}
Pairwise = Literal["hinge", "softmax_margin"]
_MASKED, _RANDOM = 0.8, 0.9  # below the first a piece becomes [MASK], from there to the second a random one


@dataclass(frozen=True)
class Settings:
    """What a recipe may set under ``model``.

    Args:
        network: the language model, where none is given with ``--network model=DIR``.
        pairwise: the loss of a pair: "hinge" on the scores (the paper), or "softmax_margin" (as released).
        margin: by how much the positive's score should be higher; 1 with "softmax_margin".
        ratio: masked pieces, as a share of a document's words, in (0, 1).
        most: masked pieces of a row at most.
        chunk: tokens whose scores over the vocabulary exist at a time.
    """

    network: ModelSettings = field(default_factory=lambda: ModelSettings("bert"))
    pairwise: Pairwise = "hinge"
    margin: Annotated[float, Field(gt=0)] = 1.0
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.15
    most: Annotated[int, Field(ge=1)] = 60
    chunk: Annotated[int, Field(ge=1)] = 1024


def build(settings: Settings, data: DataSettings, networks: Mapping[str, Network]) -> PROP:
    """The model that a recipe describes."""
    if settings.pairwise == "softmax_margin" and settings.margin != 1:
        raise ValueError("model.margin: with pairwise=softmax_margin it is 1; leave it, or set pairwise=hinge")
    vocabulary = known(data.vocabulary)
    model = language_model(settings.network, vocabulary, "masked", data.length, networks.get("model"))
    return PROP(model, vocabulary, settings)


@dataclass(frozen=True)
class PairPlan(Plan):
    """What is masked: tokens of both rows of a pair, one after the other.

    Args:
        mask: pieces whose input is replaced.
        asked: pieces that are predicted: those, and the tenth that stays.
        replacement: what stands in the place of each piece that is replaced.
    """

    asked: Bool[Tensor, "batch tokens"]
    replacement: Int[Tensor, "batch tokens"]


class Pooler(nn.Module):
    """The first token's state through a linear layer and tanh.

    Args:
        dim: of the states.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)

    def forward(self, states: Float[Tensor, "rows length dim"]) -> Float[Tensor, "rows dim"]:
        return torch.tanh(self.dense(states[:, 0]))


class PROP(nn.Module):
    """A cross-encoder that ranks word sets for a document and fills in the document's masked words.

    Args:
        model: a masked language model of transformers; its pooler is taken over where it has one.
        vocabulary: of its tokenizer.
        settings: losses and masks.
    """

    loss_on = "all"  # a tenth of the pieces that are asked for is seen

    def __init__(self, model: Any, vocabulary: Vocabulary, settings: Settings) -> None:
        super().__init__()
        self.model, self.settings, self.vocabulary = model, settings, vocabulary
        self.head = masked_head(model, settings.chunk)
        dim, std = model.config.hidden_size, getattr(model.config, "initializer_range", 0.02)
        self.pooler, self.score = Pooler(dim), nn.Linear(dim, 1)
        for layer in (self.pooler.dense, self.score):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        self.score.bias.requires_grad_(False)
        self.dropout = nn.Dropout(getattr(model.config, "hidden_dropout_prob", 0.1))
        self._take_over(model)
        accepted = inspect.signature(model.base_model.forward).parameters
        self._typed = "token_type_ids" in accepted and getattr(model.config, "type_vocab_size", 1) > 1

    def _take_over(self, model: Any) -> None:
        """Use the model's own pooler, and leave out of training what only next-sentence prediction needs."""
        given = getattr(model.base_model, "pooler", None)
        if given is not None:
            self.pooler.dense.load_state_dict(given.dense.state_dict())
            model.base_model.pooler = None
        for name, parameter in model.named_parameters():
            if "seq_relationship" in name:
                parameter.requires_grad_(False)

    def encoder_of(self) -> nn.Module:
        """The language model without its heads, and the pooler."""
        return nn.ModuleDict({"model": self.model.base_model, "pooler": self.pooler})

    # ---- what is masked --------------------------------------------------------------------------------------------

    def draw(self, batch: PairBatch, clock: Clock, key: Key) -> PairPlan:
        """Choose whole words of the documents, row by row."""
        key, length = key.stream("mask"), batch.tokens.shape[2]
        order = _both(key.stream("order"), lambda row: row.bits(length))
        asked = masked_pieces(batch.groups.flatten(0, 1), order.flatten(0, 1), self.settings.ratio, self.settings.most)
        asked = asked.view(len(batch.ids), -1)  # [batch, 2 length]
        kind = _both(key.stream("kind"), lambda row: row.uniform(length)).flatten(1)
        pieces = _both(key.stream("pieces"), lambda row: row.integers(length, self.vocabulary.size)).flatten(1)
        replacement = torch.where(kind < _MASKED, self.vocabulary.mask, pieces)
        return PairPlan(Mask.from_hidden(asked & (kind < _RANDOM), batch.valid.flatten(1)), asked, replacement)

    def inputs(self, batch: PairBatch, plan: PairPlan) -> Int[Tensor, "rows length"]:
        """The input ids, row 2i the positive of row 2i + 1."""
        tokens = batch.tokens.flatten(1)
        return torch.where(plan.mask.hidden, plan.replacement, tokens).view(-1, batch.tokens.shape[2])

    def target(self, batch: PairBatch, plan: PairPlan) -> Int[Tensor, "batch tokens"]:
        """The clean pieces."""
        return batch.tokens.flatten(1)

    # ---- what is predicted -----------------------------------------------------------------------------------------

    def states(
        self,
        tokens: Int[Tensor, "rows length"],
        types: Int[Tensor, "rows length"],
        valid: Bool[Tensor, "rows length"],
    ) -> Float[Tensor, "rows length dim"]:
        """Last hidden states."""
        more = {"token_type_ids": types} if self._typed else {}
        return last_hidden(self.model, tokens, valid, **more)

    def _states(self, batch: PairBatch, tokens: Int[Tensor, "rows length"]) -> Float[Tensor, "rows length dim"]:
        return self.states(tokens, batch.types.flatten(0, 1), batch.valid.flatten(0, 1))

    def rank(self, states: Float[Tensor, "rows length dim"]) -> Float[Tensor, "rows"]:
        """How well each row's words fit its document."""
        return self.score(self.dropout(self.pooler(states)))[:, 0]

    def predict(self, batch: PairBatch, plan: PairPlan) -> Float[Tensor, "asked vocabulary"]:
        """Scores of the pieces that are asked for; `forward` makes them in chunks."""
        states = self._states(batch, self.inputs(batch, plan))
        return self.head.scores(self.model, states.flatten(0, 1)[plan.asked.flatten()])

    def forward(self, batch: PairBatch, plan: PairPlan) -> Output:
        """Representative words prediction and masked language modelling, with equal weights (section 3.3)."""
        states = self._states(batch, self.inputs(batch, plan))  # [2 batch, length, dim]
        scores = self.rank(states).float().view(-1, 2)  # [batch, 2]
        asked = plan.asked.flatten()
        targets = self.target(batch, plan).flatten()[asked]
        mlm = self.head.loss(self.model, states.flatten(0, 1)[asked], targets)
        count = float(len(scores))
        pairs = pair_loss(scores[:, 0] - scores[:, 1], self.settings.pairwise, self.settings.margin)
        terms = {"words": Term(pairs.sum(), count), "masked": Term(mlm, plan.asked.sum())}
        ordered = (scores[:, 0] > scores[:, 1]).sum()
        return Output(terms, {"ordered": Metric(ordered.detach(), count)})

    def counts(self, batch: PairBatch, plan: PairPlan) -> dict[str, Any]:
        """What each term is divided by."""
        return {"words": float(len(batch.ids)), "masked": plan.asked.sum()}

    def encode(self, batch: PairBatch) -> Features:
        """States of both rows, one after the other, and the pooled vector of the first; nothing is masked."""
        rows, length = len(batch.ids), batch.tokens.shape[2]
        states = self._states(batch, batch.tokens.flatten(0, 1))
        cls = self.pooler(states).view(rows, 2, -1)[:, 0]
        return Features(states.view(rows, 2 * length, -1), (2, length), cls, batch.valid.flatten(1))


def masked_pieces(
    groups: Int[Tensor, "rows length"], order: Int[Tensor, "rows length"], ratio: float, most: int
) -> Bool[Tensor, "rows length"]:
    """The pieces of whole words that are asked for; see `choose_groups`.

    Args:
        groups: which word of the document a piece belongs to, from 0 on; -1 elsewhere.
        order: random integers.
        ratio: pieces, as a share of the words.
        most: pieces at most.
    """
    words = groups.amax(1) + 1
    budget = (words.double() * ratio).round().long().clamp(1, most)  # halves to even
    return choose_groups(groups, order, budget)


def pair_loss(difference: Float[Tensor, "pairs"], kind: Pairwise, margin: float = 1.0) -> Float[Tensor, "pairs"]:
    """The loss of pairs, from the positive's score minus the negative's.

    "hinge" is max(0, margin - difference). "softmax_margin" is 1 - p + q with the softmax (p, q) over both scores,
    which is 2 sigmoid(-difference).
    """
    return F.relu(margin - difference) if kind == "hinge" else 2 * torch.sigmoid(-difference)


def _both(key: Key, draw: Callable[[Key], Tensor]) -> Tensor:
    """A draw for each row of a pair; of a longer batch the same draws and more: [batch, 2, length]."""
    return torch.stack([draw(key.stream(row)) for row in range(2)], dim=1)
