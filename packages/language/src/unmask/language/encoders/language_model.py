"""A language model of transformers as methods use it: hidden states, the output layer, and a vocabulary that fits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmask.core.errors import UnmaskError
from unmask.core.method import Features
from unmask.core.networks import Network
from unmask.language.data.vocabulary import Vocabulary
from unmask.language.encoders.class_head import freeze_unused_bias

Head = Literal["causal", "masked"]
_ENDING = {"causal": "ForCausalLM", "masked": "ForMaskedLM"}


@dataclass(frozen=True)
class ModelSettings:
    """A language model of transformers with random weights; not used where the network ``model`` is given.

    Args:
        architecture: transformers' name of it (``model_type`` in a config.json): llama, gpt2, bert, roberta ...
        config: keys of its configuration, by transformers' names; the vocabulary and the special ids come from the
            tokenizer.
    """

    architecture: str = "llama"
    config: dict[str, Any] = field(default_factory=dict)


def language_model(
    settings: ModelSettings, vocabulary: Vocabulary, head: Head, length: int, network: Network | None = None
) -> Any:
    """A language model with an output layer: the network that was given, made trainable, or one at random weights.

    Rows that the vocabulary needs and the network's embedding lacks (of a mask token that is new) begin as the mean of
    the others.

    Args:
        settings: of random weights.
        vocabulary: of the tokenizer.
        head: predicts the next token, or the token itself.
        length: tokens seen at once.
        network: as opened by core.

    Raises:
        UnmaskError: no such architecture, a wrong key, a network without such a head, or one for shorter texts.
    """
    model = _random(settings, vocabulary, head) if network is None else _given(network, head)
    longest, taken = getattr(model.config, "max_position_embeddings", None), _positions_taken(model, vocabulary)
    if isinstance(longest, int) and longest < length + taken:
        raise UnmaskError(
            f"model: {type(model).__name__} sees {longest - taken} tokens at most, and data.length is {length}; lower "
            f"that, or raise max_position_embeddings to {length + taken}"
        )
    embedding = model.get_input_embeddings()
    if getattr(embedding, "padding_idx", None) == vocabulary.eos:  # a real token here, which has to learn
        embedding.padding_idx = None
    grow_embeddings(model, vocabulary.size)
    if head == "masked":
        freeze_unused_bias(model)
    return model


def _positions_taken(model: Any, vocabulary: Vocabulary) -> int:
    """Positions that no token can have: RoBERTa and its like count from the pad token's id on.

    Raises:
        UnmaskError: and the pad token ends texts, too, so that their positions would be wrong.
    """
    embeddings: Any = getattr(model.base_model, "embeddings", None)
    if not hasattr(embeddings, "create_position_ids_from_input_ids"):
        return 0
    pad = embeddings.padding_idx
    if pad is None or pad == vocabulary.eos:
        raise UnmaskError(
            f"model: {type(model).__name__} counts positions from its pad token, and the tokenizer has no own "
            "one. Give another with --set data.tokenizer=DIR, or another model.architecture"
        )
    return int(pad) + 1


def _random(settings: ModelSettings, vocabulary: Vocabulary, head: Head) -> Any:
    import transformers

    auto = {"causal": transformers.AutoModelForCausalLM, "masked": transformers.AutoModelForMaskedLM}[head]
    try:
        known = transformers.AutoConfig.for_model(settings.architecture)
    except ValueError:
        raise UnmaskError(
            f"model.architecture: transformers {transformers.__version__} has no {settings.architecture!r}; it is what "
            "its config.json calls model_type, for example llama, gpt2, bert"
        ) from None
    unknown = [key for key in settings.config if not hasattr(known, key)]
    if unknown:
        raise UnmaskError(f"model.config: {settings.architecture} has no {', '.join(unknown)}")
    ids = {
        "vocab_size": vocabulary.size,
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.eos,
        "pad_token_id": None if vocabulary.pad == vocabulary.eos else vocabulary.pad,  # or its row would never learn
    }
    config = transformers.AutoConfig.for_model(settings.architecture, **{**ids, **settings.config})
    try:
        return auto.from_config(config)
    except (ValueError, KeyError) as error:
        raise UnmaskError(f"model.architecture: {settings.architecture} as a {head} language model: {error}") from None


def _given(network: Network, head: Head) -> Any:
    model = network.module
    if network.kind != "transformers" or model.get_output_embeddings() is None:
        raise UnmaskError(
            f"{network.source}: {type(model).__name__} has no language modelling head. Give the directory of a "
            f"{head} language model, saved whole by transformers (one that ends in {_ENDING[head]})"
        )
    return model.requires_grad_(True)


@torch.no_grad()
def grow_embeddings(model: Any, size: int) -> None:
    """Give a model rows for ids up to `size`, each the mean of the rows there are; a larger model stays as it is."""
    rows = model.get_input_embeddings().weight.shape[0]
    if rows >= size:
        return
    model.resize_token_embeddings(size, mean_resizing=False)
    for layer in {id(layer): layer for layer in (model.get_input_embeddings(), model.get_output_embeddings())}.values():
        layer.weight[rows:] = layer.weight[:rows].mean(0)
        if getattr(layer, "bias", None) is not None:
            layer.bias[rows:] = layer.bias[:rows].mean()


def last_hidden(
    model: Any, tokens: Int[Tensor, "batch length"], valid: Bool[Tensor, "batch length"] | None = None, **more: Any
) -> Float[Tensor, "batch length dim"]:
    """The states that the output layer gets, without the scores over the vocabulary.

    Args:
        model: a language model of transformers.
        tokens: ids.
        valid: False = padding; None where there is none.
        more: what else the model takes (``token_type_ids``).
    """
    mask = None if valid is None else valid.long()
    options = {"use_cache": False} if getattr(model.config, "use_cache", None) is not None else {}
    return model.base_model(input_ids=tokens, attention_mask=mask, **options, **more).last_hidden_state


def features(
    model: Any, tokens: Int[Tensor, "batch length"], valid: Bool[Tensor, "batch length"] | None = None
) -> Features:
    """The last hidden states as features: one vector per token."""
    return Features(last_hidden(model, tokens, valid), (tokens.shape[1],), valid=valid)
