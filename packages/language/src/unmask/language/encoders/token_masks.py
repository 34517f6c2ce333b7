"""Weights of single tokens, from what a reference model computes: given by its activations, or learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from unmask.core.errors import UnmaskError
from unmask.core.losses import response_sums
from unmask.core.method import Metric
from unmask.core.targets import FrozenTeacher
from unmask.language.encoders.activations import TYPE_OF, Reading, Recorder, chosen_roles
from unmask.language.encoders.language_model import last_hidden
from unmask.language.encoders.output_layer import OutputLayer

_STD = 0.02
_ATTEMPTS = 100


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
    activations: Annotated[tuple[str, ...], Field(min_length=1)] = ("mlp", "attention", "residual", "logits")
    reward_l1: Annotated[float, Field(ge=0)] = 0.0
    divergence_l1: Annotated[float, Field(ge=0)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.01

    def name_of(self, term: Literal["reward", "divergence"]) -> str | None:
        """The learned mask of a term; None where it has none."""
        if self.kind != "learned" or term not in self.on:
            return None
        return "common" if self.common else term


def activation_mask(
    reading: Reading, response: Bool[Tensor, "rows tokens"]
) -> tuple[Float[Tensor, "rows tokens"], Bool[Tensor, "rows"]]:
    """One activation as a mask: its feature means, scaled to [0, 1] over the response; 0 outside of it.

    A response whose means do not differ by more than rounding (one token, a constant) has the mask 1.

    Returns:
        The mask, and the rows where it is 1 for that reason.
    """
    lowest = reading.mean.masked_fill(~response, torch.inf).amin(1, keepdim=True)
    highest = reading.mean.masked_fill(~response, -torch.inf).amax(1, keepdim=True)
    constant = highest - lowest <= reading.noise.masked_fill(~response, 0.0).amax(1, keepdim=True)
    scaled = (reading.mean - lowest) / torch.where(constant, 1.0, highest - lowest)
    return torch.where(constant, 1.0, scaled).masked_fill(~response, 0.0), constant[:, 0]


def mean_activation_mask(
    readings: Mapping[tuple[str, int], Reading], response: Bool[Tensor, "rows tokens"]
) -> tuple[Float[Tensor, "rows tokens"], Float[Tensor, "rows"]]:
    """The mean of the activations' masks over each type, then over the types.

    Args:
        readings: by role and layer (see `unmask.language.encoders.activations`).
        response: True = a token that counts.

    Returns:
        The mask, in [0, 1], and of each row the share of activations that were constant over the response.
    """
    masks: dict[str, list[Tensor]] = {}
    constant = []
    for (role, _), reading in readings.items():
        mask, flat = activation_mask(reading, response)
        masks.setdefault(TYPE_OF[role], []).append(mask)
        constant.append(flat.float())
    types = [torch.stack(of_type).mean(0) for of_type in masks.values()]
    return torch.stack(types).mean(0), torch.stack(constant).mean(0)


class LearnedMask(nn.Module):
    """A weight >= 0 for every token from the hidden states of all layers; a ReLU gives exact zeros.

    Args:
        layers: number of layers.
        dim: of their states.
    """

    def __init__(self, layers: int, dim: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(dim)  # one for all layers
        self.weight = nn.Parameter(torch.empty(layers, dim))
        self.bias = nn.Parameter(torch.empty(layers))
        self.mixer = nn.Linear(layers, 1, bias=False)
        self.draw_again()

    @torch.no_grad()
    def draw_again(self) -> None:
        """Initial weights as released: normal with deviation 0.02, no biases, a norm that only normalises."""
        nn.init.normal_(self.weight, std=_STD)
        nn.init.normal_(self.mixer.weight, std=_STD)
        nn.init.zeros_(self.bias)
        self.layer_norm.reset_parameters()

    def forward(self, hidden: Float[Tensor, "layers tokens dim"]) -> Float[Tensor, "tokens"]:
        """The mask, in float32: one output per layer through a ReLU, mixed over layers through another."""
        with torch.autocast(hidden.device.type, enabled=False):
            states = self.layer_norm(hidden.float())
            layers = torch.einsum("ltd,ld->tl", states, self.weight) + self.bias  # [tokens, layers]
            return self.mixer(layers.relu()).relu()[:, 0]

    def come_alive(self, hidden: Float[Tensor, "layers tokens dim"]) -> int:
        """Draw initial weights until the mask is not 0 at every one of these tokens, where nothing could be learned.

        Returns:
            How often they were drawn again.

        Raises:
            UnmaskError: a hundred draws were all dead.
        """
        for attempt in range(_ATTEMPTS):
            with torch.no_grad():
                if bool((self(hidden) > 0).any()):
                    return attempt
            self.draw_again()
        raise UnmaskError(
            f"model.masks: {_ATTEMPTS} initial masks are 0 at every token; are the hidden states of the reference "
            "finite?"
        )


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


class TokenMasks(nn.Module):
    """The weights of a batch's tokens, for both terms.

    Args:
        reference: a causal language model of transformers, whose states or activations they are made of.
        head: its output layer.
        settings: where they come from.
    """

    def __init__(self, reference: Any, head: OutputLayer, settings: MaskSettings) -> None:
        super().__init__()
        self.head, self.settings = head, settings
        by_activations = settings.kind == "activations" and settings.on
        self.roles = chosen_roles(reference, settings.activations) if by_activations else ()
        names = dict.fromkeys(name for term in settings.on if (name := settings.name_of(term)))
        sizes = reference.config.num_hidden_layers, reference.config.hidden_size
        self.learned = nn.ModuleDict({name: LearnedMask(*sizes) for name in names})

    def come_alive(self, reference: FrozenTeacher) -> None:
        """Draw learned masks again that are 0 at every one of some random tokens."""
        weight: Tensor = reference.module.get_input_embeddings().weight  # type: ignore[operator]
        if weight.is_meta or not self.learned:
            return
        length = min(32, getattr(reference.module.config, "max_position_embeddings", None) or 32)
        tokens = torch.randint(weight.shape[0], (4, length), device=weight.device)
        seen = self.look(reference, tokens, torch.arange(tokens.numel(), device=weight.device))
        for mask in self.learned.values():
            assert isinstance(mask, LearnedMask)
            mask.come_alive(torch.stack(seen.layers))

    def look(self, reference: FrozenTeacher, inputs: Tensor, where: Tensor) -> Seen:
        """Run the reference, without gradient, and keep what the masks are made of."""
        with reference.evaluating() as network:
            recorder = Recorder(network, self.roles) if self.roles else None
            if recorder is None:
                output = network.base_model(input_ids=inputs, output_hidden_states=bool(self.learned))
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
        rows = hidden.flatten(0, 1)[where].split(self.head.chunk)
        readings = [Reading.of(self.head.scores(network, part)) for part in rows]
        empty = hidden.new_zeros(hidden.shape[0] * hidden.shape[1], dtype=torch.float32)
        mean, noise = (
            empty.index_copy(0, where, torch.cat(values)).view(hidden.shape[:2])
            for values in ([r.mean for r in readings], [r.noise for r in readings])
        )
        return Reading(mean, noise)

    def forward(
        self, seen: Seen, where: Tensor, response: Bool[Tensor, "pairs 2 tokens"]
    ) -> tuple[Tensor, Tensor, dict[str, Metric]]:
        """The weights of the log-ratios and of the divergences, [pairs, 2, tokens] each, and what to log of them."""
        ones, masks, metrics = response.float(), {}, {}
        if self.learned:
            layers = torch.stack(seen.layers)
            made = {name: spread(mask(layers), where, response) for name, mask in self.learned.items()}
            masks = {term: made[name] for term in self.settings.on if (name := self.settings.name_of(term))}
        elif self.roles:
            mask, constant = mean_activation_mask(seen.readings, response.flatten(0, 1))
            masks = dict.fromkeys(self.settings.on, mask.view(response.shape))
            metrics["constant"] = Metric(constant.sum(), constant.numel())
        for term, mask in masks.items():
            metrics |= _sparsity(term, mask.detach(), response)
        return masks.get("reward", ones), masks.get("divergence", ones), metrics


def spread(values: Tensor, where: Tensor, response: Bool[Tensor, "pairs 2 tokens"]) -> Tensor:
    """Values of the response's tokens at their places, zeros elsewhere."""
    return values.new_zeros(response.numel()).index_copy(0, where, values).view(response.shape)


def _sparsity(term: str, mask: Tensor, response: Bool[Tensor, "pairs 2 tokens"]) -> dict[str, Metric]:
    """The share of zeros among a mask's weights, of chosen and rejected responses, and their mean."""
    zeros = {
        f"{term}_zeros_{side}": Metric(((mask == 0) & response)[:, i].sum(), response[:, i].sum())
        for i, side in enumerate(("chosen", "rejected"))
    }
    return zeros | {f"{term}_mask": Metric(response_sums(mask, response).sum(), response.sum())}
