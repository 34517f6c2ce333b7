"""Trained weights from elsewhere: a run, an exported directory, the released checkpoints.

`load` gives an encoder to use, `load_vitmae_directory` a whole masked autoencoder from transformers' format, and
`load_initial_weights` starts a new run from any of them (the recipe's key ``init``), decoder included.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unmask.core.errors import UnmaskError
from unmask.core.evaluation.finetune import load_tuned
from unmask.core.interop.directories import directory, is_run, read_config
from unmask.core.interop.fine_tuned import FineTunedEncoder, is_fine_tuned
from unmask.core.interop.weights import State, difference, read_state, some
from unmask.core.masking import RandomMasking
from unmask.core.method import encoder_of
from unmask.core.training.checkpoint import load_run, weights_of
from unmask.vision.data.preprocess import Preprocess
from unmask.vision.encoders.vit import VisionTransformer, ViTSettings
from unmask.vision.interop.convert import vitmae_to_mae
from unmask.vision.methods.mae import MAE, DecoderSettings


def load(path: str | Path, device: str = "cpu") -> nn.Module:
    """The trained encoder of a run or of an exported transformers directory, in eval mode.

    ``encoder(images)`` takes normalised images [batch, channels, height, width] and returns `Features`: ``tokens``,
    ``grid``, ``cls`` and ``pooled``. ``encoder.preprocess(images)`` makes such a batch from PIL images or file names.
    Of a fine-tuned directory it is a `FineTunedEncoder`: ``encoder.logits(images)`` scores ``encoder.classes``, too.

    Args:
        path: a run directory, what ``unmask finetune`` wrote, a directory made by ``unmask export --to transformers``,
            or the id of a ViTMAE on the Hugging Face hub.
        device: where to put it.

    Raises:
        UnmaskError: nothing of the kind is there.
    """
    encoder: Any
    if is_fine_tuned(path):
        tuned = load_tuned(path, device)
        encoder = FineTunedEncoder(tuned.method, encoder_of(tuned.method), Preprocess.of_data(tuned.recipe.data))
    elif is_run(path):
        run = load_run(path, device=device)
        encoder = encoder_of(run.method)
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
    model = _mae_like(_vitmae_config(path))
    model.load_state_dict(vitmae_to_mae(_vitmae_weights(path)))
    return model.eval()


def _vitmae_config(path: str | Path) -> Any:
    """The directory's configuration, if `MAE` can hold what it describes."""
    from transformers import ViTMAEConfig

    values = read_config(directory(path, ["config.json"]) / "config.json")
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
        raise UnmaskError(f"{path}: {len(missing)} weights are missing{hint}: {some(missing)}")
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
        path: a run directory, a transformers directory (or hub id), or a ``.safetensors`` or ``.pth`` file with this
            library's or the released MAE's names.

    Raises:
        UnmaskError: the weights are those of another model; the message names what differs.
    """
    given = _read_weights(path)
    mine = method.state_dict()
    fixed = {name for name, p in method.named_parameters() if not p.requires_grad}
    for name in fixed & given.keys():
        if name.endswith("pos_embed") and given[name].shape[-1] == mine[name].shape[-1]:
            given[name] = mine[name]
    problem = difference(given, mine, _no_decoder(given, mine))
    if problem:
        raise UnmaskError(
            f"{path}: these weights are of another model: {problem}. "
            "Give weights trained with the same `model` settings, or change the settings to theirs."
        )
    method.load_state_dict(given)


def _no_decoder(given: State, wanted: State) -> str:
    """Why weights are missing, where it is the decoder's alone."""
    missing = [name for name in wanted if name not in given]
    if any("decoder" in name for name in given) or not all(n.startswith(("decoder", "mask_token")) for n in missing):
        return ""
    return " (an encoder alone: take the full checkpoint, with its decoder)"


def _read_weights(path: str | Path) -> State:
    """A state dict by our names from whatever `path` is."""
    place = Path(path)
    if is_run(place):
        return dict(weights_of(place)[0])
    if place.is_file():
        return _read_file(place)
    return dict(load_vitmae_directory(path).state_dict())


def _read_file(path: Path) -> State:
    state = read_state(path)
    if any(name.startswith("encoder.") for name in state):
        return state
    if any(name.startswith("vit.") for name in state):
        raise UnmaskError(f"{path}: a transformers checkpoint; give its directory, which says how the model is shaped")
    return {_from_released(name): tensor for name, tensor in state.items()}


def _from_released(name: str) -> str:
    """Our name for one of the released MAE's: they differ by the encoder's prefix only."""
    return name if name.startswith(("decoder_", "mask_token")) else f"encoder.{name}"
