"""Samples of a run as files, where a data kind has no form of its own; and a folder that is whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import toyland
from safetensors.torch import load_file
from torch import Tensor
from toyland.methods.plain import Plain

from unmask.core.errors import UnmaskError
from unmask.core.generation import generate
from unmask.core.training.files import new_folder
from unmask.core.training.loop import train
from unmask.core.training.recipe import load_recipe


def _named(self: Plain, count: int, seed: int) -> dict[str, Tensor]:
    return {"x": torch.full((count, 4), seed), "weights": self.head.weight.T[:count]}


def test_samples_are_one_file_of_tensors_unless_the_data_kind_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toyland.install(monkeypatch)
    run = train(load_recipe("toyland/plain", steps=2), tmp_path / "run", progress=False)
    with pytest.raises(UnmaskError, match="toyland/plain does not generate; methods that do: none is installed"):
        generate(run, tmp_path / "none")
    assert not (tmp_path / "none").exists()

    monkeypatch.setattr(Plain, "generate", _named, raising=False)
    found = load_file(generate(run, tmp_path / "named", count=3, seed=7) / "samples.safetensors")
    assert found["x"].tolist() == [[7] * 4] * 3 and found["weights"].shape == (3, 4)
    monkeypatch.setattr(Plain, "generate", lambda self, count, seed: torch.zeros(count), raising=False)
    (tmp_path / "one").mkdir()
    assert load_file(generate(run, tmp_path / "one", count=2) / "samples.safetensors")["samples"].shape == (2,)


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError, match="half way"), new_folder(out) as folder:
        (folder / "a").write_text("a")
        raise RuntimeError("half way")
    assert list(out.parent.iterdir()) == []
    with new_folder(out) as folder:
        (folder / "a").write_text("a")
    assert (out / "a").read_text() == "a"
    with pytest.raises(UnmaskError, match="not empty; give a new directory with --out"), new_folder(out):
        pass
    assert (out / "a").read_text() == "a" and list(out.parent.iterdir()) == [out]
    with pytest.raises(UnmaskError, match="cannot write"), new_folder(out / "a" / "below"):
        pass
