"""Small sound methods of every shape that the suites know; `broken` breaks them one by one.

Tokens are vectors, or ids. What is hidden is replaced by a learned token, and answered for by a small decoder.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.core.checks import hidden_tokens
from unmask.core.losses import l2, mean_term
from unmask.core.mask import Indices, Mask, Split
from unmask.core.method import Clock, Features, Output, Plan, Term
from unmask.core.nn.transformer import DropPath
from unmask.core.randomness import Key

SAMPLES, TOKENS, WIDTH, DIM, WORDS = 4, 8, 3, 8, 11
IDS = torch.tensor([3, 7, 11, 2])


@dataclass(frozen=True)
class Batch:
    x: Tensor
    ids: Tensor


@dataclass(frozen=True)
class Sentences:
    words: Tensor
    ids: Tensor


def vectors() -> Batch:
    return Batch(torch.randn(SAMPLES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)), IDS)


def sentences() -> Sentences:
    return Sentences(torch.randint(WORDS, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(0)), IDS)


def corrupt(batch: Any, plan: Any, value: float) -> Any:
    hidden = hidden_tokens(plan, TOKENS)
    if isinstance(batch, Sentences):
        return replace(batch, words=torch.where(hidden, (batch.words + int(value)) % WORDS, batch.words))
    return replace(batch, x=batch.x.masked_fill(hidden[..., None], value))


class Encoder(nn.Module):
    """Embeds tokens, hides some, mixes them by their mean; dropout and stochastic depth on the way."""

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed = embed
        self.positions = nn.Parameter(torch.randn(TOKENS, DIM))
        self.mix, self.own = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.norm = nn.LayerNorm(DIM)
        self.register_buffer("scale", torch.ones(DIM))
        self.drop, self.path = nn.Dropout(0.3), DropPath(0.3)

    def forward(self, x: Tensor, hidden: Tensor | None = None, token: Tensor | None = None) -> Tensor:
        x = self.embed(x) * self.scale
        if hidden is not None and token is not None:
            x = torch.where(hidden[..., None], token, x)
        x = x + self.positions
        return self.norm(x + self.path(self.drop(self.own(x).relu() + 0.3 * self.mix(x).mean(1, keepdim=True))))


class Sound(nn.Module):
    """Answers for the values of hidden tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(nn.Linear(WIDTH, DIM))
        self.token = nn.Parameter(torch.randn(DIM))
        self.decoder = nn.Linear(DIM, WIDTH)

    def draw(self, batch: Batch, clock: Clock, key: Key) -> Any:
        return Plan(Mask.from_scores(key.stream("mask").uniform(TOKENS), 3))

    def latent(self, batch: Batch, plan: Any) -> Tensor:
        return self.encoder(batch.x, plan.mask.hidden, self.token)

    def predict(self, batch: Batch, plan: Any) -> Tensor:
        return self.decoder(plan.mask.hidden_indices.take(self.latent(batch, plan)))

    @torch.no_grad()
    def target(self, batch: Batch, plan: Any) -> Tensor:
        return plan.mask.hidden_indices.take(batch.x)

    def forward(self, batch: Batch, plan: Any) -> Output:
        return Output({"loss": mean_term(l2(self.predict(batch, plan), self.target(batch, plan)))})

    def encode(self, batch: Batch) -> Features:
        return Features(self.encoder(batch.x), (TOKENS,))


class WithoutTarget(Sound):
    """Has no `target`, embeds tokens before it hides them, and detaches what it asks."""

    target = property()  # type: ignore[assignment]

    def forward(self, batch: Batch, plan: Any) -> Output:
        asked = plan.mask.hidden_indices.take(self.encoder.scale[:WIDTH] * batch.x).detach()
        return Output({"loss": mean_term(l2(self.predict(batch, plan), asked))})


class ScoresTheMask(Sound):
    """Hides the tokens that a frozen scorer finds hardest, and keeps the scores as a target: a mask from content."""

    def __init__(self) -> None:
        super().__init__()
        self.scorer = nn.Linear(WIDTH, 1).requires_grad_(False)
        self.guess = nn.Linear(DIM, 1)

    def draw(self, batch: Batch, clock: Clock, key: Key) -> Any:
        scores = self.scorer(batch.x)[..., 0]
        return ScoredPlan(Mask.from_scores(scores + 0.3 * key.uniform(TOKENS), 3), scores)

    def target(self, batch: Batch, plan: Any) -> Any:
        hidden = plan.mask.hidden_indices
        return hidden.take(batch.x).detach(), hidden.take(plan.scores)

    def forward(self, batch: Batch, plan: Any) -> Output:
        values, scores = self.target(batch, plan)
        guesses = self.guess(plan.mask.hidden_indices.take(self.latent(batch, plan)))[..., 0]
        errors = l2(self.predict(batch, plan), values)
        return Output({"loss": mean_term(errors), "scores": mean_term((guesses - scores) ** 2)})


