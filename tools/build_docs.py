"""`make docs`, first half: write what the repository already says elsewhere as pages, and the table in README.md.

A page per method: its card, its module's docstring, its recipes, and the results committed under benchmarks/ (the JSON
files that tools/benchmark.py writes). `recipe_reference` writes the keys of recipes, `api_reference` the pages that
mkdocstrings fills in.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import api_reference
import recipe_reference

from unmask.core import registry
from unmask.core.registry import Card

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "methods"
REFERENCE = ROOT / "docs" / "reference"
README = ROOT / "README.md"
EVIDENCE = {
    "full": "the authors' own code and paper",
    "part": "part of the authors' code or paper; the rest is ours",
    "thin": "little published: a **reconstruction**, most numbers are ours",
}


def main() -> None:
    for folder in (OUT, REFERENCE):
        shutil.rmtree(folder, ignore_errors=True)
    cards = list(registry.methods().values())
    for card in cards:
        page = OUT / f"{card.id}.md"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(method_page(card), encoding="utf-8")
    (OUT / "index.md").write_text(index_page(cards), encoding="utf-8")
    README.write_text(with_table(README.read_text(encoding="utf-8"), cards), encoding="utf-8")
    keys, parts = recipe_reference.write_pages(), api_reference.write_pages()
    print(f"docs: {len(cards)} methods, {keys} keys of recipes, {parts} parts of the Python reference")


def with_table(readme: str, cards: list[Card]) -> str:
    """README.md with its table of methods made anew, between the two comments that mark it."""
    rows = [[f"`{card.id}`", card.summary + _mark(card), linked(card.paper)] for card in cards]
    made = table(["method", "what is hidden; what is asked", "paper"], rows)
    marked = re.compile(r"(<!-- methods: .*? -->\n\n).*?(\n\n<!-- /methods -->)", re.DOTALL)
    return marked.sub(lambda found: found[1] + made + found[2], readme)


def _mark(card: Card) -> str:
    return " (a reconstruction)" if card.reconstruction else ""


def linked(paper: str) -> str:
    """A paper with its arXiv number as a link."""
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", paper)


def index_page(cards: list[Card]) -> str:
    """The table of all methods."""
    rows = [
        [f"[{card.id}]({card.id}.md)", card.title + _mark(card), card.summary, linked(card.paper), card.kind, card.task]
        for card in cards
    ]
    head = ["method", "title", "what is hidden; what is asked", "paper", "kind", "task"]
    return f"# Methods\n\n[Which one to choose](../guides/which-method.md)\n\n{table(head, rows)}\n"


def method_page(card: Card) -> str:
    """One method's page; kind, task and evidence are its front matter, too."""
    docstring = ast.get_docstring(ast.parse(card.path.read_text(encoding="utf-8"))) or ""
    domain, name = card.id.split("/")
    facts = [
        ["paper", linked(card.paper)],
        ["kind", card.kind],
        ["task", card.task],
        ["hidden; asked", card.summary],
        ["rests on", EVIDENCE[card.evidence]],
        ["reference", f"{card.reference} ({card.reference_licence}); none of it is copied here"],
        ["package", f"`{card.package}`"],
        ["train it", f"`unmask train {card.id} --out RUN`"],
        ["settings", f"[keys of `model`](../../reference/recipes/{domain}.md#{domain}{name}-model)"],
    ]
    front = "\n".join(["---", f"kind: {card.kind}", f"task: {card.task}", f"evidence: {card.evidence}", "---"])
    parts = [front, f"# {card.id}", f"**{card.title}**", table(["", ""], facts), docstring]
    return "\n\n".join([*parts, *recipes(card), *results(card)]) + "\n"


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
