"""Cross-view completion on letters, after CroCo (Weinzaepfel et al., NeurIPS 2022, arXiv 2210.10716).

Most letters of a line are hidden; another line of its class is seen whole, and helps to answer.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from unmask.core.method import Plan
from unmask.core.nn.transformer import CrossBlock
from unmask.letters.data.lines import Settings as DataSettings
from unmask.letters.data.pairs import PairBatch
from unmask.letters.methods import masked_letters

CARD = {
    "title": "Siblings",
    "paper": "after Weinzaepfel et al., NeurIPS 2022, arXiv 2210.10716",
    "kind": "pretrain",
    "evidence": "thin",
    "reference": "none",
    "reference_licence": "none",
}
DATA = "pairs"


@dataclass(frozen=True)
class Settings(masked_letters.Settings):
    """As for masked letters, with more of them hidden."""

    mask_ratio: float = 0.8


def build(settings: Settings, data: DataSettings) -> Siblings:
    return Siblings(settings, data.length)


class Siblings(masked_letters.MaskedLetters):
    def __init__(self, settings: Settings, length: int) -> None:
        super().__init__(settings, length)
        self.cross = CrossBlock(self.encoder.dim, settings.encoder.heads)

    def predict(self, batch: PairBatch, plan: Plan) -> Float[Tensor, "batch length vocabulary"]:
        seen = self.encoder(batch.letters, batch.valid, plan.mask.hidden, self.mask_token)
        beside = self.encoder(batch.beside, batch.beside_valid)
        return self.head(self.cross(seen.tokens, beside.tokens, batch.valid, memory_valid=batch.beside_valid))
