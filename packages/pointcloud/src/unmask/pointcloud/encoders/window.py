"""Pillars as tokens, and the sparse window transformer over them (SST, arXiv 2112.06375), as GeoMAE uses both.

Every backbone has the same interface: ``structure = backbone.partition(pillars, shape)`` computes which pillars
interact, from integer positions, and ``backbone(x, structure)`` maps one row per pillar to one row per pillar. A method
puts structures in its plan, so that its forward pass is arithmetic only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from unmask.core.errors import UnmaskError
from unmask.core.method import Features
from unmask.core.nn.packed import Groups
from unmask.core.nn.ragged import segment_max, segment_mean
from unmask.core.nn.transformer import GroupedBlock
from unmask.pointcloud.data.batches import PointBatch
from unmask.pointcloud.geometry.voxels import VoxelGrid, Voxels, voxelise

Count = Annotated[int, Field(ge=1)]


class PillarEncoder(nn.Module):
    """One vector per pillar from its points: two rounds of a shared layer and a maximum (DynamicScatterVFE).

    A point enters as its own values, its distance from the mean of its pillar's points and its distance from the
    pillar's centre, so ``channels + 6`` values. Each round is a linear map without bias, BatchNorm (eps 1e-3, momentum
    0.01) and ReLU over all points of the batch; the maximum over a pillar goes back to its points before round two.

    In training the statistics are those of all points it is given. It computes in float32 under autocast too: a
    coordinate of 50 m has steps of 0.25 m in bfloat16.

    Args:
        channels: values per point, x, y, z first.
        dim: width of the result; the first round has half of it.
        grid: where the pillars are.
    """

    def __init__(self, channels: int, dim: int, grid: VoxelGrid) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"dim {dim} must be even: the pillar encoder's first layer has half of it")
        self.grid = grid
        self.layers = nn.ModuleList([PointLayer(channels + 6, dim // 2), PointLayer(dim, dim)])

    def forward(self, points: Float[Tensor, "total channels"], voxels: Voxels) -> Float[Tensor, "pillars dim"]:
        with torch.autocast(points.device.type, enabled=False):
            first, second = self.layers
            dtype = next(first.parameters()).dtype
            points = points[voxels.order].to(torch.promote_types(dtype, torch.float32))  # [kept, channels]
            xyz, pillar = points[:, :3], voxels.pillar_of
            mean = segment_mean(xyz, voxels.pillar_starts)  # [pillars, 3]
            x = torch.cat([points, xyz - mean[pillar], xyz - self._centres(voxels, xyz)[pillar]], dim=1)
            x = first(x.to(dtype))  # [kept, dim / 2]
            x = second(torch.cat([x, segment_max(x, voxels.pillar_starts)[pillar]], dim=1))  # [kept, dim]
            return segment_max(x, voxels.pillar_starts)  # [pillars, dim]

    def _centres(self, voxels: Voxels, like: Tensor) -> Float[Tensor, "pillars 3"]:
        """The middle of each pillar: x, y, z in metres."""
        _, row, column = voxels.pillars.unbind(1)
        index = torch.stack([column, row, torch.zeros_like(row)], dim=1)
        size, lower = (like.new_tensor(v) for v in (self.grid.pillar, self.grid.lower))
        return (index + 0.5) * size + lower


class PointLayer(nn.Module):
    """Linear without bias, BatchNorm and ReLU on every point."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width_in, width_out, bias=False)
        self.norm = nn.BatchNorm1d(width_out, eps=1e-3, momentum=0.01)

    def forward(self, x: Float[Tensor, "points width_in"]) -> Float[Tensor, "points width_out"]:
        x, norm = self.linear(x), self.norm  # [points, width_out]
        if self.training and len(x) == 1:  # a lone point has no variance: as in eval mode
            return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps).relu()
        return norm(x).relu()


@dataclass(frozen=True)
class WindowSettings:
    """The sparse window transformer; the defaults are GeoMAE's encoder.

    Args:
        dim: width; divisible by 4 and by `heads`.
        depth: blocks, each of two layers: windows aligned to the grid, then windows shifted by half their side.
        heads: attention heads.
        mlp_ratio: width of the MLP's hidden layer over `dim`.
        window: side of a window in pillars; even.
    """

    dim: Count = 128
    depth: Count = 6
    heads: Count = 8
    mlp_ratio: Annotated[float, Field(gt=0)] = 2.0
    window: Count = 12

    def __post_init__(self) -> None:
        if self.dim % 4 or self.dim % self.heads:
            raise ValueError(f"dim {self.dim} must be divisible by 4 (positions) and by {self.heads} heads")
        if self.window % 2:
            raise ValueError(f"window {self.window} must be even: every second layer shifts by half of it")


@dataclass(frozen=True)
class Windows:
    """The windows of aligned and of shifted layers.

    Args:
        groups: the pillars grouped by window.
        slot: index of each pillar inside its window, ``y * window + x``, in the order of its groups.
    """

    groups: tuple[Groups, Groups]
    slot: tuple[Int[Tensor, "pillars"], Int[Tensor, "pillars"]]


