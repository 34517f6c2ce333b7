"""`make docs`, first half: write docs/methods/ from what the repository already says about each method.

A page per method: its card, its module's docstring, its recipes, and the results committed under benchmarks/ (the JSON
files that tools/benchmark.py writes). Nothing is imported but the registry.
"""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unmask.core import registry
from unmask.core.registry import Card

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "methods"
EVIDENCE = {
    "full": "the authors' own code and paper",
    "part": "part of the authors' code or paper; the rest is ours",
    "thin": "little published: a **reconstruction**, most numbers are ours",
}


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    for card in registry.methods().values():
        page = OUT / f"{card.id}.md"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(method_page(card), encoding="utf-8")
    (OUT / "index.md").write_text(index_page(list(registry.methods().values())), encoding="utf-8")
    print(f"{OUT.relative_to(ROOT)}: {len(registry.methods())} methods")


def index_page(cards: list[Card]) -> str:
    """The table of all methods."""
    rows = [
        [
            f"[{card.id}]({card.id}.md)",
            card.title,
            card.paper,
            card.kind,
            "reconstruction" if card.reconstruction else "",
        ]
        for card in cards
    ]
    return f"# Methods\n\n{table(['method', 'title', 'paper', 'kind', ''], rows)}\n"


def method_page(card: Card) -> str:
    """One method's page."""
    docstring = ast.get_docstring(ast.parse(card.path.read_text(encoding="utf-8"))) or ""
    facts = [
        ["paper", card.paper],
        ["kind", card.kind],
        ["rests on", EVIDENCE[card.evidence]],
        ["reference", f"{card.reference} ({card.reference_licence}); none of it is copied here"],
        ["installs with", f"`pip install {card.package}`"],
        ["train it", f"`unmask train {card.id} --out RUN`"],
    ]
    parts = [f"# {card.id}", f"**{card.title}**", table(["", ""], facts), docstring, *recipes(card), *results(card)]
    return "\n\n".join(parts) + "\n"


def recipes(card: Card) -> Iterator[str]:
    """The shipped recipes, word for word."""
    folder = card.path.parent.parent / "recipes"
    for path in sorted(folder.glob(f"{card.path.stem}.*.yaml"), reverse=True):
        name = path.name.split(".")[1]
        yield f"## Recipe `{name}`\n\n```yaml\n{path.read_text(encoding='utf-8').rstrip()}\n```"


def results(card: Card) -> Iterator[str]:
    """Committed results of the method, a table per file: a line per figure, a column per variant and budget."""
    for path in sorted((ROOT / "benchmarks").rglob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = content.get("rows", []) if isinstance(content, dict) else []
        mine = [row for row in rows if str(row.get("variant", "")).split("-")[0] == card.path.stem]
        if mine:
            head = ["", *(_titled(row) for row in mine)]
            names = dict.fromkeys(name for row in mine for name in row if name not in ("variant", "images"))
            lines = [[name, *(shown(row.get(name)) for row in mine)] for name in names]
            yield f"## Results: `{path.relative_to(ROOT)}`\n\n{context(content)}{table(head, lines)}"


def _titled(row: dict[str, Any]) -> str:
    return f"{row['variant']}, {row['images']:,} images" if "images" in row else str(row["variant"])


def context(content: dict[str, Any]) -> str:
    """The command and hardware that a result file names."""
    lines = [
        f"- {key}: `{content[key]}`" for key in ("data", "command", "hardware", "date", "protocol") if key in content
    ]
    return "\n".join(lines) + "\n\n" if lines else ""


def shown(value: Any) -> str:
    """A table cell; a spread over seeds as mean, deviation and number of seeds."""
    if isinstance(value, dict) and "mean" in value:
        around = f" ± {value['std']:.2g}" if value.get("std") is not None else ""
        return f"{value['mean']:.4g}{around} (n = {value['n']})"
    if isinstance(value, dict | list) or value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


if __name__ == "__main__":
    main()
