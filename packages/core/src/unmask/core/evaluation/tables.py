"""What was measured, as text for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Cell = Callable[[Mapping[str, Any]], str]


def lookup(row: Mapping[str, Any], *path: str) -> Any:
    """The value at a path of keys; None where the row has none."""
    value: Any = row
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def percent(*path: str) -> Cell:
    """A share of a row in percent; a dash where the row has none."""

    def text(row: Mapping[str, Any]) -> str:
        value = lookup(row, *path)
        return "-" if value is None else f"{100 * value:.1f}"

    return text


def sample_columns(result: Mapping[str, Any], more: Sequence[tuple[str, Cell]] = ()) -> list[tuple[str, Cell]]:
    """Heading and text of the columns of `unmask.core.evaluation.samples`, and more, as far as a row has something."""
    rows = result["rows"]
    columns = [("k-NN", percent("knn")), ("linear", percent("linear"))]
    shares = [share for share in rows["trained"].get("few_label", {}) if share != "100"]
    columns += [(f"{share} % labels", percent("few_label", share)) for share in shares]
    columns += [("fine-tuned", percent("finetune")), *more]
    columns = [column for column in columns if any(column[1](row) != "-" for row in rows.values())]
    return [*columns, ("RankMe", lambda row: f"{row['rankme']:.1f} of {row['dim']}")]


def row_table(result: Mapping[str, Any], columns: Sequence[tuple[str, Cell]], remarks: Iterable[str] = ()) -> str:
    """One line a row of the result, with its title, and remarks below."""
    sizes = ", ".join(f"{n} {split}" for split, n in result["splits"].items())
    title = f"{result['method']} at step {result['step']} on {result['data']}"
    lines = [[result["names"][name], *(text(row) for _, text in columns)] for name, row in result["rows"].items()]
    return draw(title, sizes, [heading for heading, _ in columns], lines, remarks)


def tuned_text(result: Mapping[str, Any], samples: str) -> str:
    """What `unmask finetune` returned, as text for a terminal; `samples` is what one is called, in the plural."""
    return (
        f"test accuracy {result['accuracy']:.1%}, validation {result['val_accuracy']:.1%} after "
        f"{result['epochs']} epochs on {result['splits']['train']} {samples} of {result['data']}\n"
        f"written to {result['out']}"
    )


def draw(
    title: str,
    caption: str,
    headings: Sequence[str],
    lines: Iterable[Sequence[str]],
    remarks: Iterable[str] = (),
    width: int = 120,
) -> str:
    """A table whose first column is text and whose others are numbers.

    Args:
        title: above it.
        caption: below it.
        headings: of the columns after the first.
        lines: cells, with rich's markup in those after the first.
        remarks: lines below the caption.
        width: of the text, in characters.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    grid = Table(title=escape(title), caption=escape(caption) or None)
    grid.add_column("")
    for heading in headings:
        grid.add_column(escape(heading), justify="right")
    for first, *cells in lines:
        grid.add_row(escape(first), *cells)
    console = Console(width=width)
    with console.capture() as capture:
        console.print(grid)
        for text in remarks:
            console.print(text, markup=False)
    return capture.get().rstrip()
