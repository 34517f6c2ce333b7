"""The reference of the Python interface: a page for each file or folder of a package, which mkdocstrings fills in.

Nothing is imported: a page names modules, and mkdocstrings reads their source text.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "reference" / "api"
COMMAND_LINE = "cli"  # described by its own help


def write_pages() -> int:
    """Write a page per part of each package and an index; returns the number of pages."""
    parts = {package.name: list(parts_of(package)) for package in sorted(ROOT.glob("packages/*/src/unmask/*"))}
    for package, found in parts.items():
        for name, modules in found:
            page = OUT / package / f"{name}.md"
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(page_of(f"unmask.{package}.{name}", modules), encoding="utf-8")
    (OUT / "index.md").write_text(index_of(parts), encoding="utf-8")
    return sum(map(len, parts.values()))


def parts_of(package: Path) -> Iterator[tuple[str, list[Path]]]:
    """Each file and each folder of a package, with its modules."""
    for path in sorted(package.iterdir()):
        if path.stem.startswith(("_", COMMAND_LINE)):
            continue
        if path.suffix == ".py":
            yield path.stem, [path]
        elif modules := [module for module in sorted(path.rglob("*.py")) if said(module)]:
            yield path.name, modules


def said(module: Path) -> str:
    """The first line of a module's docstring; empty where it has none or holds nothing else."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ") if len(tree.body) > 1 else ""


def dotted(module: Path) -> str:
    """The name that a module is imported by."""
    name = ".".join(module.with_suffix("").parts[module.parts.index("src") + 1 :])
    return name.removesuffix(".__init__")


def page_of(title: str, modules: list[Path]) -> str:
    """A page: its title, and a directive for each module."""
    return "\n\n".join([f"# {title}", *(f"::: {dotted(module)}" for module in modules)]) + "\n"


def index_of(parts: dict[str, list[tuple[str, list[Path]]]]) -> str:
    """The list of all modules, by package."""
    lines = ["# Python reference", "Made from the packages' docstrings. `True` means hidden, everywhere."]
    for package, found in parts.items():
        lines.append(f"## unmask.{package}")
        lines.append(
            "\n".join(
                f"- [`{dotted(module)}`]({package}/{name}.md#{dotted(module)}): {said(module)}"
                for name, modules in found
                for module in modules
            )
        )
    return "\n\n".join(lines) + "\n"


if __name__ == "__main__":
    write_pages()
