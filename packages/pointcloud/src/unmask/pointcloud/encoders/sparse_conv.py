"""A small sparse U-Net over pillars, an alternative to GeoMAE's window transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from unmask.pointcloud.encoders.sparse import (
    InverseConv,
    Rulebook,
    StridedConv,
    SubmanifoldConv,
    strided_rules,
    submanifold_rules,
)
from unmask.pointcloud.geometry.pairwise import Backend

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class ConvEncoderSettings:
    """The shape of a `SparseConvEncoder`; the defaults have about as many weights as six SST blocks.

    Args:
        dim: width, the same at every resolution.
        levels: resolutions; each further one has half the pillars a side. A pillar sees about
            ``depth * (6 * 2^(levels-1) - 4)`` pillars to either side, as far as the pillars between are occupied.
        depth: residual blocks at each level on the way down, and again on the way up.
        backend: ``auto``, ``spconv`` or ``torch``, see `unmask.pointcloud.geometry.pairwise.resolve_backend`. Weights
            move between them.
    """

    dim: Count = 128
    levels: Count = 3
    depth: Count = 1
    backend: Backend = "auto"


@dataclass(frozen=True)
class ConvStructure:
    """The rulebooks of every level, the finest first."""

    blocks: tuple[Rulebook, ...]  # of the residual blocks
    downs: tuple[Rulebook, ...]  # from each level to the next coarser one
    ups: tuple[Rulebook, ...]  # from each level to the next finer one


class SparseConvEncoder(nn.Module):
    """Residual blocks of submanifold convolutions at several resolutions, joined as in a U-Net.

    On the way down, `depth` blocks, LayerNorm and a strided convolution at each level; on the way up, LayerNorm, an
    inverse convolution, the sum with the features of the way down, and `depth` blocks; a last LayerNorm. Blocks are
    those of Masked Scene Modeling's hybrid U-Net (arXiv 2504.06719) with LayerNorm for RMSNorm, which took up to
    five times as long on a CPU. Normalisation is per pillar, so nothing passes between samples.

    Args:
        settings: the shape.

    Raises:
        UnmaskError: ``spconv`` is asked for and cannot be imported.
    """

    def __init__(self, settings: ConvEncoderSettings) -> None:
        super().__init__()
        self.settings = settings
        dim, between = settings.dim, settings.levels - 1
        self.before = nn.ModuleList(_stage(settings) for _ in range(settings.levels))
        self.downs = nn.ModuleList(Resample(StridedConv, settings) for _ in range(between))
        self.ups = nn.ModuleList(Resample(InverseConv, settings) for _ in range(between))
        self.after = nn.ModuleList(_stage(settings) for _ in range(between))
        self.norm = nn.LayerNorm(dim)

    @property
    def dim(self) -> int:
        """Width of the features."""
        return self.settings.dim

    def layers_by_depth(self) -> list[list[nn.Module | nn.Parameter]]:
        """Every level on the way down with the step to it, then up; see `unmask.core.evaluation.classifier`."""
        down: list[list[nn.Module | nn.Parameter]] = [[*pair] for pair in zip(self.downs, self.before[1:], strict=True)]
        up: list[list[nn.Module | nn.Parameter]] = [[*pair] for pair in zip(self.ups, self.after, strict=True)]
        return [[self.before[0]], *down, *reversed(up)]

    def partition(self, pillars: Int[Tensor, "pillars 3"], shape: tuple[int, int]) -> ConvStructure:
        """Compute the rulebooks from integer positions. Costs host syncs.

        Args:
            pillars: distinct (sample, y, x), in any order.
            shape: pillars along y, x.

        Raises:
            ValueError: a pillar lies outside `shape` or occurs twice.
        """
        blocks, downs = [submanifold_rules(pillars, shape)], []
        cells, extent = pillars, tuple(shape)
        for _ in self.downs:
            cells, extent, down = strided_rules(cells, extent)
            downs.append(down)
            blocks.append(submanifold_rules(cells, extent))
        return ConvStructure(tuple(blocks), tuple(downs), tuple(down.inverse for down in downs))

    def forward(self, x: Float[Tensor, "pillars dim"], structure: ConvStructure) -> Float[Tensor, "pillars dim"]:
        """Features of the pillars that `structure` was made from, in their order."""
        skips: list[Tensor] = []
        for level, rules in enumerate(structure.blocks):
            if level:
                skips.append(x)
                x = self.downs[level - 1](x, structure.downs[level - 1])  # [cells of the level, dim]
            x = self.before[level](x, rules)
        for level in reversed(range(len(self.ups))):
            x = skips[level] + self.ups[level](x, structure.ups[level])  # [cells of the level, dim]
            x = self.after[level](x, structure.blocks[level])
        return self.norm(x)


class ResidualBlock(nn.Module):
    """x + LayerNorm(conv(gelu(conv(LayerNorm(x))))), both convolutions submanifold and without bias.

    The second LayerNorm's gain starts at 0.1, so that a block starts near the identity.
    """

    def __init__(self, dim: int, axes: int = 2, backend: Backend = "auto") -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.conv1 = SubmanifoldConv(dim, dim, axes, bias=False, backend=backend)
        self.conv2 = SubmanifoldConv(dim, dim, axes, bias=False, backend=backend)
        nn.init.constant_(self.norm2.weight, 0.1)

    def forward(self, x: Float[Tensor, "cells dim"], rules: Rulebook) -> Float[Tensor, "cells dim"]:
        hidden = nn.functional.gelu(self.conv1(self.norm1(x), rules))  # [cells, dim]
        return x + self.norm2(self.conv2(hidden, rules))


class Resample(nn.Module):
    """LayerNorm, then a convolution between two levels, with bias."""

    def __init__(self, kind: type[StridedConv | InverseConv], settings: ConvEncoderSettings) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(settings.dim)
        self.conv = kind(settings.dim, settings.dim, backend=settings.backend)

    def forward(self, x: Float[Tensor, "cells dim"], rules: Rulebook) -> Float[Tensor, "cells_out dim"]:
        return self.conv(self.norm(x), rules)  # [cells_out, dim]


class Blocks(nn.ModuleList):
    """Residual blocks one after another, over the same cells."""

    def forward(self, x: Float[Tensor, "cells dim"], rules: Rulebook) -> Float[Tensor, "cells dim"]:
        for block in self:
            x = block(x, rules)  # [cells, dim]
        return x


def _stage(settings: ConvEncoderSettings) -> Blocks:
    return Blocks(ResidualBlock(settings.dim, backend=settings.backend) for _ in range(settings.depth))
