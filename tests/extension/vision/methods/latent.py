"""Latent prediction: a small I-JEPA (Assran et al., CVPR 2023, arXiv 2301.08243).

The encoder sees a context block. A predictor answers for the features of several target blocks, one after another, as a
moving average of the encoder sees them in the whole image.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from unmask.core.losses import mean_term, smooth_l1
from unmask.core.mask import Indices, Split
from unmask.core.masking.multiblock import MultiBlockMasking
from unmask.core.method import Clock, Features, Output
from unmask.core.nn.positions import sincos_positions
from unmask.core.nn.transformer import Block
from unmask.core.randomness import Key
from unmask.core.targets import EMATeacher
from unmask.vision.data.images import ImageBatch
from unmask.vision.data.images import Settings as DataSettings
from unmask.vision.encoders.vit import VisionTransformer, ViTSettings

CARD = {
    "title": "Latent prediction",
    "paper": "after Assran et al., CVPR 2023, arXiv 2301.08243",
    "kind": "pretrain",
    "evidence": "thin",
    "reference": "none",
    "reference_licence": "none",
}


@dataclass(frozen=True)
class Settings:
    """What a recipe may set under ``model``.

    Args:
        encoder: the Vision Transformer.
        masking: context and targets.
        predictor_depth: blocks of the predictor.
    """

    encoder: ViTSettings = field(default_factory=lambda: ViTSettings(class_token=False))
    masking: MultiBlockMasking = field(default_factory=MultiBlockMasking)
    predictor_depth: int = 6


@dataclass(frozen=True)
class SplitPlan:
    split: Split


def build(settings: Settings, data: DataSettings) -> Latent:
    return Latent(VisionTransformer(settings.encoder, data.image_size, data.channels), settings)


class Latent(nn.Module):
    def __init__(self, encoder: VisionTransformer, settings: Settings) -> None:
        super().__init__()
        self.encoder, self.masking, dim = encoder, settings.masking, encoder.dim
        self.patch_size = encoder.patch_size
        self.teacher = EMATeacher(encoder, decay)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.positions = nn.Parameter(sincos_positions(encoder.grid, dim)[None], requires_grad=False)
        heads = settings.encoder.heads
        self.predictor = nn.ModuleList(Block(dim, heads) for _ in range(settings.predictor_depth))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim))

    def draw(self, batch: ImageBatch, clock: Clock, key: Key) -> SplitPlan:
        return SplitPlan(self.masking(key.stream("mask"), self.encoder.grid))

    def predict(self, batch: ImageBatch, plan: SplitPlan) -> Float[Tensor, "batch asked dim"]:
        context = plan.split.context
        latent = self.encoder.forward_visible(batch.images, context)  # [batch, context, dim]
        latent = latent + context.take(self.positions.expand(len(latent), -1, -1))
        return torch.cat([self._answer(latent, context, target) for target in plan.split.targets], dim=1)

    def _answer(self, latent: Tensor, context: Indices, target: Indices) -> Tensor:
        """What the predictor says of one target block: [batch, target, dim]."""
        asked = self.mask_token + target.take(self.positions.expand(len(latent), -1, -1))
        x, valid = torch.cat([latent, asked], dim=1), torch.cat([real(context), real(target)], dim=1)
        for block in self.predictor:
            x = block(x, None, valid)
        return self.head(x[:, latent.shape[1] :])

    def target(self, batch: ImageBatch, plan: SplitPlan) -> Float[Tensor, "batch asked dim"]:
        tokens = self.teacher(batch.images).tokens
        tokens = F.layer_norm(tokens, tokens.shape[-1:])
        return torch.cat([target.take(tokens) for target in plan.split.targets], dim=1)

    def forward(self, batch: ImageBatch, plan: SplitPlan) -> Output:
        values = smooth_l1(self.predict(batch, plan), self.target(batch, plan))  # [batch, asked]
        return Output({"latent": mean_term(values, torch.cat([real(t) for t in plan.split.targets], dim=1))})

    def encode(self, batch: ImageBatch) -> Features:
        return self.encoder(batch.images)

    def after_step(self, clock: Clock) -> None:
        self.teacher.update(self.encoder, clock)


def decay(clock: Clock) -> float:
    """From .996 to 1 in a line (appendix A)."""
    return 0.996 + 0.004 * clock.progress


def real(indices: Indices) -> Tensor:
    """True where a slot of an index set is no padding."""
    return torch.ones_like(indices.index, dtype=torch.bool) if indices.valid is None else indices.valid
