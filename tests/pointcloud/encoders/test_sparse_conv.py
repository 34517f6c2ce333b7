"""The sparse U-Net over pillars."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from unmask.core.errors import UnmaskError
from unmask.core.method import to_device
from unmask.pointcloud.encoders.sparse_conv import ConvEncoderSettings, SparseConvEncoder
from unmask.pointcloud.geometry import pairwise


def some_pillars(shape: tuple[int, int], samples: int = 3, share: float = 0.5) -> Tensor:
    """Distinct pillars in random order."""
    pillars = (torch.rand(samples, *shape) < share).nonzero()
    return pillars[torch.randperm(len(pillars))]


def lively(encoder: SparseConvEncoder) -> SparseConvEncoder:
    """With parameters that let every branch count, for tests that compare results."""
    for parameter in encoder.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return encoder


def test_every_parameter_gets_a_gradient_and_shapes_stay() -> None:
    encoder = SparseConvEncoder(ConvEncoderSettings(dim=8, levels=3, depth=2))
    pillars = some_pillars((9, 13))
    x = torch.randn(len(pillars), 8)
    structure = encoder.partition(pillars, (9, 13))
    y = encoder(x, structure)
    assert y.shape == x.shape and encoder.dim == 8
    assert len(structure.blocks) == 3 and len(structure.downs) == 2
    (y * torch.randn_like(y)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


def test_a_batch_without_pillars_passes() -> None:
    encoder = SparseConvEncoder(ConvEncoderSettings(dim=4))
    structure = encoder.partition(torch.zeros(0, 3, dtype=torch.long), (5, 5))
    assert encoder(torch.zeros(0, 4), structure).shape == (0, 4)


def test_samples_never_mix_and_order_does_not_matter() -> None:
    encoder = lively(SparseConvEncoder(ConvEncoderSettings(dim=8)))
    pillars = some_pillars((7, 5), share=0.9)
    x = torch.randn(len(pillars), 8)
    y = encoder(x, encoder.partition(pillars, (7, 5)))
    poisoned = torch.where(pillars[:, :1] == 1, torch.nan, x)
    changed = encoder(poisoned, encoder.partition(pillars, (7, 5)))
    assert torch.equal(y[pillars[:, 0] != 1], changed[pillars[:, 0] != 1])
    order = torch.randperm(len(pillars))
    torch.testing.assert_close(encoder(x[order], encoder.partition(pillars[order], (7, 5))), y[order])
    alone = pillars[:, 0] == 2
    single = encoder(x[alone], encoder.partition(pillars[alone], (7, 5)))
    torch.testing.assert_close(single, y[alone])


@pytest.mark.parametrize(("levels", "depth"), [(1, 1), (1, 2), (2, 1), (3, 1)])
def test_a_pillar_sees_as_far_as_the_settings_say(levels: int, depth: int) -> None:
    side = 65
    encoder = lively(SparseConvEncoder(ConvEncoderSettings(dim=4, levels=levels, depth=depth)))
    pillars = torch.cartesian_prod(torch.tensor([0]), torch.arange(side), torch.arange(3))
    x = torch.randn(len(pillars), 4, requires_grad=True)
    y = encoder(x, encoder.partition(pillars, (side, 3)))
    middle = int((pillars[:, 1:] == torch.tensor([side // 2, 1])).all(1).nonzero())
    (gradient,) = torch.autograd.grad(y[middle, 0], x)
    reach = (pillars[gradient.abs().sum(1) > 0, 1] - side // 2).abs().max()
    promised = depth * (6 * 2 ** (levels - 1) - 4)
    assert promised <= reach <= promised + 2**levels - 2


def test_both_implementations_agree_with_one_state_dict() -> None:
    try:
        pairwise.resolve_backend("spconv")
    except UnmaskError as error:
        pytest.skip(str(error))
    torch_one = lively(SparseConvEncoder(ConvEncoderSettings(dim=8, backend="torch")))
    spconv_one = SparseConvEncoder(ConvEncoderSettings(dim=8, backend="spconv"))
    spconv_one.load_state_dict(torch_one.state_dict())
    pillars = some_pillars((9, 13))
    x, weights = torch.randn(len(pillars), 8, requires_grad=True), torch.randn(len(pillars), 8)
    results = []
    for encoder in (torch_one, spconv_one):
        y = encoder(x, encoder.partition(pillars, (9, 13)))
        results.append((y, *torch.autograd.grad((y * weights).sum(), [x, *encoder.parameters()])))
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_it_compiles_with_the_structure_given(unchecked: None) -> None:
    encoder = lively(SparseConvEncoder(ConvEncoderSettings(dim=4, levels=2)))
    pillars = some_pillars((7, 9))
    x, weights = torch.randn(len(pillars), 4, requires_grad=True), torch.randn(len(pillars), 4)
    structure = to_device(encoder.partition(pillars, (7, 9)), "cpu")
    results = []
    for run in (encoder, torch.compile(encoder, backend="aot_eager", fullgraph=True)):
        y = run(x, structure)
        results.append((y, *torch.autograd.grad((y * weights).sum(), [x, *encoder.parameters()])))
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_a_missing_spconv_is_reported_when_the_encoder_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("spconv", "spconv.core", "spconv.pytorch", "spconv.pytorch.functional"):
        monkeypatch.setitem(sys.modules, name, None)
    pairwise._spconv.cache_clear()
    with pytest.raises(UnmaskError, match="could not be imported"):
        SparseConvEncoder(ConvEncoderSettings(dim=4, backend="spconv"))
    pairwise._spconv.cache_clear()
