"""Sound methods of every shape pass; every broken one is caught, by the check that is there for its fault."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.core.checks.broken import CAUGHT_BY
from tests.core.checks.sound import (
    Everywhere,
    Latent,
    Normalised,
    ScoresTheMask,
    SharedTarget,
    Sound,
    Tuned,
    WithoutTarget,
    Words,
    WordsWithoutTarget,
    corrupt,
    sentences,
    vectors,
)
from unmask.core.checks import CHECKS, check_method

SOUND = [
    Sound,
    WithoutTarget,
    ScoresTheMask,
    Latent,
    SharedTarget,
    Words,
    WordsWithoutTarget,
    Everywhere,
    Normalised,
    Tuned,
]


def hold(kind: type[nn.Module], skip: set[str]) -> None:
    torch.manual_seed(0)
    batch: Any = sentences() if issubclass(kind, Words) else vectors()
    tuned = issubclass(kind, Tuned)
    options: dict[str, Any] = {"kind": "finetune"} if tuned else {"corrupt": corrupt}
    check_method(kind(), batch, skip={"compiles"} | skip, **options)


@pytest.mark.parametrize("kind", SOUND, ids=lambda kind: kind.__name__)
def test_a_sound_method_passes(kind: type[nn.Module]) -> None:
    hold(kind, set())


@pytest.mark.slow  # a few seconds of tracing; the registered methods are compiled in every run
@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore")
def test_a_method_with_a_split_and_a_teacher_compiles() -> None:
    check_method(Latent(), vectors(), corrupt, skip={check.__name__ for check in CHECKS} - {"compiles"})


@pytest.mark.parametrize("kind", CAUGHT_BY, ids=lambda kind: kind.__name__)
def test_a_broken_method_is_caught(kind: type[nn.Module]) -> None:
    others = {check.__name__ for check in CHECKS} - {CAUGHT_BY[kind]}
    with pytest.raises(
        AssertionError, match=rf"{kind.__name__} fails 1 of 1 checks:\n  - {CAUGHT_BY[kind]}: (?!raised)"
    ):
        hold(kind, others)
