"""Masked letters: BERT's objective (Devlin et al., NAACL 2019, arXiv 1810.04805) on the letters of a line."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from unmask.core.losses import mean_term
from unmask.core.mask import Mask
from unmask.core.method import Clock, Features, Output, Plan
from unmask.core.randomness import Key
from unmask.letters.data.decode import VOCABULARY
from unmask.letters.data.lines import LineBatch
from unmask.letters.data.lines import Settings as DataSettings
from unmask.letters.encoders.transformer import EncoderSettings, LetterEncoder

CARD = {
    "title": "Masked letters",
    "paper": "after Devlin et al., NAACL 2019, arXiv 1810.04805",
    "kind": "pretrain",
    "evidence": "thin",
    "reference": "none",
    "reference_licence": "none",
}


@dataclass(frozen=True)
class Settings:
    """What a recipe may set under ``model``.

    Args:
        encoder: the transformer.
        mask_ratio: probability that a letter is hidden; one at least is hidden, and one visible.
    """

    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    mask_ratio: float = 0.3


def build(settings: Settings, data: DataSettings) -> MaskedLetters:
    return MaskedLetters(settings, data.length)


class MaskedLetters(nn.Module):
    def __init__(self, settings: Settings, length: int) -> None:
        super().__init__()
        self.encoder, self.mask_ratio = LetterEncoder(settings.encoder, length), settings.mask_ratio
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, self.encoder.dim))
        self.head = nn.Linear(self.encoder.dim, VOCABULARY)

    def draw(self, batch: LineBatch, clock: Clock, key: Key) -> Plan:
        noise = key.stream("mask").uniform(self.encoder.length)  # [batch, length]
        first, last = noise.masked_fill(~batch.valid, 2).argmin(1), noise.masked_fill(~batch.valid, -1).argmax(1)
        hidden = (noise < self.mask_ratio).scatter(1, first[:, None], True).scatter(1, last[:, None], False)
        return Plan(Mask.from_hidden(hidden, batch.valid))

    def predict(self, batch: LineBatch, plan: Plan) -> Float[Tensor, "batch length vocabulary"]:
        return self.head(self.encoder(batch.letters, batch.valid, plan.mask.hidden, self.mask_token).tokens)

    def target(self, batch: LineBatch, plan: Plan) -> Int[Tensor, "batch length"]:
        return batch.letters

    def forward(self, batch: LineBatch, plan: Plan) -> Output:
        logits = self.predict(batch, plan).float().transpose(1, 2)  # [batch, vocabulary, length]
        values = F.cross_entropy(logits, self.target(batch, plan), reduction="none")  # [batch, length]
        return Output({"letters": mean_term(values, plan.mask.hidden)})

    def encode(self, batch: LineBatch) -> Features:
        return self.encoder(batch.letters, batch.valid)
