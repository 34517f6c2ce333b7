"""Finding domains and methods without importing them.

A domain announces itself by an entry point in the group ``unmask.domains``; a method is a file in the domain's
``methods`` folder whose ``CARD`` is a literal. Cards are read from the source text, so listing every method imports
neither torch nor a domain.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from unmask.core.errors import UnmaskError

if TYPE_CHECKING:
    from unmask.core.domain import Domain

KINDS = ("pretrain", "finetune", "generate", "explain", "supervised")
TASKS = (
    "representation",
    "classification",
    "segmentation",
    "retrieval",
    "distance",
    "text_detection",
    "preference",
    "language",
    "planning",
    "motion",
    "generation",
    "explanation",
)


class UnknownMethodError(UnmaskError):
    """A method or recipe that no installed package has."""


@dataclass(frozen=True)
class Card:
    """What can be said of a method without running it.

    Args:
        id: ``domain/name``, for example ``vision/mae``.
        title: the method's name in full.
        paper: title, venue and arXiv id of the paper.
        kind: one of `KINDS`.
        task: one of `TASKS`: what `unmask evaluate` measures.
        summary: what is hidden and what is asked, in one line of Markdown for the tables of methods.
        evidence: ``full``, ``part`` or ``thin``: how much of it rests on the authors' own code or paper.
        reference: the official code, or "none".
        reference_licence: the licence of that code (none of it is copied here).
        package: the distribution that holds it.
        path: the method's file.
    """

    id: str
    title: str
    paper: str
    kind: str
    evidence: str
    reference: str
    reference_licence: str
    package: str
    path: Path
    task: str = "representation"
    summary: str = ""

    @property
    def reconstruction(self) -> bool:
        """True where most numbers are ours because the published evidence is thin."""
        return self.evidence == "thin"


@cache
def domains() -> dict[str, str]:
    """Installed domains: name to import path."""
    return {point.name: point.value for point in sorted(entry_points(group="unmask.domains"), key=lambda p: p.name)}


def domain_folder(name: str) -> Path:
    """The folder of an installed domain, found without importing it."""
    found = domains()
    if name not in found:
        raise UnknownMethodError(
            f"no domain {name!r} is installed; installed: {', '.join(found) or 'none'}. "
            f"Install one from a checkout of unmask: pip install ./packages/core ./packages/{name}"
        )
    spec = importlib.util.find_spec(found[name])
    assert spec is not None and spec.submodule_search_locations, found[name]
    return Path(next(iter(spec.submodule_search_locations)))


@cache
def methods() -> dict[str, Card]:
    """Every installed method's card by id, sorted."""
    return {
        f"{domain}/{path.stem}": _read_card(domain, path)
        for domain in domains()
        for path in sorted((domain_folder(domain) / "methods").glob("[!_]*.py"))
    }


def _read_card(domain: str, path: Path) -> Card:
    for node in ast.parse(path.read_text(encoding="utf-8"), filename=str(path)).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "CARD" for t in node.targets):
            card = {"task": "representation"} | ast.literal_eval(node.value)
            for key, known in (("kind", KINDS), ("task", TASKS)):
                if card.get(key) not in known:
                    raise ValueError(f"{path}: CARD {key} is {card.get(key)!r}; expected one of {', '.join(known)}")
            return Card(id=f"{domain}/{path.stem}", package=f"unmask-{domain.replace('_', '-')}", path=path, **card)
    raise ValueError(f"{path}: no CARD. A method's file starts with CARD = {{...}}; see CONTRIBUTING.md")


def card(method: str) -> Card:
    """The card of a method such as ``vision/mae``; a misspelt one suggests the nearest."""
    known = methods()
    if method in known:
        return known[method]
    names = {**{name.split("/")[1]: name for name in known}, **{name: name for name in known}}
    near = difflib.get_close_matches(method, names, n=1, cutoff=0.5)
    hint = f"did you mean {names[near[0]]!r}?" if near else f"known: {', '.join(known) or 'none'}."
    raise UnknownMethodError(f"no method {method!r}; {hint} `unmask list` shows all.")


