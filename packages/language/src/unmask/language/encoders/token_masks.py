"""Weights of single tokens, from what a reference model computes: given by its activations, or learned."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from unmask.core.errors import UnmaskError
from unmask.language.encoders.activations import TYPE_OF, Reading

_STD = 0.02
_ATTEMPTS = 100


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
            f"model.masks: {_ATTEMPTS} initial masks are 0 at every token; are the hidden states of the reference finite?"
        )
