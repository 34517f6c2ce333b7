"""SparsePO: preference alignment with sparse token masks (Christopoulou et al., EMNLP 2025 Findings, arXiv 2410.05102).

A policy learns from pairs of responses, one preferred, against a fixed reference. DPO weighs every token of a response
alike; here each token's log-ratio has a weight, and so has each token's divergence from the reference, so that only some
tokens carry the preference and only some are held near the reference. The weights are made of what the reference
computes: of its activations (MaPO, nothing to learn), or of its hidden states by a small network whose ReLU gives exact
zeros. Masks and reference are not needed when the policy is used.

Where the released code differs from the paper or leaves a choice, this file does the following:

* The divergence is KL(reference || policy) per token, over the whole vocabulary, with its gradient. The release logs
  rewards with the sign of the divergence turned round; no metric here does. Its sequence divergence counts prompt and
  padding; ours is over the responses.
* The hidden states of the last layer are those after the final norm, as released.
* MaPO names activations by role, and a role that an architecture does not have is refused
  (`unmask.language.encoders.activations`). As released an MLP's activation is never seen in GPT-2 and the mask is a mean
  of three types: ``activations`` without ``mlp``, ``attention_output`` and the rotated ones does that. Its z-normalisation
  changes nothing before a scaling to [0, 1] and is left out. Statistics are in float32 (half precision there). A response
  of one token, or constant, has mask 1 (NaN there) and is counted in the metric ``constant``.
* Only the learned mask ``simple_all`` can be constructed in the release; it is the one here. An initial mask that is 0
  at every token cannot learn and is drawn again, judged on random tokens (ours). Masks have no dropout, nor has the
  policy: the release sets every dropout to 0.
* Both masks switched off raise an error there; here that is TDPO1.
* ``loss: dpo`` and ``loss: tdpo1`` are the baselines, on the same models and data; ``loss: sft`` is the fine-tuning on
  chosen responses before (`Stages`).
* Weight decay acts on the matrices of the masks (0.01), as released; the policy follows the recipe (0 there).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from unmask.core.errors import UnmaskError
from unmask.core.losses import Scores, dpo, response_sums, sparse_preference, tdpo1, token_terms
from unmask.core.method import Clock, Features, Metric, Output, Term
from unmask.core.networks import Network
from unmask.core.randomness import Key
from unmask.core.targets import FrozenTeacher
from unmask.language.data.preferences import PreferenceBatch
from unmask.language.data.preferences import Settings as DataSettings
from unmask.language.data.vocabulary import Vocabulary, known
from unmask.language.encoders.activations import Reading, Recorder, chosen_roles
from unmask.language.encoders.language_model import ModelSettings, language_model, last_hidden
from unmask.language.encoders.output_layer import OutputLayer, output_layer
from unmask.language.encoders.token_masks import LearnedMask, mean_activation_mask
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
class MaskSettings:
    """Where the weights of the tokens come from.

    Args:
        kind: learned from the reference's hidden states; its activations (MaPO); or none, all 1.
        common: one learned mask for both terms; else one for each.
        on: the terms that are masked; the mask of the other is 1.
        activations: of ``activations``, their types or roles (`unmask.language.encoders.activations`).
        reward_l1: weight of the sum of the log-ratios' learned mask over a pair's tokens.
        divergence_l1: likewise of the divergences'; of a common mask both count.
        weight_decay: of the learned mask's matrices.
    """

    kind: Literal["learned", "activations", "none"] = "learned"
    common: bool = True
    on: tuple[Literal["reward", "divergence"], ...] = ("reward", "divergence")
    activations: tuple[str, ...] = ("mlp", "attention", "residual", "logits")
    reward_l1: Annotated[float, Field(ge=0)] = 0.0
    divergence_l1: Annotated[float, Field(ge=0)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.01

    def name_of(self, term: Literal["reward", "divergence"]) -> str | None:
        """The learned mask of a term; None where it has none."""
        if self.kind != "learned" or term not in self.on:
            return None
        return "common" if self.common else term


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


def build(
    settings: Settings, data: DataSettings, networks: Mapping[str, Network]
) -> SparsePO | SupervisedFineTuning:
    """The model that a recipe describes."""
    vocabulary, given = known(data.vocabulary), networks.get("model")
    model = policy(settings.network, vocabulary, data.length, given)
    if settings.loss == "sft":
        return SupervisedFineTuning(model, settings.chunk)
    method = SparsePO(model, reference(model, networks), settings)
    method.come_alive()
    return method


def policy(settings: ModelSettings, vocabulary: Vocabulary, length: int, given: Network | None) -> Any:
    """The model to train: a copy of the given one, with the rows that it has, or one at random weights.

    Raises:
        UnmaskError: the tokenizer has more ids than the given model.
    """
    if given is None:
        return language_model(settings, vocabulary, "causal", length)
    network = replace(given, module=copy.deepcopy(given.module))
    embedding = network.module.get_input_embeddings()
    rows = vocabulary.size if embedding is None else embedding.weight.shape[0]
    if rows < vocabulary.size - (vocabulary.mask == vocabulary.size - 1):  # a mask token, which no pair has
        raise UnmaskError(
            f"{given.source}: has {rows} ids, and the tokenizer {vocabulary.size}; give its own tokenizer, which "
            "data.tokenizer: null takes"
        )
    return language_model(settings, replace(vocabulary, size=min(rows, vocabulary.size)), "causal", length, network)


def reference(model: Any, networks: Mapping[str, Network]) -> Any:
    """What the policy is held against.

    Raises:
        UnmaskError: a network that is no language model with as many ids.
    """
    given = networks.get("reference", networks.get("model"))
    if given is None:
        return copy.deepcopy(model)
    layers = [network.get_output_embeddings() for network in (model, given.module)]
    rows = [layer.weight.shape[0] if layer is not None else 0 for layer in layers]
    if rows[0] != rows[1]:
        raise UnmaskError(
            f"{given.source}: scores {rows[1]} ids, and the model {rows[0]}; the reference needs its vocabulary"
        )
    return given.module


class Seen(NamedTuple):
    """What the reference says of a batch.

    Attributes:
        hidden: what its output layer gets.
        layers: hidden states after each layer, of the response's tokens; empty where no mask is learned.
        readings: of its activations, by role and layer; empty where masks are not made of them.
    """

    hidden: Float[Tensor, "rows tokens dim"]
    layers: list[Float[Tensor, "responses dim"]]
    readings: dict[tuple[str, int], Reading]


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
        self.mask_settings = masks
        self.roles = chosen_roles(reference, masks.activations) if masks.kind == "activations" and masks.on else ()
        config = reference.config
        names = dict.fromkeys(name for term in masks.on if (name := masks.name_of(term)))
        self.masks = nn.ModuleDict(
            {name: LearnedMask(config.num_hidden_layers, config.hidden_size) for name in names}
        )

    def come_alive(self) -> None:
        """Draw learned masks again that are 0 at every one of some random tokens."""
        weight = self.reference.module.get_input_embeddings().weight
        if weight.is_meta or not self.masks:
            return
        tokens = torch.randint(weight.shape[0], (4, 32), device=weight.device)
        seen = self.look(tokens, torch.arange(tokens.numel(), device=weight.device))
        for mask in self.masks.values():
            mask.come_alive(torch.stack(seen.layers))

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
            {"params": matrices, "weight_decay": self.mask_settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]

    def draw(self, batch: PreferenceBatch, clock: Clock, key: Key) -> None:
        """Nothing is random. The reference runs in `forward`: what it says of a batch is no choice."""

    def forward(self, batch: PreferenceBatch, plan: None) -> Output:
        """The loss of every pair (equations 4 to 6), and L1 terms of learned masks. One host sync finds the tokens."""
        tokens, response = batch.tokens.flatten(0, 1), batch.response[:, :, 1:]
        inputs, targets = tokens[:, :-1], tokens[:, 1:]  # position t predicts token t + 1
        where = response.flatten().nonzero()[:, 0]
        seen = self.look(inputs, where)
        found = token_terms(
            _scores(self.model, self.head, last_hidden(self.model, inputs), where),
            _scores(self.reference.module, self.reference_head, seen.hidden, where),
            targets.flatten()[where],
            chunk=self.settings.chunk,
            divergence=self.settings.loss != "dpo",
        )
        log_ratio, kl = (_spread(values, where, response) for values in found)  # [pairs, 2, tokens]
        reward_mask, divergence_mask, metrics = self.token_masks(seen, where, response)
        beta = self.settings.beta
        if self.settings.loss == "sparsepo":
            losses = sparse_preference(log_ratio, kl, reward_mask, divergence_mask, response, beta)
        else:
            losses = dpo(log_ratio, response, beta) if self.settings.loss == "dpo" else tdpo1(log_ratio, kl, response, beta)
        terms = {"preference": Term(losses.sum(), float(len(losses)))}
        for name, (mask, weight) in self._penalised(reward_mask, divergence_mask).items():
            terms[name] = Term(response_sums(mask, response).sum(), float(len(losses)), weight)
        return Output(terms, metrics | _account(losses, log_ratio, kl, response))

    def counts(self, batch: PreferenceBatch, plan: None) -> dict[str, float]:
        """Every term is a mean over pairs."""
        penalties = self._penalised(batch.ids, batch.ids)
        return dict.fromkeys(["preference", *penalties], float(len(batch.ids)))

    def _penalised(self, reward_mask: Tensor, divergence_mask: Tensor) -> dict[str, tuple[Tensor, float]]:
        """Learned masks whose sum is part of the loss, and its weight."""
        masks = self.mask_settings
        found = {
            "reward_l1": (reward_mask, masks.reward_l1 * (masks.name_of("reward") is not None)),
            "divergence_l1": (divergence_mask, masks.divergence_l1 * (masks.name_of("divergence") is not None)),
        }
        return {name: (mask, weight) for name, (mask, weight) in found.items() if weight}

    def look(self, inputs: Tensor, where: Tensor) -> Seen:
        """Run the reference, without gradient, and keep what the masks are made of."""
        with self.reference.evaluating() as network:
            recorder = Recorder(network, self.roles) if self.roles else None
            if recorder is None:
                output = network.base_model(input_ids=inputs, output_hidden_states=bool(self.masks))
                layers = [state.flatten(0, 1)[where] for state in (output.hidden_states or ())[1:]]
                return Seen(output.last_hidden_state, layers, {})
            with recorder.recording() as readings:
                hidden = last_hidden(network, inputs)
            if "final_norm" in self.roles:
                readings["final_norm", 0] = Reading.of(hidden)
            if "logits" in self.roles:
                readings["logits", 0] = self._logits(network, hidden, where)
            return Seen(hidden, [], readings)

    def _logits(self, network: Any, hidden: Tensor, where: Tensor) -> Reading:
        """The reading of the scores over the vocabulary, at the response's tokens."""
        rows = hidden.flatten(0, 1)[where].split(self.settings.chunk)
        readings = [Reading.of(self.reference_head.scores(network, part)) for part in rows]
        empty = hidden.new_zeros(hidden.shape[0] * hidden.shape[1], dtype=torch.float32)
        mean, noise = (
            empty.index_copy(0, where, torch.cat(values)).view(hidden.shape[:2])
            for values in ([r.mean for r in readings], [r.noise for r in readings])
        )
        return Reading(mean, noise)

    def token_masks(
        self, seen: Seen, where: Tensor, response: Bool[Tensor, "pairs 2 tokens"]
    ) -> tuple[Tensor, Tensor, dict[str, Metric]]:
        """The weights of the log-ratios and of the divergences, [pairs, 2, tokens] each, and what to log of them."""
        ones, masks, metrics = response.float(), {}, {}
        if self.masks:
            layers = torch.stack(seen.layers)
            made = {name: _spread(mask(layers), where, response) for name, mask in self.masks.items()}
            masks = {term: made[name] for term in self.mask_settings.on if (name := self.mask_settings.name_of(term))}
        elif self.roles:
            mask, constant = mean_activation_mask(seen.readings, response.flatten(0, 1))
            masks = dict.fromkeys(self.mask_settings.on, mask.view(response.shape))
            metrics["constant"] = Metric(constant.sum(), constant.numel())
        for term, mask in masks.items():
            metrics |= _sparsity(term, mask.detach(), response)
        return masks.get("reward", ones), masks.get("divergence", ones), metrics


