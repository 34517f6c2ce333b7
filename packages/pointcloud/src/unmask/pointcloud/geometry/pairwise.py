"""Two implementations of the sum over the pairs of a rulebook, in plain torch and by spconv.

Both compute, for every output row, the sum of weight[:, offset] @ x[input] over its pairs (offset, input).

* ``torch``: for each offset, gather the rows that have a partner, one matrix product, add to the partners' rows. Within
  one offset no row occurs twice, so forward and backward give the same bits every time, on a GPU as well. It runs
  under torch.compile and never waits for the device.
* ``spconv`` (package spconv-cu120, wheels for CPython 3.11 on x86-64 Linux): its native algorithm, which has the same
  steps in C++. It computes in float32 (float64 for float64 features): bfloat16 and half are cast there and back.
  Its own search for neighbours is not used: it reads coordinates that are not contiguous wrongly, without an error.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unmask.core.errors import UnmaskError

Backend = Literal["auto", "spconv", "torch"]


def resolve_backend(backend: Backend) -> Literal["spconv", "torch"]:
    """The implementation that a setting stands for.

    ``auto`` is ``torch``, because spconv measured no faster: forward and backward on one CPU core, 500 to 15,000
    cells in 2-D and a room in 3-D, 64 and 128 channels, torch took 0.97 to 1.09 times spconv's CPU time for a layer and
    0.99 to 1.04 times for a whole encoder with its search for neighbours. Torch's runs on every Python and device,
    compiles, computes in bfloat16, and saves an import of five seconds. spconv on a GPU was not tried.

    Raises:
        UnmaskError: ``spconv`` is asked for and cannot be imported.
    """
    if backend == "spconv":
        _spconv()
        return "spconv"
    return "torch"


def torch_conv(
    x: Float[Tensor, "rows channels"],
    weight: Float[Tensor, "out_channels offsets channels"],
    inputs: Int[Tensor, "pairs"],
    outputs: Int[Tensor, "pairs"],
    counts: tuple[int, ...],
    rows_out: int,
    own: int | None,
) -> Float[Tensor, "rows_out out_channels"]:
    """The sum in plain torch; for the arguments see `unmask.pointcloud.encoders.sparse.Rulebook`.

    Under autocast it computes in autocast's type; half precision is summed in float32.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)  # here, so that the backward pass sees one dtype
    return _pairwise(x, weight, inputs, outputs, counts, rows_out, own)


def spconv_conv(
    x: Float[Tensor, "rows channels"],
    weight: Float[Tensor, "out_channels *kernel channels"],
    pairs: Int[Tensor, "2 offsets most"],
    counts: Int[Tensor, "offsets"],
    rows_out: int,
    own: int | None,
) -> Float[Tensor, "rows_out out_channels"]:
    """The sum by spconv; for `pairs` and `counts` see `unmask.pointcloud.encoders.sparse.Rulebook.for_spconv`."""
    # Disabled here, not by a decorator, because that imports torch._dynamo, which takes seconds.
    conv = torch.compiler.disable(_spconv_conv) if torch.compiler.is_compiling() else _spconv_conv
    return conv(x, weight, pairs, counts, rows_out, own)


def _spconv_conv(x: Tensor, weight: Tensor, pairs: Tensor, counts: Tensor, rows_out: int, own: int | None) -> Tensor:
    functional, native = _spconv()
    conv = functional.indice_conv if own is None else functional.indice_subm_conv
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return conv(x.to(wide).contiguous(), weight.to(wide).contiguous(), pairs, counts, rows_out, native).to(x.dtype)


@cache
def _spconv() -> Any:
    """spconv's functions; importing them takes seconds and warns of deprecated calls in its own code."""
    fx = logging.getLogger("torch.fx._symbolic_trace")  # logs one more warning
    level = fx.level
    fx.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from spconv.core import ConvAlgo
            from spconv.pytorch import functional
    except (ImportError, OSError, RuntimeError) as error:
        raise UnmaskError(
            f"backend 'spconv' needs the package spconv, which could not be imported ({error}): install spconv-cu120 "
            "(its wheels are for CPython 3.11 on x86-64 Linux), or set backend to 'torch', which computes the same"
        ) from error
    finally:
        fx.setLevel(level)
    return functional, ConvAlgo.Native


