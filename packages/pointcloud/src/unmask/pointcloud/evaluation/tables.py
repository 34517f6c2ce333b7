"""What `evaluate` and `finetune` returned, as text for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

ROWS = {"trained": "trained encoder", "random": "untrained encoder", "coordinates": "coordinates"}

Cell = Callable[[Mapping[str, Any]], str]


def table(result: Mapping[str, Any]) -> str:
    """What `evaluate` or `finetune` returned, as text for a terminal."""
    if "rows" in result:
        return _rich_table(result)
    return (
        f"test accuracy {result['accuracy']:.1%}, validation {result['val_accuracy']:.1%} after "
        f"{result['protocol']['epochs']} epochs on {result['splits']['train']} clouds of {result['data']}\n"
        f"written to {result['out']}"
    )


def _rich_table(result: Mapping[str, Any]) -> str:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    sizes = ", ".join(f"{n} {split}" for split, n in result["splits"].items())
    title = f"{result['method']} at step {result['step']} on {result['data']}"
    grid = Table(title=escape(title), caption=f"clouds: {sizes}")
    grid.add_column("")
    columns = _columns(result["rows"])
    for heading, _ in columns:
        grid.add_column(heading, justify="right")
    for name, row in result["rows"].items():
        grid.add_row(result["names"][name], *(text(row) for _, text in columns))
    console = Console(width=120)
    with console.capture() as capture:
        console.print(grid)
        for line in remarks(result):
            console.print(line, markup=False)
    return capture.get().rstrip()


def _columns(rows: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Cell]]:
    """Heading and text of each column that some row has something for."""
    first = rows["trained"]
    columns = [("k-NN", _percent("knn")), ("linear", _percent("linear"))]
    columns += [(f"{s} % labels", _percent("few_label", s)) for s in first.get("few_label", {}) if s != "100"]
    columns += [("fine-tuned", _percent("finetune"))]
    columns += [("points", _percent("dense", "accuracy")), ("mean IoU", _percent("dense", "mean_iou"))]
    columns = [column for column in columns if any(column[1](row) != "-" for row in rows.values())]
    return [*columns, ("RankMe", lambda row: f"{row['rankme']:.1f} of {row['dim']}")]


def _percent(*path: str) -> Cell:
    """A share in percent; a dash where a row has none."""

    def text(row: Mapping[str, Any]) -> str:
        value: Any = row
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return "-" if value is None else f"{100 * value:.1f}"

    return text


def remarks(result: Mapping[str, Any]) -> list[str]:
    """What is said below the table."""
    lines = [result["note"]] if "note" in result else []
    lines += [f"{what}: not probed, {reason}" for what, reason in result["skipped"].items()]
    if "dense" not in result:
        return lines
    found, pillar = result["dense"], " x ".join(f"{size:g}" for size in result["dense"]["pillar"])
    ceiling, count = found["ceiling"], found["points"]
    lines.append(
        f"points: {len(found['classes'])} classes, fitted on {count['train']:,} points, scored on {count['test']:,}"
        + (f" ({found['outside']:,} more are out of range)" if found["outside"] else "")
        + f". Every point by its pillar's commonest label ({pillar}): {100 * ceiling['accuracy']:.1f}, mean IoU "
        f"{100 * ceiling['mean_iou']:.1f}. The commonest class everywhere: {100 * found['majority']:.1f}."
    )
    return lines
