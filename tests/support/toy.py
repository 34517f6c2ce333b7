"""A tiny method and data set for tests of the training loop: masked regression of short vectors, with dropout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from unmask.core.mask import Mask
from unmask.core.method import Clock, Features, Metric, Output, Plan, Term
from unmask.core.randomness import Key, SampleKey
from unmask.core.training.recipe import Optimizer, Recipe, Schedule, Training

TOKENS, WIDTH = 6, 4


@dataclass(frozen=True)
class ToyBatch:
    x: Tensor
    ids: Tensor


class ToySet:
    """Vectors with keyed noise; sample ids are 100, 101, ..."""

    def __init__(self, n: int, first: int = 100, broken: int | None = None) -> None:
        self.ids = torch.arange(first, first + n)
        self.broken = broken
        self.problems: list[str] = []

    def __len__(self) -> int:
        return len(self.ids)

    def name_of(self, sample_id: int) -> str:
        return f"sample-{sample_id}.png"

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        index, visit = item
        sample = int(self.ids[index])
        draws = SampleKey.of(7, sample, visit).stream("augment").uniform(TOKENS * WIDTH)
        x = torch.tensor(draws).reshape(TOKENS, WIDTH) + sample % 5
        return (x * torch.nan if index == self.broken else x), sample


def collate(samples: Sequence[tuple[Tensor, int]]) -> ToyBatch:
    return ToyBatch(torch.stack([x for x, _ in samples]), torch.tensor([i for _, i in samples]))


class ToyMethod(nn.Module):
    """Hides a ragged number of tokens per sample, so that counts differ between micro-batches."""

    def __init__(self, dropout: float = 0.0, terms: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(WIDTH, 8)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.norm = nn.LayerNorm(8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, WIDTH)
        self.terms = terms

    def no_weight_decay(self) -> set[str]:
        return {"mask_token"}

    def draw(self, batch: ToyBatch, clock: Clock, key: Key) -> Plan:
        noise = key.stream("mask").uniform(TOKENS)
        return Plan(Mask.from_hidden(noise <= noise[:, :1].clamp(min=0.2)))

    def forward(self, batch: ToyBatch, plan: Plan) -> Output:
        hidden = plan.mask.hidden[..., None]
        x = torch.where(hidden, self.mask_token, self.embed(batch.x))
        x = self.head(self.dropout(self.norm(x + x.mean(1, keepdim=True))))
        error = ((x - batch.x) ** 2).mean(-1)
        terms = {"hidden": Term((error * plan.mask.hidden).sum(), plan.mask.hidden.sum())}
        if self.terms == 2:
            terms["visible"] = Term((error * plan.mask.visible).sum(), plan.mask.visible.sum(), 0.5)
        return Output(terms, {"scale": Metric(x.detach().abs().sum(), x.numel())})

    def encode(self, batch: ToyBatch) -> Features:
        return Features(self.embed(batch.x), (TOKENS,))

    def predict(self, batch: ToyBatch, plan: Plan) -> Tensor:
        return self.embed(batch.x)

    def picture(self, batch: ToyBatch, plan: Plan) -> dict[str, Tensor]:
        return {}


def toy_recipe(steps: int | None = None, epochs: int = 3, **training: Any) -> Recipe:
    defaults: dict[str, Any] = {"batch_size": 8, "log_every": 2, "checkpoint_every_steps": 3, "precision": "32-true"}
    return Recipe(
        method="vision/toy",
        model={},
        data={"source": "toy"},
        seed=3,
        optimizer=Optimizer(base_lr=0.05, reference_batch=8, clip_norm=1.0),
        schedule=Schedule(epochs=epochs, steps=steps, warmup_epochs=1),
        training=Training(**{**defaults, **training}),
    )


def run_toy(out: Path, recipe: Recipe | None = None, **options: Any) -> Path:
    """Train the toy on 28 samples (3 steps of 8 an epoch), validating on 10."""
    from unmask.core.training.loop import fit

    parts = SimpleNamespace(method=ToyMethod(dropout=0.2), train=ToySet(28), val=ToySet(10, 900))
    for name in ("method", "train", "val"):
        setattr(parts, name, options.pop(name, getattr(parts, name)))
    return fit(parts.method, parts.train, parts.val, collate, recipe or toy_recipe(), out, progress=False, **options)
