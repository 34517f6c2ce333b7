"""Backbones from timm behind the interface of our encoders: embed, replace what is hidden, layers, norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from unmask.core.method import Features
from unmask.vision.encoders.vit import patch_grid


@dataclass(frozen=True)
class SwinSettings:
    """The shape of a Swin Transformer (arXiv 2103.14030); the defaults are Swin-B with SimMIM's window.

    Args:
        patch_size: side of a patch, in pixels. Features have a stride of ``patch_size * 2 ** (stages - 1)``.
        dim: width of the first stage; doubles with every stage.
        depths: blocks per stage.
        heads: attention heads per stage.
        window: side of an attention window, in tokens of the stage.
        mlp_ratio: hidden width of the MLP over the width.
        drop_path: probability of dropping a branch in training; grows linearly to this over the depth.
        kind: names this family where a recipe may choose between several.
    """

    patch_size: int = 4
    dim: int = 128
    depths: tuple[int, ...] = (2, 2, 18, 2)
    heads: tuple[int, ...] = (4, 8, 16, 32)
    window: int = 6
    mlp_ratio: float = 4.0
    drop_path: float = 0.0
    kind: Literal["swin"] = "swin"

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.heads):
            raise ValueError(f"depths {self.depths} and heads {self.heads} must have one entry per stage each")


class SwinEncoder(nn.Module):
    """timm's ``SwinTransformer`` as an encoder. Parameters keep timm's names; the classification head is dropped.

    Takes images of the size that the model was made for.

    Args:
        model: a ``timm.models.swin_transformer.SwinTransformer``, for example from ``timm.create_model``.

    Raises:
        ValueError: another class (the message names it), or an image that the stride does not divide.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        _require_swin(model)
        self.patch_embed: nn.Module = model.patch_embed
        self.layers: nn.Module = model.layers
        self.norm: nn.Module = model.norm
        self.image_size: tuple[int, int] = model.patch_embed.img_size
        self.channels: int = model.in_chans
        self.patch_size: int = model.patch_embed.patch_size[0]
        self.stride: int = model.feature_info[-1]["reduction"]
        self.token_dim: int = model.embed_dim
        self.dim: int = model.num_features
        self.grid = patch_grid(self.image_size, self.patch_size)
        patch_grid(self.image_size, self.stride)

    def forward_replaced(
        self,
        images: Float[Tensor, "batch channels height width"],
        hidden: Bool[Tensor, "batch tokens"],
        mask_token: Float[Tensor, "1 1 token_dim"],
    ) -> Features:
        """Encode all tokens, the hidden ones (of the patch grid, row-major) replaced by `mask_token`."""
        tokens = self.patch_embed(images)
        return self._encode(torch.where(hidden.view(tokens.shape[:3])[..., None], mask_token, tokens))

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Features:
        """Features of whole images, unmasked: the last map, one token per `stride` x `stride` pixels."""
        return self._encode(self.patch_embed(images))

    def layers_by_depth(self) -> list[list[nn.Module | nn.Parameter]]:
        """Patches, then every block of every stage; a stage's downsampling belongs to the block before it."""
        layers: list[list[nn.Module | nn.Parameter]] = [[self.patch_embed]]
        for stage in self.layers.children():
            layers[-1].append(stage.downsample)  # type: ignore[arg-type]  # timm's, an Identity in the first stage
            layers += [[block] for block in stage.blocks]  # type: ignore[union-attr]
        return layers

    def _encode(self, tokens: Float[Tensor, "batch rows columns token_dim"]) -> Features:
        x = self.norm(self.layers(tokens))
        return Features(x.flatten(1, 2), tuple(x.shape[1:3]))


def swin(settings: SwinSettings, image_size: tuple[int, int], channels: int = 3) -> SwinEncoder:
    """A Swin Transformer at timm's initial weights: truncated normal, biases 0, the patch convolution PyTorch's."""
    from timm.models.swin_transformer import SwinTransformer  # importing timm takes seconds

    s = settings
    model = SwinTransformer(
        img_size=image_size, in_chans=channels, num_classes=0, patch_size=s.patch_size, embed_dim=s.dim,
        depths=s.depths, num_heads=s.heads, window_size=s.window, mlp_ratio=s.mlp_ratio, drop_path_rate=s.drop_path,
    )  # fmt: skip
    return SwinEncoder(model)


def _require_swin(model: Any) -> None:
    from timm.models.swin_transformer import SwinTransformer

    if type(model) is not SwinTransformer:
        raise ValueError(
            f"{type(model).__name__} is not supported: its parts are ordered differently. Give a timm SwinTransformer "
            "(swin_tiny_patch4_window7_224, swin_base_patch4_window7_224 and the like)"
        )
