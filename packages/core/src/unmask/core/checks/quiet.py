"""Train mode without the noise that training is allowed, so that whatever else differs from eval mode shows.

Allowed is what regularises without hiding a token: dropout of values and channels, batch statistics, and gates that
drop a whole branch of a sample or a batch (stochastic depth, layer drop). Gates are told by what they do, not by their
name: of every sample they give what they give in eval mode times a factor, or one of their inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
        if func in _VALUES and args[0].shape[-1:] != (1,):
            return args[0]
        if func in _CHANNELS and args[0].shape[1] != self.tokens:
            return args[0]
        if func is F.scaled_dot_product_attention:
            args, kwargs = (*args[:4], *([0.0] if len(args) > 4 else []), *args[5:]), {**kwargs}
            kwargs.pop("dropout_p", None)
        return func(*args, **kwargs)


@contextmanager
def quiet(method: nn.Module, run: Callable[[], Any], tokens: int | None = None) -> Iterator[None]:
    """Train mode for everything but dropout, stochastic depth and batch statistics.

    Args:
        method: left in eval mode.
        run: what will be compared; tried a few times to find the gates.
        tokens: how many tokens a sample has, where that is known: what drops as many "channels" is not silenced.
    """
    method.train()
    silent = _gates(method, run)
    for module in method.modules():
        if isinstance(module, _EVAL) or module in silent:
            module.eval()
    with _NoDropout(tokens):
        yield
    method.eval()


@torch.no_grad()
def _gates(method: nn.Module, run: Callable[[], Any], tries: int = 4) -> set[nn.Module]:
    """The modules that act as gates in every call of a few runs."""
    verdict: dict[nn.Module, bool] = {}

    def judge(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        module.eval()
        still = module.forward(*args, **kwargs)
        module.train()
        if isinstance(output, Tensor) and not (output.shape == still.shape and torch.equal(output, still)):
            inputs = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.shape == still.shape]
            verdict[module] = verdict.get(module, True) and _gated(output, still, inputs)

    state = {name: buffer.clone() for name, buffer in method.named_buffers()}
    leaves = [m for m in method.modules() if not [*m.children(), *m.parameters()] and m.training]
    handles = [m.register_forward_hook(judge, with_kwargs=True) for m in leaves]
    for _ in range(tries):
        run()
    for handle in handles:
        handle.remove()
    for name, buffer in method.named_buffers():  # batch statistics have moved
        buffer.copy_(state[name])
    return {module for module, gate in verdict.items() if gate}


def _gated(output: Tensor, still: Tensor, inputs: list[Tensor]) -> bool:
    """Whether every row of `output` is that of `still` times a factor, or that of an input."""
    return output.shape == still.shape and all(
        _multiple(row, still[i]) or any(torch.equal(row, x[i]) for x in inputs) for i, row in enumerate(output)
    )


def _multiple(row: Tensor, of: Tensor) -> bool:
    where = of.abs().flatten().argmax()
    factor = row.flatten()[where] / of.flatten()[where]
    return torch.allclose(row, factor * of, rtol=1e-4, atol=1e-6)
