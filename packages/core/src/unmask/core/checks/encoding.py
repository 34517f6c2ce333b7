"""Checks of `encode`: it gives every token in spatial order, in every mode, with the network that transfers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unmask.core.checks.case import Case
from unmask.core.checks.plans import mask_of, take
from unmask.core.checks.quiet import quiet
from unmask.core.mask import Mask
from unmask.core.method import Features, Plan, encoder_of


@torch.no_grad()
def encode_never_masks(case: Case) -> None:
    """`encode` gives every token, the same in eval and train mode (dropout apart), and the same for a sample alone.

    Dropout is told from masking by its effect, not by its name (`unmask.core.checks.quiet`).
    """
    features = case.method.encode(case.batch)
    tokens = features.tokens
    assert tokens.shape[:2] == (len(case.batch.ids), math.prod(features.grid)), (
        f"encode gives tokens of shape {tuple(tokens.shape)} for a grid of {features.grid}"
    )
    assert torch.equal(tokens, case.method.encode(case.batch).tokens), "encode differs between two calls"
    with torch.enable_grad():
        assert torch.equal(tokens, case.method.encode(case.batch).tokens), "encode differs with and without gradient"
    with quiet(case.method, tokens.shape[1]):
        trained = [case.method.encode(case.batch).tokens for _ in range(3)]
    assert all(torch.equal(tokens, one) for one in trained), (
        "encode differs between eval and train mode, dropout of values apart"
    )
    alone = case.method.encode(take(case.batch, [0])).tokens
    assert torch.allclose(tokens[:1, : alone.shape[1]], alone, rtol=1e-3, atol=1e-4), (
        "a sample's features depend on the rest of the batch"
    )
    case.method.train()
    assert case.method.encode(case.batch).tokens.shape == tokens.shape, "encode gives other tokens in train mode"


def encode_runs_the_encoder(case: Case) -> None:
    """Features depend on every weight of the network that transfers (`encoder_of`), and on no other weight."""
    network, method = encoder_of(case.method), case.method
    inside = {id(p) for p in network.parameters()}
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    features = method.encode(case.batch)
    vectors = [t for t in (features.tokens, features.cls) if t is not None and t.requires_grad]
    assert vectors, "no gradient of encode's features reaches the encoder: they come from another network"
    sum((t * torch.randn_like(t)).sum() for t in vectors).backward()
    dead = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead, f"encode's features do not depend on {', '.join(dead)} of the encoder"
    with torch.no_grad():
        for parameter in method.parameters():
            if id(parameter) not in inside and parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter))
        again = method.encode(case.batch)
    assert torch.equal(features.tokens, again.tokens), (
        "encode's features change with weights that are not the encoder's; `encoder_of` names all that transfers"
    )


@torch.no_grad()
def encode_keeps_spatial_order(case: Case) -> None:
    """Overwriting the input of one token changes the features most at that token, so that none is missing or moved.

    A network may pass on more to a neighbour than it keeps; then the two must still fit better where they are than
    swapped.
    """
    first = take(case.batch, [0])
    grid = case.method.encode(first).grid
    mask = mask_of(case.draw(first))
    if isinstance(mask, Mask):  # padding has no input to overwrite
        real = (mask.hidden | mask.visible)[0].nonzero()[:, 0].tolist()
        count = mask.hidden.shape[1]
    else:
        real, count = list(range(math.prod(grid))), math.prod(grid)
    picked = [real[i] for i in torch.linspace(0, len(real) - 1, min(len(real), 16)).round().long().tolist()]
    home = {token: _feature_of(token, count, grid) for token in real}
    changes = _changes(case, first, picked, count)
    most = dict(zip(picked, changes.argmax(1).tolist(), strict=True))
    elsewhere = [token for token in picked if most[token] != home[token]]
    wrong = [token for token in elsewhere if not _fits(case, first, token, most[token], home, count)]
    assert not wrong, f"changing the input of token(s) {wrong} does not change the features most at those positions"


def _changes(case: Case, first: Any, tokens: list[int], count: int) -> Tensor:
    """How much every feature of a sample changes when the input of one token does: [token, feature]."""
    batch = take(first, [0] * len(tokens))
    only = torch.zeros(len(tokens), count, dtype=torch.bool, device=batch.ids.device)
    only[range(len(tokens)), tokens] = True
    other = replace(case, batch=batch).overwrite(Plan(Mask.from_hidden(only)), 3.0)
    before: Features = case.method.encode(batch)
    return (case.method.encode(other).tokens - before.tokens).norm(dim=2)


def _fits(case: Case, first: Any, token: int, feature: int, home: dict[int, int], count: int) -> bool:
    """Whether a token and the one that belongs to the `feature` it changes most fit better as they are than swapped."""
    rival = next((other for other, at in home.items() if at == feature), None)
    if rival is None:
        return False
    both = _changes(case, first, [token, rival], count)[:, [home[token], feature]]
    return bool(both.trace() > both.flip(1).trace())


def _feature_of(token: int, tokens: int, grid: tuple[int, ...]) -> int:
    """The feature that stands for a token, where an encoder's grid is coarser than the mask's by a whole factor."""
    factor = round((tokens / math.prod(grid)) ** (1 / len(grid)))
    index = 0
    for axis, n in enumerate(grid):
        below = math.prod(grid[axis + 1 :]) * factor ** (len(grid) - axis - 1)
        index = index * n + token // below % (n * factor) // factor
    return index
