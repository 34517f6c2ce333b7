"""The toy set, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from toy import ToySet, collate

__all__ = ["Settings", "collate", "open_split", "resolve"]


@dataclass(frozen=True)
class Settings:
    source: str = "toy"
    samples: int = 28
    free_to_change: ClassVar[frozenset[str]] = frozenset({"source"})
    filled_in: ClassVar[frozenset[str]] = frozenset()


def resolve(settings: Settings) -> Settings:
    return settings


def open_split(settings: Settings, split: str, *, seed: int = 0, augment: bool = False) -> Any:
    return ToySet(settings.samples) if split == "train" else ToySet(10, 900)
