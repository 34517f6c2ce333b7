"""The first ten losses of every `tiny` recipe: numbers that moving code must not change.

    python tools/golden_losses.py            compare with tests/golden/tiny_losses.json, to the last bit on one machine
    python tools/golden_losses.py --write    record them anew, after a change that is meant to change them

Other CPUs and versions round otherwise, so the file says what it was recorded on; elsewhere the losses have to agree to
a relative 1e-3.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import about

from unmask.core import registry
from unmask.core.training.loop import train
from unmask.core.training.recipe import load_recipe

FILE = Path(__file__).parent.parent / "tests" / "golden" / "tiny_losses.json"
STEPS = 10
TOLERANCE = 1e-3
SHORT: dict[str, Any] = {"training.log_every": 1, "training.threads": 1, "training.precision": "32-true"}
# Stages of the same short length, on fewer frames: the losses of the last one depend on all before it.
STAGES: dict[str, Any] = {
    "speech_audio/hubert": {
        "iterations": [
            {"targets": [{"kind": "mfcc", "clusters": 10, "max_frames": 5000}], "length": 1.0},
            {"targets": [{"kind": "layer", "layers": [3], "clusters": 10, "max_frames": 5000}], "length": 1.0},
        ]
    },
    "speech_audio/prediction_targets": {
        "teacher": [{"targets": [{"kind": "mfcc", "clusters": 10, "max_frames": 5000}]}],
        "compare": {"rvq": [{"kind": "layer", "layers": [3], "clusters": 10, "max_frames": 5000, "stages": 2}]},
    },
}


def main() -> None:
    """Record or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="record the losses anew")
    parser.add_argument("methods", nargs="*", help="only these; all when not given")
    options = parser.parse_args()
    chosen = options.methods or [name for name in registry.methods() if "tiny" in registry.recipes(name)]
    here = about()
    before = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {"losses": {}}
    losses = {name: first_losses(name) for name in chosen}
    if options.write:
        FILE.parent.mkdir(parents=True, exist_ok=True)
        FILE.write_text(json.dumps(here | {"losses": before["losses"] | losses}, indent=1) + "\n", encoding="utf-8")
        return
    exact = all(before[key] == here[key] for key in ("hardware", "versions"))
    wrong = [name for name, values in losses.items() if not same(values, before["losses"].get(name, []), exact)]
    how = "to the last bit" if exact else f"to {TOLERANCE:g}, since hardware or versions are others"
    for name, values in losses.items():
        print(f"{'CHANGED' if name in wrong else 'same':8}{name}  {values[0]!r} ... {values[-1]!r}")
    print(f"compared {how}")
    sys.exit(f"{', '.join(wrong)}: the losses are not those of {FILE}" if wrong else 0)


def first_losses(method: str) -> list[float]:
    """The training losses of a method's `tiny` recipe cut to `STEPS` steps."""
    changes = SHORT | ({"stages": STAGES[method]} if method in STAGES else {})
    recipe = load_recipe(method, "tiny", changes, steps=STEPS)
    with tempfile.TemporaryDirectory() as folder:
        run = train(recipe, Path(folder) / "run", progress=False)
        files = [run / "metrics.jsonl", *sorted(run.glob("stages/*/metrics.jsonl"))]
        lines = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def same(values: list[float], expected: list[float], exact: bool) -> bool:
    """Whether two rows of losses are the same."""
    if exact or len(values) != len(expected):
        return values == expected
    return all(abs(a - b) <= TOLERANCE * abs(b) for a, b in zip(values, expected, strict=True))


if __name__ == "__main__":
    main()
