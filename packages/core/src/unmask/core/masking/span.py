"""Span masking of sequences: wav2vec 2.0 and HuBERT (arXiv 2106.07447, section II-C; official code facebookresearch/
fairseq, `compute_mask_indices`).

Per sample with T valid frames: n = floor(ratio * T / length + u) spans with u uniform in [0, 1), at least `min_spans`;
n distinct starts, uniform over {0, ..., T - m - 1} with m the shortest span drawn; everything that a span covers before
frame T is hidden. Where T - m <= n, the starts come from {0, ..., n} instead. As in the released code the range of
starts ends one early, so that with spans of one fixed length the last frame of a long clip is never hidden.

Deliberate differences from the released sampler:

* **Random numbers** are keyed by sample: the mask of a clip does not depend on its batch or on how far it is padded.
* **Something stays visible.** Where the spans would cover a whole clip (the released code raises, or hides all of it,
  by version) one frame drawn at random is uncovered; only clips not much longer than `length`, and settings with very
  long random spans, ever get there. A clip of one frame hides nothing, one of T frames has at most T - 1 starts. An
  error would have to ask the device whether it happened, in every step.
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

SpanLengths = Literal["static", "uniform", "normal", "poisson"]

_LAST = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class SpanMasking:
    """Hide spans of a sequence. The defaults are HuBERT's pre-training, equal counts apart.

    With overlap, a share of about ``1 - (1 - ratio / length) ** length`` is hidden (0.566 with the defaults), not
    `ratio`.

    Args:
        ratio: spans times `length` over the number of frames, in expectation; in (0, 1].
        length: frames per span, or what the random lengths are drawn around; at least 1.
        min_spans: spans in every clip, however short (a clip of T frames has at most T - 1).
        lengths: ``static`` (all `length`), ``uniform`` over the integers `other` .. 2 * `length`, ``normal`` with mean
            `length` and deviation `other`, rounded and at least 1, or ``poisson`` with mean `length`. A span of 0 frames
            hides nothing; if a clip draws no other, its first span is `length` long.
        other: the second number of ``uniform`` and ``normal``; 0 for the others.
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
    lengths: SpanLengths = "static"
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
        if self.lengths == "uniform":
            if self.other != int(self.other) or not 0 <= self.other <= 2 * self.length:
                raise ValueError(
                    f"uniform span lengths lie between other={self.other} and 2 * length = {2 * self.length}; other must "
                    "be a whole number in that range"
                )
        elif self.lengths == "normal":
            if not self.other > 0:
                raise ValueError(f"normal span lengths need a deviation other > 0; got {self.other}")
        elif self.lengths not in ("static", "poisson"):
            raise ValueError(f"span lengths {self.lengths!r} are not one of static, uniform, normal, poisson")
        elif self.other:
            raise ValueError(f"{self.lengths} span lengths take no second number; got other={self.other}")

    def __call__(self, key: Key, grid: tuple[int, ...], valid: Bool[Tensor, "batch frames"] | None = None) -> Mask:
        """Draw a mask (ragged: counts differ from sample to sample), on the key's device and without a host sync.

        Args:
            key: the samples' key.
            grid: the number of frames, padding included; one axis.
            valid: False = padding, which must follow a clip's frames. Spans are drawn over the frames before it.

        Raises:
            ValueError: the grid has more than one axis.
        """
        if len(grid) != 1:
            raise ValueError(f"span masking needs a sequence, a grid of one axis; got {' x '.join(map(str, grid))}")
        frames = grid[0]
        size = torch.full_like(key.state, frames) if valid is None else valid.sum(1)
        draws = key.bits(frames + 2)  # two for the clip, then one for every frame: the lowest make the starts
        begin, end = self._spans(key, size, draws, frames)
        edge = torch.zeros(len(size), frames + 1, dtype=torch.int32, device=size.device)
        one = torch.ones_like(begin, dtype=torch.int32)
        edge.scatter_add_(1, begin, one).scatter_add_(1, end, -one)
        hidden = edge[:, :frames].cumsum(1, dtype=torch.int32) > 0
        if valid is not None:
            hidden &= valid
        # A clip that is covered entirely shows one frame.
        spare = (_fraction(draws[:, 1:2]) * size[:, None]) >> 24
        hidden.scatter_(1, spare, hidden.gather(1, spare) & (hidden.sum(1) < size)[:, None])
        return Mask.from_hidden(_thin(key, hidden) if self.equal_counts else hidden, valid)

    def _spans(
        self, key: Key, size: Int[Tensor, "batch"], draws: Int[Tensor, "batch draws"], frames: int
    ) -> tuple[Int[Tensor, "batch spans"], Int[Tensor, "batch spans"]]:
        """First frames, and first frames after; both `frames` where a sample has fewer spans than the longest could."""
        bound = max(self.min_spans, int(self.ratio * frames / self.length) + 1)
        bound = max(min(bound, frames - 1), 1)
        wanted = (self.ratio * size.double() / self.length + _fraction(draws[:, 0]) * 2.0**-24).to(torch.int64)
        count = torch.minimum(wanted.clamp(min=self.min_spans), size - 1)
        slot = torch.arange(bound, device=size.device)
        live = slot < count[:, None]
        if self.lengths == "static" and self.overlap:
            length: Tensor | int = self.length
            room = size - self.length
        else:
            length = self._draw_lengths(key, size, live)
            if not self.overlap:
                return _spread(size, draws[:, 2:], live, length, self.min_space)
            room = size - length.masked_fill(~live, 2 * frames).amin(1)
        begin = _choose(draws[:, 2:], torch.maximum(room, count + 1), bound)
        begin = torch.where(live, begin, frames)
        return begin, (begin + length).clamp(max=frames)

    def _draw_lengths(
        self, key: Key, size: Int[Tensor, "batch"], live: Bool[Tensor, "batch spans"]
    ) -> Int[Tensor, "batch spans"]:
        if self.lengths == "static":
            return torch.full_like(live, self.length, dtype=torch.int64)
        table = _length_table(self.lengths, self.length, self.other, size.device)
        length = torch.searchsorted(table, key.stream("lengths").bits(live.shape[1]) & 0xFFFFFFFF, right=True)
        none = (length * live).sum(1) == 0
        length[:, 0] = torch.where(none, (size - 1).clamp(0, self.length), length[:, 0])
        return length


