"""PROP's released weights (Albert-Ma/PROP; on the Hugging Face hub xyma/PROP-wiki and xyma/PROP-marco) by our names."""

from __future__ import annotations

import re

from unmask.core.interop.weights import State

_RULES = (
    (r"^module\.", ""),
    (r"\.gamma$", ".weight"),  # names of before 2019
    (r"\.beta$", ".bias"),
    (r"^bert\.pooler\.", "pooler."),
    (r"^cls\.weight$", "score.weight"),
    (r"^cls\.bias$", "score.bias"),
    (r"^(bert|cls)\.", r"model.\1."),
)


def is_released(state: State) -> bool:
    """Whether these are weights of the release: a BERT whose score layer is named ``cls``."""
    return any(name.removeprefix("module.") == "cls.weight" for name in state)


def released_to_ours(state: State) -> State:
    """The release's weights by the names of `unmask.language.methods.prop.PROP` on a BERT of transformers.

    The decoder of the masked language model is tied to the embeddings in both; its bias has one name there and two
    here. Position numbers that older versions saved are dropped.
    """
    renamed = {_renamed(name): tensor for name, tensor in state.items() if not name.endswith("position_ids")}
    head = "model.cls.predictions"
    if f"{head}.bias" in renamed:
        renamed.setdefault(f"{head}.decoder.bias", renamed[f"{head}.bias"])
    if "model.bert.embeddings.word_embeddings.weight" in renamed:
        renamed.setdefault(f"{head}.decoder.weight", renamed["model.bert.embeddings.word_embeddings.weight"])
    return renamed


def _renamed(name: str) -> str:
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name
