"""Checks of explainers: their maps follow inputs and weights, and the network stays unchanged.

Most are plain functions on a given network; one that is trained is a method with ``explain(batch)``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unmask.core.checks.generating import _assert_left_alone
from unmask.core.checks.plans import take
from unmask.core.checks.running import Check, run_checks

Explain = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Explanation:
    """An explainer under test.

    Args:
        explain: ``explain(network, inputs)`` gives one map per input.
        network: the network to explain.
        inputs: [batch, channels, *space], at least two and different; a batch where the explainer is a trained method.
    """

    explain: Explain
    network: nn.Module
    inputs: Any

    def backwards(self) -> Any:
        """The inputs in reverse."""
        if isinstance(self.inputs, Tensor):
            return self.inputs.flip(0)
        return take(self.inputs, range(len(self.inputs.ids) - 1, -1, -1))


def check_explainer(explain: Explain, network: nn.Module, inputs: Tensor) -> None:
    """Check an explainer for what `unmask explain` relies on. See `Explanation` for the arguments.

    Raises:
        AssertionError: lists every check that failed, and how.
    """
    run_checks(
        EXPLAINER, lambda: Explanation(explain, copy.deepcopy(network), inputs), getattr(explain, "__name__", "explain")
    )


def maps_have_the_inputs_shape(case: Explanation) -> None:
    """One finite number per position of every input: [batch, *space], without gradient."""
    maps = case.explain(case.network, case.inputs)
    if isinstance(case.inputs, Tensor):
        expected = (len(case.inputs), *case.inputs.shape[2:])
        assert tuple(maps.shape) == expected, f"maps are {tuple(maps.shape)}, not {expected}"
    else:
        count = len(case.inputs.ids)
        assert maps.dim() > 1 and len(maps) == count, f"maps are {tuple(maps.shape)}: not one for each of {count}"
    assert maps.isfinite().all() and not maps.requires_grad, "a map is not finite or has a gradient"


def maps_are_the_same_twice(case: Explanation) -> None:
    """The same input gives the same map, whatever the state of torch's generator; other inputs give other maps."""
    maps = case.explain(case.network, case.inputs)
    torch.manual_seed(5)
    assert torch.equal(maps, case.explain(case.network, case.inputs)), "two calls give different maps"
    assert not torch.equal(maps, case.explain(case.network, case.backwards())), "another input has the same map"


def maps_depend_on_the_network(case: Explanation) -> None:
    """With other weights the maps change (sanity checks, arXiv 1810.03292): it is the network that is explained."""
    maps = case.explain(case.network, case.inputs)
    with torch.no_grad():
        for parameter in case.network.parameters():
            parameter.add_(parameter.std(correction=0) * torch.randn_like(parameter) + 0.1)
    other = case.explain(case.network, case.inputs)
    assert not torch.equal(maps, other), "maps do not change with the network's weights"


def explaining_leaves_the_network_alone(case: Explanation) -> None:
    """Weights, buffers, gradients, hooks and modes do not change."""
    _assert_left_alone(case.network, lambda: case.explain(case.network, case.inputs), "explain")


def explains(case: Any) -> None:
    """A method's own `explain(batch)` passes the explainers' suite."""

    def explain(method: Any, batch: Any) -> Any:
        return method.explain(batch)

    for check in EXPLAINER:
        check(Explanation(explain, copy.deepcopy(case.method), case.batch))


EXPLAINER: tuple[Check, ...] = (
    maps_have_the_inputs_shape,
    maps_are_the_same_twice,
    maps_depend_on_the_network,
    explaining_leaves_the_network_alone,
)
