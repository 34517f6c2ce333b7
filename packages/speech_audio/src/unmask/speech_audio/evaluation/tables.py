"""What `evaluate` measured, line by line: for a terminal, for the report, and for several models side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from unmask.core.evaluation.tables import draw, lookup

ROWS = {"trained": "trained encoder", "random": "untrained encoder", "mfcc": "MFCC", "logmel": "log-mel"}


@dataclass(frozen=True)
class Measure:
    """One line of the table.

    Args:
        title: what is measured.
        values: by row of the result; rows that it was not measured for are missing.
        form: how a value is written.
        ranked: whether more is better.
    """

    title: str
    values: dict[str, float]
    form: str = "{:.1f}"
    ranked: bool = True

    def text(self, row: str) -> str:
        """A row's value; a dash where there is none."""
        return self.form.format(self.values[row]) if row in self.values else "–"

    def best(self, row: str) -> bool:
        """Whether a row has the highest value, where that is better."""
        return self.ranked and row in self.values and self.values[row] == max(self.values.values())


_PROBES = {"weighted": "weighted sum of layers", "linear": "last layer", "knn": "k-NN, last layer"}


def measures(result: Mapping[str, Any]) -> list[Measure]:
    """Everything that `evaluate` measured, line by line; accuracies in percent."""
    rows = result["rows"]

    def collect(*path: str, scale: float = 1.0) -> dict[str, float]:
        values = {name: lookup(row, *path) for name, row in rows.items()}
        return {name: scale * value for name, value in values.items() if value is not None}

    lines = []
    for label in dict.fromkeys([*result["tasks"], *result["speakers"]]):
        for key, what in _PROBES.items():
            lines.append(Measure(f"{label}: {what}", collect("probes", label, key, scale=100.0)))
        lines.append(
            Measure(f"{label}: within speakers", collect("probes", label, "within_speaker", "mean", scale=100.0))
        )
    lines.append(Measure("acoustic detail (R²): last layer", collect("detail", "last"), "{:.3f}"))
    lines.append(Measure("acoustic detail (R²): best layer", collect("detail", "best"), "{:.3f}"))
    lines.append(Measure("RankMe", collect("rankme"), ranked=False))
    return [line for line in lines if line.values]


def table(result: Mapping[str, Any]) -> str:
    """What `evaluate` returned, as text for a terminal."""
    sizes = ", ".join(f"{n} {split}" for split, n in result["splits"].items())
    title = f"{result['method']} at step {result['step']} on {result['data']}"
    return _draw(title, f"clips: {sizes}", result["names"], measures(result), _remarks(result))


def study_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Several models that were evaluated on the same data, side by side, with the references of the first.

    Args:
        results: what `evaluate` returned, by the models' names.
    """
    first = next(iter(results.values()))
    references = [name for name in first["rows"] if name != "trained"]
    columns = {f"model {name}": name for name in results} | {name: first["names"][name] for name in references}
    by_model = {name: {line.title: line for line in measures(result)} for name, result in results.items()}
    lines = []
    for line in measures(first):
        found = {n: by_title[line.title] for n, by_title in by_model.items() if line.title in by_title}
        values = {f"model {n}": own.values["trained"] for n, own in found.items() if "trained" in own.values}
        values |= {name: line.values[name] for name in references if name in line.values}
        lines.append(replace(line, values=values))
    return _draw(f"{len(results)} models on {first['data']}", "", columns, lines, _remarks(first))


def _draw(title: str, caption: str, columns: Mapping[str, str], lines: list[Measure], remarks: list[str]) -> str:
    cells = [
        [m.title, *(f"[bold]{m.text(name)}[/bold]" if m.best(name) else m.text(name) for name in columns)]
        for m in lines
    ]
    return draw(title, caption, list(columns.values()), cells, remarks, width=max(110, 40 + 14 * len(columns)))


def _remarks(result: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{label}: {t['classes']} classes, {t['test']} test clips, chance {100 * t['chance']:.1f}"
        + (", on splits of the training clips" if t["own_splits"] else "")
        + (f"; left out: {', '.join(t['left_out'])}" if t["left_out"] else "")
        for label, t in result["tasks"].items()
    ]
    if "note" in result:
        return [*lines, result["note"]]
    return lines + [f"{label}: not probed, {reason}" for label, reason in result["skipped"].items()]
