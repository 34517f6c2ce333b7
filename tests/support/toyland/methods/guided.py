"""Regression of a frozen network's features, with an EMA of the encoder beside it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from toy import ToyBatch

from toyland.methods.plain import Plain, Settings
from unmask.core.method import Clock
from unmask.core.networks import Network
from unmask.core.targets import EMATeacher, FrozenTeacher

CARD = {
    "title": "Guided",
    "paper": "none",
    "kind": "pretrain",
    "evidence": "full",
    "reference": "none",
    "reference_licence": "none",
}
NETWORKS = {"teacher": "the network whose features are the targets"}

__all__ = ["CARD", "NETWORKS", "Settings", "build"]


def build(settings: Settings, data: Any, networks: dict[str, Network]) -> Guided:
    return Guided(settings, networks["teacher"].module)


class Guided(Plain):
    def __init__(self, settings: Settings, network: nn.Module) -> None:
        super().__init__(settings.encoder)
        self.teacher = FrozenTeacher(network)
        self.head = nn.Linear(settings.encoder.dim, network[2].out_features)  # type: ignore[index]
        self.mean = EMATeacher(self.encoder, 0.9)

    def target(self, batch: ToyBatch, plan: Any) -> Tensor:
        return self.teacher(batch.x)

    def after_step(self, clock: Clock) -> None:
        self.mean.update(self.encoder, clock)
