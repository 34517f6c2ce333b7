"""The structure of the packages, measured, and the rules that it keeps: `make house`.

Rules: imports run downwards (data, encoders, methods, interop, evaluation, report), never from one domain to another,
from core to a domain or in a circle; core does not mention a domain; no file is longer than 450 lines; no 12 lines in a
row are in two packages; functions are annotated. Everything that breaks one is listed, and the exit status says so.
"""

from __future__ import annotations

import argparse
import ast
import graphlib
import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LONGEST = 450
EQUAL_LINES = 12
# A room may import rooms of the same floor or a lower one. What a domain has beside these (targets, geometry) lies
# between its data and its encoders; `checks` is used by tests only and may look at everything below the report.
FLOORS = ("data", "own", "encoders", "methods", "interop", "evaluation", "report")


@dataclass(frozen=True)
class Module:
    """One source file.

    Args:
        package: ``core`` or a domain.
        room: the folder under the package, or "" for a file beside the folders.
        path: relative to the repository.
        text: its source.
        imports: dotted names of this project's modules that it imports when it is imported itself.
        late: likewise, inside functions.
    """

    package: str
    room: str
    path: Path
    text: str
    imports: tuple[str, ...]
    late: tuple[str, ...]

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @property
    def name(self) -> str:
        """Its dotted name; a package's is that of its folder."""
        parts = self.path.with_suffix("").parts[self.path.parts.index("unmask") :]
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@dataclass(frozen=True)
class Numbers:
    """What is counted of one folder."""

    files: int
    lines: int
    median_function: float


def main() -> None:
    """Print the numbers and every broken rule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON value")
    modules = list(read_modules(ROOT))
    problems = [text for rule in RULES for text in rule(modules)]
    folders = {name: numbers(group) for name, group in by_folder(modules).items()}
    domains = sum(n.lines for name, n in folders.items() if not name.startswith("core"))
    everything = numbers(modules)
    if parser.parse_args().json:
        values = {name: asdict(n) for name, n in folders.items()}
        print(json.dumps({"folders": values, "domains": domains, "all": asdict(everything), "problems": problems}))
    else:
        print(f"{'folder':28}{'files':>6}{'lines':>8}{'median function':>17}")
        for name, n in {**folders, "all": everything}.items():
            print(f"{name:28}{n.files:6}{n.lines:8,}{n.median_function:17g}")
        print(f"the domains together: {domains:,} lines")
        print("\n".join(problems) if problems else "all rules are kept")
    sys.exit(bool(problems))


def read_modules(root: Path) -> Iterator[Module]:
    """Every source file of every package."""
    for path in sorted((root / "packages").glob("*/src/unmask/*/**/*.py")):
        package, *folders = path.relative_to(root).parts[4:-1]
        text = path.read_text(encoding="utf-8")
        early, late = imports_of(ast.parse(text))
        yield Module(package, folders[0] if folders else "", path.relative_to(root), text, early, late)


def imports_of(tree: ast.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a module imports of this project: at once, and inside functions. Imports for type checkers do not count."""
    checked = {id(n) for node in ast.walk(tree) if is_type_checking(node) for n in ast.walk(node)}
    inside = {id(n) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for n in ast.walk(node)}
    found: dict[bool, list[str]] = {True: [], False: []}
    for node in ast.walk(tree):
        if id(node) in checked:
            continue
        if isinstance(node, ast.Import):
            found[id(node) in inside] += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found[id(node) in inside] += [f"{node.module}.{alias.name}" for alias in node.names]
    early, late = (tuple(n for n in found[k] if n.startswith("unmask.")) for k in (False, True))
    return early, late


def is_type_checking(node: ast.AST) -> bool:
    """Whether a node is ``if TYPE_CHECKING:``."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def by_folder(modules: list[Module]) -> dict[str, list[Module]]:
    """Modules by ``package/room``, lower floors first."""
    groups: dict[str, list[Module]] = defaultdict(list)
    for module in sorted(modules, key=lambda m: (m.package != "core", m.package, floor_of(m.package, m.room))):
        groups[f"{module.package}/{module.room}".rstrip("/")].append(module)
    return groups


def numbers(modules: list[Module]) -> Numbers:
    """Files, lines and the median length of functions."""
    lengths = [length for module in modules for length in function_lengths(module)]
    median = statistics.median(lengths) if lengths else 0
    return Numbers(len(modules), sum(len(m.lines) for m in modules), median)


def function_lengths(module: Module) -> list[int]:
    """Lines of every function, docstring and signature included."""
    functions = (n for n in ast.walk(ast.parse(module.text)) if isinstance(n, ast.FunctionDef))
    return [(f.end_lineno or f.lineno) - f.lineno + 1 for f in functions]


# ---- rules ---------------------------------------------------------------------------------------------------------


def floor_of(package: str, room: str) -> int:
    """The floor of a domain's room; core has none, and files beside the rooms are above all of them."""
    if package == "core" or room == "":
        return len(FLOORS)
    return FLOORS.index(room if room in FLOORS else "own")


