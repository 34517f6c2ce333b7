"""What a run directory says, as plain values for the page. A run that is still training, or lacks a part, will do."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unmask.core import registry
from unmask.core.errors import UnmaskError
from unmask.core.training.recipe import read_yaml
from unmask.core.training.rundir import metrics_until


@dataclass(frozen=True)
class RunFacts:
    """The files of a run, read.

    Args:
        path: the directory.
        recipe: recipe.yaml as nested mappings.
        card: of the method.
        metrics: every whole line of metrics.jsonl.
        environment: environment.json, or empty.
        evaluation: evaluation.json, or None.
        tuned: finetune.json, or None.
        finished: whether the final weights are there.
    """

    path: Path
    recipe: dict[str, Any]
    card: registry.Card
    metrics: list[dict[str, Any]]
    environment: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] | None = None
    tuned: dict[str, Any] | None = None
    finished: bool = False

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric; names inside ``time`` count too."""
        steps, values = [], []
        for line in self.metrics:
            value = line.get(name, line.get("time", {}).get(name))
            if isinstance(value, int | float):
                steps.append(line["step"])
                values.append(float(value))
        return steps, values

    def last(self, name: str) -> float | None:
        """A metric's last value."""
        values = self.series(name)[1]
        return values[-1] if values else None

    @property
    def is_fine_tuning(self) -> bool:
        """Whether a classifier was trained, not the method."""
        return self.recipe.get("finetune") is not None

    @property
    def step(self) -> int:
        """Optimizer steps that the metrics cover."""
        return self.metrics[-1]["step"] if self.metrics else 0


def read_run(run_dir: str | Path) -> RunFacts:
    """Read a run directory.

    Raises:
        UnmaskError: it is not one.
    """
    path = Path(run_dir)
    if not (path / "recipe.yaml").is_file():
        raise UnmaskError(f"{path} is not a run: it has no recipe.yaml. Give the folder that --out named")
    recipe = read_yaml(path / "recipe.yaml")
    return RunFacts(
        path=path,
        recipe=recipe,
        card=registry.card(recipe["method"]),
        metrics=[json.loads(line) for line in metrics_until(path / "metrics.jsonl", sys.maxsize)],
        environment=_json(path / "environment.json") or {},
        evaluation=_json(path / "evaluation.json"),
        tuned=_json(path / "finetune.json"),
        finished=(path / "model.safetensors").is_file(),
    )


def _json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
