"""Optimizer groups: whose weights decay and how fast each part learns; and the optimizer itself.

A method may have ``param_groups() -> list`` of mappings with

* ``params``: (name, parameter) pairs, names as `named_parameters` gives them;
* ``lr_scale``: what the recipe's learning rate is multiplied by; 1 without it;
* ``weight_decay``: of all these parameters, constant; without it or with None the recipe's on matrices and none on
  vectors, biases and what `no_weight_decay` names;
* ``decay_all``: True has the recipe's weight decay act on vectors and biases, too.

Every trainable parameter is in exactly one of them. Layer-wise decay for fine-tuning is one group per layer, with
``lr_scale`` of ``0.75 ** (depth - layer)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from unmask.core.errors import UnmaskError
from unmask.core.method import Clock
from unmask.core.training.recipe import Optimizer
from unmask.core.training.schedules import value_at
from unmask.core.training.startup import StartupError


def decays(name: str, parameter: nn.Parameter, exempt: set[str]) -> bool:
    """Whether weight decay applies: to matrices and kernels, not to vectors, biases and names in `exempt`."""
    return parameter.ndim > 1 and not name.endswith("bias") and name not in exempt


def param_groups(method: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters as torch's groups, by the method's own `param_groups` or as one.

    Each is cut into what decays and what does not; ``params`` are (name, parameter) pairs, which torch keeps as
    ``param_names``, in the order given; ``lr_scale`` and ``follows`` (the recipe's weight decay) are for `set_rates`.

    Raises:
        StartupError: a group of the method's has a key that means nothing.
    """
    exemptions: Any = getattr(method, "no_weight_decay", set)
    own: Any = getattr(method, "param_groups", None)
    named = [(name, p) for name, p in method.named_parameters() if p.requires_grad]
    wanted = [{"params": named}] if own is None else own()
    return [part for group in wanted for part in _parts(group, set(exemptions()), weight_decay) if part["params"]]


def _parts(group: dict[str, Any], exempt: set[str], weight_decay: float) -> list[dict[str, Any]]:
    known = {"params", "lr_scale", "weight_decay", "decay_all"}
    if strange := sorted(set(group) - known):
        raise StartupError(f"param_groups: unknown key {strange[0]!r}; a group has {', '.join(sorted(known))}")
    named, scale, fixed = list(group["params"]), group.get("lr_scale", 1.0), group.get("weight_decay")
    if fixed is not None:
        return [{"params": named, "weight_decay": fixed, "lr_scale": scale, "follows": False}]
    if group.get("decay_all"):
        return [{"params": named, "weight_decay": weight_decay, "lr_scale": scale, "follows": True}]
    matrices = [(n, p) for n, p in named if decays(n, p, exempt)]
    others = [(n, p) for n, p in named if not decays(n, p, exempt)]
    return [
        {"params": matrices, "weight_decay": weight_decay, "lr_scale": scale, "follows": True},
        {"params": others, "weight_decay": 0.0, "lr_scale": scale, "follows": False},
    ]


def make_optimizer(method: nn.Module, settings: Optimizer) -> torch.optim.AdamW:
    """AdamW over `param_groups`, fused where torch has it. `set_rates` moves its rates at every step.

    Raises:
        UnmaskError: nothing is trainable.
    """
    groups = param_groups(method, value_at(settings.weight_decay, Clock()))
    if not groups:
        raise UnmaskError(f"{type(method).__name__} has no trainable parameter: requires_grad is False for all of them")
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for g in groups for _, p in g["params"])
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps, fused=fused)


def set_rates(optimizer: torch.optim.Optimizer, learning_rate: float, weight_decay: float) -> None:
    """Give every group its learning rate, and those that follow the recipe their weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]
        if group["follows"]:
            group["weight_decay"] = weight_decay


def parameters_by_name(optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """The optimizer's parameters in its own order."""
    return {
        name: p
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    }
