"""SparsePO: preference alignment with sparse token masks (Christopoulou et al., EMNLP 2025 Findings, arXiv 2410.05102).

A policy learns from pairs of responses, one preferred, against a fixed reference. DPO weighs every token of a response
alike; here each token's log-ratio has a weight, and so has each token's divergence from the reference, so that only
some tokens carry the preference and only some are held near the reference. The weights are made of what the reference
computes: of its activations (MaPO, nothing to learn), or of its hidden states by a small network whose ReLU gives
exact zeros. Masks and reference are not needed when the policy is used.

Where the released code differs from the paper or leaves a choice, this file does the following:

* The divergence is KL(reference || policy) per token, over the whole vocabulary, with its gradient. The release logs
  rewards with the sign of the divergence turned round; no metric here does. Its sequence divergence counts prompt and
  padding; ours is over the responses.
* The hidden states of the last layer are those after the final norm, as released.
* MaPO names activations by role, and a role that an architecture does not have is refused
  (`unmask.language.encoders.activations`). As released an MLP's activation is never seen in GPT-2 and the mask is a
  mean of three types; naming all roles but ``mlp_activation`` and ``attention_output`` does that. The z-normalisation
  changes nothing before a scaling to [0, 1] and is left out, and so are the other normalisations of the release's
  options. Statistics are in float32 (half precision there). A response of one token, or constant, has mask 1 (NaN
  there) and is counted in the metric ``constant``.
* Only the learned mask ``simple_all`` can be constructed in the release; it is the one here. An initial mask that is 0
  at every token cannot learn and is drawn again, judged on random tokens (ours). Masks have no dropout, nor has the
  policy: the release sets every dropout to 0.
* Both masks switched off raise an error there; here that is TDPO1.
* ``loss: dpo`` and ``loss: tdpo1`` are the baselines, on the same models and data; ``loss: sft`` is the fine-tuning on
  chosen responses before (`Stages`).
* Weight decay acts on the matrices of the masks (0.01), as released; the policy follows the recipe (0 there).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from unmask.core.losses import Scores, dpo, response_sums, sparse_preference, token_terms
from unmask.core.method import Clock, Features, Metric, Output, Term
from unmask.core.networks import Network
from unmask.core.randomness import Key
from unmask.core.targets import FrozenTeacher
from unmask.language.data.preferences import PreferenceBatch
from unmask.language.data.preferences import Settings as DataSettings
from unmask.language.data.vocabulary import known
from unmask.language.encoders.language_model import ModelSettings, last_hidden
from unmask.language.encoders.output_layer import OutputLayer, output_layer
from unmask.language.encoders.policies import policy, reference
from unmask.language.encoders.token_masks import MaskSettings, Seen, TokenMasks, spread
from unmask.language.stages.chosen import Stages as Stages
from unmask.language.stages.chosen import outline as outline
from unmask.language.stages.chosen import planned as planned
from unmask.language.stages.chosen import prepare as prepare

CARD = {
    "title": "SparsePO: Controlling Preference Alignment of LLMs via Sparse Token Masks",
    "paper": "Christopoulou et al., Findings of EMNLP 2025, arXiv 2410.05102",
    "summary": "weights of single tokens in the reward and in the divergence; which of two responses is preferred",
    "kind": "finetune",
    "task": "preference",
    "evidence": "full",
    "reference": "huawei-noah/HEBO",
    "reference_licence": "Apache-2.0",
}
DATA = "preferences"
OPTIONAL_NETWORKS = {
    "model": "the causal language model to train, saved by transformers; without it one at random weights",
    "reference": "the one it is held against; without it a copy of the model as it is before training",
}


@dataclass(frozen=True)
class Settings:
    """What a recipe may set under ``model``.

    Args:
        network: the language model, where none is given with ``--network model=DIR``.
        loss: the method; a baseline without masks; or sft, the likelihood of the chosen responses.
        beta: how much a margin counts.
        masks: the tokens' weights.
        chunk: tokens whose scores over the vocabulary exist at a time.
    """

    network: ModelSettings = field(default_factory=ModelSettings)
    loss: Literal["sparsepo", "tdpo1", "dpo", "sft"] = "sparsepo"
    beta: Annotated[float, Field(gt=0)] = 0.1
    masks: MaskSettings = field(default_factory=MaskSettings)
    chunk: Annotated[int, Field(ge=1)] = 512


def build(settings: Settings, data: DataSettings, networks: Mapping[str, Network]) -> SparsePO | SupervisedFineTuning:
    """The model that a recipe describes."""
    vocabulary, given = known(data.vocabulary), networks.get("model")
    model = policy(settings.network, vocabulary, data.length, given)
    if settings.loss == "sft":
        return SupervisedFineTuning(model, settings.chunk)
    method = SparsePO(model, reference(model, networks), settings)
    method.masks.come_alive(method.reference)
    return method


class SparsePO(nn.Module):
    """A policy, its reference and the masks.

    Args:
        model: a causal language model of transformers: the policy.
        reference: another of the same vocabulary.
        settings: loss and masks.
    """

    def __init__(self, model: Any, reference: Any, settings: Settings) -> None:
        super().__init__()
        self.model, self.settings = model.eval(), settings
        self.reference = FrozenTeacher(reference)
        self.head, self.reference_head = (output_layer(m, settings.chunk) for m in (model, reference))
        masks = settings.masks if settings.loss == "sparsepo" else replace(settings.masks, kind="none")
        self.masks = TokenMasks(reference, self.reference_head, masks)

    def train(self, mode: bool = True) -> SparsePO:
        """The policy stays in eval mode: no dropout, as released."""
        super().train(mode)
        self.model.eval()
        return self

    def encoder_of(self) -> nn.Module:
        """The policy without its output layer."""
        return self.model.base_model

    def encode(self, batch: PreferenceBatch) -> Features:
        """The policy's hidden states of prompts with their chosen responses."""
        valid = torch.arange(batch.tokens.shape[2], device=batch.ids.device) < batch.lengths[:, :1]
        return Features(last_hidden(self.model, batch.tokens[:, 0]), (batch.tokens.shape[2],), valid=valid)

    def param_groups(self) -> list[dict[str, Any]]:
        """The policy as the recipe says; the masks' matrices decay by their own number."""
        masks = [(f"masks.{name}", p) for name, p in self.masks.named_parameters()]
        matrices, others = ([(n, p) for n, p in masks if (p.ndim > 1) == wide] for wide in (True, False))
        return [
            {"params": [(f"model.{name}", p) for name, p in self.model.named_parameters()]},
            {"params": matrices, "weight_decay": self.masks.settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]

    def draw(self, batch: PreferenceBatch, clock: Clock, key: Key) -> None:
        """Nothing is random. The reference runs in `forward`: what it says of a batch is no choice."""

    def forward(self, batch: PreferenceBatch, plan: None) -> Output:
        """The loss of every pair (equations 4 to 6), and L1 terms of learned masks. One host sync finds the tokens."""
        inputs = batch.tokens.flatten(0, 1)[:, :-1]  # position t predicts token t + 1
        where = batch.response[:, :, 1:].flatten().nonzero()[:, 0]
        return self._compare(
            batch, where, self.masks.look(self.reference, inputs, where), last_hidden(self.model, inputs)
        )

    @torch.compiler.disable  # shapes that depend on the batch's values
    def _compare(self, batch: PreferenceBatch, where: Tensor, seen: Seen, hidden: Tensor) -> Output:
        """What policy and reference make of the responses' tokens, whose positions are `where`."""
        response, targets = batch.response[:, :, 1:], batch.tokens[:, :, 1:].flatten()[where]
        ours = _scores(self.model, self.head, hidden, where)
        theirs = _scores(self.reference.module, self.reference_head, seen.hidden, where)
        options = {"chunk": self.settings.chunk, "divergence": self.settings.loss != "dpo"}
        found = token_terms(ours, theirs, targets, **options)  # type: ignore[arg-type]
        log_ratio, kl = (spread(values, where, response) for values in found)  # [pairs, 2, tokens]
        reward_mask, divergence_mask, metrics = self.masks(seen, where, response)
        beta, pairs = self.settings.beta, float(len(batch.ids))
        if self.settings.loss == "dpo":
            losses = dpo(log_ratio, response, beta)
        else:
            losses = sparse_preference(log_ratio, kl, reward_mask, divergence_mask, response, beta)
        terms = {"preference": Term(losses.sum(), pairs)}
        for name, (mask, weight) in self._penalised(reward_mask, divergence_mask).items():
            terms[name] = Term(response_sums(mask, response).sum(), pairs, weight)
        return Output(terms, metrics | _account(losses, log_ratio, kl, response))

    def counts(self, batch: PreferenceBatch, plan: None) -> dict[str, float]:
        """Every term is a mean over pairs."""
        penalties = self._penalised(batch.ids, batch.ids)
        return dict.fromkeys(["preference", *penalties], float(len(batch.ids)))

    def _penalised(self, reward_mask: Tensor, divergence_mask: Tensor) -> dict[str, tuple[Tensor, float]]:
        """Learned masks whose sum is part of the loss, and its weight."""
        masks = self.masks.settings
        found = {
            "reward_l1": (reward_mask, masks.reward_l1 * (masks.name_of("reward") is not None)),
            "divergence_l1": (divergence_mask, masks.divergence_l1 * (masks.name_of("divergence") is not None)),
        }
        return {name: (mask, weight) for name, (mask, weight) in found.items() if weight}


def _scores(model: Any, head: OutputLayer, hidden: Tensor, where: Tensor) -> Scores:
    """What the scores at the response's tokens are made of."""
    layer = model.get_output_embeddings()
    bias = getattr(layer, "bias", None)
    return Scores(hidden.flatten(0, 1).index_select(0, where), layer.weight, bias, head.scale, head.softcap)


@torch.no_grad()
def _account(losses: Tensor, log_ratio: Tensor, kl: Tensor, response: Tensor) -> dict[str, Metric]:
    """How often the chosen response wins, and how far both have moved from the reference, masks left out."""
    metrics = {"accuracy": Metric((losses < math.log(2)).sum(), len(losses))}
    for name, values in (("log_ratio", log_ratio), ("kl", kl)):
        for side, sums in zip(("chosen", "rejected"), response_sums(values, response).unbind(1), strict=True):
            metrics[f"{name}_{side}"] = Metric(sums.sum(), len(losses))
    return metrics


class SupervisedFineTuning(nn.Module):
    """The stage before: the likelihood of the chosen responses.

    Args:
        model: a causal language model of transformers.
        chunk: see `Settings`.
    """

    def __init__(self, model: Any, chunk: int) -> None:
        super().__init__()
        self.model, self.head = model, output_layer(model, chunk)

    def encoder_of(self) -> nn.Module:
        """The model without its output layer."""
        return self.model.base_model

    def draw(self, batch: PreferenceBatch, clock: Clock, key: Key) -> None:
        """Nothing is random."""

    def forward(self, batch: PreferenceBatch, plan: None) -> Output:
        """Cross-entropy of the chosen responses' tokens."""
        tokens, response = batch.tokens[:, 0], batch.response[:, 0, 1:]
        targets = tokens[:, 1:].masked_fill(~response, -100)
        states = last_hidden(self.model, tokens[:, :-1])
        return Output({"next_token": Term(self.head.loss(self.model, states, targets), response.sum())})