@dataclass(frozen=True)
class ScoredPlan(Plan):
    scores: Tensor


class EMA(nn.Module):
    """The smallest teacher that follows a student."""

    kind = "ema"

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(student).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> EMA:
        return self

    def decay(self, clock: Clock) -> float:
        return 0.99 + 0.0099 * clock.progress

    @torch.no_grad()
    def update(self, student: nn.Module, clock: Clock) -> None:
        for mine, other in zip(self.module.state_dict().values(), student.state_dict().values(), strict=True):
            mine.lerp_(other, 1 - self.decay(clock))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


class Latent(Sound):
    """Predicts an EMA teacher's features of two target sets from a context: a plan with a `Split`."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = EMA(self.encoder)
        self.decoder = nn.Linear(DIM, DIM)

    def draw(self, batch: Batch, clock: Clock, key: Key) -> Any:
        order = key.permutation(TOKENS)
        return SplitPlan(Split(Indices(order[:, :4]), (Indices(order[:, 4:6]), Indices(order[:, 5:7]))))

    def latent(self, batch: Batch, plan: Any) -> Tensor:
        return self.encoder(batch.x, hidden_tokens(plan, TOKENS), self.token)

    def predict(self, batch: Batch, plan: Any) -> Tensor:
        return self.decoder(torch.cat([asked.take(self.latent(batch, plan)) for asked in plan.split.targets], 1))

    @torch.no_grad()
    def target(self, batch: Batch, plan: Any) -> Tensor:
        features = self.teacher(batch.x)
        return torch.cat([asked.take(features) for asked in plan.split.targets], 1)

    def after_step(self, clock: Clock) -> None:
        self.teacher.update(self.encoder, clock)


class SharedTarget(Sound):
    """Predicts the encoder's own features of the whole, detached; no `target`, no declared teacher."""

    target = property()  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(DIM, DIM)

    def forward(self, batch: Batch, plan: Any) -> Output:
        asked = plan.mask.hidden_indices.take(self.encoder(batch.x).detach())
        return Output({"loss": mean_term(l2(self.predict(batch, plan), asked))})


@dataclass(frozen=True)
class SplitPlan:
    split: Split


class Words(Sound):
    """BERT's objective on ids: cross entropy at hidden places."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(nn.Embedding(WORDS, DIM))
        self.decoder = nn.Linear(DIM, WORDS)

    def latent(self, batch: Any, plan: Any) -> Tensor:
        return self.encoder(batch.words, plan.mask.hidden, self.token)

    def target(self, batch: Any, plan: Any) -> Tensor:
        return plan.mask.hidden_indices.take(batch.words)

    def forward(self, batch: Any, plan: Any) -> Output:
        answer, asked = self.predict(batch, plan).flatten(0, 1), self.target(batch, plan).flatten()
        return Output({"loss": Term(F.cross_entropy(answer, asked, reduction="sum"), float(len(asked)))})

    def encode(self, batch: Any) -> Features:
        return Features(self.encoder(batch.words), (TOKENS,))


class WordsWithoutTarget(Words):
    """The same without `target`."""

    target = property()  # type: ignore[assignment]

    def forward(self, batch: Any, plan: Any) -> Output:
        asked = plan.mask.hidden_indices.take(batch.words).flatten()
        loss = F.cross_entropy(self.predict(batch, plan).flatten(0, 1), asked, reduction="sum")
        return Output({"loss": Term(loss, float(len(asked)))})


class Everywhere(Sound):
    """Asks for all tokens, and says so."""

    loss_on = "all"

    def forward(self, batch: Batch, plan: Any) -> Output:
        return Output({"loss": mean_term(l2(self.decoder(self.latent(batch, plan)), batch.x.detach()))})

    target = property()  # type: ignore[assignment]


class Normalised(Sound):
    """Its encoder normalises over all tokens, hidden ones included, and says so."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder.embed = nn.Sequential(nn.Linear(WIDTH, DIM), _OverTokens(), nn.Linear(DIM, DIM))

    def norms_over_all(self) -> set[str]:
        return {"encoder.embed.1.norm"}


class _OverTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class Tuned(nn.Module):
    """A fine-tuning: no mask, no `encode`, no `predict`; a plan with nothing in it."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Encoder(nn.Linear(WIDTH, DIM))
        self.head = nn.Linear(DIM, 2)

    def draw(self, batch: Batch, clock: Clock, key: Key) -> tuple[()]:
        return ()

    def forward(self, batch: Batch, plan: Any) -> Output:
        loss = F.cross_entropy(self.head(self.network(batch.x).mean(1)), batch.ids % 2, reduction="sum")
        return Output({"class": Term(loss, float(len(batch.ids)))})


def network(image: Tensor) -> nn.Module:
    """A small classifier of images, for explainers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(image[0].numel(), 6), nn.ReLU(), nn.Linear(6, 2)).eval()
