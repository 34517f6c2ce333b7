"""MAE: Masked Autoencoders Are Scalable Vision Learners (He et al., CVPR 2022, arXiv 2111.06377).

The encoder sees a random quarter of the patches and no mask tokens. A small decoder receives the encoded tokens and a
learned mask token at every hidden position, and regresses the pixels of the hidden patches.

Where the released code differs from the paper or leaves a choice, this file does the following:

* `norm_pix` is on (the paper's best setting and the released encoders' recipe; off by default in the released code).
* Decoder tokens stay in the order visible, hidden, and what follows the attention of the last block runs on hidden
  tokens only (`unmask.core.nn.decoder`). Values equal the released layout's.
* All parameters but vectors and biases decay, `cls_token` and `mask_token` included, as in the released code.
* Optimizer, schedule and augmentation are the recipe's: ``paper`` holds the published values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from jaxtyping import Float
from pydantic import Discriminator, Tag
from torch import Tensor, nn

from unmask.core.losses import l2, mean_term
from unmask.core.masking import Masking, RandomMasking
from unmask.core.method import Clock, Features, Output, Plan
from unmask.core.nn.decoder import MaskedDecoder
from unmask.core.nn.init import xavier_init
from unmask.core.nn.positions import sincos_positions
from unmask.core.nn.transformer import Block
from unmask.core.randomness import Key
from unmask.core.targets import denormalize_patches, normalize_patches, patchify, unpatchify
from unmask.vision.data.images import ImageBatch
from unmask.vision.data.images import Settings as DataSettings
from unmask.vision.encoders.timm import TimmViT, TimmViTSettings, timm_vit
from unmask.vision.encoders.vit import VisionTransformer, ViTSettings

CARD = {
    "title": "Masked Autoencoders Are Scalable Vision Learners",
    "paper": "He et al., CVPR 2022, arXiv 2111.06377",
    "summary": "75 % of patches at random; their pixels",
    "kind": "pretrain",
    "evidence": "full",
    "reference": "facebookresearch/mae",
    "reference_licence": "CC-BY-NC-4.0",
}


@dataclass(frozen=True)
class DecoderSettings:
    """The decoder's shape; the defaults are the paper's, for every encoder size.

    Args:
        dim: width.
        depth: number of blocks.
        heads: attention heads per block; must divide `dim`.
    """

    dim: int = 512
    depth: int = 8
    heads: int = 16


def _kind(encoder: Any) -> str:
    return str(encoder.get("kind", "vit") if isinstance(encoder, Mapping) else encoder.kind)


Encoder = Annotated[Annotated[ViTSettings, Tag("vit")] | Annotated[TimmViTSettings, Tag("timm")], Discriminator(_kind)]


@dataclass(frozen=True)
class Settings:
    """What a recipe may set under ``model``.

    Args:
        encoder: the Vision Transformer: our own by its shape, or with ``kind: timm`` one of timm's by its name.
        decoder: the decoder.
        mask_ratio: share of patches hidden, in (0, 1).
        norm_pix: normalise every target patch by its own mean and standard deviation.
    """

    encoder: Encoder = field(default_factory=ViTSettings)
    decoder: DecoderSettings = field(default_factory=DecoderSettings)
    mask_ratio: float = 0.75
    norm_pix: bool = True


def build(settings: Settings, data: DataSettings) -> MAE:
    """The model that a recipe describes."""
    encoder: VisionTransformer | TimmViT
    if isinstance(settings.encoder, TimmViTSettings):
        encoder = timm_vit(settings.encoder, data.image_size, data.channels)
    else:
        encoder = VisionTransformer(settings.encoder, data.image_size, data.channels)
    return MAE(encoder, settings.decoder, masking=RandomMasking(settings.mask_ratio), norm_pix=settings.norm_pix)


class MAE(nn.Module):
    """A masked autoencoder around a Vision Transformer.

    Args:
        encoder: the network to pre-train; its weights are initialised again.
        decoder: the decoder's shape.
        masking: which patches are hidden. The paper's is uniform at 75 %; any masking may be given, ragged ones too.
        norm_pix: normalise every target patch by its own mean and standard deviation.
    """

    def __init__(
        self,
        encoder: VisionTransformer | TimmViT,
        decoder: DecoderSettings | None = None,
        *,
        masking: Masking | None = None,
        norm_pix: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(encoder, VisionTransformer) and encoder.settings.relative_bias:
            raise ValueError("encoder.relative_bias needs the whole token grid, and MAE drops tokens; set it to false")
        decoder = decoder or DecoderSettings()
        self.encoder = encoder
        self.masking = masking or RandomMasking(0.75)
        self.norm_pix = norm_pix
        self.patch_size = encoder.patch_size
        table = nn.functional.pad(sincos_positions(encoder.grid, decoder.dim), (0, 0, encoder.prefix_tokens, 0))
        self.decoder_embed = nn.Linear(encoder.dim, decoder.dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder.dim))
        self.decoder_pos_embed = nn.Parameter(table[None], requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(decoder.dim, decoder.heads) for _ in range(decoder.depth))
        self.decoder_norm = nn.LayerNorm(decoder.dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder.dim, self.patch_size**2 * encoder.channels)
        self._init_weights()

    def _init_weights(self) -> None:
        self.apply(xavier_init)
        nn.init.xavier_uniform_(self.encoder.patch_embed.proj.weight.data.flatten(1))
        nn.init.normal_(self.mask_token, std=0.02)

    def draw(self, batch: ImageBatch, clock: Clock, key: Key) -> Plan:
        """Choose what is hidden (section 3, "Masking")."""
        return Plan(self.masking(key.stream("mask"), self.encoder.grid))

    @property
    def decoder(self) -> MaskedDecoder:
        """The decoder, made of this model's modules."""
        return MaskedDecoder(
            self.decoder_embed, self.mask_token, self.decoder_blocks, self.decoder_norm, self.decoder_pred,
            positions=self.decoder_pos_embed,
        )  # fmt: skip

    def predict(self, batch: ImageBatch, plan: Plan) -> Float[Tensor, "batch hidden values"]:
        """Encode the visible patches and predict the hidden ones, in the order of `hidden_indices`."""
        latent = self.encoder.forward_visible(batch.images, plan.mask.visible_indices)  # [batch, 1 + visible, dim]
        return self.decoder(latent, plan.mask)  # [batch, hidden, patch_size**2 * channels]

    @torch.no_grad()
    def target(self, batch: ImageBatch, plan: Plan) -> Float[Tensor, "batch hidden values"]:
        """The hidden patches' pixels, in the order of `hidden_indices` (section 3, "Reconstruction target")."""
        patches = plan.mask.hidden_indices.take(patchify(batch.images, self.patch_size))  # [batch, hidden, values]
        return normalize_patches(patches) if self.norm_pix else patches

    def forward(self, batch: ImageBatch, plan: Plan) -> Output:
        """Mean squared error over the hidden patches of the batch."""
        values = l2(self.predict(batch, plan), self.target(batch, plan))  # [batch, hidden]
        return Output({"reconstruction": mean_term(values, plan.mask.hidden_indices.valid)})

    def encode(self, batch: ImageBatch) -> Features:
        """Features of whole images: nothing is masked, whatever the mode."""
        return self.encoder(batch.images)

    @torch.no_grad()
    def picture(self, batch: ImageBatch, plan: Plan) -> dict[str, Float[Tensor, "batch channels height width"]]:
        """The images, what the encoder saw of them, and the reconstruction with visible patches as they were.

        With `norm_pix` predictions are denormalised with the true patch's mean and deviation.
        """
        hidden = plan.mask.hidden_indices
        patches = patchify(batch.images, self.patch_size)
        prediction = self.predict(batch, plan).float()
        if self.norm_pix:
            prediction = denormalize_patches(prediction, hidden.take(patches))

        def image(x: Tensor) -> Tensor:
            return unpatchify(x, self.patch_size, self.encoder.grid)

        return {
            "input": batch.images,
            "masked": image(patches.masked_fill(plan.mask.hidden[..., None], 0.0)),
            "reconstruction": image(hidden.put(patches, prediction)),
        }
