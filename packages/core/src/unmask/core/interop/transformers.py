"""Directories that transformers saved: read from safetensors only, and without running code that lies in them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from unmask.core.errors import UnmaskError
from unmask.core.interop.weights import PICKLED, State, some


def check_model_type(config: Mapping[str, Any], path: str | Path, expected: str, example: str) -> None:
    """Raise an UnmaskError where a ``config.json`` is of another ``model_type``; `example` is a class with this one."""
    kind = config.get("model_type") or config.get("architecture") or "no model type"
    if kind != expected:
        raise UnmaskError(f"{path}: config.json describes {kind!r}; expected {expected!r} ({example})")


def read_transformers(kind: Any, path: str | Path, optional: Collection[str] = (), without: str = "") -> State:
    """The weights of a model by transformers' current names: reading old files' names is left to transformers.

    Args:
        kind: the model's class, such as ``BertModel``.
        path: a directory, or an id on the Hugging Face hub.
        optional: names that may be missing; left out where they are.
        without: a part that some save the model without, such as ``decoder``: the message says so where it is missing.

    Raises:
        UnmaskError: they cannot be read or are in pickles alone, or some are missing or of another shape.
    """
    pickles = [file for file in Path(path).glob("*") if file.suffix in PICKLED]
    if pickles and not any(Path(path).glob("*.safetensors")):
        raise UnmaskError(
            f"{pickles[0]}: of a transformers directory only safetensors are read. If you trust it, save it again: "
            f"{kind.__name__}.from_pretrained(...).save_pretrained(DIR) in transformers"
        )
    options = {"use_safetensors": True, "trust_remote_code": False, "dtype": torch.float32}
    try:
        model, info = kind.from_pretrained(str(path), output_loading_info=True, **options)
    except Exception as error:  # transformers and safetensors raise a dozen kinds here; all mean "not readable"
        raise UnmaskError(f"{path}: the weights cannot be read: {' '.join(str(error).split())[:300]}") from None
    wrong = [str(key[0]) if isinstance(key, tuple) else str(key) for key in info.get("mismatched_keys", ())]
    missing = sorted([*(name for name in info["missing_keys"] if name not in optional), *wrong])
    if missing:
        hint = f" (the {without} was not saved)" if without and all(without in name for name in missing) else ""
        raise UnmaskError(
            f"{path}: not the weights that its config.json describes; {len(missing)} missing or misshapen{hint}: "
            f"{some(missing)}"
        )
    return {name: tensor for name, tensor in model.state_dict().items() if name not in info["missing_keys"]}
