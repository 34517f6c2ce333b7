"""A recipe's method, with the networks from elsewhere that it uses; its weights are the initial ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from unmask.core import registry
from unmask.core.networks import Network, NetworkError, open_network
from unmask.core.training.recipe import NetworkSource, Recipe


def open_networks(recipe: Recipe) -> tuple[Recipe, dict[str, Network]]:
    """Open what the recipe names under `networks`.

    Returns:
        The recipe with the hash of every network's weights, and the networks.

    Raises:
        UnmaskError: one cannot be opened, or its weights are not those that the recipe has the hash of.
    """
    opened = {name: _open(name, source) for name, source in recipe.networks.items()}
    sources = {name: NetworkSource(network.source, network.hash) for name, network in opened.items()}
    return replace(recipe, networks=sources), opened


def _open(name: str, source: NetworkSource) -> Network:
    try:
        network = open_network(source.source)
    except NetworkError as error:
        moved = f". If it has moved: unmask train --resume RUN --network {name}=DIR" if source.hash else ""
        raise NetworkError(f"networks.{name}: {error}{moved}") from None
    if source.hash is not None and source.hash != network.hash:
        raise NetworkError(
            f"networks.{name}: the weights in {source.source} are not those that the run was started with (hash "
            f"{source.hash} then, {network.hash} now). Put them back; if they have moved: unmask train --resume RUN "
            f"--network {name}=DIR; or start a new run"
        )
    return network


def make_method(recipe: Recipe, networks: Mapping[str, Network] | None = None) -> nn.Module:
    """What the method's ``build`` makes of a recipe; its random weights come from torch's generator as it is.

    Args:
        recipe: see `load_recipe`.
        networks: those of `open_networks`, where they are open already; None opens them.

    Raises:
        UnmaskError: see `open_networks`.
        ValueError: the method refuses its settings.
    """
    module = registry.load(recipe.method)
    if not hasattr(module, "NETWORKS") and not hasattr(module, "OPTIONAL_NETWORKS"):
        return module.build(recipe.model, recipe.data)
    return module.build(recipe.model, recipe.data, open_networks(recipe)[1] if networks is None else dict(networks))
