"""Checks of generators: samples follow the seed, have the requested number, and leave the network unchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from unmask.core.checks.case import changed, snapshot
from unmask.core.checks.plans import same, tensors
from unmask.core.checks.running import Check, run_checks

Generate = Callable[[int, int], Any]


@dataclass(frozen=True)
class Generation:
    """A generator under test.

    Args:
        generate: ``generate(count, seed)`` gives tensors with a row per sample.
        network: the network it samples from.
        shape: of one sample, where that is fixed.
    """

    generate: Generate
    network: nn.Module
    shape: tuple[int, ...] | None = None


def check_generator(generate: Generate, network: nn.Module, shape: tuple[int, ...] | None = None) -> None:
    """Check a generator for what `unmask generate` relies on. See `Generation` for the arguments.

    Raises:
        AssertionError: lists every check that failed, and how.
    """
    run_checks(GENERATOR, lambda: Generation(generate, network, shape), getattr(generate, "__name__", "generate"))


def samples_follow_the_seed(case: Generation) -> None:
    """The same seed gives the same samples, whatever the state of torch's generator; another seed gives others."""
    samples = case.generate(3, 1)
    torch.manual_seed(5)
    assert same(samples, case.generate(3, 1)), "two calls with the same seed give different samples"
    assert not same(samples, case.generate(3, 2)), "another seed gives the same samples; is it used?"
    rows = [t for t in tensors(samples).values() if t.dim() and len(t) == 3]
    assert any(not torch.equal(t[0], t[i]) for t in rows for i in (1, 2)), "all samples of a call are the same"


def samples_are_well_formed(case: Generation) -> None:
    """The requested number of finite samples, of the expected shape, without gradient."""
    for count in (1, 3):
        samples = tensors(case.generate(count, 1))
        assert samples, "generate gives no tensor"
        for name, tensor in samples.items():
            assert tensor.dim() and len(tensor) == count, f"{name}: {tuple(tensor.shape)} is no row for each of {count}"
            assert tensor.isfinite().all() and not tensor.requires_grad, f"{name} is not finite or has a gradient"
        first = next(iter(samples.values()))
        assert case.shape in (None, tuple(first.shape[1:])), f"samples are {tuple(first.shape[1:])}, not {case.shape}"


def generating_leaves_the_network_alone(case: Generation) -> None:
    """Weights, buffers, hooks and modes do not change."""
    _assert_left_alone(case.network, lambda: case.generate(2, 1), "generate")


def _assert_left_alone(network: nn.Module, act: Callable[[], Any], what: str) -> None:
    for training in (False, True):
        network.train(training)
        before, modules = snapshot(network), _facts(network)
        act()
        assert not changed(before, network), f"{what} changed {', '.join(changed(before, network))}"
        now = _facts(network)
        moved = [name or "the network" for name in modules if modules[name] != now.get(name)]
        assert not moved and len(now) == len(modules), f"{what} changed mode, gradient or hooks of {', '.join(moved)}"
    network.eval()


def _facts(network: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Mode, hooks, and which parameters are trained, of every module."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        name: (
            module.training,
            [list(getattr(module, hook)) for hook in hooks],
            [(p.requires_grad, p.grad is None) for p in module.parameters(recurse=False)],
        )
        for name, module in network.named_modules()
    }


def generates(case: Any) -> None:
    """A method's own `generate(count, seed)` passes the generators' suite."""
    method = copy.deepcopy(case.method)
    for check in GENERATOR:
        check(Generation(method.generate, method))


GENERATOR: tuple[Check, ...] = (samples_follow_the_seed, samples_are_well_formed, generating_leaves_the_network_alone)
