"""Pillar encoder and window transformer against plain rewrites of what the sheet of the released code says."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.core.nn.attention import GroupedAttention
from unmask.pointcloud.data.batches import PointBatch
from unmask.pointcloud.encoders.window import (
    PillarEncoder,
    WindowSettings,
    WindowTransformer,
    pad,
    window_positions,
)
from unmask.pointcloud.geometry.voxels import VoxelGrid, voxelise

GRID = VoxelGrid(lower=(-4.0, -4.0, -1.0), pillar=(0.5, 0.5, 2.0), shape=(16, 16))
SETTINGS = WindowSettings(dim=16, depth=2, heads=4, window=4)


def clouds(*sizes: int, channels: int = 4, spread: float = 1.2) -> PointBatch:
    """Random clouds, some of whose points are outside GRID."""
    points = torch.randn(sum(sizes), channels) * spread
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    return PointBatch(points, offsets, torch.arange(len(sizes)) + 11)


# --- pillar encoder ---


def slow_pillar_encoder(encoder: PillarEncoder, batch: PointBatch) -> dict[tuple[int, int, int], Tensor]:
    """One pillar at a time, in eval mode, by (sample, y, x)."""
    members: dict[tuple[int, int, int], list[int]] = {}
    for i, (x, y, z) in enumerate(batch.points[:, :3].tolist()):
        bounds = zip((x, y, z), GRID.lower, GRID.pillar, strict=True)
        column, row, level = (math.floor((v - low) / size) for v, low, size in bounds)
        if 0 <= column < 16 and 0 <= row < 16 and level == 0:
            members.setdefault((int(batch.sample_of[i]), row, column), []).append(i)
    found = {}
    for (sample, row, column), rows in members.items():
        p = batch.points[rows]
        centre = torch.tensor([-4.0 + 0.5 * (column + 0.5), -4.0 + 0.5 * (row + 0.5), 0.0])
        x = torch.cat([p, p[:, :3] - p[:, :3].mean(0), p[:, :3] - centre], dim=1)
        for layer in encoder.layers:
            norm = layer.norm
            y = x @ layer.linear.weight.T
            y = (y - norm.running_mean) / (norm.running_var + 1e-3).sqrt() * norm.weight + norm.bias
            y = y.clamp(min=0)
            x = torch.cat([y, y.amax(0).expand_as(y)], dim=1)
        found[sample, row, column] = y.amax(0)
    return found


def test_pillar_encoder_equals_one_pillar_at_a_time() -> None:
    encoder, batch = PillarEncoder(4, 16, GRID), clouds(40, 3, 90)
    for layer in encoder.layers:
        nn.init.normal_(layer.norm.running_mean, std=0.3)
        nn.init.uniform_(layer.norm.running_var, 0.5, 2.0)
    encoder.eval()
    voxels = voxelise(batch.points, batch.offsets, GRID)
    got, expected = encoder(batch.points, voxels), slow_pillar_encoder(encoder, batch)
    assert [tuple(p) for p in voxels.pillars.tolist()] == sorted(expected)
    torch.testing.assert_close(got, torch.stack([expected[p] for p in sorted(expected)]), rtol=1e-5, atol=1e-5)


def test_pillar_encoder_reads_metres_in_float32_under_autocast() -> None:
    encoder, batch = PillarEncoder(4, 16, GRID).eval(), clouds(60)
    voxels = voxelise(batch.points, batch.offsets, GRID)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder(batch.points, voxels), encoder(batch.points, voxels).float())
        got = encoder(batch.points, voxels)
    assert torch.equal(got, encoder(batch.points, voxels))


def test_statistics_are_those_of_all_points_inside() -> None:
    encoder, batch = PillarEncoder(4, 16, GRID).train(), clouds(200)
    voxels, seen = voxelise(batch.points, batch.offsets, GRID), []
    encoder.layers[0].linear.register_forward_hook(lambda module, inputs, out: seen.append(out))
    encoder(batch.points, voxels)
    (out,), norm = seen, encoder.layers[0].norm
    assert len(out) == len(voxels.order) < 200
    torch.testing.assert_close(norm.running_mean, 0.01 * out.mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(norm.running_var, 0.99 + 0.01 * out.var(0), rtol=1e-4, atol=1e-6)


# --- window transformer ---


def slow_windows(encoder: WindowTransformer, x: Tensor, pillars: Tensor) -> Tensor:
    """One window at a time with torch's own multi-head attention and the copied weights."""
    window, dim = encoder.window, encoder.dim
    for i, layer in enumerate(encoder.layers):
        shift = window // 2 if i % 2 else 0
        place = pillars[:, 1:] + (window - shift if shift else 0)
        number = torch.cat([pillars[:, :1], place // window], dim=1)
        inside = place % window - window / 2
        out = torch.zeros_like(x)
        for one in number.unique(dim=0):
            mine = (number == one).all(1)
            y, position = x[mine], torch.stack([code(t, dim) for t in inside[mine]])
            attended = torchs_attention(layer.attn, y + position, y)
            y = F.layer_norm(y + attended, (dim,), layer.norm1.weight, layer.norm1.bias, 1e-5)
            mlp = layer.mlp.fc2(F.gelu(layer.mlp.fc1(y)))
            out[mine] = F.layer_norm(y + mlp, (dim,), layer.norm2.weight, layer.norm2.bias, 1e-5)
        x = out
    return x


def torchs_attention(attention: GroupedAttention, q: Tensor, v: Tensor) -> Tensor:
    """torch's own multi-head attention, queries and keys from q, with these weights."""
    qkv, proj = attention.qkv, attention.proj
    args = (q.shape[1], attention.heads, qkv.weight, qkv.bias, None, None, False, 0.0, proj.weight, proj.bias)
    return F.multi_head_attention_forward(q, q, v, *args, need_weights=False)[0]


def code(place: Tensor, dim: int) -> Tensor:
    """The positional code of (y, x) counted from the window's middle, one channel at a time."""
    half = dim // 2
    values = []
    for t in (float(place[1]), float(place[0])):
        for channel in range(half):
            angle = t / 10000 ** (2 * (channel // 2) / half)
            values.append(math.cos(angle) if channel % 2 else math.sin(angle))
    return torch.tensor(values)


def some_pillars() -> Tensor:
    """Pillars of three samples on GRID, dense, sparse and a single one, sorted."""
    full = torch.cartesian_prod(torch.arange(2), torch.arange(16), torch.arange(16))
    keep = torch.rand(len(full)) < torch.where(full[:, 0] == 0, 0.6, 0.1)
    return torch.cat([full[keep], torch.tensor([[2, 15, 15]])])


def test_window_transformer_equals_one_window_at_a_time() -> None:
    encoder, pillars = WindowTransformer(SETTINGS), some_pillars()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(len(pillars), 16, requires_grad=True)
    got, expected = encoder(x, encoder.partition(pillars, GRID.shape)), slow_windows(encoder, x, pillars)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(got)
    ours = torch.autograd.grad((got * weights).sum(), [x, *encoder.parameters()])
    theirs = torch.autograd.grad((expected * weights).sum(), [x, *encoder.parameters()])
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max() + 1e-6


def test_full_windows_of_the_released_size() -> None:
    """144 tokens in a full window: none is dropped."""
    encoder = WindowTransformer(WindowSettings(dim=16, depth=1, heads=4))
    pillars = torch.cartesian_prod(torch.arange(1), torch.arange(24), torch.arange(24))
    structure = encoder.partition(pillars, (24, 24))
    assert structure.groups[0].sizes.tolist() == [[4, 144]]
    assert sum(n * size for n, size in structure.groups[1].sizes.tolist()) == 576
    x = torch.randn(576, 16)
    torch.testing.assert_close(encoder(x, structure), slow_windows(encoder, x, pillars), rtol=1e-4, atol=1e-5)


def test_samples_do_not_see_each_other_and_order_does_not_matter() -> None:
    encoder, pillars = WindowTransformer(SETTINGS), some_pillars()
    x = torch.randn(len(pillars), 16)
    whole = encoder(x, encoder.partition(pillars, GRID.shape))
    for sample in range(3):
        mine = pillars[:, 0] == sample
        alone = encoder(x[mine], encoder.partition(pillars[mine], GRID.shape))
        torch.testing.assert_close(whole[mine], alone, rtol=1e-5, atol=1e-5)
    mixed = torch.randperm(len(pillars))
    torch.testing.assert_close(
        encoder(x[mixed], encoder.partition(pillars[mixed], GRID.shape)), whole[mixed], rtol=1e-5, atol=1e-5
    )


def test_shifted_windows_join_what_aligned_ones_part() -> None:
    """Pillars 3 and 4 lie in different windows of side 4, and in one window once they are shifted by 2."""
    encoder = WindowTransformer(WindowSettings(dim=16, depth=1, heads=4, window=4))
    pillars = torch.tensor([[0, 0, 3], [0, 0, 4]])
    aligned, shifted = encoder.partition(pillars, GRID.shape).groups
    assert aligned.sizes.tolist() == [[2, 1]] and shifted.sizes.tolist() == [[1, 2]]


def test_no_pillars() -> None:
    encoder = WindowTransformer(SETTINGS)
    none = torch.zeros(0, 3, dtype=torch.int64)
    assert encoder(torch.zeros(0, 16), encoder.partition(none, GRID.shape)).shape == (0, 16)


def test_positions() -> None:
    table = window_positions(4, 16).view(4, 4, 16)
    assert torch.equal(table[2, 2], torch.tensor([0.0, 1.0] * 8))  # the middle: sin 0, cos 0
    torch.testing.assert_close(table[1, 3], code(torch.tensor([-1.0, 1.0]), 16))


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"dim 18 must be divisible by 4"):
        WindowSettings(dim=18, heads=2)
    with pytest.raises(ValueError, match=r"divisible by 4 .* and by 3 heads"):
        WindowSettings(dim=16, heads=3)
    with pytest.raises(ValueError, match="window 5 must be even"):
        WindowSettings(window=5)


# --- features ---


def test_features_are_padded_and_read_out_per_point() -> None:
    batch = clouds(30, 20, 80)
    voxels = voxelise(batch.points, batch.offsets, GRID)
    x = torch.randn(len(voxels.pillars), 8)
    features = pad(x, voxels)
    assert torch.equal(features.packed, x)
    assert features.tokens.shape == (3, *features.grid, 8) and not features.tokens[~features.valid].any()
    lengths = voxels.offsets.diff().tolist()
    expected = torch.stack([part.mean(0) for part in x.split(lengths)])
    torch.testing.assert_close(features.pooled, expected)
    rows, values = features.per_point()
    for j in range(0, len(rows), 7):
        place = ((batch.points[rows[j], :2] - torch.tensor([-4.0, -4.0])) / 0.5).floor().long().flip(0)
        wanted = torch.tensor([int(batch.sample_of[rows[j]]), *place.tolist()])
        assert torch.equal(values[j], x[(voxels.pillars == wanted).all(1)][0])
