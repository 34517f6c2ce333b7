"""A few clips in memory, with what label making asks of a split of recordings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from unmask.core.randomness import stable_id


class FakeClips:
    """Waveforms with names and clip-level labels; `read` notes which were asked for."""

    def __init__(
        self,
        waves: dict[str, Tensor],
        labels: dict[str, list[int]] | None = None,
        classes: dict[str, list[str]] | None = None,
    ) -> None:
        self.waves, self.names = list(waves.values()), list(waves)
        self.ids = torch.tensor([stable_id(name) for name in waves], dtype=torch.int64)
        self.lengths = torch.tensor([len(wave) for wave in self.waves])
        self.labels = {what: torch.tensor(values) for what, values in (labels or {}).items()}
        self.classes = classes or {}
        self.settings = SimpleNamespace(corrupt="skip")
        self.read: list[str] = []

    def __len__(self) -> int:
        return len(self.names)

    def waveform(self, index: int) -> Tensor:
        self.read.append(self.names[index])
        return self.waves[index]

    def name_of(self, sample_id: int) -> str:
        return self.names[self.ids.tolist().index(sample_id)]

    def reordered(self, order: Sequence[int]) -> FakeClips:
        """The same clips in another order."""
        return FakeClips({self.names[i]: self.waves[i] for i in order})


def tone(hertz: float, seconds: float = 0.5, harmonics: int = 5, noise: float = 0.0, seed: int = 0) -> Tensor:
    """A harmonic sound at 16 kHz in [-1, 1]."""
    t = torch.arange(round(16_000 * seconds)) / 16_000
    wave = sum(torch.sin(2 * math.pi * hertz * n * t + n) / n for n in range(1, harmonics + 1))
    assert isinstance(wave, Tensor)
    return 0.3 * wave + noise * torch.randn(len(t), generator=torch.Generator().manual_seed(seed))


def two_voices(count: int = 12, prefix: str = "clip") -> FakeClips:
    """Clips of a low and a high voice that say one of two things (few or many harmonics), 0.3 to 0.6 s."""
    waves = {}
    for i in range(count):
        low, rich = i % 2 == 0, i % 4 < 2
        waves[f"{prefix}{i}.wav"] = tone(110 if low else 260, 0.3 + 0.1 * (i % 4), 12 if rich else 1, 0.02, seed=i)
    labels = {"speaker": [i % 2 for i in range(count)], "word": [int(i % 4 < 2) for i in range(count)]}
    return FakeClips(waves, labels, {"speaker": ["low", "high"], "word": ["poor", "rich"]})
