"""Whole groups of tokens (words of several pieces), in random order, under a budget of tokens."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def choose_groups(
    groups: Int[Tensor, "rows tokens"], order: Int[Tensor, "rows tokens"], budget: Int[Tensor, "rows"]
) -> Bool[Tensor, "rows tokens"]:
    """Take groups in a random order, skipping those that no longer fit, until the budget is used up.

    This is BERT's whole-word masking (google-research/bert, ``create_masked_lm_predictions``), for all rows at once: a
    pass over the order takes what fits up to the first group that does not, and sets aside all later groups that are
    larger than what is left. What is left shrinks with every pass, so they are few.

    Args:
        groups: the group of each token, from 0 on and below the number of tokens; negative ones are never taken.
        order: a random integer per token; a group has the place of its first token.
        budget: tokens that may be taken.

    Returns:
        True = taken. All tokens of a group, or none.
    """
    rows, tokens = groups.shape
    there, index = groups >= 0, groups.clamp(min=0)
    sizes = torch.zeros_like(groups).scatter_add_(1, index, there.long())  # by group
    position = torch.arange(tokens, device=groups.device).expand_as(groups)
    far = torch.where(there, position, tokens - 1)
    first = torch.full_like(groups, tokens - 1).scatter_reduce_(1, index, far, "amin")
    place = order.gather(1, first).masked_fill(sizes == 0, torch.iinfo(order.dtype).max)
    by_place = place.argsort(dim=1, stable=True)  # groups in the order of their draw, those that are not there last
    fits = _take(sizes.gather(1, by_place), budget)
    taken = torch.zeros_like(there).scatter_(1, by_place, fits)  # by group
    return taken.gather(1, index) & there


def _take(sizes: Int[Tensor, "rows groups"], budget: Int[Tensor, "rows"]) -> Bool[Tensor, "rows groups"]:
    """Which of these sizes, one after another, still fit into what is left."""
    open_, room = sizes > 0, budget[:, None]
    place = torch.arange(sizes.shape[1], device=sizes.device)
    while True:
        used = (sizes * open_).cumsum(1)
        over = open_ & (used > room)
        if not over.any():
            return open_
        at = torch.where(over, place, len(place)).amin(1, keepdim=True)  # the first that does not fit
        before = torch.where(place < at, used, 0).amax(1, keepdim=True)
        open_ = open_ & ((place < at) | (sizes <= room - before))
