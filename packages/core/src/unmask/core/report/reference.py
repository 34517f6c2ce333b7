"""Is my loss normal? The committed curve of a method's `tiny` recipe, and what to make of a run beside it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unmask.core import registry
from unmask.core.errors import UnmaskError
from unmask.core.report.gather import RunFacts, read_run
from unmask.core.report.parts import Verdict
from unmask.core.training.files import write_json
from unmask.core.training.recipe import flatten, read_yaml

WIDTH = 2.0  # the band is the mean over seeds plus and minus this many deviations ...
FLOOR = 0.02  # ... and never narrower than this share of the mean, since few seeds give a rough deviation
TAIL = 0.1  # the verdict is on the mean over this last share of the run

# What two runs may differ in and still have comparable losses.
_SETTINGS = ("model", "data", "optimizer", "schedule")


@dataclass(frozen=True)
class Reference:
    """A recipe's training loss over several seeds; the JSON beside the recipe has these keys.

    Args:
        step: optimizer steps, rising.
        loss: the mean over seeds.
        spread: the standard deviation over seeds (n - 1).
        seeds: how many.
    """

    step: list[int]
    loss: list[float]
    spread: list[float]
    seeds: int = 1

    def band(self, steps: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The lower and upper edge of what is normal at `steps`."""
        mean, spread = (np.interp(steps, self.step, values) for values in (self.loss, self.spread))
        half = np.maximum(WIDTH * spread, FLOOR * np.abs(mean))
        return mean - half, mean + half


def make_reference(runs: Sequence[str | Path], out: str | Path | None = None) -> Reference:
    """The reference curve of runs that differ in their seed only, written to `out` as JSON if that is given.

    Raises:
        UnmaskError: no runs, or they logged different steps.
    """
    found = [read_run(run).series("loss") for run in runs]
    if not found or any(steps != found[0][0] for steps, _ in found):
        raise UnmaskError("a reference needs runs of one recipe, logged at the same steps; only seeds may differ")
    columns = list(zip(*(values for _, values in found), strict=True))
    spread = [statistics.stdev(c) if len(c) > 1 else 0.0 for c in columns]
    mean = [round(statistics.fmean(c), 6) for c in columns]
    reference = Reference(found[0][0], mean, [round(s, 6) for s in spread], len(found))
    if out is not None:
        write_json(Path(out), asdict(reference))
    return reference


def find_reference(method: str) -> Reference | None:
    """The curve shipped beside a method's `tiny` recipe, if there is one."""
    path = registry.card(method).path
    path = path.parent.parent / "recipes" / f"{path.stem}.tiny.reference.json"
    if not path.is_file():
        return None
    raw = json.loads(path.read_text(encoding="utf-8"))
    return Reference(raw["step"], raw["loss"], raw["spread"], raw.get("seeds", 1))


def differences(run: RunFacts) -> list[str]:
    """Keys that the `tiny` recipe sets and this run has other values for, which make losses incomparable."""
    shipped = _flat(read_yaml(registry.recipe_path(run.card.id, "tiny")))
    own = _flat(run.recipe)
    settings = registry.data_kind(run.card.id).Settings
    free = {f"data.{name}" for name in (settings.free_to_change | settings.filled_in) - {"source"}}
    free |= {"optimizer.reference_batch"}
    keys = [*shipped, "schedule.steps"]  # a recipe says epochs; a run that was given steps has another length
    return [key for key in keys if key not in free and own.get(key) != shipped.get(key)]


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    flat = flatten({key: recipe.get(key) or {} for key in _SETTINGS})
    flat["training.batch_size"] = (recipe.get("training") or {}).get("batch_size")
    return {key: _plain(value) for key, value in flat.items()}


def _plain(value: Any) -> Any:
    """One form of what YAML and the resolved recipe write differently: [28, 28] and 28, 1 and 1.0."""
    if isinstance(value, list | tuple) and len(set(map(str, value))) == 1:
        value = value[0]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def judge(steps: Sequence[int], loss: Sequence[float], reference: Reference, different: Sequence[str] = ()) -> Verdict:
    """Whether a loss curve is normal, in a sentence.

    Args:
        steps: of the run's curve.
        loss: of the run's curve.
        reference: what it is held against.
        different: settings in which the run differs from the reference's recipe.
    """
    inside = [i for i, step in enumerate(steps) if reference.step[0] <= step <= reference.step[-1]]
    if not inside:
        return Verdict("The run has not logged a step that the reference covers yet.", "plain")
    tail = inside[-max(1, round(TAIL * len(inside))) :]
    at = [steps[i] for i in tail]
    low, high = (float(edge.mean()) for edge in reference.band(at))
    mean, where = statistics.fmean(loss[i] for i in tail), f"at step {at[-1]:,}"
    numbers = f"{mean:.4g}, and the band is {low:.4g} to {high:.4g}"
    if different:
        keys = ", ".join(different[:4]) + (" and others" if len(different) > 4 else "")
        return Verdict(
            f"This run changes {keys}, so its loss need not follow the reference: {where} it is {numbers}.", "plain"
        )
    if mean > high:
        return Verdict(
            f"Above the reference band {where}: {numbers}. The run learns more slowly than the recipe's own runs: look "
            "at the learning rate, the data and the hidden share.",
            "warn",
        )
    if mean < low:
        return Verdict(
            f"Below the reference band {where}: {numbers}. A lower loss is not a better encoder; check that as much is "
            "hidden and that samples vary.",
            "warn",
        )
    return Verdict(f"Normal: within the reference band {where} ({numbers}).", "good")
