"""Names of weights: ours (timm's inside the encoder) and those of transformers' ViTMAE and BEiT.

Names on transformers' side are those of a model's ``state_dict()`` in version 5.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from unmask.core.interop.names import Names, Table, prefixed
from unmask.core.interop.weights import State

_BLOCK: Table = {
    "norm1.*": ("layernorm_before.*",),
    "attn.qkv.*": ("attention.q_proj.*", "attention.k_proj.*", "attention.v_proj.*"),
    "attn.proj.*": ("attention.o_proj.*",),
    "norm2.*": ("layernorm_after.*",),
    "mlp.*.*": ("mlp.*.*",),
}
_EMBEDDINGS: Table = {
    "cls_token": ("embeddings.cls_token",),
    "pos_embed": ("embeddings.position_embeddings",),
    "patch_embed.proj.*": ("embeddings.patch_embeddings.projection.*",),
}
# A `MAE` and a transformers ViTMAEForPreTraining, decoder included.
VITMAE = Names(
    {
        **prefixed("encoder.", "vit.", _EMBEDDINGS),
        **prefixed("encoder.blocks.*.", "vit.layers.*.", _BLOCK),
        "encoder.norm.*": ("vit.layernorm.*",),
        "mask_token": ("decoder.mask_token",),
        "decoder_pos_embed": ("decoder.decoder_pos_embed",),
        "decoder_embed.*": ("decoder.decoder_embed.*",),
        **prefixed("decoder_blocks.*.", "decoder.decoder_layers.*.", _BLOCK),
        "decoder_norm.*": ("decoder.decoder_norm.*",),
        "decoder_pred.*": ("decoder.decoder_pred.*",),
    },
    "transformers' ViTMAEForPreTraining",
)
# Core's `Classifier` on a ViT, by its parts, and a transformers BeitForImageClassification.
_BEIT = Names(
    {
        **prefixed("encoder.", "beit.", _EMBEDDINGS),
        "encoder.rel_pos_bias.table": ("beit.shared_position_bias.relative_position_bias_table",),
        **prefixed(
            "encoder.blocks.*.", "beit.layers.*.", _BLOCK | {"ls1.gamma": ("lambda_1",), "ls2.gamma": ("lambda_2",)}
        ),
        "norm.*": ("beit.pooler.layernorm.*",),
        "head.*": ("classifier.*",),
    },
    "transformers' BeitForImageClassification",
)


def classifier_to_beit(state: Mapping[str, Tensor]) -> State:
    """The state dict of a transformers ``BeitForImageClassification`` from that of core's `Classifier` on a ViT.

    BEiT's keys have no bias. Ours adds the same number to all logits of a query, which softmax cancels: it is left out.
    """
    return {name: tensor for name, tensor in _BEIT.to_theirs(state).items() if not name.endswith(".k_proj.bias")}
