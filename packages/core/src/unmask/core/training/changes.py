"""What of a recipe may change between the start of a run and its resumption, and what did."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from unmask.core.training.recipe import Recipe, as_dict, flatten, plain

# What may differ on a resume: none of it changes what is computed.
_FREE = ("workers", "checkpoint_every_steps", "keep_checkpoints", "monitor", "probe_every_epochs")
_FREE_TO_CHANGE = frozenset(f"training.{name}" for name in _FREE)
TOTAL = frozenset({"schedule.epochs", "schedule.steps", "schedule.warmup_epochs", "schedule.step_at"})


def free_to_change(recipe: Recipe) -> frozenset[str]:
    """Dotted keys that may differ on a resume: data and networks may have moved, but must be the same ones."""
    data = {f"data.{name}" for name in getattr(recipe.data, "free_to_change", ())}
    return _FREE_TO_CHANGE | data | {f"networks.{name}.source" for name in recipe.networks}


def filled_in(recipe: Recipe) -> frozenset[str]:
    """Dotted keys that are not known before data and networks are opened or earlier stages have run."""
    data = {f"data.{name}" for name in getattr(recipe.data, "filled_in", ())}
    return frozenset(data | {f"networks.{name}.hash" for name in recipe.networks})


def changed_keys(before: dict[str, Any], recipe: Recipe) -> dict[str, str]:
    """Dotted keys whose values differ, with the text "KEY was A, now B"; keys that may change are left out.

    A key that the saved recipe lacks was not known to the version that saved it, and counts as its default.
    """
    old, new = flatten(with_defaults(before, recipe)), flatten(as_dict(recipe))
    free = free_to_change(recipe)
    unknown = {key for key in filled_in(recipe) if None in (old.get(key), new.get(key))}
    sections = tuple(f"{key}." for key in unknown if key in old or key in new)  # null on one side, filled on the other
    return {
        key: f"{key} was {old.get(key, 'not set')}, now {new.get(key, 'not set')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in free and key not in unknown and not key.startswith(sections)
    }


def with_defaults(saved: Any, recipe: Any) -> Any:
    """The plain values `saved` of an earlier `recipe`, or of a part of one, with the defaults of keys that it lacks."""
    if dataclasses.is_dataclass(recipe) and isinstance(saved, Mapping):
        known = {f.name: getattr(recipe, f.name) for f in fields(recipe)}
        missing = _defaults([f for f in fields(recipe) if f.name not in saved])
        return missing | {key: with_defaults(value, known.get(key)) for key, value in saved.items()}
    if isinstance(saved, Mapping) and isinstance(recipe, Mapping):
        return {key: with_defaults(value, recipe.get(key)) for key, value in saved.items()}
    if isinstance(saved, list) and isinstance(recipe, list | tuple) and len(saved) == len(recipe):
        return [with_defaults(*both) for both in zip(saved, recipe, strict=True)]
    return saved


def _defaults(missing: list[dataclasses.Field[Any]]) -> dict[str, Any]:
    """The fields' defaults, as plain values; without those that have none."""
    made = {f.name: f.default_factory() for f in missing if f.default_factory is not dataclasses.MISSING}
    return plain(made | {f.name: f.default for f in missing if f.default is not dataclasses.MISSING})