def _fraction(bits: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """The lowest 24 bits: a uniform number in units of 2**-24."""
    return bits & 0xFFFFFF


def _choose(bits: Int[Tensor, "batch frames"], room: Int[Tensor, "batch"], bound: int) -> Int[Tensor, "batch {bound}"]:
    """Distinct positions in random order, uniform over the first `room` ones; further ones where `room` < `bound`."""
    outside = torch.arange(bits.shape[1], device=bits.device) >= room[:, None]
    return bits.masked_fill(outside, _LAST).topk(bound, dim=1, largest=False).indices


def _spread(
    size: Int[Tensor, "batch"],
    bits: Int[Tensor, "batch frames"],
    live: Bool[Tensor, "batch spans"],
    length: Int[Tensor, "batch spans"],
    space: int,
) -> tuple[Int[Tensor, "batch spans"], Int[Tensor, "batch spans"]]:
    """Spans at least `space` apart, every arrangement equally likely.

    Shrinking each span and the gap that must follow it to one cell maps the arrangements of n spans of length l on T
    frames one to one to the sets of n among T + space - n * (l - 1 + space) cells. So: draw such a set, sort it, and
    let every span push the later ones back by l - 1 + space. Lengths go to the spans from left to right as drawn;
    those that no longer fit are left out.
    """
    frames = bits.shape[1]
    length = torch.minimum(length, (size - 1)[:, None])  # so that the first always fits
    push = length.clamp(min=1) - 1 + space
    live = live & ((push + 1).cumsum(1) <= (size + space)[:, None])
    push = push * live
    cells = size + space - push.sum(1)
    begin = torch.where(live, _choose(bits, cells, live.shape[1]), frames).sort(1).values
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
def _length_table(lengths: SpanLengths, length: int, other: float, device: torch.device) -> Int[Tensor, "longest"]:
    """P(a span is at most k long) for k = 0, 1, ..., in units of 2**-32: one table draws every kind on any device."""
    if lengths == "uniform":
        low, high = int(other), 2 * length
        below = [max(0, k - low + 1) / (high - low + 1) for k in range(high + 1)]
    elif lengths == "normal":
        longest = length + math.ceil(7 * other) + 1
        below = [0.0] + [0.5 * math.erfc((length - k - 0.5) / other / math.sqrt(2)) for k in range(1, longest)]
    else:
        longest = length + math.ceil(10 * math.sqrt(length)) + 10
        mass = [math.exp(k * math.log(length) - length - math.lgamma(k + 1)) for k in range(longest)]
        below = [math.fsum(mass[: k + 1]) for k in range(longest)]
    return torch.tensor([round(p * 2**32) for p in below[:-1]] + [2**32], device=device)
