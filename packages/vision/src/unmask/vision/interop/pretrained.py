"""Trained weights from elsewhere: a run, an exported directory, the released checkpoints.

`load` gives an encoder to use, `load_vitmae_directory` a whole masked autoencoder from transformers' format, and
`load_initial_weights` starts a new run from any of them (the recipe's key ``init``), decoder included.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unmask.core.errors import UnmaskError
from unmask.core.masking import RandomMasking
from unmask.vision.data.preprocess import Preprocess
from unmask.vision.encoders.vit import VisionTransformer, ViTSettings
from unmask.vision.interop.convert import State, vitmae_to_mae
from unmask.vision.methods.mae import MAE, DecoderSettings

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SHOWN = 3  # names listed per kind of difference between a checkpoint and a model


def load(path: str | Path, device: str = "cpu") -> nn.Module:
    """The trained encoder of a run or of an exported transformers directory, in eval mode.

    ``encoder(images)`` takes normalised images [batch, channels, height, width] and returns `Features`: ``tokens``,
    ``grid``, ``cls`` and ``pooled``. ``encoder.preprocess(images)`` makes such a batch from PIL images or file names.

    Args:
        path: a run directory, a directory made by ``unmask export --to transformers``, or the id of a ViTMAE on the
            Hugging Face hub.
        device: where to put it.

    Raises:
        UnmaskError: nothing of the kind is there.
    """
    if _is_run(path):
        from unmask.core.training.checkpoint import load_run

        run = load_run(Path(path), device=device)
        encoder: Any = run.method.encoder
        encoder.preprocess = Preprocess.of_data(run.recipe.data)
    else:
        encoder = load_vitmae_directory(path).encoder.to(device)
        encoder.preprocess = Preprocess.of_directory(path, encoder.image_size, encoder.channels)
    return encoder.eval()


def load_vitmae_directory(path: str | Path) -> MAE:
    """A masked autoencoder, decoder included, from what transformers saved as ``ViTMAEForPreTraining``.

    Weights are read from safetensors only and no code of the repository is run. LayerNorm's epsilon is 1e-6 as in the
    released model, also where the directory names transformers' default of 1e-12.

    Args:
        path: a directory with ``config.json`` and ``model.safetensors``, or an id on the Hugging Face hub.

    Raises:
        UnmaskError: no such directory or id, another architecture, or weights that are missing.
    """
    config = _vitmae_config(path)
    model = _mae_like(config)
    model.load_state_dict(vitmae_to_mae(_vitmae_weights(path)))
    return model.eval()


def _vitmae_config(path: str | Path) -> Any:
    """The directory's configuration, if `MAE` can hold what it describes."""
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise UnmaskError(f"{path}: neither a run (no recipe.yaml) nor an exported directory (no config.json)")
    from transformers import PreTrainedConfig, ViTMAEConfig

    try:
        values, _ = PreTrainedConfig.get_config_dict(str(path), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UnmaskError(_not_found(path, error)) from None
    if values.get("model_type") != "vit_mae":
        kind = values.get("model_type") or values.get("architecture") or "no model type"
        raise UnmaskError(f"{path}: config.json describes {kind!r}; expected 'vit_mae' (ViTMAEForPreTraining)")
    config = ViTMAEConfig.from_dict(values)
    refused = {
        "qkv_bias false": not config.qkv_bias,
        f"hidden_act {config.hidden_act!r} (gelu is ours)": config.hidden_act != "gelu",
        "a patch that is not square": not isinstance(config.patch_size, int),
        "a decoder MLP that is not 4 times the width": config.decoder_intermediate_size
        != 4 * config.decoder_hidden_size,
    }
    if any(refused.values()):
        raise UnmaskError(f"{path}: cannot be held by this MAE: {', '.join(k for k, bad in refused.items() if bad)}")
    return config


def _not_found(path: str | Path, error: Exception) -> str:
    if Path(path).exists() or not _HUB_ID.fullmatch(str(path)):
        return f"{path}: {'not a readable config.json' if Path(path).exists() else 'no such directory'}"
    return f"no directory {path}, and no model of that id could be read from the hub ({str(error).splitlines()[0]})"


def _vitmae_weights(path: str | Path) -> State:
    """The weights by transformers' names: reading old files' names is left to transformers."""
    from transformers import ViTMAEForPreTraining

    try:
        model, info = ViTMAEForPreTraining.from_pretrained(
            str(path),
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            ignore_mismatched_sizes=False,
            output_loading_info=True,
        )
    except Exception as error:  # transformers and safetensors raise a dozen kinds here; all mean "not readable"
        raise UnmaskError(f"{path}: the weights cannot be read: {' '.join(str(error).split())[:300]}") from None
    missing = sorted(info["missing_keys"])
    if missing:
        hint = " (an encoder alone: the decoder was not saved)" if all("decoder" in name for name in missing) else ""
        raise UnmaskError(f"{path}: {len(missing)} weights are missing{hint}: {_some(missing)}")
    return model.state_dict()


def _mae_like(config: Any) -> MAE:
    size = config.image_size
    dim, hidden = config.hidden_size, config.intermediate_size
    ratio = hidden / dim
    settings = ViTSettings(
        patch_size=config.patch_size,
        dim=dim,
        depth=config.num_hidden_layers,
        heads=config.num_attention_heads,
        mlp_ratio=ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf),
    )
    encoder = VisionTransformer(settings, (size, size) if isinstance(size, int) else tuple(size), config.num_channels)
    decoder = DecoderSettings(
        config.decoder_hidden_size, config.decoder_num_hidden_layers, config.decoder_num_attention_heads
    )
    return MAE(encoder, decoder, masking=RandomMasking(config.mask_ratio), norm_pix=config.norm_pix_loss)


