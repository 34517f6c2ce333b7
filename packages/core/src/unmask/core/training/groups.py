"""Which parameters decay: optimizer groups and the optimizer itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from unmask.core.errors import UnmaskError
from unmask.core.training.recipe import Optimizer


def decays(name: str, parameter: nn.Parameter, exempt: set[str]) -> bool:
    """Whether weight decay applies: to matrices and kernels, not to vectors, biases and names in `exempt`."""
    return parameter.ndim > 1 and not name.endswith("bias") and name not in exempt


def param_groups(method: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters as two groups, with and without decay, in the order of `named_parameters`.

    Each group's ``params`` are (name, parameter) pairs, which torch keeps as ``param_names``.
    """
    exemptions: Any = getattr(method, "no_weight_decay", set)
    exempt: set[str] = set(exemptions())
    named = [(name, p) for name, p in method.named_parameters() if p.requires_grad]
    groups = [
        {"params": [(n, p) for n, p in named if decays(n, p, exempt)], "weight_decay": weight_decay},
        {"params": [(n, p) for n, p in named if not decays(n, p, exempt)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(method: nn.Module, settings: Optimizer) -> torch.optim.AdamW:
    """AdamW over `param_groups`, fused where torch has it. The learning rate is set at every step.

    Raises:
        UnmaskError: nothing is trainable.
    """
    groups = param_groups(method, settings.weight_decay)
    if not groups:
        raise UnmaskError(f"{type(method).__name__} has no trainable parameter: requires_grad is False for all of them")
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for g in groups for _, p in g["params"])
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps, fused=fused)


def parameters_by_name(optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """The optimizer's parameters in its own order."""
    return {
        name: p
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    }
