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

from unmask.core.errors import UnmaskError

KINDS = ("pretrain", "finetune", "generate", "explain", "supervised")


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
            f"Install one with: pip install unmask-{name.replace('_', '-')}"
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
            card = ast.literal_eval(node.value)
            if card.get("kind") not in KINDS:
                raise ValueError(f"{path}: CARD kind is {card.get('kind')!r}; expected one of {', '.join(KINDS)}")
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
    """Import a method's module: it has ``CARD``, ``Settings`` and ``build(settings, data) -> nn.Module``."""
    found = card(method)
    domain, name = found.id.split("/")
    return importlib.import_module(f"{domains()[domain]}.methods.{name}")


def load_part(method: str, part: str) -> ModuleType:
    """Import a module of a method's domain: ``data`` or ``evaluation``."""
    return importlib.import_module(f"{domains()[card(method).id.split('/')[0]]}.{part}")


def optional_part(method: str, part: str) -> ModuleType | None:
    """`load_part` for modules that a domain need not have, such as ``report``: None where it has none."""
    name = f"{domains()[card(method).id.split('/')[0]]}.{part}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


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
            f"{method} has no recipe {recipe!r}; it has {', '.join(shipped)}, or give a .yaml file"
        )
    return shipped[recipe]