def load_initial_weights(method: nn.Module, path: str | Path) -> None:
    """Copy trained weights into a freshly built method, heads included, so that pre-training goes on from them.

    Fixed position tables are the new model's own, so the image size may differ; everything else must fit.

    Args:
        method: what the recipe's ``build`` returned; changed in place.
        path: a run directory, a transformers directory (or hub id), or a ``.safetensors`` file with this library's or
            the released MAE's names.

    Raises:
        UnmaskError: the weights are those of another model; the message names what differs.
    """
    given = _read_weights(path)
    mine = method.state_dict()
    fixed = {name for name, p in method.named_parameters() if not p.requires_grad}
    for name in fixed & given.keys():
        if name.endswith("pos_embed") and given[name].shape[-1] == mine[name].shape[-1]:
            given[name] = mine[name]
    problem = _difference(given, mine)
    if problem:
        raise UnmaskError(
            f"{path}: these weights are of another model: {problem}. "
            "Give weights trained with the same `model` settings, or change the settings to theirs."
        )
    method.load_state_dict(given)


def _read_weights(path: str | Path) -> State:
    """A state dict by our names from whatever `path` is."""
    place = Path(path)
    if _is_run(place):
        from unmask.core.training.checkpoint import weights_of

        return dict(weights_of(place)[0])
    if place.is_file():
        return _read_file(place)
    return dict(load_vitmae_directory(path).state_dict())


def _read_file(path: Path) -> State:
    if path.suffix != ".safetensors":
        raise UnmaskError(
            f"{path}: only safetensors are read (a {path.suffix or 'file like this'} can run code when it is opened); "
            "save the checkpoint's state dict with safetensors.torch.save_file first"
        )
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except SafetensorError as error:
        raise UnmaskError(f"{path}: not a complete safetensors file ({error})") from None
    if any(name.startswith("encoder.") for name in state):
        return state
    if any(name.startswith("vit.") for name in state):
        raise UnmaskError(f"{path}: a transformers checkpoint; give its directory, which says how the model is shaped")
    return {_from_released(name): tensor for name, tensor in state.items()}


def _from_released(name: str) -> str:
    """Our name for one of the released MAE's: they differ by the encoder's prefix only."""
    return name if name.startswith(("decoder_", "mask_token")) else f"encoder.{name}"


def _difference(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """What keeps the weights `given` from fitting, in words; empty when they fit."""
    parts = []
    shapes = [
        f"{name} ({_shape(given[name])}, the model's is {_shape(wanted[name])})"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]
    missing = [name for name in wanted if name not in given]
    if shapes:
        parts.append(f"{len(shapes)} of another shape: {_some(shapes)}")
    if missing:
        no_decoder = not any("decoder" in name for name in given) and all(
            name.startswith(("decoder", "mask_token")) for name in missing
        )
        why = " (an encoder alone: take the full checkpoint, with its decoder)" if no_decoder else ""
        parts.append(f"{len(missing)} missing{why}: {_some(missing)}")
    unknown = [name for name in given if name not in wanted]
    if unknown:
        parts.append(f"{len(unknown)} that the model does not have: {_some(unknown)}")
    return "; ".join(parts)


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "scalar"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _is_run(path: str | Path) -> bool:
    return (Path(path) / "recipe.yaml").is_file()
