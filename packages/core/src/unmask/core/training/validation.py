"""Plain mappings into frozen dataclasses: every unknown key and wrong value is reported, none stops the others."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError


def section(name: str, kind: type, value: Any, problems: list[str]) -> Any:
    """An instance of the dataclass `kind` from a mapping; its unknown keys and bad values are added to `problems`."""
    value = {} if value is None else value
    if not isinstance(value, Mapping):
        problems.append(f"{name}: expected keys and values, got {value!r}")
        return None
    problems += unknown_keys(name, kind, value)
    return validated(name, kind, value, problems)


def validated(name: str, kind: Any, value: Any, problems: list[str]) -> Any:
    """`value` as type `kind`, or None with the reasons added to `problems`."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        problems += [
            _pydantic_problem(name, e, value) for e in error.errors() if e["type"] != "unexpected_keyword_argument"
        ]
    except ValueError as error:
        problems.append(f"{name}: {error}")
    return None


def _pydantic_problem(name: str, error: Any, value: Any) -> str:
    where = ".".join([name, *_keys(error, value)])
    if error["type"] in ("missing", "missing_argument"):
        return f"{where}: missing"
    if error["type"] == "union_tag_not_found":
        return f"{where}.kind: missing"
    if error["type"] == "union_tag_invalid":
        return f"{where}.kind: {error['ctx']['tag']!r} is not one of {error['ctx']['expected_tags']}"
    if error["type"] == "value_error":
        return f"{where}: {error['ctx']['error']}"
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{where}: {message} (got {error['input']!r})"


def _keys(error: Any, value: Any) -> Iterator[str]:
    """The parts of an error's location that are keys: where types are alternatives, pydantic puts in their names."""
    *_, last = error["loc"] or (None,)
    for part in error["loc"]:
        inside = isinstance(value, Mapping) and part in value
        if inside or isinstance(part, int) and isinstance(value, list | tuple) and part < len(value):
            value = value[part]
            yield str(part)
        elif part is last and error["type"] in ("missing", "missing_argument"):
            yield str(part)


def unknown_keys(name: str, kind: type, value: Mapping[str, Any]) -> list[str]:
    """A problem for each key of `value`, at any depth, that the dataclass `kind` does not have."""
    known, hints = [f.name for f in fields(kind)], typing.get_type_hints(kind)
    problems = [f"{name}.{unknown_key(str(key), known)}" for key in value if key not in known]
    for key in known:
        problems += _unknown_inside(f"{name}.{key}", hints[key], value.get(key))
    return problems


def _unknown_inside(name: str, hint: Any, value: Any) -> list[str]:
    """`unknown_keys` of a value whose type is a dataclass, or a tuple or mapping of such."""
    inner = _dataclass_of(hint, value)
    if inner is not None:
        return unknown_keys(name, inner, value)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and isinstance(value, list | tuple):
        return [p for i, item in enumerate(value) for p in _unknown_inside(f"{name}.{i}", arguments[0], item)]
    if origin is dict and isinstance(value, Mapping):
        return [p for key, item in value.items() for p in _unknown_inside(f"{name}.{key}", arguments[1], item)]
    return []


def _dataclass_of(hint: Any, value: Any) -> type | None:
    """The dataclass that the mapping `value` describes: where a hint names several, the one of its ``kind``."""
    found = [option for option in _options(hint) if isinstance(option, type) and is_dataclass(option)]
    if not found or not isinstance(value, Mapping):
        return None
    return next((option for option in found if getattr(option, "kind", None) == value.get("kind")), found[0])


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) else (hint,)


def unknown_key(key: str, known: list[str]) -> str:
    """The text about one unknown key, with the nearest known one."""
    near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.6)
    return f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}")
