"""Hand a trained model to timm or transformers, as a directory either of them loads without this library.

* ``timm``: the encoder, as ``timm.create_model("local-dir:PATH", pretrained=True)`` loads it. Its output is the mean
  over patch tokens, equal to `Features.pooled`.
* ``transformers``: the whole masked autoencoder, decoder included, as a ``ViTMAEForPreTraining`` directory with its
  image processor.

Both get a model card. `unmask.vision.interop.pretrained` reads the second form back.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file

from unmask.core.errors import UnmaskError
from unmask.core.training.checkpoint import LoadedRun, load_run
from unmask.vision.data.preprocess import Preprocess
from unmask.vision.encoders.timm import SwinSettings, TimmViTSettings
from unmask.vision.encoders.vit import VisionTransformer, ViTSettings
from unmask.vision.interop.convert import State, mae_to_vitmae
from unmask.vision.interop.model_card import model_card
from unmask.vision.methods.mae import MAE

Target = Literal["timm", "transformers"]


def export(run_dir: str | Path, out: str | Path, to: Target = "timm") -> Path:
    """Write a run's weights in another library's format.

    Args:
        run_dir: a run directory.
        out: a directory that does not exist yet, or is empty.
        to: ``timm`` (the encoder) or ``transformers`` (the whole MAE).

    Returns:
        `out`.

    Raises:
        UnmaskError: not a run, `out` holds something, or the other library cannot hold this model; says what can be
            exported instead.
    """
    write = _WRITERS.get(to)
    if write is None:
        raise UnmaskError(f"cannot export to {to!r}; choose one of: {', '.join(_WRITERS)}")
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UnmaskError(f"{out} is there already and not empty; give a new directory for the export")
    run = load_run(run_dir)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
            made = Path(scratch) / "export"
            made.mkdir()
            write(run, made)
            card = model_card(run, Path(run_dir), to)
            (made / "README.md").write_text(card, encoding="utf-8")
            if out.exists():
                out.rmdir()
            shutil.move(made, out)
    except OSError as error:
        raise UnmaskError(f"cannot write the export to {out}: {error.strerror or error}") from None
    return out


def _write_transformers(run: LoadedRun, out: Path) -> None:
    method = run.method
    if not isinstance(method, MAE):
        raise UnmaskError(
            f"transformers' ViTMAE cannot hold {run.recipe.method}; export its encoder instead: --to timm"
        )
    encoder = method.encoder
    refused = _not_in_vitmae(encoder) if isinstance(encoder, VisionTransformer) else ["its encoder is timm's"]
    if refused:
        raise UnmaskError(
            f"transformers' ViTMAE cannot hold this MAE: {', '.join(refused)}; export its encoder instead: --to timm"
        )
    from transformers import ViTMAEForPreTraining

    theirs = ViTMAEForPreTraining(_vitmae_config(method))
    theirs.load_state_dict(mae_to_vitmae(method.state_dict()))
    theirs.save_pretrained(out)
    Preprocess.of_data(run.recipe.data).save(out)


def _not_in_vitmae(encoder: VisionTransformer) -> list[str]:
    """What transformers' ViTMAE has no place for."""
    s, (height, width) = encoder.settings, encoder.image_size
    checks = {
        "it has no class token": not s.class_token,
        f"its positions are {s.positions!r} (transformers' are sincos)": s.positions != "sincos",
        "it has a relative position bias": s.relative_bias,
        "it has layer scale": s.layer_scale is not None,
        f"its images are not square ({height} x {width})": height != width,
    }
    return [text for text, found in checks.items() if found]


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


def _write_timm(run: LoadedRun, out: Path) -> None:
    method: Any = run.method
    data = run.recipe.data
    model = timm_model(method.encoder, run.recipe.model.encoder)
    preprocess = Preprocess.of_data(data)
    config = {
        "architecture": model.architecture,
        "num_classes": 0,
        "num_features": model.features,
        "global_pool": "avg",
        "model_args": {**model.args, "num_classes": 0, "global_pool": "avg"},
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [data.channels, *preprocess.size],
            "fixed_input_size": True,
            "interpolation": preprocess.interpolation,
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in model.state.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


@dataclass(frozen=True)
class TimmModel:
    """What timm needs to build and fill an encoder.

    Args:
        architecture: timm's name; with `args` it builds the shape.
        args: keyword arguments of ``timm.create_model``, all of them JSON.
        state: the weights by timm's names.
        features: width of the output.
    """

    architecture: str
    args: dict[str, Any]
    state: State
    features: int


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
    return TimmModel("vit_base_patch16_224", args, encoder.state_dict(), s.dim)


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
    return TimmModel("beit_base_patch16_224", args, renamed, s.dim)


_WRITERS: dict[str, Callable[[LoadedRun, Path], None]] = {"timm": _write_timm, "transformers": _write_transformers}