class WindowTransformer(nn.Module):
    """Post-norm transformer layers with full attention among the pillars of one window (SST, section 3).

    A window holds as many tokens as it has pillars: none is dropped, and none is added as padding. A fixed sine-cosine
    embedding of the position in the window is added to queries and keys only.

    Args:
        settings: its shape.
        depth: number of blocks; None takes the settings'.
    """

    table: Tensor

    def __init__(self, settings: WindowSettings, depth: int | None = None) -> None:
        super().__init__()
        self.dim, self.window = settings.dim, settings.window
        layers = 2 * (settings.depth if depth is None else depth)
        self.layers = nn.ModuleList(
            GroupedBlock(settings.dim, settings.heads, settings.mlp_ratio, norm="post", eps=1e-5) for _ in range(layers)
        )
        self.register_buffer("table", window_positions(settings.window, settings.dim), persistent=False)
        init_weights(self)

    def layers_by_depth(self) -> list[list[nn.Module | nn.Parameter]]:
        """Every layer, two to a block; see `unmask.core.evaluation.classifier.layers_of`."""
        return [[layer] for layer in self.layers]

    def partition(self, pillars: Int[Tensor, "n 3"], shape: tuple[int, int]) -> Windows:
        """Windows of these pillars, given as (sample, y, x) on a grid of `shape` (rows, columns)."""
        aligned, shifted = (self._windows(pillars, shape, shift) for shift in (0, self.window // 2))
        return Windows((aligned[0], shifted[0]), (aligned[1], shifted[1]))

    def _windows(self, pillars: Tensor, shape: tuple[int, int], shift: int) -> tuple[Groups, Tensor]:
        sample, y, x = pillars.unbind(1)
        # Shifted windows begin before the grid does: pillar 0 lies in the middle of the first one.
        y, x = (v + (self.window - shift if shift else 0) for v in (y, x))
        rows, columns = (n // self.window + 2 for n in shape)
        number = (sample * rows + y // self.window) * columns + x // self.window
        groups = Groups.of(number)
        return groups, (y % self.window * self.window + x % self.window)[groups.order]

    def forward(self, x: Float[Tensor, "n dim"], structure: Windows) -> Float[Tensor, "n dim"]:
        if len(x) == 0:
            return x
        positions = [self.table[slot][None] for slot in structure.slot]  # [1, n, dim] each
        back: Tensor | None = None  # from the current order of x to that of the input
        for i, layer in enumerate(self.layers):
            groups = structure.groups[i % 2]
            x = x[groups.order if back is None else back[groups.order]]
            x = layer(x[None], groups.sizes, positions[i % 2])[0]  # [n, dim]
            back = groups.inverse
        return x if back is None else x[back]


def window_positions(window: int, dim: int) -> Float[Tensor, "slots dim"]:
    """The embedding of every position (y, x) of a window, row-major: x in the first half of the channels, then y.

    Channel 2i of a half is ``sin(t / 10000 ** (2i / half))`` and channel 2i + 1 the cosine, with t the distance from
    the window's middle, in pillars.
    """
    half = dim // 2
    frequency = 10000.0 ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)
    angle = (torch.arange(window, dtype=torch.float64) - window / 2)[:, None] * frequency
    waves = torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)
    of_y, of_x = waves[:, None].expand(-1, window, -1), waves[None].expand(window, -1, -1)
    return torch.cat([of_x, of_y], dim=2).flatten(0, 1).float()


def init_weights(module: nn.Module) -> None:
    """The released initialisation: every matrix Xavier-uniform, attention biases 0, the rest PyTorch's default.

    The pillar encoder is no part of the released backbone and keeps PyTorch's initial values.
    """
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
        elif name.endswith(("attn.qkv.bias", "attn.proj.bias")):
            nn.init.zeros_(parameter)


@dataclass(frozen=True)
class PillarFeatures(Features):
    """One vector per non-empty pillar, in the order of `voxels.pillars`, padded to the fullest sample of the batch.

    ``grid`` is (most pillars of a sample,), and ``valid`` is False at padding.

    Args:
        voxels: which point lies in which pillar.
    """

    voxels: Voxels = field(kw_only=True)

    @property
    def packed(self) -> Float[Tensor, "pillars dim"]:
        """The vectors without padding, sample after sample."""
        assert self.valid is not None
        return self.tokens[self.valid]

    def per_point(self) -> tuple[Int[Tensor, "kept"], Float[Tensor, "kept dim"]]:
        """Rows of the batch's points that lie in a pillar, and the vector of that pillar for each."""
        return self.voxels.order, self.packed[self.voxels.pillar_of]


def encode(batch: PointBatch, pillar_encoder: PillarEncoder, backbone: Any) -> PillarFeatures:
    """Features of whole clouds: every pillar that holds points goes through both networks.

    Args:
        batch: the clouds.
        pillar_encoder: maps points to one vector per pillar.
        backbone: maps these to as many features; see the interface above.

    Raises:
        UnmaskError: a cloud of the batch has no point inside the range.
    """
    grid = pillar_encoder.grid
    voxels = voxelise(batch.points, batch.offsets, grid)
    if not bool(voxels.offsets.diff().all()):
        raise UnmaskError(
            f"a cloud of the batch has no point inside data.range, {grid.bounds}: move it there, or leave it out"
        )
    return pad(backbone(pillar_encoder(batch.points, voxels), backbone.partition(voxels.pillars, grid.shape)), voxels)


def pad(x: Float[Tensor, "pillars dim"], voxels: Voxels) -> PillarFeatures:
    """Features of concatenated pillars, padded to one row of tokens per sample."""
    valid = valid_pillars(voxels)
    tokens = x.new_zeros(*valid.shape, x.shape[1])
    tokens[valid] = x
    return PillarFeatures(tokens, (valid.shape[1],), valid=valid, voxels=voxels)


def valid_pillars(voxels: Voxels) -> Tensor:
    """[batch, most pillars], False at padding. Costs a host sync for the width."""
    lengths = voxels.offsets.diff()
    width = int(lengths.max())
    return torch.arange(width, device=lengths.device) < lengths[:, None]
