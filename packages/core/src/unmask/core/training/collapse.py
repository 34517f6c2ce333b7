"""Whether features collapse while a run trains: how many dimensions they, and what is asked, use.

A method that learns to predict features, its own or a teacher's, can find an answer that is always right: the same
feature for everything. The loss is then excellent and the features are worth nothing. What tells are, measured on
validation samples in eval mode and under the run's autocast:

* ``rankme``: effective rank of the pooled features, one vector per sample (RankMe, arXiv 2210.02885);
* ``deviation``: of the same, per dimension and after scaling to length 1 (SimSiam, arXiv 2011.10566): 0 when all
  samples have the same feature, 1 when features are isotropic;
* ``token_rankme`` and ``token_deviation``: of single tokens, whose variance data2vec's released code watches;
* ``target_rank``: RankMe of what the method's `target` asks, where it has one that gives vectors.

All are sums over samples (`Spread`), added over ranks, so that the number of ranks does not matter. Ranks of features
that are not centred may well be low from the start, and fall as a network learns; hence the alarm is for a fall far
below what the run has had, and for a deviation of nearly nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unmask.core.evaluation.rankme import Spread
from unmask.core.method import Features
from unmask.core.targets.teachers import teachers
from unmask.core.training.gradients import Call, evaluating, exact
from unmask.core.training.recipe import Recipe

SAMPLES = 1024
TOKENS = 16  # of a sample, so that a sample of many tokens does not cost more than its encoding
SHARE = 1 / 4  # of the highest rank so far: below it is a collapse
LEAST_DEVIATION = 0.01
_RANKS = {"rankme": "the features use", "target_rank": "the targets use"}


def is_watched(method: nn.Module, recipe: Recipe) -> bool:
    """Whether a run measures collapse: as its recipe says; ``auto`` is for methods with a teacher."""
    return bool(teachers(method)) if recipe.training.monitor == "auto" else recipe.training.monitor


class CollapseMonitor:
    """Measures features and targets, and says when they collapse.

    Args:
        fabric: Lightning Fabric, launched.
        method: what is trained.
        earlier: metrics lines of the run up to here, whose ranks count among the highest.
    """

    def __init__(self, fabric: Any, method: Any, earlier: Sequence[Mapping[str, Any]] = ()) -> None:
        self.fabric, self.method = fabric, method
        self.highest = {name: max((line.get(name) or 0.0 for line in earlier), default=0.0) for name in _RANKS}
        self.dims: dict[str, int] = {}
        self.alarmed = False

    def begin(self, calls: Iterable[Call]) -> None:
        """Take the ranks at the start as the first to compare with, unless earlier lines have some."""
        if not any(self.highest.values()):
            self.alarm(self.measure(calls))
            self.alarmed = False

    def measure(self, calls: Iterable[Call]) -> dict[str, float]:
        """The numbers named in this file's head. Every rank has a call at least."""
        pooled, tokens, target = (Spread(exact(self.fabric.device)) for _ in range(3))
        with evaluating(self.method):
            for call in calls:
                with self.fabric.autocast():
                    features, asked = self.method.encode(call.batch), self._target(call)
                pooled.add(features.pooled.float())
                tokens.add(some_tokens(features).float())
                for rows in asked:
                    target.add(rows.float())
        return self._numbers(pooled, tokens, target)

    def _target(self, call: Call) -> list[Float[Tensor, "n dim"]]:
        """What is asked at hidden tokens, thinned as tokens are; nothing where it is no vectors.

        Of several targets it is the first.
        """
        target = getattr(self.method, "target", None)
        asked = None if target is None else target(call.batch, call.plan)
        asked = asked[0] if isinstance(asked, tuple | list) and asked else asked
        if isinstance(asked, Tensor) and asked.is_floating_point() and asked.dim() > 1 and asked.shape[-1] > 1:
            return [_evenly(asked.flatten(0, -2), TOKENS * len(call.batch.ids))]
        return []

    def _numbers(self, pooled: Spread, tokens: Spread, target: Spread) -> dict[str, float]:
        rank, deviation, dims = pooled.finish(self.fabric)
        token_rank, token_deviation, _ = tokens.finish(self.fabric)
        numbers = {"rankme": rank, "deviation": deviation}
        numbers |= {"token_rankme": token_rank, "token_deviation": token_deviation}
        self.dims["rankme"] = dims
        if target.sums is not None:
            numbers["target_rank"], _, self.dims["target_rank"] = target.finish(self.fabric)
        return numbers

    def alarm(self, numbers: Mapping[str, float]) -> str | None:
        """What to say about new numbers: once when they show a collapse, and again only after they have recovered."""
        found = [text for name in _RANKS if name in numbers and (text := self._fallen(name, numbers[name]))]
        if numbers["deviation"] < LEAST_DEVIATION:
            found.insert(0, f"all samples have nearly the same feature (deviation {numbers['deviation']:.2g} of 1)")
        known, self.alarmed = self.alarmed, bool(found)
        return f"{'; '.join(found)}: a collapse. {self._remedy()}" if found and not known else None

    def _fallen(self, name: str, rank: float) -> str | None:
        """The text for a rank that is far below the highest so far, which it may be itself."""
        if not math.isfinite(rank):
            return None
        self.highest[name] = max(self.highest[name], rank)
        if rank >= SHARE * self.highest[name]:
            return None
        before = f"under a quarter of the {self.highest[name]:.1f} before"
        return f"{_RANKS[name]} {rank:.1f} of {self.dims[name]} dimensions (RankMe), {before}"

    def _remedy(self) -> str:
        helps = "A low loss means little now; what helps most is a lower optimizer.base_lr"
        averages = [path for path, teacher in teachers(self.method).items() if teacher.kind == "ema"]
        return helps + (f", and a decay of the EMA ({', '.join(averages)}) that is nearer to 1" if averages else "")


def some_tokens(features: Features) -> Float[Tensor, "n dim"]:
    """Tokens spread evenly over each sample, padding left out."""
    count = features.tokens.shape[1]
    at = torch.linspace(0, count - 1, min(count, TOKENS), device=features.tokens.device).round().long()
    chosen = features.tokens[:, at]
    return chosen.flatten(0, 1) if features.valid is None else chosen[features.valid[:, at]]


def _evenly(rows: Float[Tensor, "n dim"], limit: int) -> Float[Tensor, "m dim"]:
    at = torch.linspace(0, len(rows) - 1, min(len(rows), limit), device=rows.device)
    return rows[at.round().long()]
