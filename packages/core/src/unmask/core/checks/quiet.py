"""Train mode without the noise that training may add, so that any other difference from eval mode shows.

Such noise regularises without hiding a token: dropout of values and channels, batch statistics, and gates that drop a
whole branch of a sample or a batch (stochastic depth, layer drop). Gates are recognised by their effect, not by their
name: for every sample their output is that of eval mode times a factor, or one of their inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_VALUES = (F.dropout, F.alpha_dropout)
_CHANNELS = (F.dropout1d, F.dropout2d, F.dropout3d, F.feature_alpha_dropout)
_EVAL = (nn.modules.batchnorm._BatchNorm, nn.MultiheadAttention, nn.RNNBase)  # statistics; dropout inside one call


class _NoDropout(TorchFunctionMode):
    """Dropout does nothing, unless it drops tokens: one value per token, or channels where the tokens are."""

    def __init__(self, tokens: int | None) -> None:
        super().__init__()
        self.tokens = tokens

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _VALUES and args[0].shape[-1:] != (1,) and (args[0].dim() > 2 or args[0].shape[-1] != self.tokens):
            return args[0]
        if func in _CHANNELS and args[0].shape[1] != self.tokens:
            return args[0]
        if func is F.scaled_dot_product_attention:
            args, kwargs = (*args[:4], *([0.0] if len(args) > 4 else []), *args[5:]), {**kwargs}
            kwargs.pop("dropout_p", None)
        return func(*args, **kwargs)


@contextmanager
def quiet(method: nn.Module, tokens: int | None = None) -> Iterator[None]:
    """Train mode for everything but dropout, stochastic depth and batch statistics.

    Args:
        method: left in eval mode.
        tokens: tokens of a sample, where that is known: dropout over as many "channels" is not switched off.
    """
    method.train()
    for module in method.modules():
        if isinstance(module, _EVAL):
            module.eval()
    leaves = [m for m in method.modules() if not [*m.children(), *m.parameters()] and m.training]
    handles = [module.register_forward_hook(_open_gate, with_kwargs=True) for module in leaves]
    with _NoDropout(tokens):
        yield
    for handle in handles:
        handle.remove()
    method.eval()


@torch.no_grad()
def _open_gate(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """Replace a gate's output by that of eval mode; None, which changes nothing, for other modules."""
    module.eval()
    still = module.forward(*args, **kwargs)
    module.train()
    if not isinstance(output, Tensor) or output.shape != still.shape or torch.equal(output, still):
        return None
    inputs = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.shape == still.shape]
    return still if _gated(output, still, inputs) else None


def _gated(output: Tensor, still: Tensor, inputs: list[Tensor]) -> bool:
    """Whether every row of `output` is that of `still` times a factor, or that of an input."""
    return all(_multiple(row, still[i]) or any(torch.equal(row, x[i]) for x in inputs) for i, row in enumerate(output))


def _multiple(row: Tensor, of: Tensor) -> bool:
    where = of.abs().flatten().argmax()
    factor = row.flatten()[where] / of.flatten()[where]
    return torch.allclose(row, factor * of, rtol=1e-4, atol=1e-6)