def downward_imports(modules: list[Module]) -> Iterator[str]:
    """Imports that run upwards within a domain, and any from one domain to another or from core to a domain."""
    domains = {m.package for m in modules} - {"core"}
    for module in modules:
        for name in (*module.imports, *module.late):
            _, package, *rest = name.split(".")
            if package in domains and package != module.package:
                yield f"{module.path}: imports {name}, of another package"
            if package != module.package or package == "core" or len(rest) < 2 or module.room == "":
                continue
            if floor_of(package, rest[0]) > floor_of(module.package, module.room) and name in module.imports:
                yield f"{module.path}: imports {name}, which is on a higher floor"


def no_import_cycles(modules: list[Module]) -> Iterator[str]:
    """Modules that import each other when they are imported: whether that works depends on which comes first."""
    names = {module.name for module in modules}
    graph: dict[str, set[str]] = {}
    for module in modules:
        wanted = {module.name.rpartition(".")[0]} | {part for name in module.imports for part in prefixes(name)}
        graph[module.name] = (wanted & names) - {module.name} - set(prefixes(module.name))
        # Importing a module runs the packages above it first; those that it lies in itself are running already.
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        yield f"modules import each other: {' -> '.join(error.args[1])}"


def prefixes(name: str) -> list[str]:
    """A dotted name and every package above it."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


def core_names_no_domain(modules: list[Module]) -> Iterator[str]:
    """Mentions of a domain in core: its name with or without a method, in code, help or prose."""
    domains = sorted({m.package for m in modules} - {"core"})
    # ``vision/mae`` and the like show how a command is written; a bare name or module would be knowledge of a domain.
    pattern = re.compile(rf"unmask\.({'|'.join(domains)})\b|[\"']({'|'.join(domains)})[\"']")
    for module in modules:
        if module.package == "core":
            for number, line in enumerate(module.lines, start=1):
                match = pattern.search(line)
                if match and line.strip() != f"{match[0]},":  # alone on its line, it is a task called like a domain
                    yield f"{module.path}:{number}: core mentions {match[0]}"


def short_files(modules: list[Module]) -> Iterator[str]:
    """Files that are longer than `LONGEST` lines."""
    for module in modules:
        if len(module.lines) > LONGEST:
            yield f"{module.path}: {len(module.lines)} lines; at most {LONGEST}"


def annotated_functions(modules: list[Module]) -> Iterator[str]:
    """Functions with an argument or result that has no type."""
    for module in modules:
        for f in (n for n in ast.walk(ast.parse(module.text)) if isinstance(n, ast.FunctionDef)):
            arguments = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]
            bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            if bare or f.returns is None and f.name != "__init__":
                yield f"{module.path}:{f.lineno}: {f.name} is not annotated ({', '.join(bare) or 'its result'})"


def no_repeated_code(modules: list[Module]) -> Iterator[str]:
    """Runs of `EQUAL_LINES` lines that stand in two packages; blank lines, comments and imports do not count."""
    seen: dict[tuple[str, ...], tuple[Module, int]] = {}
    for module in modules:
        reported = 0
        lines = [(number, text) for number, text in enumerate(map(str.strip, module.lines), 1) if counts(text)]
        for start in range(len(lines) - EQUAL_LINES + 1):
            window = lines[start : start + EQUAL_LINES]
            first, number = seen.setdefault(tuple(text for _, text in window), (module, window[0][0]))
            if first.package != module.package and window[0][0] > reported:
                yield f"{module.path}:{window[0][0]}: {EQUAL_LINES} lines stand at {first.path}:{number} too"
                reported = window[-1][0]


def counts(text: str) -> bool:
    """Whether a line counts as code."""
    return bool(text) and not text.startswith(("#", "import ", "from ")) and text not in ("(", ")", "]", "}", '"""')


RULES = (downward_imports, no_import_cycles, core_names_no_domain, short_files, annotated_functions, no_repeated_code)

if __name__ == "__main__":
    main()
