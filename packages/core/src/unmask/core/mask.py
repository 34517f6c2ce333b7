"""Which tokens are hidden: the types that every domain shares.

One polarity everywhere: **True means hidden**. Index sets come padded (`Indices`, a rectangle with a validity flag) and
packed (`Packed`, concatenated with offsets, the form variable-length attention takes). Class and register tokens stand
outside: a mask counts only the tokens that can be hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """A set of tokens per sample, concatenated.

    Args:
        index: positions in the flattened (batch * tokens) axis, sample after sample.
        offsets: start of every sample in `index`, and its length at the end (``cu_seqlens`` elsewhere).
    """

    index: Int[Tensor, "total"]
    offsets: Int[Tensor, "batch_plus_1"]

    def take(self, x: Tensor) -> Tensor:
        """Rows of `x` [batch, tokens, ...] in packed order: [total, ...]."""
        return x.flatten(0, 1)[self.index]


@dataclass(frozen=True)
class Indices:
    """A set of tokens per sample, as a rectangle of positions.

    Args:
        index: token positions; a padded slot holds some legal position and must not be used.
        valid: False where a slot is padding; None when every slot counts.
    """

    index: Int[Tensor, "batch count"]
    valid: Bool[Tensor, "batch count"] | None = None

    @classmethod
    def from_members(cls, members: Bool[Tensor, "batch tokens"], count: int | None = None) -> Indices:
        """The tokens marked True, in spatial order.

        Args:
            members: True = in the set.
            count: take the first `count` of each sample, none of which may have fewer; None takes all, padded to the
                longest set, which costs one host sync.
        """
        order = _spatial_order(~members, None)
        if count is not None:
            return cls(order[:, :count])
        return _slots(order, torch.zeros_like(members.sum(1)), members.sum(1))

    def members(self, tokens: int) -> Bool[Tensor, "batch {tokens}"]:
        """True at the tokens in the set.

        Args:
            tokens: length of the token axis.
        """
        none = torch.zeros(len(self.index), tokens, dtype=torch.bool, device=self.index.device)
        return self.put(none, torch.ones_like(self.index, dtype=torch.bool))

    def rows(self, rows: Sequence[int]) -> Indices:
        """The sets of these samples, no wider than the longest of them."""
        chosen = torch.as_tensor(rows, device=self.index.device)
        if self.valid is None:
            return Indices(self.index[chosen])
        width = int(self.valid[chosen].sum(1).max())
        return Indices(self.index[chosen, :width], self.valid[chosen, :width])

    @property
    def count(self) -> int:
        """Slots per sample, padding included."""
        return self.index.shape[1]

    @property
    def lengths(self) -> Int[Tensor, "batch"]:
        """Tokens in each sample's set."""
        if self.valid is None:
            return torch.full((self.index.shape[0],), self.count, device=self.index.device)
        return self.valid.sum(1)

    def take(self, x: Tensor) -> Tensor:
        """Gather these tokens of `x` [batch, tokens, ...]: [batch, count, ...]."""
        index = self.index.reshape(*self.index.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
        return x.gather(1, index)

    def put(self, x: Tensor, values: Tensor) -> Tensor:
        """A copy of `x` [batch, tokens, ...] with `values` [batch, count, ...] at these tokens."""
        index = self.index
        if self.valid is not None:  # padded slots write to a row that is cut off again
            index = index.masked_fill(~self.valid, x.shape[1])
            x = torch.cat([x, x[:, :1]], dim=1)
        index = index.reshape(*index.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
        filled = x.scatter(1, index, values.to(x.dtype))
        return filled if self.valid is None else filled[:, :-1]


@dataclass(frozen=True)
class Mask:
    """Which tokens of a batch are hidden.

    Make one with `from_scores` or `from_hidden`; the maskings in `unmask.core.masking` do.

    Args:
        hidden: True = hidden.
        drawn_order: a permutation of the tokens per sample: visible first, then hidden, then padding; None for spatial
            order within each kind, which is computed when `order` is first read.
        num_visible: visible tokens per sample where that is the same known number for all, else None (ragged).
        valid: False = padding, which is never hidden and never counted; None when there is none.
    """

    hidden: Bool[Tensor, "batch tokens"]
    drawn_order: Int[Tensor, "batch tokens"] | None
    num_visible: int | None
    valid: Bool[Tensor, "batch tokens"] | None = None

    @cached_property
    def order(self) -> Int[Tensor, "batch tokens"]:
        """A permutation of the tokens per sample: visible first, then hidden, then padding."""
        return _spatial_order(self.hidden, self.valid) if self.drawn_order is None else self.drawn_order

    @classmethod
    def from_scores(cls, scores: Float[Tensor, "batch tokens"] | Int[Tensor, "batch tokens"], num_visible: int) -> Mask:
        """Keep the `num_visible` tokens with the lowest scores of each sample and hide the rest.

        With uniform noise as scores this is MAE's masking, and with the same noise the same mask (arXiv 2111.06377,
        section 3). Negate the scores to keep the highest. Ties go to the lower position.

        Raises:
            ValueError: `num_visible` leaves nothing visible or nothing hidden.
        """
        check_count(num_visible, scores.shape[1])
        return cls.from_order(scores.argsort(dim=1, stable=True), num_visible)

    @classmethod
    def from_order(cls, order: Int[Tensor, "batch tokens"], num_visible: int) -> Mask:
        """Keep the first `num_visible` tokens of each sample's permutation and hide the rest."""
        hidden = torch.ones_like(order, dtype=torch.bool)
        hidden.scatter_(1, order[:, :num_visible], False)
        return cls(hidden, order, num_visible)

    @classmethod
    def from_hidden(
        cls,
        hidden: Bool[Tensor, "batch tokens"],
        valid: Bool[Tensor, "batch tokens"] | None = None,
        num_visible: int | None = None,
    ) -> Mask:
        """A mask from a boolean array, tokens of each kind in spatial order.

        Args:
            hidden: True = hidden; entries at padding are ignored.
            valid: False = padding.
            num_visible: visible tokens per sample, where all samples have that many; None otherwise.
        """
        if valid is not None:
            hidden = hidden & valid
        return cls(hidden, None, num_visible, valid)

    @classmethod
    def from_visible(cls, visible: Int[Tensor, "batch count"], tokens: int) -> Mask:
        """A mask from the positions that stay visible, the same number in every sample; the rest is hidden."""
        hidden = torch.ones(len(visible), tokens, dtype=torch.bool, device=visible.device)
        return cls.from_hidden(hidden.scatter_(1, visible, False), num_visible=visible.shape[1])

    @property
    def visible(self) -> Bool[Tensor, "batch tokens"]:
        """True where a token is real and not hidden."""
        return ~self.hidden if self.valid is None else ~self.hidden & self.valid

    @property
    def visible_indices(self) -> Indices:
        """The visible tokens. A ragged mask costs one host sync for the longest set."""
        if self.num_visible is not None:
            return Indices(self.order[:, : self.num_visible])
        return _slots(self.order, torch.zeros_like(self.visible.sum(1)), self.visible.sum(1))

    @property
    def hidden_indices(self) -> Indices:
        """The hidden tokens. A ragged mask costs one host sync for the longest set."""
        if self.num_visible is not None and self.valid is None:
            return Indices(self.order[:, self.num_visible :])
        return _slots(self.order, self.visible.sum(1), self.hidden.sum(1))

    def take(self, rows: Sequence[int]) -> Mask:
        """The mask of these samples, no wider than the longest of them."""
        chosen = torch.as_tensor(rows, device=self.hidden.device)
        width = self.hidden.shape[1] if self.valid is None else int(self.valid[chosen].sum(1).max())
        parts = (None if t is None else t[chosen, :width] for t in (self.hidden, self.drawn_order, self.valid))
        hidden, order, valid = parts
        assert hidden is not None
        return Mask(hidden, order, self.num_visible, valid)


@dataclass(frozen=True)
class Split:
    """A context and the token sets to be predicted from it (I-JEPA, arXiv 2301.08243; V-JEPA, arXiv 2404.08471).

    No target holds a token of the context. Targets may share tokens with each other, and some tokens may be in neither.

    Args:
        context: what the encoder sees.
        targets: the tokens to predict, one set after another; each may be padded on its own.
    """

    context: Indices
    targets: tuple[Indices, ...]

    def hidden(self, tokens: int) -> Bool[Tensor, "batch {tokens}"]:
        """True at what the encoder must not see: every token outside the context, whether it is a target or not."""
        return ~self.context.members(tokens)

    def asked(self, tokens: int) -> Bool[Tensor, "batch {tokens}"]:
        """True at the tokens in any target."""
        return torch.stack([target.members(tokens) for target in self.targets]).any(0)

    def take(self, rows: Sequence[int]) -> Split:
        """The split of these samples, each set no wider than the longest of them."""
        return Split(self.context.rows(rows), tuple(target.rows(rows) for target in self.targets))


def _slots(order: Int[Tensor, "batch tokens"], start: Int[Tensor, "batch"], lengths: Int[Tensor, "batch"]) -> Indices:
    """The `lengths` entries of each sample's `order` from `start` on. Costs one host sync for the longest."""
    slot = torch.arange(int(lengths.max()), device=order.device)
    # Padding repeats a set's last member: what it gathers is never of the other kind (NaN would pass attention).
    rank = start[:, None] + torch.minimum(slot, lengths[:, None] - 1).clamp(min=0)
    rank = rank.clamp(max=order.shape[1] - 1)
    return Indices(order.gather(1, rank), slot < lengths[:, None])


def _spatial_order(
    hidden: Bool[Tensor, "batch tokens"], valid: Bool[Tensor, "batch tokens"] | None
) -> Int[Tensor, "batch tokens"]:
    """Visible, then hidden, then padding, each in spatial order: by counting, which beats a stable sort by half."""
    position = torch.arange(hidden.shape[1], device=hidden.device).expand_as(hidden)
    kinds = [hidden] if valid is None else [hidden, ~valid]
    # Before a visible token come the visible ones to its left; before a hidden one all visible and the hidden ones ...
    rank = position
    for kind in kinds:
        rank = rank - kind.cumsum(1)
    start = rank[:, -1:] + 1
    for kind in kinds:
        count = kind.cumsum(1)
        rank = torch.where(kind, start + count - 1, rank)
        start = start + count[:, -1:]
    return torch.empty_like(rank).scatter_(1, rank, position)


def check_count(num_visible: int, tokens: int) -> None:
    """Raise ValueError unless at least one of `tokens` stays visible and at least one is hidden."""
    if not 0 < num_visible < tokens:
        what = "nothing would be visible" if num_visible <= 0 else "nothing would be hidden"
        raise ValueError(
            f"{num_visible} of {tokens} tokens visible: {what}. Choose a ratio that leaves between 1 and "
            f"{tokens - 1} of the {tokens} tokens visible, or more tokens (a larger image, a smaller patch)."
        )
