"""The attentive probe: a learned query gathers what a class needs from frozen tokens, and a linear layer reads it.

A mean over tokens loses what only a few of them know, and which those are; this probe learns where to look.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from unmask.core.errors import UnmaskError
from unmask.core.method import Clock
from unmask.core.nn.attention import CrossAttention
from unmask.core.nn.init import truncated_normal_init
from unmask.core.nn.transformer import Block, Mlp
from unmask.core.randomness import Key
from unmask.core.training.groups import make_optimizer, set_rates
from unmask.core.training.recipe import Optimizer
from unmask.core.training.schedules import Scheduled


@dataclass(frozen=True)
class AttentiveProbe:
    """V-JEPA's frozen evaluation (arXiv 2404.08471), its settings chosen from V-JEPA 2's grid (arXiv 2506.09985).

    From V-JEPA: one cross-attention block and a linear layer, AdamW, a cosine from the learning rate to 0 without
    warm-up, 20 epochs, batches of 256, gradients clipped at a norm of 1, weight decay on everything but biases and
    vectors. Its one learning rate and weight decay, 1e-3 and 0.01, are a member of the grid. From V-JEPA 2: the grid,
    all members of which are trained at once on the same batches, and three self-attention blocks before the pooling
    for ``blocks=4``, which is not the default.

    Ours: the member is chosen on the validation split and the test split scored once (V-JEPA 2 reports the best of the
    grid); all members start from the same weights, so that they differ in the grid's settings alone; every linear
    weight starts truncated normal (std 0.02), without a rescaling by depth; the last epoch's weights count; 16 heads,
    those of V-JEPA's ViT-L and ViT-H (its code takes the encoder's: hand in yours with `dataclasses.replace`). Tokens
    are given, so nothing is augmented while the probe trains, and predictions are not averaged over views: tokens of
    several clips or crops may be concatenated.

    Args:
        blocks: the cross-attention block and the self-attention blocks before it, together; at least 1.
        heads: attention heads; must divide the tokens' width.
        mlp_ratio: width of an MLP's hidden layer over the tokens'.
        learning_rates: the grid of peak learning rates.
        weight_decays: the grid of weight decays, each of which is tried with each learning rate.
        betas: AdamW's decay rates.
        epochs: passes over the training split.
        batch_size: samples per step; all of them where there are fewer. A last batch that is not full is left out,
            with other samples in each epoch.
        clip_norm: largest norm of all gradients together.
    """

    blocks: int = 1
    heads: int = 16
    mlp_ratio: float = 4.0
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 5e-3)
    weight_decays: tuple[float, ...] = (0.01, 0.1, 0.4, 0.8)
    betas: tuple[float, float] = (0.9, 0.999)
    epochs: int = 20
    batch_size: int = 256
    clip_norm: float = 1.0


@dataclass(frozen=True)
class TokenSplit:
    """The frozen tokens of a split. They may lie on the CPU or in a mapped file: only batches of them are moved.

    Args:
        x: tokens.
        ids: the samples' stable ids.
        y: class indices.
        valid: False = padding, in samples shorter than the longest, whatever values it has; None when there is none.

    Raises:
        UnmaskError: a sample is padding alone.
    """

    x: Float[Tensor, "n tokens dim"]
    ids: Int[Tensor, "n"]
    y: Int[Tensor, "n"]
    valid: Bool[Tensor, "n tokens"] | None = None

    def __post_init__(self) -> None:
        if self.valid is not None and not bool((some := self.valid.any(1)).all()):
            empty = int(self.ids[(~some).nonzero()[0, 0]])
            raise UnmaskError(
                f"sample {empty} has no valid token, expected at least one in every sample; leave out such samples"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def batch(
        self, index: Int[Tensor, "batch"], device: torch.device | str
    ) -> tuple[Float[Tensor, "batch tokens dim"], Bool[Tensor, "batch tokens"] | None, Int[Tensor, "batch"]]:
        """Tokens in fp32 with zeros for padding, which tokens are valid, and class indices, on `device`."""
        x, y = (of[index.to(of.device)].to(device) for of in (self.x, self.y))  # [batch, tokens, dim] and [batch]
        if self.valid is None:
            return x.float(), None, y
        valid = self.valid[index.to(self.valid.device)].to(device)  # [batch, tokens]
        # Attention gives padding a weight of 0, but 0 times NaN is NaN.
        return x.float().masked_fill(~valid[..., None], 0.0), valid, y


@dataclass(frozen=True)
class AttentiveProbed:
    """What the probe reached.

    Args:
        accuracy: on the test split, in [0, 1].
        val_accuracy: on the validation split.
        learning_rate: the one that was chosen.
        weight_decay: the one that was chosen.
        labels: how many it was fitted on.
    """

    accuracy: float
    val_accuracy: float
    learning_rate: float
    weight_decay: float
    labels: int


class AttentiveClassifier(nn.Module):
    """Self-attention blocks, V-JEPA's attentive pooling, and a linear classifier.

    With one learned query q and tokens x: ``q + attention(q, norm(x))``, then ``q + mlp(norm(q))``. As in V-JEPA's
    code, the query is not normalised before it attends, attention has no output projection, and no norm follows.

    Args:
        dim: the tokens' width.
        classes: how many.
        protocol: depth, heads and MLP.

    Raises:
        ValueError: the heads do not divide `dim`.
    """

    def __init__(self, dim: int, classes: int, protocol: AttentiveProbe) -> None:
        super().__init__()
        p = protocol
        self.blocks = nn.ModuleList(Block(dim, p.heads, p.mlp_ratio) for _ in range(p.blocks - 1))
        self.query = nn.Parameter(torch.empty(1, 1, dim))
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.cross_attn = CrossAttention(dim, p.heads, project=False)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * p.mlp_ratio))
        self.head = nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.query, std=0.02)
        self.apply(truncated_normal_init)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], valid: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch classes"]:
        """Logits of the classes.

        Args:
            x: frozen tokens; padding has to be finite.
            valid: False = padding, which nothing attends to.
        """
        return self.head(self.pool(x, valid))

    def pool(
        self, x: Float[Tensor, "batch tokens dim"], valid: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch dim"]:
        """What the query gathers, before the classifier."""
        for block in self.blocks:
            x = block(x, None, valid)
        q = self.query.expand(len(x), -1, -1)  # [batch, 1, dim]
        q = q + self.cross_attn(q, self.norm1(x), valid)
        return (q + self.mlp(self.norm2(q)))[:, 0]


class _Member:
    """One point of the grid: a classifier of its own, with its optimizer."""

    def __init__(self, start: AttentiveClassifier, rate: float, decay: float, protocol: AttentiveProbe) -> None:
        self.rate, self.decay, self.clip_norm = rate, decay, protocol.clip_norm
        self.classifier = deepcopy(start)
        self.optimizer = make_optimizer(self.classifier, Optimizer(weight_decay=decay, betas=protocol.betas))
        self.schedule = Scheduled(rate, 0.0, "cosine")

    def step(self, x: Tensor, valid: Tensor | None, y: Tensor, clock: Clock) -> None:
        set_rates(self.optimizer, self.schedule(clock), self.decay)
        self.optimizer.zero_grad()
        F.cross_entropy(self.classifier(x, valid), y).backward()
        nn.utils.clip_grad_norm_(self.classifier.parameters(), self.clip_norm)
        self.optimizer.step()


def attentive_probe(
    train: TokenSplit,
    val: TokenSplit,
    test: TokenSplit,
    protocol: AttentiveProbe | None = None,
    seed: int = 0,
    *,
    device: torch.device | str = "cpu",
) -> AttentiveProbed:
    """Train every member of the grid on train, choose one on validation (the first of equals), score test once.

    Initial weights depend on `seed`, and the order of the samples on it and on their ids; no generator is drawn from.
    The classes are those of `train`: samples of others count as wrong. Memory holds a batch of tokens, and weights,
    gradients and AdamW's state for every member.

    Args:
        train: what to fit on.
        val: what to choose on.
        test: what to report on.
        protocol: the hyper-parameters.
        seed: of initial weights and order.
        device: where to compute; the splits stay where they are.

    Raises:
        ValueError: the protocol's heads do not divide the tokens' width.
    """
    protocol = protocol or AttentiveProbe()
    start = _start(train, protocol, seed).to(device)
    grid = product(protocol.learning_rates, protocol.weight_decays)
    members = [_Member(start, rate, decay, protocol) for rate, decay in grid]
    with torch.enable_grad():
        for batch, clock in _training_batches(train, protocol, seed, device):
            for member in members:
                member.step(*batch, clock)
    reached = [_accuracy(member.classifier, val, protocol.batch_size, device) for member in members]
    val_accuracy = max(reached)
    best = members[reached.index(val_accuracy)]
    accuracy = _accuracy(best.classifier, test, protocol.batch_size, device)
    return AttentiveProbed(accuracy, val_accuracy, best.rate, best.decay, len(train))


def _start(train: TokenSplit, protocol: AttentiveProbe, seed: int) -> AttentiveClassifier:
    """The weights that every member starts from, drawn on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs too, which are not forked
        return AttentiveClassifier(train.x.shape[2], int(train.y.max()) + 1, protocol)


def _training_batches(
    train: TokenSplit, protocol: AttentiveProbe, seed: int, device: torch.device | str
) -> Iterator[tuple[tuple[Tensor, Tensor | None, Tensor], Clock]]:
    size = min(protocol.batch_size, len(train))
    steps = len(train) // size
    for epoch in range(protocol.epochs):
        bits = Key.of(seed, train.ids.cpu(), epoch).stream("attentive probe").bits(1)[:, 0]
        order = torch.argsort(bits, stable=True)[: steps * size]
        for step, index in enumerate(order.split(size)):
            yield train.batch(index, device), Clock(epoch * steps + step, protocol.epochs * steps)


@torch.no_grad()
def _accuracy(classifier: AttentiveClassifier, split: TokenSplit, batch_size: int, device: torch.device | str) -> float:
    """The share that is right; a classifier that diverged gets nothing right."""
    right = 0
    for index in torch.arange(len(split)).split(batch_size):
        x, valid, y = split.batch(index, device)
        logits = classifier(x, valid)  # [batch, classes]
        right += int(((logits.argmax(1) == y) & logits.isfinite().all(1)).sum())
    return right / len(split)
