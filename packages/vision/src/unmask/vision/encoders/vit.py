"""Image encoders: the plain Vision Transformer on core's block. Names of parameters are timm's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from unmask.core.mask import Indices
from unmask.core.method import Features
from unmask.core.nn.positions import RelativePositionBias, sincos_positions
from unmask.core.nn.transformer import Block
from unmask.core.targets import patchify

Positions = Literal["sincos", "learned", "none"]


@dataclass(frozen=True)
class ViTSettings:
    """The shape of a Vision Transformer; the defaults are ViT-B/16.

    Args:
        patch_size: side of a patch, in pixels.
        dim: width.
        depth: number of blocks.
        heads: attention heads per block.
        mlp_ratio: hidden width of the MLP over `dim`.
        class_token: whether a class token is prepended.
        positions: ``sincos`` (fixed), ``learned``, or ``none``.
        relative_bias: one relative-position bias, shared by all blocks (BEiT's).
        layer_scale: initial gain of the residual branches, or null.
        drop_path: probability of dropping a branch in training; grows linearly to this over the depth.
        kind: the name of this family, where a recipe may choose between several.
    """

    patch_size: int = 16
    dim: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    class_token: bool = True
    positions: Positions = "sincos"
    relative_bias: bool = False
    layer_scale: float | None = None
    drop_path: float = 0.0
    kind: Literal["vit"] = "vit"


class PatchEmbed(nn.Module):
    """A convolution whose kernel and stride are the patch, computed as a matrix product on the kept patches."""

    def __init__(self, channels: int, patch_size: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(
        self, images: Float[Tensor, "batch channels height width"], keep: Indices | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """Embed all patches, or only those in `keep`: hidden ones are not even projected."""
        patches = patchify(images, self.patch_size, "channels_first")  # [batch, tokens, channels * patch_size**2]
        if keep is not None:
            patches = keep.take(patches)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class VisionTransformer(nn.Module):
    """ViT (arXiv 2010.11929): patches, positions, pre-norm blocks, a final LayerNorm (eps 1e-6).

    Takes images of any size that the patch divides, unless it has a relative bias: a fixed table is recomputed for the
    new grid, a learned or fine-tuned one is interpolated (bicubic, as MAE's released fine-tuning does with both).
    Hidden tokens never enter: give `keep` to `forward_visible`.

    Args:
        settings: the shape.
        image_size: (height, width) that positions are made for, in pixels.
        channels: channels of the images.

    Raises:
        ValueError: the patch does not divide the image (the message says which sizes do).
    """

    def __init__(self, settings: ViTSettings, image_size: tuple[int, int], channels: int = 3) -> None:
        super().__init__()
        s = self.settings = settings
        self.image_size, self.channels = image_size, channels
        self.patch_size = self.stride = s.patch_size  # pixels of a patch, and between neighbouring features
        self.dim = self.token_dim = s.dim  # width of the features, and of the patch tokens, which mask tokens share
        self.prefix_tokens = int(s.class_token)  # before those of the patches
        self.grid = patch_grid(image_size, s.patch_size)
        self.patch_embed = PatchEmbed(channels, s.patch_size, s.dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, s.dim)) if s.class_token else None
        self.pos_embed = self._position_table() if s.positions != "none" else None
        self.rel_pos_bias = RelativePositionBias(self.grid, s.heads, s.class_token) if s.relative_bias else None
        rates = [s.drop_path * i / max(1, s.depth - 1) for i in range(s.depth)]
        self.blocks = nn.ModuleList(
            Block(s.dim, s.heads, s.mlp_ratio, layer_scale=s.layer_scale, drop_path=rate) for rate in rates
        )
        self.norm = nn.LayerNorm(s.dim, eps=1e-6)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)

    def layers_by_depth(self) -> list[list[nn.Module | nn.Parameter]]:
        """Patches, class token and positions, then every block; see `unmask.core.evaluation.classifier.layers_of`."""
        tokens = [p for p in (self.cls_token, self.pos_embed) if p is not None]
        blocks: list[list[nn.Module | nn.Parameter]] = [[block] for block in self.blocks]
        return [[self.patch_embed, *tokens], *blocks]

    def _position_table(self) -> nn.Parameter:
        if self.settings.positions == "learned":
            tokens = self.prefix_tokens + self.grid[0] * self.grid[1]
            return nn.Parameter(torch.empty(1, tokens, self.dim).normal_(std=0.02))
        table = F.pad(sincos_positions(self.grid, self.dim), (0, 0, self.prefix_tokens, 0))
        return nn.Parameter(table[None], requires_grad=False)

    def positions(self, grid: tuple[int, int]) -> Float[Tensor, "1 tokens dim"] | None:
        """Position embeddings of the patch tokens (the class token's left out) for a grid of any size."""
        if self.pos_embed is None:
            return None
        table = self.pos_embed[:, self.prefix_tokens :]
        if grid == self.grid:
            return table
        if self.settings.positions == "sincos" and not self.pos_embed.requires_grad:
            return sincos_positions(grid, self.dim).to(table)[None]
        image = table.view(1, *self.grid, self.dim).permute(0, 3, 1, 2)
        return F.interpolate(image, grid, mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(1, 2)

    def embed(
        self, images: Float[Tensor, "batch channels height width"], keep: Indices | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """Patch tokens with positions added: all of them, or those in `keep`."""
        return self._add_positions(self.patch_embed(images, keep), images, keep)

    def _add_positions(self, tokens: Tensor, images: Tensor, keep: Indices | None = None) -> Tensor:
        positions = self.positions(patch_grid(images.shape[-2:], self.patch_size))
        if positions is None:
            return tokens
        return tokens + (positions if keep is None else keep.take(positions.expand(len(images), -1, -1)))

    def blocks_and_norm(
        self, tokens: Float[Tensor, "batch tokens dim"], valid: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch out_tokens dim"]:
        """Prepend the class token (if there is one), run the blocks, normalise."""
        x = tokens
        if self.cls_token is not None:
            cls = self.cls_token if self.pos_embed is None else self.cls_token + self.pos_embed[:, :1]
            x = torch.cat([cls.expand(len(x), -1, -1), x], dim=1)
            valid = None if valid is None else F.pad(valid, (1, 0), value=True)
        bias = None if self.rel_pos_bias is None else self._relative_bias(x.shape[1])
        for block in self.blocks:
            x = block(x, bias, valid)  # [batch, out_tokens, dim]
        return self.norm(x)

    def _relative_bias(self, tokens: int) -> Tensor:
        assert self.rel_pos_bias is not None
        if tokens != len(self.rel_pos_bias.index):
            raise ValueError(
                f"relative_bias is made for all tokens of {self.image_size[0]} x {self.image_size[1]} images "
                f"({len(self.rel_pos_bias.index)}); got {tokens}. Resize the images, and drop no tokens"
            )
        return self.rel_pos_bias()

    def forward_visible(
        self, images: Float[Tensor, "batch channels height width"], keep: Indices
    ) -> Float[Tensor, "batch out_tokens dim"]:
        """Encode only the tokens in `keep`: the class token first (if there is one), then `keep`'s order."""
        return self.blocks_and_norm(self.embed(images, keep), keep.valid)

    def forward_replaced(
        self,
        images: Float[Tensor, "batch channels height width"],
        hidden: Bool[Tensor, "batch tokens"],
        mask_token: Float[Tensor, "1 1 dim"],
    ) -> Features:
        """Encode all tokens, the hidden ones replaced by `mask_token` before positions are added."""
        tokens = torch.where(hidden[..., None], mask_token, self.patch_embed(images))  # [batch, tokens, dim]
        return self._features(self.blocks_and_norm(self._add_positions(tokens, images)), images)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Features:
        """Features of whole images, unmasked, in spatial order."""
        return self._features(self.blocks_and_norm(self.embed(images)), images)

    def _features(self, x: Float[Tensor, "batch out_tokens dim"], images: Tensor) -> Features:
        prefix = self.prefix_tokens
        return Features(x[:, prefix:], patch_grid(images.shape[-2:], self.patch_size), x[:, 0] if prefix else None)


def patch_grid(image_size: tuple[int, int] | torch.Size, patch_size: int) -> tuple[int, int]:
    """Patches along (height, width).

    Raises:
        ValueError: the patch does not divide the image; the message says which patch and image sizes do.
    """
    height, width = image_size
    if height % patch_size or width % patch_size:
        fit = [p for p in range(2, min(height, width) + 1) if height % p == 0 and width % p == 0]
        near = [max(1, round(n / patch_size)) * patch_size for n in (height, width)]
        raise ValueError(
            f"a patch of {patch_size} pixels does not divide an image of {height} x {width}; patch sizes that do: "
            f"{', '.join(map(str, fit)) or 'none above 1'}; nearest image size for this patch: {near[0]} x {near[1]}"
        )
    return height // patch_size, width // patch_size
