"""Checks of `draw`: it depends on the key and the sample alone, in every mode, and its masks are consistent."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from unmask.core.checks.case import Case, changed, snapshot
from unmask.core.checks.plans import differing, mask_of, same, take, tensors
from unmask.core.mask import Mask, Split


def draw_depends_on_key_alone(case: Case) -> None:
    """Equal keys give equal plans, in eval and train mode; the method stays, and so do torch's and numpy's generators.

    Where the plan holds a mask, another visit gives another plan.
    """
    plan = case.draw()
    for mode in ("eval", "train"):
        case.method.train(mode == "train")
        before = snapshot(case.method)
        torch.manual_seed(1)
        random.seed(mode)
        moved = _generators()
        again = case.draw()
        assert moved == _generators(), f"draw consumed a global generator ({mode} mode); draw from `key`"
        assert same(plan, again), (
            f"two draws with the same key differ ({mode} mode); everything random comes from `key`, and networks that "
            "draw runs are in eval mode"
        )
        assert not changed(before, case.method), f"draw changed {', '.join(changed(before, case.method))} ({mode} mode)"
    graph = [name for name, t in tensors(plan).items() if t.requires_grad]
    assert not graph, f"{', '.join(graph)} carries a gradient out of draw"
    if mask_of(plan) is not None:
        assert not same(plan, case.draw(visit=1)), "the plan is the same at another visit; does draw use its key?"


def _generators() -> list[Any]:
    """The states of torch's and numpy's global generators (type checks that sample values move Python's)."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    kind, numbers, *rest = np.random.get_state()
    return [[t.tolist() for t in (torch.get_rng_state(), *cuda)], kind, np.asarray(numbers).tolist(), rest]


def draw_ignores_the_rest_of_the_batch(case: Case) -> None:
    """A sample gets the same plan alone, in the batch, and in the reversed batch."""
    whole, n = case.draw(), len(case.batch.ids)
    backwards = range(n - 1, -1, -1)
    if name := differing(whole, backwards, case.draw(take(case.batch, backwards)), n):
        raise AssertionError(f"{name} depends on a sample's position in the batch")
    for i in range(n):
        if name := differing(whole, [i], case.draw(take(case.batch, [i])), n):
            raise AssertionError(f"{name} of sample {i} differs when it is drawn alone")


def masks_are_consistent(case: Case) -> None:
    """Something is hidden and something visible; a mask's index sets partition the tokens, a split's do not overlap."""
    where = mask_of(case.draw())
    assert where is not None, "the plan holds no Mask and no Split, which say what is hidden"
    if isinstance(where, Split):
        _check_split(where)
    else:
        _check_mask(where)


def _check_mask(mask: Mask) -> None:
    positions = torch.arange(mask.hidden.shape[1], device=mask.hidden.device).expand_as(mask.order)
    assert torch.equal(mask.order.sort(1).values, positions), "order is not a permutation of the tokens"
    assert mask.hidden.any() and mask.visible.any(), "the mask hides everything or nothing"
    for name, flags, indices in (
        ("visible", mask.visible, mask.visible_indices),
        ("hidden", mask.hidden, mask.hidden_indices),
    ):
        assert torch.equal(indices.lengths, flags.sum(1)), f"the {name} indices do not count the {name} tokens"
        marks = torch.ones_like(indices.index) if indices.valid is None else indices.valid.long()
        counted = torch.zeros_like(mask.order).scatter_add_(1, indices.index, marks)
        assert torch.equal(counted, flags.long()), f"the {name} indices are not the {name} tokens, each once"
    if mask.num_visible is not None:
        assert (mask.visible.sum(1) == mask.num_visible).all(), "num_visible is not the number of visible tokens"


def _check_split(split: Split) -> None:
    sets = {"context": split.context, **{f"target set {i}": target for i, target in enumerate(split.targets)}}
    assert split.targets, "the split has no targets"
    tokens = 1 + max(int(indices.index.max()) for indices in sets.values() if indices.index.numel())
    flags = {}
    for name, indices in sets.items():
        assert indices.index.numel() and indices.lengths.min() > 0, f"the {name} of a sample is empty"
        flags[name] = indices.members(tokens)
        assert torch.equal(flags[name].sum(1), indices.lengths), f"the {name} names a token twice"
    overlap = [name for name in flags if name != "context" and (flags[name] & flags["context"]).any()]
    assert not overlap, f"{', '.join(overlap)} overlaps the context: the encoder would see the target"
