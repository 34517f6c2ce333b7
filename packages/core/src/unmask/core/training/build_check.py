"""Whether a method can be built with its settings, learnt without the memory and time that its weights would take."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def build_problems(module: types.ModuleType, recipe: Any) -> list[str]:
    """What the `build` of a method's module says against a recipe's settings."""
    if recipe.networks:
        return []  # they are opened once, when the rest is known to be sound; the real build speaks for itself
    if hasattr(module, "planned"):
        try:
            recipe = module.planned(recipe)
        except ValueError as error:
            return [f"stages: {error}"]
    try:
        with torch.random.fork_rng(devices=[]), _WithoutWeights():
            module.build(recipe.model, recipe.data, *([{}] if hasattr(module, "OPTIONAL_NETWORKS") else []))
    except ValueError as error:
        return [f"model: {error}"]
    except (NotImplementedError, RuntimeError):
        pass  # layers that need memory, or data that are not opened yet: the real build comes later, and speaks then
    return []


class _WithoutWeights(TorchFunctionMode):
    """Layers have weights with a shape and without memory; tables are computed as ever.

    Under ``torch.device("meta")`` tables would have no values either, and torch would import its compiler for the first
    ``arange`` or ``normal_`` there, which takes seconds.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.normal_ or getattr(function, "__module__", None) == "torch.nn.init":
            weight = args[0] if args else kwargs["tensor"]
            if weight.is_meta:
                return weight
        if function in (torch.empty, torch.rand, torch.randn) and kwargs.get("device") is None:
            kwargs = kwargs | {"device": "meta"}
        return function(*args, **kwargs)
