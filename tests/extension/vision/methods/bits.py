"""Masked bits: a small MaskGIT (Chang et al., CVPR 2022, arXiv 2202.04200) on black and white pixels.

Pixels brighter than the mean are 1, the others 0. A transformer answers for hidden pixels; to generate, all pixels are
hidden and are revealed in a random order, a few in each step, each drawn from what the network answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from unmask.core.losses import mean_term
from unmask.core.mask import Mask
from unmask.core.method import Clock, Output, Plan
from unmask.core.nn.positions import sincos_positions
from unmask.core.nn.transformer import Block
from unmask.core.randomness import Key
from unmask.vision.data.images import ImageBatch
from unmask.vision.data.images import Settings as DataSettings

CARD = {
    "title": "Masked bits",
    "paper": "after Chang et al., CVPR 2022, arXiv 2202.04200",
    "kind": "generate",
    "task": "generation",
    "evidence": "thin",
    "reference": "none",
    "reference_licence": "none",
}
_HIDDEN = 2  # the id of a pixel that is not seen


@dataclass(frozen=True)
class Settings:
    """What a recipe may set under ``model``.

    Args:
        dim: width of the transformer.
        depth: its blocks.
        heads: its attention heads.
        steps: in which an image is revealed.
    """

    dim: int = 32
    depth: int = 2
    heads: int = 2
    steps: int = 8


def build(settings: Settings, data: DataSettings) -> MaskedBits:
    return MaskedBits(settings, data.image_size)


class MaskedBits(nn.Module):
    patch_size = 1  # a token is a pixel, for the checks

    def __init__(self, settings: Settings, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.image_size, self.steps = image_size, settings.steps
        self.embed = nn.Embedding(3, settings.dim)
        self.positions = nn.Parameter(sincos_positions(image_size, settings.dim)[None])
        self.blocks = nn.ModuleList(Block(settings.dim, settings.heads) for _ in range(settings.depth))
        self.norm = nn.LayerNorm(settings.dim)
        self.head = nn.Linear(settings.dim, 1)

    def draw(self, batch: ImageBatch, clock: Clock, key: Key) -> Plan:
        """A share of the pixels between none and all, as the cosine of a uniform draw; at least one."""
        noise = key.stream("mask").uniform(batch.images[0, 0].numel())  # [batch, pixels]
        share = torch.cos(torch.pi / 2 * key.stream("share").uniform(1))
        return Plan(Mask.from_hidden((noise < share) | (noise == noise.amin(1, keepdim=True))))

    def logits(self, ids: Int[Tensor, "batch pixels"]) -> Float[Tensor, "batch pixels"]:
        x = self.embed(ids) + self.positions  # [batch, pixels, dim]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))[..., 0]

    def predict(self, batch: ImageBatch, plan: Plan) -> Float[Tensor, "batch pixels"]:
        return self.logits(bits(batch).masked_fill(plan.mask.hidden, _HIDDEN))

    def target(self, batch: ImageBatch, plan: Plan) -> Float[Tensor, "batch pixels"]:
        return bits(batch).float()

    def forward(self, batch: ImageBatch, plan: Plan) -> Output:
        answer, asked = self.predict(batch, plan).float(), self.target(batch, plan)
        values = F.binary_cross_entropy_with_logits(answer, asked, reduction="none")
        return Output({"bits": mean_term(values, plan.mask.hidden)})

    @torch.no_grad()
    def generate(self, count: int, seed: int) -> Float[Tensor, "count 1 rows columns"]:
        """Images whose pixels are one deviation below the mean or above it."""
        device, pixels = self.positions.device, self.positions.shape[1]
        dice = torch.Generator().manual_seed(seed)
        order = torch.rand(count, pixels, generator=dice).argsort(1).to(device)
        ids = torch.full((count, pixels), _HIDDEN, device=device)
        for revealed in order.tensor_split(self.steps, dim=1):
            drawn = torch.rand(count, pixels, generator=dice).to(device) < self.logits(ids).sigmoid()
            ids = ids.scatter(1, revealed, drawn.long().gather(1, revealed))
        return (2.0 * ids - 1).view(count, 1, *self.image_size)


def bits(batch: ImageBatch) -> Int[Tensor, "batch pixels"]:
    return (batch.images[:, 0] > 0).flatten(1).long()
