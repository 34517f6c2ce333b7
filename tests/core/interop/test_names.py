"""Names with stars convert there and back, and every name that does not fit is listed."""

from __future__ import annotations

import pytest
import torch

from unmask.core.errors import UnmaskError
from unmask.core.interop.names import Names, prefixed

BLOCK = {"qkv.*": ("q.*", "k.*", "v.*"), "norm.*": ("ln.*",)}
NAMES = Names({"embed": ("embeddings.table",), **prefixed("blocks.*.", "layers.*.", BLOCK)}, "theirs")
OURS = {"embed": torch.rand(5, 2), "blocks.10.qkv.weight": torch.rand(6, 2), "blocks.0.norm.bias": torch.rand(2)}


def test_there_and_back_changes_no_bit() -> None:
    theirs = NAMES.to_theirs(OURS)
    assert list(theirs) == [
        "embeddings.table", "layers.10.q.weight", "layers.10.k.weight", "layers.10.v.weight", "layers.0.ln.bias",
    ]  # fmt: skip
    assert theirs["layers.10.k.weight"].equal(OURS["blocks.10.qkv.weight"][2:4])
    back = NAMES.to_ours(dict(reversed(theirs.items())))
    assert back.keys() == OURS.keys() and all(back[name].equal(tensor) for name, tensor in OURS.items())


def test_parts_of_a_joined_tensor_share_no_memory() -> None:
    parts = NAMES.to_theirs(OURS)
    parts["layers.10.q.weight"].zero_()
    assert OURS["blocks.10.qkv.weight"].ne(0).all() and parts["layers.10.k.weight"].ne(0).all()


def test_names_that_do_not_fit_are_listed() -> None:
    theirs = NAMES.to_theirs(OURS)
    del theirs["layers.10.v.weight"]
    with pytest.raises(UnmaskError, match=r"not those of theirs; unknown: odd; missing: layers\.10\.v\.weight$"):
        NAMES.to_ours({**theirs, "odd": torch.zeros(1)})
    with pytest.raises(
        UnmaskError, match=r"a model that theirs can hold; unknown: blocks\.0\.extra\.weight, embed\.x$"
    ):
        NAMES.to_theirs({**OURS, "blocks.0.extra.weight": torch.zeros(1), "embed.x": torch.zeros(1)})
