"""Hand a trained model to timm or transformers, as a directory either of them loads without this library.

* ``timm``: the encoder, as ``timm.create_model("local-dir:PATH", pretrained=True)`` loads it. Its output is the mean
  over patch tokens, equal to `Features.pooled`; of a fine-tuned directory, the logits of its classes.
* ``transformers``: the whole masked autoencoder, decoder included, as a ``ViTMAEForPreTraining`` directory with its
  image processor; of a fine-tuned directory, a ``BeitForImageClassification``, which pools as our classifiers do.

Both get a model card. `unmask.vision.interop.pretrained` reads a ``ViTMAEForPreTraining`` back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unmask.core.errors import UnmaskError
from unmask.core.interop.export import Exported, Exporter, Writer, write_directory
from unmask.core.interop.weights import State
from unmask.vision.data.preprocess import Preprocess
from unmask.vision.encoders.timm import SwinSettings, TimmViTSettings
from unmask.vision.encoders.vit import VisionTransformer, ViTSettings
from unmask.vision.interop.convert import VITMAE, classifier_to_beit
from unmask.vision.interop.model_card import image_card
from unmask.vision.methods.mae import MAE


def _write_transformers(exported: Exported, out: Path) -> None:
    made = _as_vitmae(exported) if exported.classes is None else _as_beit_classifier(exported, exported.classes)
    made.save_pretrained(out)
    Preprocess.of_data(exported.run.recipe.data).save(out)


def _as_vitmae(exported: Exported) -> Any:
    method = exported.method
    if not isinstance(method, MAE):
        raise UnmaskError(
            f"transformers' ViTMAE cannot hold {exported.run.recipe.method}; export its encoder instead: --to timm"
        )
    encoder = method.encoder
    refused = _not_in_vitmae(encoder) if isinstance(encoder, VisionTransformer) else ["its encoder is timm's"]
    if refused:
        raise UnmaskError(
            f"transformers' ViTMAE cannot hold this MAE: {', '.join(refused)}; export its encoder instead: --to timm"
        )
    from transformers import ViTMAEForPreTraining

    theirs = ViTMAEForPreTraining(_vitmae_config(method))
    theirs.load_state_dict(VITMAE.to_theirs(method.state_dict()))
    return theirs


def _as_beit_classifier(exported: Exported, classes: Sequence[str]) -> Any:
    """Of transformers' classifiers the one that has its last norm behind the mean over patches."""
    encoder = exported.method.encoder
    if not isinstance(encoder, VisionTransformer) or encoder.cls_token is None or len(set(encoder.image_size)) > 1:
        raise UnmaskError(
            "transformers' BEiT holds classifiers on a ViT with a class token and square images only; export this one "
            "with --to timm, or use it with unmask.vision.load"
        )
    from transformers import BeitConfig, BeitForImageClassification

    s = encoder.settings
    config = BeitConfig(
        hidden_size=s.dim,
        num_hidden_layers=s.depth,
        num_attention_heads=s.heads,
        intermediate_size=int(s.dim * s.mlp_ratio),
        layer_norm_eps=1e-6,
        image_size=encoder.image_size[0],
        patch_size=s.patch_size,
        num_channels=encoder.channels,
        use_mask_token=False,
        use_absolute_position_embeddings=s.positions != "none",
        use_shared_relative_position_bias=s.relative_bias,
        layer_scale_init_value=s.layer_scale or 0.0,
        drop_path_rate=0.0,
        use_mean_pooling=True,
        id2label=dict(enumerate(classes)),
        label2id={name: i for i, name in enumerate(classes)},
    )
    theirs = BeitForImageClassification(config)
    theirs.load_state_dict(classifier_to_beit(exported.method.state_dict()))
    return theirs


def _not_in_vitmae(encoder: VisionTransformer) -> list[str]:
    """Why transformers' ViTMAE cannot hold an encoder."""
    s, (height, width) = encoder.settings, encoder.image_size
    checks = {
        "it has no class token": not s.class_token,
        f"its positions are {s.positions!r} (transformers' are sincos)": s.positions != "sincos",
        "it has a relative position bias": s.relative_bias,
        "it has layer scale": s.layer_scale is not None,
        f"its images are not square ({height} x {width})": height != width,
    }
    return [text for text, is_so in checks.items() if is_so]


def _vitmae_config(model: MAE) -> Any:
    from transformers import ViTMAEConfig

    assert isinstance(model.encoder, VisionTransformer)
    s = model.encoder.settings
    block: Any = model.decoder_blocks[0]
    return ViTMAEConfig(
        hidden_size=s.dim,
        num_hidden_layers=s.depth,
        num_attention_heads=s.heads,
        intermediate_size=int(s.dim * s.mlp_ratio),
        layer_norm_eps=1e-6,
        image_size=model.encoder.image_size[0],
        patch_size=s.patch_size,
        num_channels=model.encoder.channels,
        decoder_hidden_size=model.mask_token.shape[-1],
        decoder_num_hidden_layers=len(model.decoder_blocks),
        decoder_num_attention_heads=block.attn.heads,
        decoder_intermediate_size=block.mlp.fc1.out_features,
        mask_ratio=getattr(model.masking, "ratio", 0.75),
        norm_pix_loss=model.norm_pix,
    )