# Operators of their own, with derivatives by hand: automatic ones would allocate a gradient of all rows for each
# offset, and torch.compile would unroll every offset of every layer. Half precision is summed in float32, since an
# output row gets up to 27 additions.
_ARGUMENTS = "Tensor inputs, Tensor outputs, SymInt[] counts, SymInt rows_out, int? own"


@torch.library.custom_op(
    "unmask::pairwise_conv", mutates_args=(), schema=f"(Tensor x, Tensor weight, {_ARGUMENTS}) -> Tensor"
)
def _pairwise(
    x: Tensor, weight: Tensor, inputs: Tensor, outputs: Tensor, counts: Sequence[int], rows_out: int, own: int | None
) -> Tensor:
    """Gather, multiply, add, offset by offset: x [rows, in] and weight [out, offsets, in] to [rows_out, out]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.new_zeros(rows_out, len(weight), dtype=wide) if own is None else (x @ weight[:, own].t()).to(wide)
    for offset, source, target, here, there in _chunks(x, len(weight), inputs, outputs, counts, own):
        torch.index_select(x, 0, source, out=here)
        torch.mm(here, weight[:, offset].t(), out=there)
        y.index_add_(0, target, there.to(wide))
    return y.to(x.dtype)


@torch.library.custom_op(
    "unmask::pairwise_conv_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor x, Tensor weight, {_ARGUMENTS}) -> (Tensor, Tensor)",
)
def _pairwise_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    inputs: Tensor,
    outputs: Tensor,
    counts: Sequence[int],
    rows_out: int,
    own: int | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `x` and `weight`; the same steps with inputs and outputs exchanged."""
    grad = grad.contiguous()
    wide = torch.promote_types(x.dtype, torch.float32)
    grad_weight = torch.zeros_like(weight)
    if own is None:
        grad_x = torch.zeros_like(x, dtype=wide)
    else:
        grad_x = (grad @ weight[:, own]).to(wide)
        grad_weight[:, own] = grad.t() @ x
    for offset, source, target, here, there in _chunks(x, len(weight), inputs, outputs, counts, own):
        torch.index_select(x, 0, source, out=here)
        torch.index_select(grad, 0, target, out=there)
        torch.mm(there.t(), here, out=grad_weight[:, offset])
        torch.mm(there, weight[:, offset], out=here)
        grad_x.index_add_(0, source, here.to(wide))
    return grad_x.to(x.dtype), grad_weight


@_pairwise.register_fake
def _(x: Tensor, weight: Tensor, inputs: Any, outputs: Any, counts: Any, rows_out: int, own: Any) -> Tensor:
    return x.new_empty(rows_out, weight.shape[0])


@_pairwise_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, *rules: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.counts, ctx.rows_out, ctx.own = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, inputs, outputs = ctx.saved_tensors
    gradients = _pairwise_backward(grad, x, weight, inputs, outputs, ctx.counts, ctx.rows_out, ctx.own)
    return *gradients, None, None, None, None, None


_pairwise.register_autograd(_differentiate, setup_context=_keep)


def _chunks(
    x: Tensor, width: int, inputs: Tensor, outputs: Tensor, counts: Sequence[int], own: int | None
) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
    """The pairs of each offset, with memory for the rows of `x` and for those of `width` values that they go to."""
    here, there = x.new_empty(max(counts), x.shape[1]), x.new_empty(max(counts), width)
    for offset, pair in enumerate(zip(inputs.split(list(counts)), outputs.split(list(counts)), strict=True)):
        if offset != own:
            yield offset, *pair, here[: counts[offset]], there[: counts[offset]]
