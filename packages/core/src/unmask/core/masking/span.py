"""Span masking of sequences: wav2vec 2.0 and HuBERT (arXiv 2106.07447; official code facebookresearch/fairseq).

Per sample with T valid frames: n = floor(ratio * T / length + u) spans with u uniform in [0, 1), at least `min_spans`;
n distinct starts, uniform over {0, ..., T - m - 1} with m the shortest span drawn; everything that a span covers before
frame T is hidden. Where T - m <= n, the starts come from {0, ..., n} instead. As in the released code the range of
starts ends one early, so that with spans of one fixed length the last frame of a long clip is never hidden.

Deliberate differences from the released sampler:

* **Random numbers** are keyed by sample: the mask of a clip does not depend on its batch or on how far it is padded.
* **Something stays visible.** Where the spans would cover a whole clip (the released code raises, or hides all of it,
  by version) one frame drawn at random is uncovered; it happens only in clips not much longer than `length`, and with
  very long random spans. A clip of one frame hides nothing, one of T frames has at most T - 1 starts. To raise an error
  instead would cost a host sync in every step.
* **Equal counts** are off by default; see `SpanMasking`.
* **Spans apart** (``overlap=False``): the released branch does not run on current NumPy, and its recursive placement is
  not uniform. Here every arrangement of the spans is equally likely; see `_spread`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from unmask.core.mask import Mask
from unmask.core.randomness import Key

SpanKind = Literal["static", "uniform", "normal", "poisson"]

_LAST = torch.iinfo(torch.int64).max
_BITS_32 = (1 << 32) - 1
_BITS_40 = (1 << 40) - 1


@dataclass(frozen=True)
class SpanMasking:
    """Hide spans of a sequence. The defaults are HuBERT's pre-training, equal counts apart.

    With overlap, a share of about ``1 - (1 - ratio / length) ** length`` is hidden (0.566 with the defaults), not
    `ratio`.

    Args:
        ratio: spans times `length` over the number of frames, in expectation; in (0, 1].
        length: frames per span, or what the random lengths are drawn around; at least 1.
        min_spans: spans in every clip, however short (a clip of T frames has at most T - 1).
        kind: how long spans are: ``static`` (all `length`), ``uniform`` over the integers `other` .. 2 * `length`,
            ``normal`` with mean `length` and deviation `other`, rounded and at least 1, or ``poisson`` with mean
            `length`. A span of 0 frames hides nothing; if a clip draws no other, its first span is `length` long.
        other: the second parameter of ``uniform`` and ``normal`` (fairseq's ``mask_other``); 0 for the other kinds.
        overlap: False keeps spans apart, and drops those that no longer fit.
        min_space: visible frames between neighbouring spans at least; needs ``overlap=False``.
        equal_counts: thin every clip's mask at random to the smallest count in the batch, as the released code does
            (it puts the hidden frames of a batch into one rectangle); clips that hide nothing are not counted. Off by
            default: a clip's mask then depends on the clips beside it, the thinning leaves single visible frames inside
            spans, it lowers the share hidden (0.566 to 0.534 in a batch of 8), and a loss divided by the number of
            hidden frames does not need it.
    """

    ratio: float = 0.8
    length: int = 10
    min_spans: int = 2
    kind: SpanKind = "static"
    other: float = 0.0
    overlap: bool = True
    min_space: int = 0
    equal_counts: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"span ratio {self.ratio} is not in (0, 1]: it is the number of spans times their length")
        if self.length < 1 or self.min_spans < 0 or self.min_space < 0:
            raise ValueError(
                f"spans need length >= 1, min_spans >= 0 and min_space >= 0; got {self.length}, {self.min_spans} and "
                f"{self.min_space}"
            )
        if self.overlap and self.min_space:
            raise ValueError(f"min_space={self.min_space} keeps spans apart: it needs overlap=False")
        self._check_lengths()

    def _check_lengths(self) -> None:
        if self.kind == "uniform":
            if self.other != int(self.other) or not 0 <= self.other <= 2 * self.length:
                raise ValueError(
                    f"uniform span lengths lie between other={self.other} and 2 * length = {2 * self.length}; other "
                    "must be a whole number in that range"
                )
        elif self.kind == "normal":
            if not self.other > 0:
                raise ValueError(f"normal span lengths need a deviation other > 0; got {self.other}")
        elif self.kind not in ("static", "poisson"):
            raise ValueError(f"span kind {self.kind!r} is not one of static, uniform, normal, poisson")
        elif self.other:
            raise ValueError(f"{self.kind} span lengths take no second number; got other={self.other}")

    def __call__(self, key: Key, grid: tuple[int, ...], valid: Bool[Tensor, "batch frames"] | None = None) -> Mask:
        """Draw a mask on the key's device without a host sync; it is ragged: counts differ from sample to sample.

        Args:
            key: the samples' key.
            grid: the number of frames, padding included; one axis.
            valid: False = padding, which must follow a clip's frames. Spans are drawn over the frames before it.

        Raises:
            ValueError: the grid has more than one axis.
        """
        if len(grid) != 1:
            raise ValueError(f"span masking needs a sequence, a grid of one axis; got {' x '.join(map(str, grid))}")
        return Mask.from_hidden(self.hidden(key, grid[0], valid), valid)

    def hidden(
        self, key: Key, frames: int, valid: Bool[Tensor, "batch frames"] | None = None
    ) -> Bool[Tensor, "batch {frames}"]:
        """The mask that `__call__` draws, as a plain array: True = hidden."""
        size = torch.full_like(key.state, frames) if valid is None else valid.sum(1)
        most = max(1, min(frames - 1, max(self.min_spans, (frames * self._rate >> 32) + 1)))
        draws = key.bits(most + 2)  # two for the clip, then one for every span it could have
        begin, end = self._spans(key, size, draws, frames)
        edge = torch.zeros(len(size), frames + 1, dtype=torch.int32, device=size.device)
        edge.scatter_(1, begin, 1, reduce="add").scatter_(1, end, -1, reduce="add")
        hidden = edge[:, :frames].cumsum(1, dtype=torch.int32) > 0
        if valid is not None:
            hidden &= valid
        if valid is not None or self.kind != "static" or not self.overlap or frames - self.length <= most:
            # Uncover one frame of a clip that is covered entirely.
            spare = ((draws[:, 1:2] & _BITS_32) * size[:, None]) >> 32
            hidden.scatter_(1, spare, hidden.gather(1, spare) & (hidden.sum(1) < size)[:, None])
        return _thin(key, hidden) if self.equal_counts else hidden

    @property
    def _rate(self) -> int:
        """Spans per frame, in units of 2**-32: whole numbers round alike on every device."""
        return round(self.ratio / self.length * 2**32)

    def _spans(
        self, key: Key, size: Int[Tensor, "batch"], draws: Int[Tensor, "batch draws"], frames: int
    ) -> tuple[Int[Tensor, "batch spans"], Int[Tensor, "batch spans"]]:
        """First frame of each span, and the frame after its last; both `frames` for spans beyond a sample's count."""
        count = (size * self._rate + (draws[:, 0] & _BITS_32)) >> 32  # the share, rounded at random
        count = torch.minimum(count.clamp(min=self.min_spans), size - 1)[:, None]
        draws = draws[:, 2:]
        if self.kind == "static" and self.overlap:
            room = torch.maximum(size[:, None] - self.length, count + 1)
            begin = _choose(draws, count, room, frames)
            return begin, (begin + self.length).clamp(max=frames)
        live = torch.arange(draws.shape[1], device=size.device) < count
        length = self._draw_lengths(key, size, live)
        if not self.overlap:
            return _spread(size, draws, live, length, self.min_space, frames)
        room = size[:, None] - length.masked_fill(~live, 2 * frames).amin(1, keepdim=True)
        begin = _choose(draws, count, torch.maximum(room, count + 1), frames)
        return begin, (begin + length).clamp(max=frames)

    def _draw_lengths(
        self, key: Key, size: Int[Tensor, "batch"], live: Bool[Tensor, "batch spans"]
    ) -> Int[Tensor, "batch spans"]:
        if self.kind == "static":
            return torch.full_like(live, self.length, dtype=torch.int64)
        table = _length_table(self.kind, self.length, self.other, size.device)
        length = torch.searchsorted(table, key.stream("lengths").bits(live.shape[1]) & _BITS_32, right=True)
        none = (length * live).sum(1) == 0
        length[:, 0] = torch.where(none, (size - 1).clamp(0, self.length), length[:, 0])
        return length


def _choose(
    bits: Int[Tensor, "batch spans"], count: Int[Tensor, "batch 1"], room: Int[Tensor, "batch 1"], frames: int
) -> Int[Tensor, "batch spans"]:
    """`count` distinct positions, every set of that many among the first `room` equally likely; then `frames`.

    The first steps of a Fisher-Yates shuffle of range(room), all at once. Step j swaps cell j with a cell r[j] >= j,
    drawn uniformly, and the first `count` cells are the set. A later cell that was written to ends with the value that
    its last writer moved there, one of the first positions: that one leaves the set, and the cell's own position enters
    it. The value that step j moves was itself written to cell j by the last earlier step that chose that cell, and so
    on back: a chain of pointers, resolved by pointer doubling.
    """
    step = torch.arange(bits.shape[1] + 1, device=bits.device)
    chosen = torch.where(step < count, step, frames)  # one cell more, which takes the writes without effect
    step = step[:-1]
    # A step beyond the count swaps nothing, and must not look like a later writer than the steps before it.
    live = (step < count).to(torch.int64)
    cell = step + ((((bits >> 24) & _BITS_40) * ((room - step) * live)) >> 40)
    writer = torch.full((len(bits), frames), -1, dtype=torch.int32, device=bits.device)
    away = writer.scatter_reduce_(1, cell, (step * live).to(torch.int32), "amax")[:, : len(step)]
    away = torch.where(away < 0, step, away)
    for _ in range((len(step) - 1).bit_length()):
        away = away.gather(1, away)
    leaves = (writer.gather(1, cell) == step) & (cell >= count)
    return chosen.scatter_(1, torch.where(leaves, away, len(step)), cell)[:, :-1]


def _spread(
    size: Int[Tensor, "batch"],
    bits: Int[Tensor, "batch spans"],
    live: Bool[Tensor, "batch spans"],
    length: Int[Tensor, "batch spans"],
    space: int,
    frames: int,
) -> tuple[Int[Tensor, "batch spans"], Int[Tensor, "batch spans"]]:
    """Spans at least `space` apart, every arrangement equally likely.

    Shrinking each span and the gap that must follow it to one cell maps the arrangements of n spans of length l on T
    frames one to one to the sets of n among T + space - n * (l - 1 + space) cells. So: draw such a set, sort it, and
    let every span push the later ones back by l - 1 + space. Lengths go to the spans from left to right as drawn;
    those that no longer fit are left out.
    """
    length = torch.minimum(length, (size - 1)[:, None])  # so that the first always fits
    push = length.clamp(min=1) - 1 + space
    live = live & ((push + 1).cumsum(1) <= (size + space)[:, None])
    push = push * live
    cells = (size + space - push.sum(1))[:, None]
    begin = _choose(bits, live.sum(1, keepdim=True), cells, frames).sort(1).values
    begin = torch.where(live, begin + push.cumsum(1) - push, frames)
    return begin, torch.where(live, begin + length, frames)


def _thin(key: Key, hidden: Bool[Tensor, "batch frames"]) -> Bool[Tensor, "batch frames"]:
    """Uncover random frames until every sample hides as many as the one that hides fewest (but not none)."""
    count = hidden.sum(1)
    least = count.masked_fill(count == 0, hidden.shape[1]).amin()
    score = key.stream("thin").bits(hidden.shape[1]).masked_fill(~hidden, _LAST)
    # index_select and not an index: reading the count as a number would make the host wait for it.
    return hidden & (score <= score.sort(1).values.index_select(1, least[None] - 1))


@lru_cache
def _length_table(kind: SpanKind, length: int, other: float, device: torch.device) -> Int[Tensor, "longest"]:
    """P(a span is at most k long) for k = 0, 1, ..., in units of 2**-32: one table draws every kind on any device."""
    if kind == "uniform":
        low, high = int(other), 2 * length
        below = [max(0, k - low + 1) / (high - low + 1) for k in range(high + 1)]
    elif kind == "normal":
        longest = length + math.ceil(7 * other) + 1
        below = [0.0] + [0.5 * math.erfc((length - k - 0.5) / other / math.sqrt(2)) for k in range(1, longest)]
    else:
        longest = length + math.ceil(10 * math.sqrt(length)) + 10
        mass = [math.exp(k * math.log(length) - length - math.lgamma(k + 1)) for k in range(longest)]
        below = [math.fsum(mass[: k + 1]) for k in range(longest)]
    return torch.tensor([round(p * 2**32) for p in below[:-1]] + [2**32], device=device)