def _write_timm(exported: Exported, out: Path) -> None:
    data, preprocess = exported.run.recipe.data, Preprocess.of_data(exported.run.recipe.data)
    model = timm_model(exported.method.encoder, exported.run.recipe.model.encoder)
    if exported.classes is not None:
        model = _with_head(model, exported.method)
    classes = exported.classes or []
    config = {
        "architecture": model.architecture,
        "num_classes": len(classes),
        "num_features": model.features,
        "global_pool": "avg",
        **({"label_names": classes} if classes else {}),
        "model_args": {**model.args, "num_classes": len(classes), "global_pool": "avg"},
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [data.channels, *preprocess.size],
            "fixed_input_size": True,
            "interpolation": preprocess.interpolation,
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
            "num_classes": len(classes),
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    write_directory(out, config, model.state)


@dataclass(frozen=True)
class TimmModel:
    """What timm needs to build and fill an encoder.

    Args:
        architecture: timm's name; with `args` it builds the shape.
        args: keyword arguments of ``timm.create_model``, all of them JSON.
        state: the weights by timm's names.
        features: width of the output.
        norm_after_pooling: the argument that moves its last norm behind pooling; None where there is none.
    """

    architecture: str
    args: dict[str, Any]
    state: State
    features: int
    norm_after_pooling: str | None = None


def timm_model(encoder: Any, settings: ViTSettings | SwinSettings | TimmViTSettings) -> TimmModel:
    """The timm model that computes what `encoder`, made from `settings`, does.

    Raises:
        UnmaskError: timm has no such model.
    """
    if isinstance(settings, SwinSettings):
        return _as_swin(encoder, settings)
    if isinstance(settings, TimmViTSettings):
        arguments = settings.arguments(encoder.image_size, encoder.channels)
        return TimmModel(settings.architecture, arguments, encoder.state_dict(), encoder.dim)
    s = settings
    args: dict[str, Any] = {
        "img_size": list(encoder.image_size),
        "patch_size": s.patch_size,
        "in_chans": encoder.channels,
        "embed_dim": s.dim,
        "depth": s.depth,
        "num_heads": s.heads,
        "mlp_ratio": s.mlp_ratio,
        "init_values": s.layer_scale,
    }
    if s.relative_bias:
        return _as_beit(s, args, encoder.state_dict())
    positions = "none" if s.positions == "none" else "learn"
    args |= {"fc_norm": False, "class_token": s.class_token, "pos_embed": positions}
    return TimmModel("vit_base_patch16_224", args, encoder.state_dict(), s.dim, "fc_norm")


def _with_head(model: TimmModel, classifier: Any) -> TimmModel:
    """The timm model with a classifier's norm after pooling, in place of its last norm, and its linear layer.

    Raises:
        UnmaskError: timm's model has no norm after pooling.
    """
    if model.norm_after_pooling is None:
        raise UnmaskError(
            f"timm's {model.architecture} cannot hold this classifier, which has its norm after pooling; use it with "
            "unmask.vision.load, or export the run that was fine-tuned: its encoder fits"
        )
    state = dict(model.state)
    for ours, theirs in (("norm", "fc_norm"), ("head", "head")):
        state |= {f"{theirs}.{name}": tensor for name, tensor in getattr(classifier, ours).state_dict().items()}
    return replace(model, args=model.args | {model.norm_after_pooling: True}, state=state)


def _as_swin(encoder: Any, s: SwinSettings) -> TimmModel:
    args = {
        "img_size": list(encoder.image_size),
        "patch_size": s.patch_size,
        "in_chans": encoder.channels,
        "embed_dim": s.dim,
        "depths": list(s.depths),
        "num_heads": list(s.heads),
        "window_size": s.window,
        "mlp_ratio": s.mlp_ratio,
    }
    return TimmModel("swin_base_patch4_window7_224", args, encoder.state_dict(), encoder.dim)


def _as_beit(s: ViTSettings, args: dict[str, Any], state: State) -> TimmModel:
    """A ViT with one relative-position bias for all blocks is timm's BEiT.

    BEiT's keys have no bias. Ours adds the same number to all logits of a query, which softmax cancels: it is left out.
    """
    if not s.class_token:
        raise UnmaskError(
            "timm has no ViT with a shared relative position bias and without class token; "
            "load the run with unmask.vision.load instead"
        )
    args |= {
        "use_abs_pos_emb": s.positions != "none",
        "use_rel_pos_bias": False,
        "use_shared_rel_pos_bias": True,
        "use_fc_norm": False,
    }
    renamed: State = {}
    for name, tensor in state.items():
        if name.endswith("attn.qkv.bias"):
            q, _, v = tensor.chunk(3)
            stem = name.removesuffix("qkv.bias")
            renamed |= {f"{stem}q_bias": q, f"{stem}v_bias": v}
        elif name.startswith("rel_pos_bias."):
            renamed["rel_pos_bias.relative_position_bias_table"] = tensor
        else:
            renamed[name.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2")] = tensor
    return TimmModel("beit_base_patch16_224", args, renamed, s.dim, "use_fc_norm")


_WRITERS: dict[str, Writer] = {"timm": _write_timm, "transformers": _write_transformers}
export = Exporter(_WRITERS, image_card, classifiers=_WRITERS)
