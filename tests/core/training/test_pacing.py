"""Pacing functions: the values that CLIMB's release gives, and what any of them does."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from unmask.core.training.pacing import Pacing

_FILE = Path(__file__).parents[2] / "golden" / "climb"
GOLDEN, ROWS = (
    load_file(_FILE.with_suffix(".safetensors")),
    json.loads(_FILE.with_suffix(".json").read_text())["pacing_rows"],
)
SHAPES: list[Any] = ["linear", "quad", "root", "step", "exp", "log"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("total", [160, 400000])
def test_the_released_values(shape: Any, total: int) -> None:
    steps = GOLDEN[f"sampler/pacing/T{total}/steps"].tolist()
    wanted = GOLDEN[f"sampler/pacing/T{total}/values"][ROWS.index(shape)].tolist()
    pacing = Pacing(shape)
    assert [pacing(step / total) for step in steps] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_pacing_rises_from_its_lowest_to_its_highest(shape: Any) -> None:
    values = [Pacing(shape)(step / 1000) for step in range(1001)]
    assert values == sorted(values)
    assert set(values[:62]) == {0.1} and set(values[875:]) == {1.0}
    half = {"linear": 0.55, "quad": 0.325, "root": 0.736, "step": 0.1, "exp": 0.106, "log": 0.938}[shape]
    assert Pacing(shape)((0.0625 + 0.875) / 2) == pytest.approx(half, abs=5e-4)
    assert Pacing(shape, begin=0.5, end=0.5)(0.5) == 1.0


def test_a_pacing_that_falls_is_refused() -> None:
    for wrong in ({"begin": 0.9, "end": 0.1}, {"lowest": 0.9, "highest": 0.1}):
        with pytest.raises(ValueError, match="a pacing rises"):
            Pacing(**wrong)  # type: ignore[arg-type]
