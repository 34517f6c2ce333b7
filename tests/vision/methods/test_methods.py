"""Every method that the registry finds, held to `check_method` at the size of its tiny recipe, shrunk."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch

from unmask.core import registry
from unmask.core.training.recipe import load_recipe
from unmask.vision.checks import check_method
from unmask.vision.data.images import ImageBatch

METHODS = [name for name, card in registry.methods().items() if name.startswith("vision/") and card.kind == "pretrain"]
SMALL = {"dim": 16, "depth": 2, "heads": 2}


def shrink(settings: Any) -> Any:
    """The same settings with every width, depth and number of heads small."""
    changed = {
        f.name: shrink(value) if is_dataclass(value) else SMALL[f.name]
        for f in fields(settings)
        if is_dataclass(value := getattr(settings, f.name)) or (f.name in SMALL and isinstance(value, int))
    }
    return replace(settings, **changed)


def make(name: str) -> tuple[torch.nn.Module, ImageBatch]:
    recipe = load_recipe(name, "tiny")
    method = registry.load(name).build(shrink(recipe.model), recipe.data)
    images = torch.randn(4, recipe.data.channels, *recipe.data.image_size)
    return method, ImageBatch(images, torch.tensor([5, 2**40, 17, 3]))


def test_all_are_found() -> None:
    assert {"vision/mae", "vision/simmim", "vision/colormae"} <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_passes_check_method(name: str) -> None:
    check_method(*make(name), skip={"compiles"})


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore")
def test_compiles(name: str) -> None:
    from unmask.core.checks import CHECKS

    check_method(*make(name), skip={check.__name__ for check in CHECKS if check.__name__ != "compiles"})


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("recipe", ["tiny", "paper"])
def test_recipes_are_valid(name: str, recipe: str) -> None:
    assert load_recipe(name, recipe).method == name
