"""CLIMB: Curriculum Learning for Infant-inspired Model Building (Diehl Martinez et al., BabyLM 2023, arXiv 2311.08886).

Masked language modelling on a small corpus under three curricula, each of which may be left out: of the vocabulary
(what is too hard yet reads UNKNOWN, in inputs and labels), of the objective (parts of speech before words, or with
them), and of the data (the easiest blocks first: ``data.curriculum``). The vocabulary and the data open by a pacing
function of the share of the run that is done; objectives are active in intervals of it. The authors find no consistent
gain over a well-tuned baseline without curricula.

The paper's tables could not be read for this implementation, so "as released" below means the code. Differences:

* Labels of parts of speech are class numbers and are not mapped to the unknown token; the release maps them as if they
  were ids. Special tokens are never mapped either, wherever their ids lie; in the release they are the lowest ids.
* ``both`` leaves tokens of the class X unknown to the very end, as released: its threshold never reaches them.
* A special token is never chosen; the release would choose one that had a listed part of speech (none has).
* One optimizer and one schedule for encoder and heads, and clipping over all of them. The release has an AdamW of
  transformers for every head (eps 1e-6, not clipped), whose rate warms up over a tenth of the head's own active steps
  and falls to 0 at the end of its interval. Core's groups have a constant factor of the rate, no schedule of their own.
* The heads that learn in a step are those that are active in it; the release steps those of the next one. While a head
  is idle its gradient is 0, and what momentum it had runs out (the release leaves its weights as they are).
* Intervals must cover the run together; the release's check rejects some nested ones that do.
* Data: the quantile is of all training blocks, not of each rank's share; ``self_perplexity`` (blocks scored again by
  the model every 25 000 steps) is not offered; blocks hold one split's documents, the tail is dropped once, and tags
  reach sub-words by characters, so that they cannot drift. See `unmask.language.data.tagged_texts`.
* The word head of random weights is drawn as released (torch's own, LayerNorm eps 1e-12, bias 0), as are the heads of
  parts of speech. Another model may be given with ``--network model=DIR``; it keeps its head. When the word head is
  exported, transformers gives its LayerNorm the encoder's eps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from unmask.core.losses.vocabulary import IGNORE
from unmask.core.mask import Mask
from unmask.core.method import Clock, Features, Output, Plan, Term
from unmask.core.networks import Network
from unmask.core.randomness import Key
from unmask.language.data.tagged_texts import Settings as DataSettings
from unmask.language.data.tagged_texts import TaggedBatch
from unmask.language.data.vocabulary import Vocabulary, known
from unmask.language.data.word_classes import CLASSES, NUMBER, UNKNOWN
from unmask.language.encoders.class_head import ClassHead, init_head
from unmask.language.encoders.language_model import ModelSettings, features, language_model, last_hidden
from unmask.language.encoders.masked_head import masked_head
from unmask.language.targets.known_words import VocabularyCurriculum

CARD = {
    "title": "CLIMB - Curriculum Learning for Infant-inspired Model Building",
    "paper": "Diehl Martinez et al., BabyLM Challenge at CoNLL 2023, arXiv 2311.08886",
    "summary": "15 % of the tokens; their ids, and parts of speech: frequent words and easy blocks first",
    "kind": "pretrain",
    "task": "language",
    "evidence": "part",
    "reference": "codebyzeb/CLIMB",
    "reference_licence": "none found",
}
DATA = "tagged_texts"
OPTIONAL_NETWORKS = {"model": "a masked language model to train on, saved by transformers; without it one at random"}

Objective = Literal["mlm", "pos_all", "pos_noun_verb"]
Share = Annotated[float, Field(ge=0, le=1)]
LISTED: dict[str, tuple[int, ...]] = {  # the word classes that each objective tells apart; all others are class 0
    "pos_all": tuple(range(UNKNOWN)),
    "pos_noun_verb": (NUMBER["NOUN"], NUMBER["VERB"]),
}


@dataclass(frozen=True)
class Settings:
    """What a recipe may set under ``model``.

    Args:
        network: the language model, where none is given with ``--network model=DIR``; input and output embeddings are
            not tied unless its config says so.
        objectives: when each is active, as shares of the run; both ends count. ``mlm`` must be among them, and at
            least one must be active at any time.
        vocabulary: its curriculum; null opens all of it.
        ratio: share of the tokens that ``mlm`` chooses, in [0, 1].
        keep: share of the chosen ones that ``mlm`` leaves as they are; 0.1 become random, the rest the mask token.
        listed_ratio: share that a part-of-speech objective chooses of tokens whose class it tells apart.
        other_ratio: likewise of other tokens.
        chunk: tokens whose scores over the vocabulary exist at a time.
    """

    network: ModelSettings = field(default_factory=lambda: ModelSettings("roberta-prelayernorm"))
    objectives: dict[Objective, tuple[Share, Share]] = field(default_factory=lambda: {"mlm": (0.0, 1.0)})
    vocabulary: VocabularyCurriculum | None = None
    ratio: Share = 0.15
    keep: Annotated[float, Field(ge=0, le=0.9)] = 0.0
    listed_ratio: Share = 0.4
    other_ratio: Share = 0.15
    chunk: Annotated[int, Field(ge=1)] = 1024

    def __post_init__(self) -> None:
        check_intervals(self.objectives)


def check_intervals(objectives: Mapping[Any, tuple[float, float]]) -> None:
    """Raise ValueError unless ``mlm`` is there and the intervals cover the run."""
    if "mlm" not in objectives:
        raise ValueError("objectives: mlm is missing; the run is for its head")
    reached = 0.0
    for begin, end in sorted(objectives.values()):
        if begin > end:
            raise ValueError(f"objectives: the interval [{begin}, {end}] ends before it begins")
        if begin > reached:
            raise ValueError(f"objectives: none is active between {reached} and {begin} of the run")
        reached = max(reached, end)
    if reached < 1:
        raise ValueError(f"objectives: none is active after {reached} of the run")


def active(objectives: Mapping[Any, tuple[float, float]], progress: float) -> list[str]:
    """The objectives whose interval holds this share of the run, both ends included."""
    return [name for name, (begin, end) in objectives.items() if begin <= progress <= end]


def build(settings: Settings, data: DataSettings, networks: Mapping[str, Network]) -> CLIMB:
    """The model that a recipe describes."""
    vocabulary, given, network = known(data.vocabulary), networks.get("model"), settings.network
    if settings.vocabulary is not None and vocabulary.unknown is None:
        raise ValueError("model.vocabulary: the tokenizer has no unknown token to put for hard words; set it to null")
    network = replace(network, config={"tie_word_embeddings": False, **network.config})
    model = language_model(network, vocabulary, "masked", data.length, given)
    if given is None:
        init_head(model)
    return CLIMB(model, vocabulary, settings, data.length)


@dataclass(frozen=True)
class Corruption:
    """One objective's own copy of the input.

    Args:
        chosen: True = the loss is taken here.
        fill: the id that stands in the place of the token, -1 where the token stays.
    """

    chosen: Bool[Tensor, "batch length"]
    fill: Int[Tensor, "batch length"]


@dataclass(frozen=True)
class CurriculumPlan(Plan):
    """The corruption of every active objective; the mask holds what all of them hide.

    Args:
        copies: by objective.
        limit: what the vocabulary curriculum lets be known is not above this; None where it lets all.
    """

    copies: dict[str, Corruption]
    limit: Int[Tensor, "batch 1"] | None = None


class CLIMB(nn.Module):
    """A masked language model with a head for words and, for other objectives, heads for word classes.

    Args:
        model: a masked language model of transformers.
        vocabulary: of its tokenizer.
        settings: objectives and curricula.
        length: tokens of a block.
    """

    predicts = "masked"  # what the task `language` measures
    special: Tensor

    def __init__(self, model: Any, vocabulary: Vocabulary, settings: Settings, length: int) -> None:
        super().__init__()
        self.model, self.settings, self.length, self.vocabulary = model, settings, length, vocabulary
        self.word_head = masked_head(model, settings.chunk)
        dim, others = model.config.hidden_size, [name for name in settings.objectives if name != "mlm"]
        self.heads = nn.ModuleDict({name: ClassHead(dim, len(LISTED[name]) + 1) for name in others})
        self.register_buffer("special", torch.tensor(vocabulary.special), persistent=False)
        self.loss_on = "all" if others or settings.keep else "hidden"  # a token that was chosen and kept is visible

    def encoder_of(self) -> nn.Module:
        """The language model without its head."""
        return self.model.base_model

    # ---- choices -----------------------------------------------------------------------------------------------------

    def draw(self, batch: TaggedBatch, clock: Clock, key: Key) -> CurriculumPlan:
        """Choose and replace tokens, for each active objective by itself."""
        names = active(self.settings.objectives, clock.progress)
        copies = {name: self._corruption(name, batch, key.stream(name)) for name in names}
        hidden = torch.stack([copy.fill >= 0 for copy in copies.values()]).all(0)
        return CurriculumPlan(Mask.from_hidden(hidden, batch.valid), copies, self._limit(batch, clock))

    def _corruption(self, name: str, batch: TaggedBatch, key: Key) -> Corruption:
        tokens, size = batch.tokens, batch.tokens.shape[1]
        chosen = key.stream("chosen").uniform(size) < self._ratios(name, batch)
        chosen &= ~torch.isin(tokens, self.special)
        if batch.valid is not None:
            chosen &= batch.valid
        keep = self.settings.keep if name == "mlm" else 0.1
        kind, words = key.stream("kind").uniform(size), key.stream("words").integers(size, self.vocabulary.size)
        fill = torch.where(kind < 0.9 - keep, self.vocabulary.mask, torch.where(kind < 1.0 - keep, words, -1))
        return Corruption(chosen, torch.where(chosen, fill, -1))

    def _ratios(self, name: str, batch: TaggedBatch) -> Float[Tensor, "batch length"]:
        if name == "mlm":
            return torch.full_like(batch.tokens, self.settings.ratio, dtype=torch.float32)
        listed = torch.isin(batch.tags, torch.tensor(LISTED[name], device=batch.tags.device))
        return torch.where(listed, self.settings.listed_ratio, self.settings.other_ratio)

    def _limit(self, batch: TaggedBatch, clock: Clock) -> Int[Tensor, "batch 1"] | None:
        if self.settings.vocabulary is None:
            return None
        limit = self.settings.vocabulary.limit(clock.progress, self.vocabulary.size)
        return batch.tokens.new_full((len(batch.tokens), 1), limit)

    # ---- inputs and targets ------------------------------------------------------------------------------------------

    def known(
        self, ids: Int[Tensor, "batch length"], batch: TaggedBatch, plan: CurriculumPlan
    ) -> Int[Tensor, "batch length"]:
        """Ids as the vocabulary curriculum has them: the unknown token's where they are too hard yet."""
        if plan.limit is None or self.settings.vocabulary is None:
            return ids
        return self.settings.vocabulary.apply(ids, batch.tags, plan.limit, self.vocabulary)

    def inputs(self, batch: TaggedBatch, plan: CurriculumPlan, objective: str) -> Int[Tensor, "batch length"]:
        """An objective's copy of the input."""
        fill = plan.copies[objective].fill
        return self.known(torch.where(fill >= 0, fill, batch.tokens), batch, plan)

    def target(self, batch: TaggedBatch, plan: CurriculumPlan) -> dict[str, Int[Tensor, "batch length"]]:
        """Each active objective's labels: ids, or classes (0 = none of those listed); -100 where nothing is asked."""
        labels = {}
        for name, copy in plan.copies.items():
            wanted = self.known(batch.tokens, batch, plan) if name == "mlm" else class_labels(batch.tags, name)
            labels[name] = wanted.masked_fill(~copy.chosen, IGNORE)
        return labels

    # ---- passes ------------------------------------------------------------------------------------------------------

    def predict(self, batch: TaggedBatch, plan: CurriculumPlan) -> Float[Tensor, "batch length classes"]:
        """Scores of the first active objective: over words for ``mlm``; `forward` makes only those that are asked."""
        name = next(iter(plan.copies))
        states = last_hidden(self.model, self.inputs(batch, plan, name), batch.valid)
        return self.word_head.scores(self.model, states) if name == "mlm" else self.heads[name](states)

    def forward(self, batch: TaggedBatch, plan: CurriculumPlan) -> Output:
        """The mean cross-entropy of every active objective, each with a forward pass of its own; they are summed."""
        targets, terms = self.target(batch, plan), {}
        for name in plan.copies:
            states = last_hidden(self.model, self.inputs(batch, plan, name), batch.valid)
            asked = targets[name] != IGNORE
            loss = self._loss(name, states[asked], targets[name][asked])
            terms[name] = Term(loss, asked.sum())
        first = next(iter(terms))
        terms[first] = replace(terms[first], total=terms[first].total + self._idle(plan))
        return Output(terms)

    def _loss(self, name: str, states: Float[Tensor, "asked dim"], wanted: Int[Tensor, "asked"]) -> Float[Tensor, ""]:
        if name == "mlm":
            return self.word_head.loss(self.model, states, wanted)
        return nn.functional.cross_entropy(self.heads[name](states).float(), wanted, reduction="sum")

    def _idle(self, plan: CurriculumPlan) -> Tensor | float:
        """0, with a gradient of 0 for heads that are not active: a data-parallel step waits for every gradient."""
        if len(plan.copies) == len(self.settings.objectives):
            return 0.0
        idle = [p for name, head in self.heads.items() if name not in plan.copies for p in head.parameters()]
        if "mlm" not in plan.copies:
            encoder = {id(p) for p in self.model.base_model.parameters()}
            idle += [p for p in self.model.parameters() if id(p) not in encoder]
        return sum((0.0 * p.sum() for p in idle if p.requires_grad), 0.0)

    def counts(self, batch: TaggedBatch, plan: CurriculumPlan) -> dict[str, Tensor]:
        """Tokens that each active objective is asked for."""
        return {name: copy.chosen.sum() for name, copy in plan.copies.items()}

    def encode(self, batch: TaggedBatch) -> Features:
        """Hidden states of whole texts: nothing is masked or unknown, whatever the mode."""
        return features(self.model, batch.tokens, batch.valid)


def class_labels(tags: Int[Tensor, "batch length"], objective: str) -> Int[Tensor, "batch length"]:
    """1 + the place of each token's class among those listed, 0 for the others."""
    places = torch.zeros(len(CLASSES), dtype=torch.int64, device=tags.device)
    places[list(LISTED[objective])] = torch.arange(1, len(LISTED[objective]) + 1, device=tags.device)
    return places[tags]