def _scores(model: Any, head: OutputLayer, hidden: Tensor, where: Tensor) -> Scores:
    """What the scores at the response's tokens are made of."""
    layer = model.get_output_embeddings()
    bias = getattr(layer, "bias", None)
    return Scores(hidden.flatten(0, 1).index_select(0, where), layer.weight, bias, head.scale, head.softcap)


def _spread(values: Tensor, where: Tensor, response: Bool[Tensor, "pairs 2 tokens"]) -> Tensor:
    """Values of the response's tokens at their places, zeros elsewhere."""
    return values.new_zeros(response.numel()).index_copy(0, where, values).view(response.shape)


def _sparsity(term: str, mask: Tensor, response: Bool[Tensor, "pairs 2 tokens"]) -> dict[str, Metric]:
    """The share of zeros among a mask's weights, of chosen and rejected responses, and their mean."""
    zeros = {
        f"{term}_zeros_{side}": Metric(((mask == 0) & response)[:, i].sum(), response[:, i].sum())
        for i, side in enumerate(("chosen", "rejected"))
    }
    return zeros | {f"{term}_mask": Metric(response_sums(mask, response).sum(), response.sum())}


@torch.no_grad()
def _account(losses: Tensor, log_ratio: Tensor, kl: Tensor, response: Tensor) -> dict[str, Metric]:
    """How often the chosen response wins, and how far both have moved from the reference, masks left out."""
    pairs, sides = len(losses), ("chosen", "rejected")
    moved = {"log_ratio": response_sums(log_ratio, response), "kl": response_sums(kl, response)}
    means = {f"{name}_{side}": Metric(v[:, i].sum(), pairs) for name, v in moved.items() for i, side in enumerate(sides)}
    ln2 = torch.log(torch.tensor(2.0, device=losses.device))
    return {"accuracy": Metric((losses < ln2).sum(), pairs), **means}


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
