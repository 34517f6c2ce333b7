"""Regression of hidden vectors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from toy import WIDTH, ToyBatch, ToyMethod

from unmask.core.method import Features, Output, Plan, Term

CARD = {
    "title": "Plain",
    "paper": "none",
    "kind": "pretrain",
    "evidence": "full",
    "reference": "none",
    "reference_licence": "none",
}


@dataclass(frozen=True)
class Encoder:
    dim: int = 8
    rate: float = 0.0
    kind: str = "a"


@dataclass(frozen=True)
class Settings:
    encoder: Encoder = field(default_factory=Encoder)


def build(settings: Settings, data: Any) -> Plain:
    return Plain(settings.encoder)


def make_encoder(settings: Encoder) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, settings.dim), nn.GELU(), nn.Linear(settings.dim, settings.dim))


class Plain(nn.Module):
    def __init__(self, settings: Encoder) -> None:
        super().__init__()
        self.encoder = make_encoder(settings)
        self.head = nn.Linear(settings.dim, WIDTH)

    draw = ToyMethod.draw

    def predict(self, batch: ToyBatch, plan: Plan) -> Tensor:
        x = batch.x.masked_fill(plan.mask.hidden[..., None], 0)
        return self.head(self.encoder(x + x.mean(1, keepdim=True)))

    def target(self, batch: ToyBatch, plan: Any) -> Tensor:
        return batch.x

    def forward(self, batch: ToyBatch, plan: Plan) -> Output:
        error = ((self.predict(batch, plan) - self.target(batch, plan)) ** 2).mean(-1)
        return Output({"hidden": Term((error * plan.mask.hidden).sum(), plan.mask.hidden.sum())})

    def encode(self, batch: ToyBatch) -> Features:
        return Features(self.encoder(batch.x), (batch.x.shape[1],))
