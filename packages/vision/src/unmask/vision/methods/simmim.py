"""SimMIM: A Simple Framework for Masked Image Modeling (Xie et al., CVPR 2022, arXiv 2111.09886).

Squares of 32 x 32 pixels are hidden by replacing their tokens with one learned token. The encoder, a ViT or a Swin
Transformer, sees the whole grid, and a single linear layer regresses the hidden pixels with an L1 loss.

Where the released code differs from the paper or leaves a choice, this file does the following:

* The number of hidden squares is rounded up, as released: the paper's 60 % cannot be met exactly (30 of 49, 22 of 36).
* The paper does not describe its ViT beyond the size; the released one is BEiT's, and so is `BEiTSettings`: one
  relative-position bias for all blocks and no absolute positions, LayerScale from 0.1, drop path 0.1, `attn.proj` and
  `mlp.fc2` of block k (from 1) divided by sqrt(2k) at the start, a mask token truncated at one standard deviation. The
  final LayerNorm stays, as in the released pre-training configurations.
* BEiT's keys have no bias. Ours have one: it adds the same number to all logits of a query, which softmax cancels, so
  function and gradients are the same. It starts at 0.
* transformers' ``ViTForMaskedImageModeling`` is another backbone under the same loss: learned positions, no relative
  bias, no LayerScale. With ``positions: learned, relative_bias: false, layer_scale: null, drop_path: 0.0`` our encoder
  has its shape (its LayerNorm eps is 1e-12, ours 1e-6).
* Weight decay falls on all but vectors, biases, ViT's class token and absolute positions, and Swin's mask token: what
  the released code does. Its list also names the relative-position tables, but never matches them: they decay.
* The loss divides by the number of hidden values. The released 1e-5 in the divisor guards against an empty mask, which
  is refused here.
* With accumulation the released code clips gradients and advances the schedule at every micro-batch; here both happen
  once per optimizer step, as published for one large batch.
* Do not expect good linear probes of the last layer: the paper finds the best features in the middle of the network.
* Optimizer, schedule and augmentation are the recipe's: ``paper`` (ViT-B) and ``paper_swin`` (Swin-B) hold the
  published values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from unmask.core.losses import mean_term, regression
from unmask.core.losses.regression import RegressionKind
from unmask.core.masking import Masking, RandomMasking
from unmask.core.method import Clock, Features, Output, Plan
from unmask.core.nn.init import truncated_normal_init
from unmask.core.randomness import Key
from unmask.core.targets import patchify, unpatchify
from unmask.vision.data.images import ImageBatch
from unmask.vision.data.images import Settings as DataSettings
from unmask.vision.encoders.timm import SwinEncoder, SwinSettings, swin
from unmask.vision.encoders.vit import Positions, VisionTransformer, ViTSettings

CARD = {
    "title": "SimMIM: A Simple Framework for Masked Image Modeling",
    "paper": "Xie et al., CVPR 2022, arXiv 2111.09886",
    "summary": "60 % in 32-pixel units, ViT or Swin; raw pixels, linear head, L1",
    "kind": "pretrain",
    "evidence": "full",
    "reference": "microsoft/SimMIM",
    "reference_licence": "MIT",
}


@dataclass(frozen=True)
class BEiTSettings(ViTSettings):
    """The Vision Transformer that SimMIM's authors released, which is BEiT's; the size defaults to ViT-B/16."""

    positions: Positions = "none"
    relative_bias: bool = True
    layer_scale: float | None = 0.1
    drop_path: float = 0.1


@dataclass(frozen=True)
class Settings:
    """What a recipe may set under ``model``.

    Args:
        encoder: ``kind: vit`` or ``kind: swin``, and its shape.
        mask_unit: side of the squares that are hidden, in pixels: a multiple of the patch that divides the image.
        mask_ratio: share of squares hidden, in (0, 1); their number is rounded up.
        loss: the error of a pixel. The paper's is ``l1``; it reports the others to be within 0.1 point.
    """

    encoder: Annotated[BEiTSettings | SwinSettings, Field(discriminator="kind")] = field(default_factory=BEiTSettings)
    mask_unit: int = 32
    mask_ratio: float = 0.6
    loss: RegressionKind = "l1"


def build(settings: Settings, data: DataSettings) -> SimMIM:
    """The model that a recipe describes."""
    unit = _unit_in_tokens(settings.mask_unit, settings.encoder.patch_size, data.image_size)
    encoder: VisionTransformer | SwinEncoder
    if isinstance(settings.encoder, SwinSettings):
        encoder = swin(settings.encoder, data.image_size, data.channels)
    else:
        encoder = VisionTransformer(settings.encoder, data.image_size, data.channels)
    return SimMIM(encoder, masking=RandomMasking(settings.mask_ratio, "ceil_hide", unit), loss=settings.loss)


def _unit_in_tokens(mask_unit: int, patch_size: int, image_size: tuple[int, int]) -> int:
    if mask_unit < 1 or mask_unit % patch_size or any(side % mask_unit for side in image_size):
        units = range(patch_size, min(image_size), patch_size)
        fit = [unit for unit in units if all(side % unit == 0 for side in image_size)]
        raise ValueError(
            f"mask_unit {mask_unit} must be a multiple of the patch ({patch_size} pixels) and divide the image "
            f"({image_size[0]} x {image_size[1]}); units that do: {', '.join(map(str, fit)) or 'none'}"
        )
    return mask_unit // patch_size


class SimMIM(nn.Module):
    """Masked pixel regression with one linear layer on an encoder that keeps all its tokens.

    Args:
        encoder: the network to pre-train.
        masking: which patches of the encoder's grid are hidden. The paper's is 60 % of squares of 32 pixels, which is
            the default where the patch allows it.
        loss: the error of a pixel.
    """

    def __init__(
        self, encoder: VisionTransformer | SwinEncoder, *, masking: Masking | None = None, loss: RegressionKind = "l1"
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.patch_size = encoder.patch_size
        self.masking = masking or RandomMasking(0.6, "ceil_hide", max(1, 32 // encoder.patch_size))
        self.loss = loss
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.token_dim))
        self.head = nn.Linear(encoder.dim, encoder.stride**2 * encoder.channels)
        self._init_weights()

    def _init_weights(self) -> None:
        """The head keeps PyTorch's initial values, Swin has its own; see the file's docstring for ViT."""
        if isinstance(self.encoder, SwinEncoder):
            nn.init.normal_(self.mask_token, std=0.02)
            return
        self.encoder.apply(truncated_normal_init)
        for k, block in enumerate(self.encoder.blocks, start=1):
            for name in ("attn.proj.weight", "mlp.fc2.weight"):
                block.get_parameter(name).data /= (2 * k) ** 0.5
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def no_weight_decay(self) -> set[str]:
        """Parameters that do not decay, besides vectors and biases."""
        if isinstance(self.encoder, SwinEncoder):
            return {"mask_token"}
        return {"encoder.cls_token", "encoder.pos_embed"}

    def draw(self, batch: ImageBatch, clock: Clock, key: Key) -> Plan:
        """Choose what is hidden (section 3.2)."""
        return Plan(self.masking(key.stream("mask"), self.encoder.grid))

    def predict(self, batch: ImageBatch, plan: Plan) -> Float[Tensor, "batch hidden values"]:
        """Encode with hidden tokens replaced and predict the hidden patches, in the order of `hidden_indices`.

        The values of a patch are in the order (channel, row, column), as a pixel shuffle reads them.
        """
        hidden = plan.mask.hidden_indices
        features = self.encoder.forward_replaced(batch.images, plan.mask.hidden, self.mask_token)
        if self.encoder.stride == self.patch_size:
            return self.head(hidden.take(features.tokens))  # [batch, hidden, values]
        # A feature of Swin covers several patches: predict the whole image and take the hidden patches out of it.
        rows, columns = features.grid
        values = self.head(features.tokens)  # [batch, rows * columns, stride**2 * channels]
        image = unpatchify(values, self.encoder.stride, (rows, columns), "channels_first")
        return hidden.take(self._patches(image))  # [batch, hidden, patch_size**2 * channels]

    @torch.no_grad()
    def target(self, batch: ImageBatch, plan: Plan) -> Float[Tensor, "batch hidden values"]:
        """The hidden patches' pixels, in the order of `predict`."""
        return plan.mask.hidden_indices.take(self._patches(batch.images))  # [batch, hidden, values]

    def forward(self, batch: ImageBatch, plan: Plan) -> Output:
        """Mean absolute error over the hidden pixels of the batch (section 3.4)."""
        values = regression(self.loss, self.predict(batch, plan), self.target(batch, plan))  # [batch, hidden]
        return Output({"reconstruction": mean_term(values, plan.mask.hidden_indices.valid)})

    def _patches(self, images: Tensor) -> Tensor:
        return patchify(images, self.patch_size, "channels_first")

    def encode(self, batch: ImageBatch) -> Features:
        """Features of whole images: nothing is masked, whatever the mode."""
        return self.encoder(batch.images)

    @torch.no_grad()
    def picture(self, batch: ImageBatch, plan: Plan) -> dict[str, Float[Tensor, "batch channels height width"]]:
        """The images, the masked images, and the reconstruction with visible patches as they were."""
        patches = self._patches(batch.images)
        prediction = self.predict(batch, plan).float()

        def image(x: Tensor) -> Tensor:
            return unpatchify(x, self.patch_size, self.encoder.grid, "channels_first")

        return {
            "input": batch.images,
            "masked": image(patches.masked_fill(plan.mask.hidden[..., None], 0.0)),
            "reconstruction": image(plan.mask.hidden_indices.put(patches, prediction)),
        }
