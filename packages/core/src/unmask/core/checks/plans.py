"""Access to plans and batches: what is hidden, which tensors there are, what belongs to a sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from unmask.core.mask import Indices, Mask, Packed, Split
from unmask.core.method import Plan, map_tensors

Leaf = Tensor | Indices | Packed


@dataclass(frozen=True)
class SplitPlan:
    """A plan that is a split and nothing else, for `corrupt`."""

    split: Split


def mask_of(plan: Any) -> Mask | Split | None:
    """The plan's statement of what is hidden: ``plan.mask``, else its first `Mask`, else its first `Split`."""
    parts = list(_walk(plan))
    own = getattr(plan, "mask", None)
    fit: list[Mask | Split] = [value for value in (own, *parts) if isinstance(value, Mask)]
    fit += [value for value in parts if isinstance(value, Split)]
    return fit[0] if fit else None


def hidden_tokens(plan: Any, tokens: int) -> Bool[Tensor, "batch tokens"]:
    """Which tokens a plan hides: those of its mask, or all that are not in the context of its split.

    Args:
        plan: with a `Mask` or a `Split`.
        tokens: length of the token axis; a mask has it, a split does not.
    """
    where = mask_of(plan)
    if isinstance(where, Split):
        return where.hidden(tokens)
    assert where is not None, f"{type(plan).__name__} holds no Mask and no Split"
    return where.hidden


def inverse(plan: Any) -> Plan | SplitPlan:
    """A plan that hides what `plan` shows: the visible tokens of its mask, or the context of its split."""
    where = mask_of(plan)
    if isinstance(where, Split):
        return SplitPlan(Split(_join(where.targets), (where.context,)))
    assert where is not None, f"{type(plan).__name__} holds no Mask and no Split"
    return Plan(Mask.from_hidden(where.visible, where.valid))


def _join(sets: Sequence[Indices]) -> Indices:
    flags = [torch.ones_like(s.index, dtype=torch.bool) if s.valid is None else s.valid for s in sets]
    return Indices(torch.cat([s.index for s in sets], dim=1), torch.cat(flags, dim=1))


def _walk(value: Any) -> Iterator[Any]:
    """A nested value and everything in it, except the inside of masks and splits."""
    yield value
    if isinstance(value, Mask | Split):
        return
    if is_dataclass(value):
        parts: Any = [getattr(value, f.name) for f in fields(value)]
    else:
        parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else []
    for part in parts:
        yield from _walk(part)


def tensors(value: Any) -> dict[str, Tensor]:
    """Every tensor in a nested value, numbered in the order of its fields."""
    collected: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        collected.append(tensor)
        return tensor

    map_tensors(value, collect)
    return {f"{type(value).__name__} tensor {i} {tuple(t.shape)[1:]}": t for i, t in enumerate(collected)}


def same(a: Any, b: Any) -> bool:
    """Whether two nested values hold the same tensors, bit for bit; NaN equals nothing."""
    left, right = list(tensors(a).values()), list(tensors(b).values())
    return len(left) == len(right) and all(torch.equal(x, y) for x, y in zip(left, right, strict=True))


def take(value: Any, rows: Sequence[int]) -> Any:
    """A batch or plan of these samples only; ragged ones have their own `take`."""
    if hasattr(value, "take"):
        return value.take(rows)
    return map_tensors(value, lambda t: t[torch.as_tensor(rows, device=t.device)])


def differing(plan: Any, rows: Sequence[int], other: Any, n: int) -> str | None:
    """What differs between these samples' part of a plan of `n` and another plan; None where nothing does.

    Index sets are compared without their padding, so that the width of a batch does not matter.
    """
    if hasattr(plan, "take"):
        plan = plan.take(rows)
        pairs = ((f.name, getattr(plan, f.name), getattr(other, f.name)) for f in fields(plan))
        return next((name for name, one, two in pairs if not same(one, two)), None)
    wide, narrow = (_width(p) for p in (plan, other))
    parts = _leaves(other)
    for name, leaf in _leaves(plan).items():
        if isinstance(leaf, Tensor) and (leaf.dim() == 0 or len(leaf) != n):
            equal = name in parts and same(leaf, parts[name])
        else:
            pairs_of = ((_row(leaf, i, wide), _row(parts[name], k, narrow)) for k, i in enumerate(rows))
            equal = name in parts and all(torch.equal(one, two) for one, two in pairs_of)
        if not equal:
            return name
    return None


def _leaves(value: Any, path: str = "") -> dict[str, Leaf]:
    """Tensors and index sets of a nested value by the path to them."""
    if isinstance(value, Leaf):
        return {path: value}
    parts: dict[Any, Any] = {}
    if is_dataclass(value):
        parts = {f.name: getattr(value, f.name) for f in fields(value)}
    elif isinstance(value, Mapping | tuple | list):
        parts = dict(value) if isinstance(value, Mapping) else dict(enumerate(value))
    below = (_leaves(part, f"{path}.{name}" if path else str(name)) for name, part in parts.items())
    return {name: leaf for leaves in below for name, leaf in leaves.items()}


def _row(leaf: Leaf, i: int, tokens: int) -> Tensor:
    """What belongs to sample `i`."""
    if isinstance(leaf, Indices):
        return leaf.index[i] if leaf.valid is None else leaf.index[i][leaf.valid[i]]
    if isinstance(leaf, Packed):
        return leaf.index[int(leaf.offsets[i]) : int(leaf.offsets[i + 1])] % tokens
    return leaf[i]


def _width(plan: Any) -> int:
    """Tokens per sample, which packed positions are offset by; 1 where the plan has no mask."""
    where = mask_of(plan)
    return where.hidden.shape[1] if isinstance(where, Mask) else 1
