"""Hand a trained model to transformers or torchaudio, as a directory either of them loads without this library.

* ``transformers``: a ``HubertModel`` directory with its feature extractor. The heads of pre-training, which it
  cannot hold, are beside it in a file of their own.
* ``torchaudio``: a state dict as safetensors, and the function and arguments that build the model: the whole of
  pre-training where there is one target, else the encoder.

Both get a model card. `unmask.speech_audio.interop.pretrained` reads both back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unmask.core.interop.export import Exported, Exporter, write_directory
from unmask.core.interop.weights import save_state
from unmask.speech_audio.data.frames import SAMPLE_RATE
from unmask.speech_audio.encoders.wav2vec2 import KERNELS, STRIDES, EncoderSettings
from unmask.speech_audio.interop import convert
from unmask.speech_audio.interop.model_card import speech_card
from unmask.speech_audio.interop.pretrained import HEADS, HEADS_FILE


def _write_transformers(exported: Exported, out: Path) -> None:
    from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

    method = exported.method
    theirs = HubertModel(HubertConfig(**convert.settings_to_transformers(method.encoder.settings)))
    theirs.load_state_dict(convert.to_transformers(method.state_dict()))
    theirs.save_pretrained(out)
    # With a mask for attention also after GroupNorm, unlike the released BASE: this model was trained with one.
    Wav2Vec2FeatureExtractor(
        feature_size=1, sampling_rate=SAMPLE_RATE, padding_value=0.0, do_normalize=exported.run.recipe.data.normalise,
        return_attention_mask=True,
    ).save_pretrained(out)  # fmt: skip
    state = method.state_dict()
    save_state({name: state[name] for name in HEADS if name in state}, out / HEADS_FILE)


def _write_torchaudio(exported: Exported, out: Path) -> None:
    method = exported.method
    state, settings = method.state_dict(), method.encoder.settings
    arguments = _torchaudio_arguments(settings)
    if len(method.classes) == 1:
        factory = "hubert_pretrain_model"
        arguments |= _pretraining_arguments(method, settings)
    else:
        factory = "wav2vec2_model"
        arguments["aux_num_out"] = None
        state = {name: tensor for name, tensor in state.items() if name.startswith("encoder.")}
    config = {"method": exported.run.recipe.method, "factory": factory, "arguments": arguments}
    config["normalise"] = exported.run.recipe.data.normalise
    write_directory(out, config, convert.to_torchaudio(state))


def _torchaudio_arguments(s: EncoderSettings) -> dict[str, Any]:
    """Of ``torchaudio.models.wav2vec2_model`` and ``hubert_pretrain_model``, as far as they agree."""
    return {
        "extractor_mode": s.extractor,
        "extractor_conv_layer_config": [[s.channels, k, stride] for k, stride in zip(KERNELS, STRIDES, strict=True)],
        "extractor_conv_bias": s.conv_bias,
        "encoder_embed_dim": s.dim,
        "encoder_projection_dropout": s.input_dropout,
        "encoder_pos_conv_kernel": s.positional_kernel,
        "encoder_pos_conv_groups": s.positional_groups,
        "encoder_num_layers": s.depth,
        "encoder_num_heads": s.heads,
        "encoder_attention_dropout": s.attention_dropout,
        "encoder_ff_interm_features": int(s.dim * s.mlp_ratio),
        "encoder_ff_interm_dropout": s.activation_dropout,
        "encoder_dropout": s.dropout,
        "encoder_layer_norm_first": s.norm == "pre",
        "encoder_layer_drop": s.layer_drop,
    }


# The masking of torchaudio's own `hubert_pretrain_model`, at HuBERT's values.
_MASKING = {
    "mask_prob": 0.8, "mask_selection": "static", "mask_other": 0.0, "mask_length": 10, "no_mask_overlap": False,
    "mask_min_space": 1, "mask_channel_prob": 0.0, "mask_channel_selection": "static", "mask_channel_other": 0.0,
    "mask_channel_length": 10, "no_mask_channel_overlap": False, "mask_channel_min_space": 1,
}  # fmt: skip


def _pretraining_arguments(method: Any, s: EncoderSettings) -> dict[str, Any]:
    """The rest of ``hubert_pretrain_model``'s."""
    return _MASKING | {
        "skip_masked": method.masked_weight == 0,
        "skip_nomask": method.unmasked_weight == 0,
        "num_classes": method.classes[0],
        "final_dim": method.label_embeddings.shape[1],
        "feature_grad_mult": s.feature_grad if s.feature_grad < 1 else None,
    }


export = Exporter({"transformers": _write_transformers, "torchaudio": _write_torchaudio}, speech_card)
