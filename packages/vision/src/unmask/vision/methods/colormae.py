"""ColorMAE: Exploring data-independent masking strategies in Masked AutoEncoders (Hinojosa, Liu, Ghanem; ECCV 2024).

MAE with one change: which patches stay visible follows from coloured noise instead of white noise. Network, target,
loss and cost are MAE's (`unmask.vision.methods.mae`). Green noise, whose visible and hidden regions are blobs of two to
three patches, is the paper's best: clearly better segmentation, slightly better classification.

What the paper, its poster and the released code leave open is decided as follows:

* How the noise is made: the authors' poster and page give one-pass formulas, but no widths, and the code has no
  generator (the supplement was not read). Widths and passes are ours, chosen so that spectra match the poster's, and
  both are settings; see `unmask.core.masking.noise`.
* Which noise a sample gets: the released code reads slice i of its bank for image i of every batch, with one offset and
  one pair of flips per step. Here every sample draws its own of all three.
* One colour serves the whole run, as in every result we found. The released code can also change colour by epoch.
* Weight decay skips vectors, biases, positions, class and mask token, as in the code ColorMAE is built on (MAE's own
  released code, and our MAE, decay the tokens).
* Encoding never masks. In the released code `forward(x, mask=False)` still does, by an oversight.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from unmask.core.masking import NoiseMasking
from unmask.vision.data.images import Settings as DataSettings
from unmask.vision.encoders.vit import VisionTransformer, ViTSettings
from unmask.vision.methods.mae import MAE, DecoderSettings

CARD = {
    "title": "ColorMAE: Exploring data-independent masking strategies in Masked AutoEncoders",
    "paper": "Hinojosa et al., ECCV 2024, arXiv 2407.13036",
    "summary": "MAE with red, green, blue or purple noise as scores",
    "kind": "pretrain",
    "evidence": "part",
    "reference": "carlosh93/ColorMAE",
    "reference_licence": "Apache-2.0",
}


@dataclass(frozen=True)
class Settings:
    """What a recipe may set under ``model``.

    Args:
        encoder: the Vision Transformer.
        decoder: the decoder.
        color: the noise that decides which patches stay visible.
        mask_ratio: share of patches hidden, in (0, 1).
        norm_pix: normalise every target patch by its own mean and standard deviation.
        sigma: widths of the noise filter, in patches; null is our default for the colour.
        n_pass: rounds of filtering; null is our default for the colour, 1 the published formula unchanged.
    """

    encoder: ViTSettings = field(default_factory=ViTSettings)
    decoder: DecoderSettings = field(default_factory=DecoderSettings)
    color: Literal["red", "green", "blue", "purple"] = "green"
    mask_ratio: float = 0.75
    norm_pix: bool = True
    sigma: tuple[float, ...] | None = None
    n_pass: int | None = None


def build(settings: Settings, data: DataSettings) -> ColorMAE:
    """The model that a recipe describes."""
    encoder = VisionTransformer(settings.encoder, data.image_size, data.channels)
    masking = NoiseMasking(settings.color, settings.mask_ratio, settings.sigma, settings.n_pass)
    return ColorMAE(encoder, settings.decoder, masking=masking, norm_pix=settings.norm_pix)


class ColorMAE(MAE):
    """A masked autoencoder that keeps the patches where coloured noise is highest; see `MAE` for the arguments."""

    def no_weight_decay(self) -> set[str]:
        """Position embeddings, class token and mask token; vectors and biases do not decay anyway."""
        tokens = {"encoder.cls_token", "encoder.pos_embed", "mask_token", "decoder_pos_embed"}
        return {name for name, _ in self.named_parameters() if name in tokens}
