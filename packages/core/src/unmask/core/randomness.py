"""Counter-based random draws, keyed by sample.

A draw depends on ``(seed, stream, sample id, visit)`` and on nothing else: not on the batch a sample happens to be
in, the worker that loads it, the rank that trains on it, or whether the run was resumed. `visit` is the number of the
draw: in training, the epoch. The generator is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014, doi
10.1145/2660193.2660195) written in 64-bit integer tensor operations, so bits and uniforms are equal on every device.
`Key` draws for a batch; `SampleKey` draws the same numbers for one sample in plain Python, for data workers.
`Key.shared` is the one exception to "per sample": draws that a whole step shares.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB
_WORD = (1 << 64) - 1


def stable_id(name: str) -> int:
    """A 63-bit integer from a string, the same in every process: a sample id from a path or a shard key."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


def _signed(word: int) -> int:
    """The int64 that has the bits of an unsigned 64-bit word."""
    word &= _WORD
    return word - (1 << 64) if word >> 63 else word


def _shift(z: Tensor, by: int) -> Tensor:
    """Logical right shift: torch's is arithmetic, so the copied sign bits are cleared."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _signed(_MULTIPLIER_1)
    z = (z ^ _shift(z, 27)) * _signed(_MULTIPLIER_2)
    return z ^ _shift(z, 31)


def _mix_word(z: int) -> int:
    z = ((z ^ (z >> 30)) * _MULTIPLIER_1) & _WORD
    z = ((z ^ (z >> 27)) * _MULTIPLIER_2) & _WORD
    return z ^ (z >> 31)


def _fold_word(state: int, value: int) -> int:
    return _mix_word((state ^ _mix_word((value + _GOLDEN) & _WORD)) & _WORD)


def _fold(state: Tensor, value: Tensor) -> Tensor:
    return _mix(state ^ _mix(value + _signed(_GOLDEN)))


@dataclass(frozen=True)
class Key:
    """The source of a batch's random draws: one 64-bit state per sample. Make a key with `Key.of`.

    Args:
        state: one counter state per sample.
        root: the state of seed and streams alone, without samples and visits: what `shared` starts from. None in keys
            that were made from states alone.
    """

    state: Int[Tensor, "batch"]
    root: int | None = None

    @classmethod
    def of(cls, seed: int, ids: Int[Tensor, "batch"], visits: Int[Tensor, "batch"] | int = 0) -> Key:
        """The key of samples `ids` at their `visits` (epoch or draw number) under a run's `seed`."""
        # Filled on the device: copying a number there would make the host wait for it.
        visits = torch.full_like(ids, visits, dtype=torch.int64) if isinstance(visits, int) else visits.to(torch.int64)
        root = _fold_word(0, seed)
        start = torch.full_like(ids, _signed(root), dtype=torch.int64)
        return cls(_fold(_fold(start, ids.to(torch.int64)), visits.to(ids.device)), root)

    def stream(self, name: str | int) -> Key:
        """An independent key for one purpose (`"mask"`, `"noise"`) or one of several equal draws (an int)."""
        value = name if isinstance(name, int) else stable_id(name)
        state = _fold(self.state, torch.full_like(self.state, _signed(value)))
        return Key(state, None if self.root is None else _fold_word(self.root, value))

    def shared(self, step: int) -> Key:
        """A key of one row for draws that a whole step shares, such as a batch's block sizes: broadcast them.

        It follows the seed, the streams and `step` (``clock.step``) and nothing else, so all ranks and micro-batches of
        a step draw the same, whatever samples they hold. Validation has one clock, and so draws the same in all its
        batches.

        Raises:
            ValueError: the key was made from states alone.
        """
        if self.root is None:
            raise ValueError("a key made from states alone has no seed to share; make it with Key.of")
        root = _fold_word(self.root, step)
        return Key(self.state.new_full((1,), _signed(root)), root)

    def bits(self, n: int) -> Int[Tensor, "batch n"]:
        """`n` uniform 64-bit integers per sample (as int64, so half of them are negative)."""
        counter = torch.arange(1, n + 1, device=self.state.device) * _signed(_GOLDEN)
        return _mix(self.state[:, None] + counter)

    def uniform(self, n: int) -> Float[Tensor, "batch n"]:
        """`n` float32 uniforms in [0, 1) per sample, multiples of 2**-24."""
        return _shift(self.bits(n), 40).to(torch.float32) * 2.0**-24

    def integers(self, n: int, high: int) -> Int[Tensor, "batch n"]:
        """`n` uniform integers in [0, high) per sample; `high` up to 2**24."""
        return (_shift(self.bits(n), 24) * high) >> 40 if high <= 1 << 23 else _shift(self.bits(n), 1) % high

    def permutation(self, n: int) -> Int[Tensor, "batch n"]:
        """A uniform permutation of range(n) per sample."""
        return self.bits(n).argsort(dim=1)


@dataclass(frozen=True)
class SampleKey:
    """The `Key` of one sample in plain Python integers: the same draws, without tensors, for data workers."""

    state: int

    @classmethod
    def of(cls, seed: int, sample_id: int, visit: int = 0) -> SampleKey:
        """The key of one sample at one visit; see `Key.of`."""
        return cls(_fold_word(_fold_word(_fold_word(0, seed), sample_id), visit))

    def stream(self, name: str | int) -> SampleKey:
        """See `Key.stream`."""
        return SampleKey(_fold_word(self.state, name if isinstance(name, int) else stable_id(name)))

    def uniform(self, n: int) -> Sequence[float]:
        """`n` uniforms in [0, 1): equal to row `sample` of `Key.uniform(n)`."""
        words = (_mix_word((self.state + i * _GOLDEN) & _WORD) for i in range(1, n + 1))
        return [(word >> 40) * 2.0**-24 for word in words]

    def fine_uniform(self, n: int) -> Float64[np.ndarray, "n"]:
        """`n` uniforms in [0, 1), multiples of 2**-53, from the words of `Key.bits`: for draws among millions."""
        z = np.uint64(self.state) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(_MULTIPLIER_1)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(_MULTIPLIER_2)
        return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def epoch_order(seed: int, epoch: int, n: int) -> Int[Tensor, "n"]:
    """The order in which an epoch visits `n` samples: a permutation that is a function of seed and epoch alone."""
    key = Key.of(seed, torch.zeros(1, dtype=torch.int64), epoch).stream("epoch order")
    return key.permutation(n)[0]