def load(method: str) -> ModuleType:
    """Import a method's module: it has ``CARD``, ``Settings`` and ``build(settings, data) -> nn.Module``.

    One that is not trained has ``explain`` instead of ``build``; see `unmask.core.explanation`.
    """
    found = card(method)
    domain, name = found.id.split("/")
    return importlib.import_module(f"{domains()[domain]}.methods.{name}")


def domain(method: str) -> Domain:
    """The `Domain` of a method, or of a domain's name."""
    name = method if method in domains() else card(method).id.split("/")[0]
    return importlib.import_module(domains()[name]).DOMAIN


def data_kind(method: str) -> Any:
    """The `unmask.core.domain.Data` module of a method: the kind that its module names as ``DATA``, else the first."""
    kinds = domain(method).data
    kind = getattr(load(method), "DATA", next(iter(kinds)))
    if kind not in kinds:
        raise ValueError(f"{card(method).path}: DATA is {kind!r}; its domain has {', '.join(kinds)}")
    return importlib.import_module(kinds[kind])


def part(method: str, name: Literal["encoding", "pretrained", "export", "report", "checks"]) -> Any | None:
    """A module of a method's domain, by its name in `Domain`; None where the domain has none."""
    module = getattr(domain(method), name)
    return None if module is None else importlib.import_module(module)


def task(method: str, verb: str | None = None) -> Any:
    """The `unmask.core.domain.Task` module of a method's task; with `verb` it must have a function of that name.

    Raises:
        UnmaskError: its domain does not evaluate this task, or the task has nothing for the verb.
    """
    found, tasks = card(method), domain(method).tasks
    if found.task not in tasks:
        known = f"the tasks it evaluates: {', '.join(tasks)}" if tasks else "it evaluates no task"
        raise UnmaskError(f"{found.id} is of the task {found.task!r}, which {found.package} does not evaluate; {known}")
    module = importlib.import_module(tasks[found.task])
    if verb is not None and not hasattr(module, verb):
        raise UnmaskError(f"{found.id} is of the task {found.task!r}, which has nothing for `unmask {verb}`")
    return module


def of_kind(kind: str) -> str:
    """The installed methods of a kind, for a sentence: their ids, or that there is none."""
    return ", ".join(c.id for c in methods().values() if c.kind == kind) or "none is installed"


def check_trained(method: str) -> None:
    """See that a method is trained, and is not a plain function on somebody's network.

    Raises:
        UnmaskError: its module has no ``build``; names the verb that it is for.
    """
    found, module = card(method), load(method)
    if hasattr(module, "build"):
        return
    hint = ""
    if found.kind == "explain":
        networks = " ".join(f"--network {name}=DIR_OR_HUB_ID" for name in getattr(module, "NETWORKS", {}))
        hint = f"; use it with: unmask explain INPUT --method {found.id} {networks} --out DIR"
    raise UnmaskError(f"{found.id} is of the kind {found.kind!r} and is not trained{hint}")


def recipes(method: str) -> dict[str, Path]:
    """The recipes shipped with a method, by name."""
    path = card(method).path
    folder = path.parent.parent / "recipes"
    return {p.name.split(".")[1]: p for p in sorted(folder.glob(f"{path.stem}.*.yaml"))}


def recipe_path(method: str, recipe: str) -> Path:
    """The file of a method's shipped recipe (``tiny``, ``small`` or ``paper``), or of a recipe given as a path."""
    if recipe.endswith((".yaml", ".yml")):
        path = Path(recipe)
        if not path.is_file():
            raise UnknownMethodError(f"no recipe file {recipe}")
        return path
    shipped = recipes(method)
    if recipe not in shipped:
        raise UnknownMethodError(
            f"{method} has no recipe {recipe!r}; it has {', '.join(shipped) or 'none'}, or give a .yaml file"
        )
    return shipped[recipe]
