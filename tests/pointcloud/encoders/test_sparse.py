"""Sparse convolutions against dense ones on the same cells, and spconv against plain torch."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.core.errors import UnmaskError
from unmask.core.method import to_device
from unmask.pointcloud.encoders import sparse
from unmask.pointcloud.encoders.sparse import (
    InverseConv,
    StridedConv,
    SubmanifoldConv,
    strided_rules,
    submanifold_rules,
)
from unmask.pointcloud.geometry import pairwise

SHAPES = [(5, 7), (4, 1), (3, 5, 7), (6, 4, 2)]
KINDS = [SubmanifoldConv, StridedConv, InverseConv]


@pytest.fixture(params=["torch", "spconv"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "spconv":
        try:
            pairwise.resolve_backend("spconv")
        except UnmaskError as error:
            pytest.skip(str(error))
    return request.param


def some_cells(shape: tuple[int, ...], samples: int = 3, share: float = 0.5) -> Tensor:
    """Distinct cells in random order; the corners of the first sample are among them."""
    occupied = torch.rand(samples, *shape) < share
    occupied[(0, *[0] * len(shape))] = occupied[(0, *[-1] * len(shape))] = True
    cells = occupied.nonzero()
    return cells[torch.randperm(len(cells))]


def rules_for(kind: type, cells: Tensor, shape: tuple[int, ...]) -> tuple[sparse.Rulebook, Tensor, Tensor]:
    """The rules, the cells of the input and the cells of the output."""
    if kind is SubmanifoldConv:
        return submanifold_rules(cells, shape), cells, cells
    coarse, _, rules = strided_rules(cells, shape)
    return (rules, cells, coarse) if kind is StridedConv else (rules.inverse, coarse, cells)


def dense(kind: type, x: Tensor, weight: Tensor, bias: Tensor, cells: tuple[Tensor, Tensor], shape: tuple) -> Tensor:
    """The same by torch's dense convolution of the whole grid, read at the output's cells."""
    source, target = cells
    axes = len(shape)
    extent = [-(-size // 2) for size in shape] if kind is InverseConv else [size + size % 2 for size in shape]
    grid = x.new_zeros(3, *extent, x.shape[1]).index_put(tuple(source.t()), x).movedim(-1, 1)
    weight = weight.movedim(-1, 1)
    if kind is SubmanifoldConv:
        grid = (F.conv2d, F.conv3d)[axes - 2](grid, weight, bias, padding=1)
    elif kind is StridedConv:
        grid = (F.conv2d, F.conv3d)[axes - 2](grid, weight, bias, stride=2)
    else:
        convolve = (F.conv_transpose2d, F.conv_transpose3d)[axes - 2]
        grid = convolve(grid, weight.transpose(0, 1), bias, stride=2)
    return grid.movedim(1, -1)[tuple(target.t())]


def close(a: Tensor, b: Tensor) -> bool:
    """Equal up to 1e-5 of the largest value."""
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-5 * b.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_dense_convolution_gives_the_same_values_and_gradients(kind: type, shape: tuple, backend: str) -> None:
    rules, source, target = rules_for(kind, some_cells(shape), shape)
    conv = kind(6, 5, axes=len(shape), backend=backend)
    x = torch.randn(len(source), 6, requires_grad=True)
    wanted = torch.randn(len(target), 5)
    leaves = (x, conv.weight, conv.bias)
    ours = conv(x, rules)
    theirs = dense(kind, *leaves, (source, target), shape)
    assert close(ours, theirs)
    for a, b in zip(*(torch.autograd.grad((y * wanted).sum(), leaves) for y in (ours, theirs)), strict=True):
        assert close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_cell_and_none_at_all(kind: type, backend: str) -> None:
    conv = kind(3, 2, backend=backend)
    rules, source, target = rules_for(kind, torch.tensor([[0, 2, 1]]), (3, 3))
    x = torch.randn(1, 3, requires_grad=True)
    y = conv(x, rules)
    offset = (1, 1) if kind is SubmanifoldConv else (0, 1)
    assert torch.allclose(y[0], conv.weight[(slice(None), *offset)] @ x[0] + conv.bias)
    y.sum().backward()
    assert torch.allclose(x.grad, conv.weight[(slice(None), *offset)].sum(0))

    rules, *_ = rules_for(kind, torch.zeros(0, 3, dtype=torch.long), (3, 3))
    empty = torch.zeros(0, 3, requires_grad=True)
    y = conv(empty, rules)
    y.sum().backward()
    assert y.shape == (0, 2) and empty.grad.shape == (0, 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 3)])
def test_samples_never_mix(kind: type, shape: tuple, backend: str) -> None:
    """Every cell is occupied, so that the ends of one sample's rows touch the next one's in any flat order."""
    rules, source, target = rules_for(kind, some_cells(shape, share=2.0), shape)
    conv = kind(4, 4, axes=len(shape), backend=backend)
    x = torch.randn(len(source), 4)
    poisoned = torch.where(source[:, :1] == 1, torch.nan, x)
    y, changed = conv(x, rules), conv(poisoned, rules)
    others = target[:, 0] != 1
    assert torch.equal(y[others], changed[others]) and changed[~others].isnan().all()


@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7)])
def test_permuting_the_cells_permutes_the_result(shape: tuple, backend: str) -> None:
    cells = some_cells(shape)
    order = torch.randperm(len(cells))
    x = torch.randn(len(cells), 4)
    sub, down, up = (kind(4, 4, axes=len(shape), backend=backend) for kind in KINDS)
    assert close(sub(x[order], submanifold_rules(cells[order], shape)), sub(x, submanifold_rules(cells, shape))[order])
    (coarse, _, rules), (same, _, permuted) = strided_rules(cells, shape), strided_rules(cells[order], shape)
    assert torch.equal(coarse, same)
    y = down(x, rules)
    assert close(down(x[order], permuted), y)
    assert close(up(y, permuted.inverse), up(y, rules.inverse)[order])


def test_coarse_cells_are_the_parents_in_order() -> None:
    cells = torch.tensor([[1, 4, 6], [0, 0, 0], [0, 1, 1], [1, 0, 3]])
    coarse, shape, rules = strided_rules(cells, (5, 7))
    assert shape == (3, 4) and coarse.tolist() == [[0, 0, 0], [1, 0, 1], [1, 2, 3]]
    assert rules.counts == (2, 1, 0, 1)
    assert (rules.rows_in, rules.rows_out) == (4, 3)


def test_large_grids_need_no_memory_of_their_size() -> None:
    """A cube with sides of 2^16 cells: neighbours over a border of 2^31 keys are found, wrapped ones are not."""
    side = 2**16
    cells = torch.tensor([[7, 40000, 40000, side - 1], [7, 40001, 40000, side - 1], [7, 40000, 40001, 0]])
    rules = submanifold_rules(cells, (side,) * 3)
    assert sorted(zip(rules.inputs.tolist(), rules.outputs.tolist(), strict=True)) == [(0, 1), (1, 0)]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([[0, 0, 0], [0, 0, 3]], "1 of 2 cells lie outside the grid"),
        ([[0, 0, 0], [0, -1, 1]], "1 of 2 cells lie outside the grid"),
        ([[0, 1, 1], [0, 1, 1]], "1 occur twice"),
    ],
)
def test_impossible_cells_are_refused(cells: list, message: str) -> None:
    for make in (submanifold_rules, strided_rules):
        with pytest.raises(ValueError, match=message):
            make(torch.tensor(cells), (3, 3))


def test_rules_of_another_kernel_or_for_other_rows_are_refused() -> None:
    cells = some_cells((4, 4))
    x = torch.randn(len(cells), 2)
    with pytest.raises(ValueError, match="rules for .* 4 offsets"):
        SubmanifoldConv(2, 2)(x, strided_rules(cells, (4, 4))[2])
    with pytest.raises(ValueError, match="rows"):
        SubmanifoldConv(2, 2)(x[1:], submanifold_rules(cells, (4, 4)))


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_close_and_gradients_keep_the_weights_type(kind: type, backend: str) -> None:
    rules, source, _ = rules_for(kind, some_cells((9, 9)), (9, 9))
    conv = kind(8, 8, backend=backend)
    x = torch.randn(len(source), 8, requires_grad=True)
    exact = torch.autograd.grad(conv(x, rules).square().sum(), [x, conv.weight])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv(x, rules)
    rough = torch.autograd.grad(y.float().square().sum(), [x, conv.weight])
    for a, b in zip(rough, exact, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() < 0.02 * b.norm()
    half = conv.bfloat16()(x.bfloat16(), rules)
    assert half.dtype == torch.bfloat16 and (half - y).norm() < 0.02 * y.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_the_operators_keep_what_they_tell_the_compiler(kind: type, unchecked: None) -> None:
    """Shapes and types of the results, no hidden writes; whole graphs are compiled in test_conv_encoder.py."""
    rules, source, _ = rules_for(kind, some_cells((4, 5)), (4, 5))
    x, weight = torch.randn(len(source), 3), torch.randn(2, len(rules.counts), 3, requires_grad=True)
    book = (rules.inputs, rules.outputs, list(rules.counts), rules.rows_out, rules.own)
    parts = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(pairwise._pairwise, (x, weight, *book), test_utils=parts)
    grad = torch.randn(rules.rows_out, 2)
    torch.library.opcheck(pairwise._pairwise_backward, (grad, x, weight.detach(), *book), test_utils=parts)


def test_a_rulebook_travels_with_a_plan() -> None:
    rules = to_device(submanifold_rules(some_cells((4, 4)), (4, 4)), "meta")
    assert rules.inputs.is_meta and rules.outputs.is_meta and sum(rules.counts) == len(rules.inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axes", [2, 3])
def test_spconvs_own_layers_take_the_same_weights(kind: type, axes: int) -> None:
    """Its layers find the pairs themselves, and sort coarse cells in their own way."""
    try:
        pairwise.resolve_backend("spconv")
    except UnmaskError as error:
        pytest.skip(str(error))
    import spconv.pytorch as spconv
    from spconv.core import ConvAlgo

    shape = (6, 4, 8)[:axes]  # even: spconv drops what lies behind the last whole stride
    cells = some_cells(shape)
    coarse, coarse_shape, rules = strided_rules(cells, shape)
    x = torch.randn(len(cells), 3)
    tensor = spconv.SparseConvTensor(x, cells.int().contiguous(), list(shape), 3)
    ours = kind(3, 5, axes=axes, backend="torch")
    if kind is SubmanifoldConv:
        layer = getattr(spconv, f"SubMConv{axes}d")(3, 5, 3, algo=ConvAlgo.Native)
        layer.load_state_dict(ours.state_dict())
        assert close(layer(tensor).features, ours(x, submanifold_rules(cells, shape)))
        return
    strided = getattr(spconv, f"SparseConv{axes}d")(3, 3, 2, 2, algo=ConvAlgo.Native, indice_key="pairs")
    down = StridedConv(3, 3, axes=axes, backend="torch")
    strided.load_state_dict(down.state_dict())
    theirs = strided(tensor)
    y = down(x, rules)
    place = {tuple(cell): row for row, cell in enumerate(coarse.tolist())}
    order = [place[tuple(cell)] for cell in theirs.indices.tolist()]
    assert close(theirs.features, y[order]) and len(order) == len(coarse)
    inverse = getattr(spconv, f"SparseInverseConv{axes}d")(3, 5, 2, algo=ConvAlgo.Native, indice_key="pairs")
    if kind is InverseConv:
        inverse.load_state_dict(ours.state_dict())
        assert close(inverse(theirs).features, ours(y, rules.inverse))


def test_spconv_is_named_where_it_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("spconv", "spconv.core", "spconv.pytorch", "spconv.pytorch.functional"):
        monkeypatch.setitem(sys.modules, name, None)
    pairwise._spconv.cache_clear()
    with pytest.raises(UnmaskError, match="spconv-cu120.*set backend to 'torch'"):
        SubmanifoldConv(2, 2, backend="spconv")
    assert SubmanifoldConv(2, 2, backend="auto").backend == "torch"
    pairwise._spconv.cache_clear()
