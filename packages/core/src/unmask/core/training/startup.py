"""Checks made while a run starts: they raise before hours are spent on a mistake."""

from __future__ import annotations

from collections import Counter

from torch import nn
from torch.optim import Optimizer


class StartupError(RuntimeError):
    """A method or optimizer put together wrongly: a mistake in code, so it keeps its traceback."""


def check_groups(method: nn.Module, optimizer: Optimizer) -> None:
    """Every trainable parameter is in exactly one optimizer group, and nothing else is.

    Raises:
        StartupError: naming the parameters that are missing, doubled or not the method's.
    """
    times = Counter(id(p) for group in optimizer.param_groups for p in group["params"])
    named = list(method.named_parameters())
    problems = {
        "in no optimizer group": [n for n, p in named if p.requires_grad and not times[id(p)]],
        "in more than one optimizer group": [n for n, p in named if times[id(p)] > 1],
        "frozen but in an optimizer group": [n for n, p in named if not p.requires_grad and times[id(p)]],
    }
    found = [f"{what}: {shorten(names)}" for what, names in problems.items() if names]
    strangers = len(set(times) - {id(p) for _, p in named})
    if strangers:
        found.append(f"{strangers} parameters of the optimizer are not the method's")
    if found:
        raise StartupError("parameters " + "; ".join(found))


class GradientCheck:
    """Every trainable parameter gets a gradient within the first steps of a run.

    Call `after_backward` at each step; it costs nothing once the check has passed.

    Args:
        method: the module that is trained.
        steps: how many steps a parameter may wait for its first gradient.
    """

    def __init__(self, method: nn.Module, steps: int = 2) -> None:
        self.waiting = {name: p for name, p in method.named_parameters() if p.requires_grad}
        self.steps = steps

    def after_backward(self) -> None:
        """Look at the gradients of one step.

        Raises:
            StartupError: after the last of the steps, naming the parameters that never had a gradient.
        """
        if not self.waiting:
            return
        self.waiting = {name: p for name, p in self.waiting.items() if p.grad is None}
        self.steps -= 1
        if self.waiting and self.steps <= 0:
            raise StartupError(
                f"no gradient reaches {shorten(list(self.waiting))}. Freeze what should not learn "
                f"(requires_grad_(False)), or look for a detach() or an unused layer in the method's forward"
            )


def shorten(names: list[str], shown: int = 6) -> str:
    """Names in a row, the rest counted."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
