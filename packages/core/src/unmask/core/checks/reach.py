"""The test of a stop-gradient: which weights a loss term trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from unmask.core.method import Term

Reached = Tensor | nn.Module


def assert_reaches(term: Term | Tensor, yes: Sequence[Reached] = (), no: Sequence[Reached] = ()) -> None:
    """Check which tensors get a gradient from a loss term, and which do not. Nothing is changed, ``.grad`` included.

    Args:
        term: a term of a method's output, or any tensor with a graph, which is kept.
        yes: tensors, parameters and modules (every parameter of them) that must get a gradient other than 0.
        no: those that must get none, or 0.

    Raises:
        AssertionError: lists the tensors of `yes` without a gradient and those of `no` with one.
    """
    total = term.total if isinstance(term, Term) else term
    missing = [name for name, tensor in _named(yes) if not _reaches(total, tensor)]
    reached = [name for name, tensor in _named(no) if _reaches(total, tensor)]
    said = [f"no gradient reaches {', '.join(missing)}"] if missing else []
    said += [f"a gradient reaches {', '.join(reached)}"] if reached else []
    assert not said, "; ".join(said)


def _named(things: Sequence[Reached]) -> Iterator[tuple[str, Tensor]]:
    for i, thing in enumerate(things):
        if isinstance(thing, nn.Module):
            parameters = dict(thing.named_parameters())
            assert parameters, f"{type(thing).__name__} has no parameters"
            yield from ((f"{type(thing).__name__}.{name}", p) for name, p in parameters.items())
        else:
            yield f"tensor {i} {tuple(thing.shape)}", thing


def _reaches(total: Tensor, tensor: Tensor) -> bool:
    if not (total.requires_grad and tensor.requires_grad):
        return False
    (gradient,) = torch.autograd.grad(total.sum(), tensor, retain_graph=True, allow_unused=True)
    return gradient is not None and bool((gradient != 0).any())
