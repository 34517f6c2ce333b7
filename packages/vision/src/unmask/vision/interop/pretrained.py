"""Trained weights from elsewhere: a run, a transformers directory, the released checkpoints.

`unmask.vision.load` gives an encoder to use, `load_vitmae_directory` a whole masked autoencoder from transformers'
format, and `load_initial_weights` starts a new run from any of them (the recipe's key ``init``), decoder included.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import nn

from unmask.core.errors import UnmaskError
from unmask.core.interop.directories import directory, is_run, read_config
from unmask.core.interop.transformers import check_model_type, read_transformers
from unmask.core.interop.weights import State, check_initial, read_state
from unmask.core.masking import RandomMasking
from unmask.core.method import encoder_of
from unmask.core.training.checkpoint import LoadedRun, weights_of
from unmask.vision.data.preprocess import Preprocess
from unmask.vision.encoders.vit import VisionTransformer, ViTSettings
from unmask.vision.interop.convert import VITMAE
from unmask.vision.methods.mae import MAE, DecoderSettings


def as_encoder(run: LoadedRun) -> nn.Module:
    """The encoder of a method: ``encoder(images)`` takes normalised images [batch, channels, height, width].

    It returns `Features`: ``tokens``, ``grid``, ``cls`` and ``pooled``. ``encoder.preprocess(images)``, a `Preprocess`,
    makes such a batch from PIL images, arrays or file names.
    """
    encoder: Any = encoder_of(run.method)
    encoder.preprocess = Preprocess.of_data(run.recipe.data)
    return encoder


def open_directory(path: str | Path) -> nn.Module:
    """`as_encoder` of a directory with a ``ViTMAEForPreTraining``, or the id of one on the Hugging Face hub.

    Raises:
        UnmaskError: nothing of the kind is there.
    """
    encoder: Any = load_vitmae_directory(path).encoder
    encoder.preprocess = Preprocess.of_directory(path, encoder.image_size, encoder.channels)
    return encoder


def load_vitmae_directory(path: str | Path) -> MAE:
    """A masked autoencoder, decoder included, from what transformers saved as ``ViTMAEForPreTraining``.

    Weights are read from safetensors only and no code of the repository is run. LayerNorm's epsilon is 1e-6 as in the
    released model, also where the directory names transformers' default of 1e-12.

    Args:
        path: a directory with ``config.json`` and ``model.safetensors``, or an id on the Hugging Face hub.

    Raises:
        UnmaskError: no such directory or id, another architecture, or weights that are missing.
    """
    from transformers import ViTMAEForPreTraining

    model = _mae_like(_vitmae_config(path))
    model.load_state_dict(VITMAE.to_ours(read_transformers(ViTMAEForPreTraining, path, without="decoder")))
    return model.eval()


def _vitmae_config(path: str | Path) -> Any:
    """The directory's configuration, if `MAE` can hold what it describes."""
    from transformers import ViTMAEConfig

    values = read_config(directory(path, ["config.json"]) / "config.json")
    check_model_type(values, path, "vit_mae", "ViTMAEForPreTraining")
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
    wanted = method.state_dict()
    fixed = {name for name, p in method.named_parameters() if not p.requires_grad}
    for name in fixed & given.keys():
        if name.endswith("pos_embed") and given[name].shape[-1] == wanted[name].shape[-1]:
            given[name] = wanted[name]
    check_initial(given, wanted, path, why_missing=_no_decoder(given, wanted))
    method.load_state_dict(given)


def _no_decoder(given: State, wanted: State) -> str:
    """Why weights are missing, where it is the decoder's alone."""
    missing = [name for name in wanted if name not in given]
    if any("decoder" in name for name in given) or not all(n.startswith(("decoder", "mask_token")) for n in missing):
        return ""
    return " (an encoder alone: take the full checkpoint, with its decoder)"


def _read_weights(path: str | Path) -> State:
    """A state dict by our names from whatever `path` is."""
    if is_run(path):
        return dict(weights_of(Path(path))[0])
    if not Path(path).is_file():
        return dict(load_vitmae_directory(path).state_dict())
    state = read_state(Path(path))
    if any(name.startswith("encoder.") for name in state):
        return state
    if any(name.startswith("vit.") for name in state):
        raise UnmaskError(f"{path}: a transformers checkpoint; give its directory, which says how the model is shaped")
    ours = ("decoder_", "mask_token")  # the released MAE's names are ours without the encoder's prefix
    return {name if name.startswith(ours) else f"encoder.{name}": tensor for name, tensor in state.items()}
