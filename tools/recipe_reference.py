"""The reference of recipes: every key that a recipe may set, from the settings' types, defaults and docstrings."""

from __future__ import annotations

import importlib
import inspect
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from unmask.core import registry
from unmask.core.training.recipe import NetworkSource, Optimizer, Recipe, Schedule, Training

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "reference" / "recipes"
_WORDS = {int: "integer", float: "number", str: "text", bool: "`true` or `false`", type(None): "`null`"}
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_INTRODUCTION = """# Recipes

A recipe is a YAML file with everything that decides what a run computes. `unmask train METHOD --recipe NAME|FILE` reads
one, `--set KEY=VALUE` changes a key by the names below, and `--dry-run` prints the complete recipe. A key that does not
exist, a value of the wrong type and values that do not fit together are all reported before anything runs. What a
domain's data and its methods' models may set stands on a page of its own: {domains}."""


@dataclass(frozen=True)
class Key:
    """A key of a recipe.

    Args:
        name: dotted, as ``--set`` takes it.
        kind: its type, in words.
        default: as YAML, or "required".
        meaning: from the docstring; empty where it says nothing.
    """

    name: str
    kind: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Section:
    """The keys of one settings class, at one position in the recipe."""

    title: str
    text: str
    keys: list[Key]


def write_pages() -> int:
    """Write the page of the common keys and one per domain; returns the number of keys."""
    OUT.mkdir(parents=True, exist_ok=True)
    links = ", ".join(f"[{name}]({name}.md)" for name in registry.domains())
    pages = {"index": (_INTRODUCTION.format(domains=links), common_sections())}
    for name in registry.domains():
        pages[name] = (
            f"# Recipes of {name}\n\nKeys that every domain has are [here](index.md).",
            domain_sections(name),
        )
    for name, (head, found) in pages.items():
        text = "\n\n".join([head, *map(shown, found)])
        (OUT / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    return sum(len(section.keys) for _, found in pages.values() for section in found)


def common_sections() -> list[Section]:
    """What a recipe of any method may set."""
    found = [Section("The whole", *described(Recipe, ""))]
    for name, kind in (("optimizer", Optimizer), ("schedule", Schedule), ("training", Training)):
        found += sections(name, kind)
    return found + list(sections("networks.NAME", NetworkSource))


def domain_sections(name: str) -> list[Section]:
    """What a domain's data kinds and methods may set."""
    found: list[Section] = []
    for kind, path in registry.domain(name).data.items():
        found += sections("data", importlib.import_module(path).Settings, f"{kind}: ")
    for card in registry.methods().values():
        if card.id.split("/")[0] == name:
            method = registry.load(card.id)
            for part, settings in (("model", "Settings"), ("stages", "Stages")):
                found += sections(part, getattr(method, settings), f"{card.id}: ") if hasattr(method, settings) else []
    return found


def sections(path: str, kind: Any, head: str = "", choice: str = "") -> Iterator[Section]:
    """A settings class and, below it, the classes of its fields.

    Args:
        path: the dotted key that it stands at.
        kind: the dataclass.
        head: of every title.
        choice: said in the title, where the key may hold one of several classes.
    """
    yield Section(f"{head}`{path}`{choice}", *described(kind, f"{path}."))
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        found = [] if field.name in getattr(kind, "filled_in", ()) else list(nested(hints[field.name], field.name))
        for name, inner in found:
            several = f" with `kind: {inner.kind}`" if len(found) > 1 else ""
            yield from sections(f"{path}.{name}", inner, head, several)


def nested(hint: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The settings classes that a type is made of, each with the key that it stands at."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint):
        yield path, hint
    elif origin is dict:
        yield from nested(arguments[1], f"{path}.NAME")
    elif origin is tuple:
        yield from nested(arguments[0], f"{path}.N")
    elif origin is Annotated:
        yield from nested(arguments[0], path)
    elif origin in (typing.Union, types.UnionType):
        for inner in arguments:
            yield from nested(inner, path)


def described(kind: Any, prefix: str) -> tuple[str, list[Key]]:
    """A settings class's own words, and its keys."""
    hints = typing.get_type_hints(kind, include_extras=True)
    filled_in = {
        name: "filled in by the run" for name in getattr(kind, "filled_in", ()) if [*nested(hints[name], name)]
    }
    meanings = {key: text for base in reversed(kind.__mro__) for key, text in arguments_of(base).items()}
    keys = [
        Key(
            prefix + field.name,
            filled_in.get(field.name) or type_text(hints[field.name]),
            default_text(field),
            meanings.get(field.name, ""),
        )
        for field in fields(kind)
    ]
    return markdown(_parts(kind)[0]), keys


def arguments_of(kind: type) -> dict[str, str]:
    """What a class's own docstring says of each of its arguments."""
    entries = re.split(r"^(\w+): ", inspect.cleandoc(_parts(kind)[1]), flags=re.MULTILINE)[1:]
    return {name: markdown(text) for name, text in zip(entries[::2], entries[1::2], strict=True)}


def _parts(kind: type) -> tuple[str, str]:
    """A class's own docstring: what stands before the arguments, and the arguments."""
    text = inspect.cleandoc(kind.__dict__.get("__doc__") or "")
    head, _, rest = text.partition("\nArgs:\n")
    return head.strip(), re.split(r"^\S", rest, maxsplit=1, flags=re.MULTILINE)[0]


def markdown(text: str) -> str:
    """A docstring's paragraphs with code marked as Markdown does."""
    text = re.sub(r"(?<!\n)\n[ ]*(?!\n)", " ", text.strip()).replace("``", "`")
    return re.sub(r"\bNone\b", "`null`", text)


def type_text(hint: Any) -> str:
    """A type in words: ``integer ≥ 1``, ``list of text``, `` `a` or `b` ``."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return type_text(arguments[0]) + bounds_text(arguments[1:])
    if origin is Literal:
        return _or([f"`{value}`" for value in arguments])
    if origin in (typing.Union, types.UnionType):
        return _or(list(dict.fromkeys(map(type_text, arguments))))
    if origin is dict:
        return f"for each name: {type_text(arguments[1])}"
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"list; each: {type_text(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(map(type_text, arguments))}]"
    return "keys, see below" if is_dataclass(hint) else _WORDS.get(hint, "keys")


def _or(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def bounds_text(constraints: tuple[Any, ...]) -> str:
    """Limits of a number, such as `` ≥ 1``; empty without any."""
    single = [limit for item in constraints for limit in getattr(item, "metadata", [item])]
    found = [
        f" {sign} {value:g}"
        for limit in single
        for name, sign in _BOUNDS.items()
        if (value := getattr(limit, name, None)) is not None
    ]
    return ",".join(found)


def default_text(field: Field[Any]) -> str:
    """A field's default as a recipe would have it."""
    if field.default_factory is not MISSING:
        value = field.default_factory()
    elif field.default is not MISSING:
        value = field.default
    else:
        return "required"
    return "" if is_dataclass(value) else f"`{yaml_text(value)}`"


def yaml_text(value: Any) -> str:
    """A plain value as YAML."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(yaml_text, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def shown(section: Section) -> str:
    """A section as Markdown."""
    rows = [(f"`{key.name}`", key.kind, key.default, key.meaning) for key in section.keys]
    lines = [("key", "type", "default", "meaning"), ("---",) * 4, *rows]
    table = "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)
    return f"## {section.title}\n\n{section.text}\n\n{table}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n\n", "<br>")
