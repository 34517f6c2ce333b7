"""Teacher-guided masking: a masked autoencoder that hides what its teacher finds most unlike the rest of the image.

The teacher is a moving average of the encoder. A patch's score is how far its feature points away from the image's mean
feature; noise keeps masks from repeating, and fades over the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from unmask.core.mask import Mask
from unmask.core.method import Clock, Plan
from unmask.core.randomness import Key
from unmask.core.targets import EMATeacher
from unmask.vision.data.images import ImageBatch
from unmask.vision.data.images import Settings as DataSettings
from unmask.vision.encoders.vit import VisionTransformer
from unmask.vision.methods import mae

CARD = {
    "title": "Teacher-guided masking",
    "paper": "none",
    "kind": "pretrain",
    "evidence": "thin",
    "reference": "none",
    "reference_licence": "none",
}


@dataclass(frozen=True)
class Settings(mae.Settings):
    """MAE's, and the teacher's.

    Args:
        decay: of the teacher's moving average.
    """

    decay: float = 0.99


def build(settings: Settings, data: DataSettings) -> Guided:
    encoder = VisionTransformer(settings.encoder, data.image_size, data.channels)
    return Guided(
        encoder, settings.decoder, norm_pix=settings.norm_pix, ratio=settings.mask_ratio, decay=settings.decay
    )


class Guided(mae.MAE):
    def __init__(self, *parts: Any, ratio: float, decay: float, **options: Any) -> None:
        super().__init__(*parts, **options)
        self.ratio = ratio
        self.teacher = EMATeacher(self.encoder, decay)

    def draw(self, batch: ImageBatch, clock: Clock, key: Key) -> Plan:
        with self.teacher.evaluating() as teacher:
            tokens = teacher(batch.images).tokens.float()  # [batch, tokens, dim]
        unlike = 1 - F.cosine_similarity(tokens, tokens.mean(1, keepdim=True), dim=2)  # [batch, tokens]
        noise = key.stream("mask").uniform(tokens.shape[1])
        scores = unlike / unlike.amax(1, keepdim=True) + (1 - clock.progress) * noise
        return Plan(Mask.from_scores(scores, num_visible=int(tokens.shape[1] * (1 - self.ratio))))

    @torch.no_grad()
    def after_step(self, clock: Clock) -> None:
        self.teacher.update(self.encoder, clock)
