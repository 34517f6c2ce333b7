"""Trained weights from elsewhere: a run, an exported directory, HuBERT in transformers' or torchaudio's format.

`unmask.speech_audio.load` gives an encoder to use, and `load_initial_weights` starts a new run from any of them (the
recipe's key ``init``), heads included where they are there and fit.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from unmask.core.errors import UnmaskError
from unmask.core.interop.directories import directory, is_run, read_config
from unmask.core.interop.pretrained import check_domain_of
from unmask.core.interop.transformers import check_model_type, read_transformers
from unmask.core.interop.weights import State, check_initial, read_state
from unmask.core.method import encoder_of
from unmask.core.training.checkpoint import LoadedRun, load_run
from unmask.speech_audio.encoders.wav2vec2 import EncoderSettings, SpeechEncoder
from unmask.speech_audio.interop import convert
from unmask.speech_audio.interop.model import PretrainedEncoder

HEADS_FILE = "pretraining_heads.safetensors"  # beside an exported model.safetensors
HEADS = ("final_proj.weight", "final_proj.bias", "label_embeddings")
SETTINGS = "`model.encoder` settings"
DESCRIPTIONS = ("recipe.yaml", "config.json")  # what says how the weights beside it are shaped
_HEADS_BY_WIDTH = {768: 12, 1024: 16, 1280: 16}  # attention heads of the released models


@dataclass(frozen=True)
class Weights:
    """What a file or a directory holds, by our names.

    Args:
        settings: the encoder's shape.
        encoder: its weights, without prefix.
        extra: the mask embedding and the heads, as far as they are there.
        normalise: whether clips go in with zero mean and unit variance.
    """

    settings: EncoderSettings
    encoder: State
    extra: State = field(default_factory=dict)
    normalise: bool = False


def as_encoder(run: LoadedRun) -> PretrainedEncoder:
    """The encoder of a method, with the preparation of its input: ``encoder(encoder.preprocess(["a.wav"]))``."""
    encoder: Any = encoder_of(run.method)
    return PretrainedEncoder(encoder, run.recipe.data.normalise)


def open_directory(path: str | Path) -> PretrainedEncoder:
    """`as_encoder` of weights from elsewhere.

    Args:
        path: a directory made by ``unmask export``; a directory in transformers' format, or the id of one on the
            Hugging Face hub (``facebook/hubert-base-ls960``); a ``.safetensors`` or ``.pth`` file with a torchaudio
            HuBERT's state dict.

    Raises:
        UnmaskError: nothing of the kind is there, or only in a format that can run code when it is opened.
    """
    weights = read_weights(path)
    encoder = SpeechEncoder(weights.settings)
    check_initial(weights.encoder, encoder.state_dict(), path, SETTINGS)
    encoder.load_state_dict(weights.encoder)
    return PretrainedEncoder(encoder, weights.normalise)


def load_initial_weights(method: nn.Module, path: str | Path) -> None:
    """Copy trained weights into a freshly built method, so that pre-training goes on from them.

    The encoder has to fit. The mask embedding and the heads are copied where they are there; heads for other labels
    than the method's are not, which is said on stderr.

    Args:
        method: what the recipe's ``build`` returned; changed in place.
        path: a run directory, or as for `open_directory`.

    Raises:
        UnmaskError: the weights are those of another model; the message names what differs.
    """
    weights = read_weights(path)
    wanted, extra = method.state_dict(), weights.extra
    ours = {name.removeprefix("encoder."): tensor for name, tensor in wanted.items() if _is_encoder(name)}
    check_initial(weights.encoder, ours, path, SETTINGS)
    given = {f"encoder.{name}": tensor for name, tensor in weights.encoder.items()}
    if _same_shape(extra, wanted, "mask_embedding"):
        given["mask_embedding"] = extra["mask_embedding"]
    if all(_same_shape(extra, wanted, name) for name in HEADS):
        given |= {name: extra[name] for name in HEADS}
    else:
        why = "there are none" if "label_embeddings" not in extra else _heads_differ(extra, wanted)
        print(f"{path}: the encoder is loaded; the heads start at random values ({why})", file=sys.stderr)
    method.load_state_dict(wanted | given)


def _is_encoder(name: str) -> bool:
    return name.startswith("encoder.")


def _same_shape(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], name: str) -> bool:
    return name in given and name in wanted and given[name].shape == wanted[name].shape


def _heads_differ(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    if "label_embeddings" not in given:
        return "there are none"
    theirs, ours = given["label_embeddings"], wanted.get("label_embeddings")
    if ours is None:
        return "this method has no label embeddings"
    (classes, dim), (wanted_classes, wanted_dim) = theirs.shape, ours.shape
    return f"they are for {classes} classes in {dim} dimensions, these for {wanted_classes} in {wanted_dim}"


# ---- reading -------------------------------------------------------------------------------------------------------


def read_weights(path: str | Path) -> Weights:
    """The weights and the shape of whatever `path` is; see `load_initial_weights`."""
    folder = Path(path)
    if folder.name == "model.safetensors" and any((folder.parent / name).is_file() for name in DESCRIPTIONS):
        path = folder = folder.parent
    if is_run(folder):
        return _of_run(folder)
    if folder.is_file():
        return _of_file(folder)
    folder = directory(path, ["config.json", "model.safetensors", HEADS_FILE])
    config = read_config(folder / "config.json")
    if "factory" in config:
        return _of_torchaudio(read_state(folder / "model.safetensors"), config)
    heads = folder / HEADS_FILE
    return _of_transformers(path, config, read_state(heads) if heads.is_file() else {})


def _of_run(path: Path) -> Weights:
    run = load_run(path)
    check_domain_of(run.recipe.method, "speech_audio", path)
    encoder: Any = encoder_of(run.method)
    return _split(run.method.state_dict(), encoder.settings, run.recipe.data.normalise)


def _of_file(path: Path) -> Weights:
    state, beside = read_state(path), path.parent / "config.json"
    if any(name.startswith(("wav2vec2.", "encoder.transformer.")) for name in state):
        return _of_torchaudio(state, read_config(beside) if beside.is_file() else {})
    raise UnmaskError(
        f"{path}: not the weights of a torchaudio HuBERT; give the directory of a transformers model or of a run, "
        "which says how the model is shaped"
    )


def _of_torchaudio(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Weights:
    ours = convert.from_torchaudio(state)
    arguments = config.get("arguments", {})
    try:
        settings = _settings_of(ours, arguments.get("encoder_num_heads"))
    except KeyError as error:
        raise UnmaskError(f"these weights are not those of a torchaudio HuBERT: {error} is missing") from None
    normalise = config.get("normalise", settings.extractor == "layer_norm")
    return _split(ours, settings, bool(normalise))


def _settings_of(state: Mapping[str, Tensor], heads: int | None) -> EncoderSettings:
    """An encoder's shape from its weights, dropouts 0. Heads cannot be seen: the released models' by width."""
    convolution = state["encoder.positions.conv.parametrizations.weight.original1"]
    dim, per_group, kernel = convolution.shape
    heads = heads or _HEADS_BY_WIDTH.get(dim)
    if heads is None:
        raise UnmaskError(
            f"a state dict does not say how many attention heads a model of width {dim} has; put it into a directory "
            'as model.safetensors beside a config.json with {"factory": "wav2vec2_model", "arguments": '
            '{"encoder_num_heads": N}}'
        )
    by_layer = "encoder.waveform.1.norm.weight" in state
    return EncoderSettings(
        channels=len(state["encoder.waveform.0.conv.weight"]),
        extractor="layer_norm" if by_layer else "group_norm",
        conv_bias="encoder.waveform.0.conv.bias" in state,
        feature_grad=1.0 if by_layer else 0.1,
        dim=dim,
        depth=1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.blocks.")),
        heads=heads,
        mlp_ratio=len(state["encoder.blocks.0.mlp.fc1.weight"]) / dim,
        norm="pre" if by_layer else "post",
        positional_kernel=kernel,
        positional_groups=dim // per_group,
        input_dropout=0.0,
        dropout=0.0,
        attention_dropout=0.0,
        layer_drop=0.0,
    )


def _split(ours: Mapping[str, Tensor], settings: EncoderSettings, normalise: bool) -> Weights:
    encoder = {name.removeprefix("encoder."): tensor for name, tensor in ours.items() if _is_encoder(name)}
    extra = {name: tensor for name, tensor in ours.items() if not _is_encoder(name)}
    return Weights(settings, encoder, extra, normalise)


# ---- transformers --------------------------------------------------------------------------------------------------


def _of_transformers(path: str | Path, config: Mapping[str, Any], heads: State) -> Weights:
    """What transformers saved as a ``HubertModel`` (or with a head on it), and our heads where they lay beside it."""
    from transformers import HubertModel

    check_model_type(config, path, "hubert", "HubertModel")
    settings = convert.settings_from_transformers(config)
    theirs = read_transformers(HubertModel, path, optional=["masked_spec_embed"])
    return _split(heads | convert.from_transformers(theirs), settings, _normalises(path, settings))


def _normalises(path: str | Path, settings: EncoderSettings) -> bool:
    """What the feature extractor says; LARGE models are normalised where there is none."""
    from transformers import FeatureExtractionMixin

    try:
        values, _ = FeatureExtractionMixin.get_feature_extractor_dict(str(path))
    except (OSError, ValueError):
        return settings.extractor == "layer_norm"
    return bool(values.get("do_normalize", settings.extractor == "layer_norm"))
