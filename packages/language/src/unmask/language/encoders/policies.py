"""The two language models of preference optimisation: a policy, and the reference that it is held against."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from unmask.core.errors import UnmaskError
from unmask.core.networks import Network
from unmask.language.data.vocabulary import Vocabulary
from unmask.language.encoders.language_model import ModelSettings, language_model


def policy(settings: ModelSettings, vocabulary: Vocabulary, length: int, given: Network | None) -> Any:
    """The model to train: a copy of the given one, with the rows that it has, or one at random weights.

    Raises:
        UnmaskError: the tokenizer has more ids than the given model.
    """
    if given is None:
        return language_model(settings, vocabulary, "causal", length)
    network = replace(given, module=copy.deepcopy(given.module))
    embedding = network.module.get_input_embeddings()
    rows = vocabulary.size if embedding is None else embedding.weight.shape[0]
    if rows < vocabulary.size - (vocabulary.mask == vocabulary.size - 1):  # a mask token, which no pair has
        raise UnmaskError(
            f"{given.source}: has {rows} ids, and the tokenizer {vocabulary.size}; give its own tokenizer, which "
            "data.tokenizer: null takes"
        )
    return language_model(settings, replace(vocabulary, size=min(rows, vocabulary.size)), "causal", length, network)


def reference(model: Any, networks: Mapping[str, Network]) -> Any:
    """What the policy is held against.

    Raises:
        UnmaskError: a network that is no language model with as many ids.
    """
    given = networks.get("reference", networks.get("model"))
    if given is None:
        return copy.deepcopy(model)
    layers = [network.get_output_embeddings() for network in (model, given.module)]
    rows = [layer.weight.shape[0] if layer is not None else 0 for layer in layers]
    if rows[0] != rows[1]:
        raise UnmaskError(
            f"{given.source}: scores {rows[1]} ids, and the model {rows[0]}; the reference needs its vocabulary"
        )
    return given.module
