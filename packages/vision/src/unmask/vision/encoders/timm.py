"""Backbones from timm behind the interface of our encoders: embed, take or replace tokens, blocks, norm."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from unmask.core.mask import Indices
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
        kind: the name of this family, where a recipe may choose between several.
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
        tokens = self.patch_embed(images)  # [batch, rows, columns, token_dim]
        return self._encode(torch.where(hidden.view(tokens.shape[:3])[..., None], mask_token, tokens))

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Features:
        """Features of whole images, unmasked: the last map, one token per `stride` x `stride` pixels."""
        return self._encode(self.patch_embed(images))  # from [batch, rows, columns, token_dim]

    def layers_by_depth(self) -> list[list[nn.Module | nn.Parameter]]:
        """Patches, then every block of every stage; a stage's downsampling belongs to the block before it."""
        layers: list[list[nn.Module | nn.Parameter]] = [[self.patch_embed]]
        for stage in self.layers.children():
            layers[-1].append(stage.downsample)  # type: ignore[arg-type]  # timm's, an Identity in the first stage
            layers += [[block] for block in stage.blocks]  # type: ignore[union-attr]
        return layers

    def _encode(self, tokens: Float[Tensor, "batch rows columns token_dim"]) -> Features:
        x = self.norm(self.layers(tokens))  # [batch, rows / 2**(stages - 1), columns / 2**(stages - 1), dim]
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


@dataclass(frozen=True)
class TimmViTSettings:
    """A Vision Transformer of timm by its name, at initial weights.

    Args:
        architecture: a name of ``timm.list_models("vit_*")`` or another whose class is ``VisionTransformer``, for
            example ``vit_small_patch16_224``. The image size is the data's.
        drop_path: probability of dropping a branch in training; grows linearly to this over the depth.
        kind: names this family where a recipe may choose between several.
    """

    architecture: str
    drop_path: float = 0.0
    kind: Literal["timm"] = "timm"

    def arguments(self, image_size: tuple[int, int], channels: int) -> dict[str, Any]:
        """What timm makes the network from, besides its name: its last norm comes before pooling, and no head."""
        size = {"img_size": list(image_size), "in_chans": channels}
        return {**size, "num_classes": 0, "global_pool": "avg", "fc_norm": False}


class TimmViT(nn.Module):
    """timm's ``VisionTransformer`` as an encoder that takes visible tokens. Parameters keep timm's names; no head.

    Class and register tokens, kinds of positions, layer scale and norms are what the model has. Dropout of patches and
    positions, which timm has beside them, is left out. Takes images of the size that the model was made for.

    Args:
        model: a ``timm.models.vision_transformer.VisionTransformer``, for example from ``timm.create_model``.

    Raises:
        ValueError: another class (the message names it), or patches that overlap or come out of convolutions.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        _require_vit(model)
        self.patch_embed: Any = model.patch_embed
        self.cls_token: nn.Parameter | None = model.cls_token
        self.reg_token: nn.Parameter | None = model.reg_token
        self.pos_embed: nn.Parameter | None = model.pos_embed
        self.norm_pre: nn.Module = model.norm_pre
        self.blocks: nn.Module = model.blocks
        self.norm: nn.Module = model.norm
        self.image_size: tuple[int, int] = model.patch_embed.img_size
        self.channels: int = model.in_chans
        self.patch_size: int = model.patch_embed.patch_size[0]
        self.dim: int = model.embed_dim
        self.prefix_tokens: int = model.num_prefix_tokens
        self._with_positions = 0 if model.no_embed_class else model.num_prefix_tokens  # of the prefix tokens
        self.grid = patch_grid(self.image_size, self.patch_size)

    def embed(
        self, images: Float[Tensor, "batch channels height width"], keep: Indices | None = None
    ) -> Float[Tensor, "batch all_tokens dim"]:
        """Class and register tokens, then patch tokens (all of them, or those in `keep`), positions added."""
        patches = self.patch_embed(images).flatten(1, -2)  # [batch, tokens, dim]
        prefix = [t for t in (self.cls_token, self.reg_token) if t is not None]
        first = torch.cat([patches.new_zeros(1, 0, self.dim), *prefix], dim=1)  # [1, prefix, dim]
        if self.pos_embed is not None:
            first = first + self.pos_embed[:, : self._with_positions] if self._with_positions else first
            patches = patches + self.pos_embed[:, self._with_positions :]
        patches = patches if keep is None else keep.take(patches)
        return torch.cat([first.expand(len(images), -1, -1), patches], dim=1)

    def forward_visible(
        self, images: Float[Tensor, "batch channels height width"], keep: Indices
    ) -> Float[Tensor, "batch all_tokens dim"]:
        """Encode only the tokens in `keep`: class and register tokens first, then `keep`'s order."""
        x = self.norm_pre(self.embed(images, keep))
        if keep.valid is None:
            return self.norm(self.blocks(x))
        attend = F.pad(keep.valid, (self.prefix_tokens, 0), value=True)[:, None, None]  # [batch, 1, 1, all_tokens]
        for block in self.blocks.children():
            x = block(x, attn_mask=attend)
        return self.norm(x)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Features:
        """Features of whole images, unmasked, in spatial order."""
        x = self.norm(self.blocks(self.norm_pre(self.embed(images))))
        return Features(x[:, self.prefix_tokens :], self.grid, x[:, 0] if self.cls_token is not None else None)


def timm_vit(settings: TimmViTSettings, image_size: tuple[int, int], channels: int = 3) -> TimmViT:
    """A Vision Transformer of timm at its initial weights.

    Raises:
        ValueError: no such model, or one that `TimmViT` does not take.
    """
    from timm import create_model, is_model, list_models

    if not is_model(settings.architecture):
        near = difflib.get_close_matches(settings.architecture, list_models("vit*"), n=3, cutoff=0.5)
        raise ValueError(
            f"encoder.architecture {settings.architecture!r}: timm has no such model; near it: "
            f"{', '.join(near) or 'none'}. timm.list_models('vit*') names those that may be given"
        )
    arguments = settings.arguments(image_size, channels)
    try:
        model = create_model(settings.architecture, drop_path_rate=settings.drop_path, **arguments)
    except (AssertionError, TypeError):  # another class, which takes other arguments
        raise ValueError(f"encoder.architecture {settings.architecture!r} is not supported: {_TAKES}") from None
    return TimmViT(model)


_TAKES = "give a timm VisionTransformer (vit_small_patch16_224, deit3_small_patch16_224 and the like)"


def _require_vit(model: Any) -> None:
    from timm.layers import PatchEmbed
    from timm.models.vision_transformer import VisionTransformer

    if type(model) is not VisionTransformer:
        raise ValueError(f"{type(model).__name__} is not supported, its parts are ordered differently: {_TAKES}")
    if type(model.patch_embed) is not PatchEmbed:
        raise ValueError(
            f"{type(model.patch_embed).__name__} is not supported: a patch's token would see other patches. Give a "
            "model whose patches are projected one by one (vit_small_patch16_224 and the like)"
        )


def _require_swin(model: Any) -> None:
    from timm.models.swin_transformer import SwinTransformer

    if type(model) is not SwinTransformer:
        raise ValueError(
            f"{type(model).__name__} is not supported: its parts are ordered differently. Give a timm SwinTransformer "
            "(swin_tiny_patch4_window7_224, swin_base_patch4_window7_224 and the like)"
        )
