"""Every Python block of a page runs, one after another, where a reader would run them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scans
import speech
import torch
from clips import tone
from documents import DOCUMENTS, blocks, fabricate_mae, write_photographs

PAGES = [name for name, path in DOCUMENTS.items() if blocks(path, "python")]
COMPILES = "docs/guides/add-a-method.md"  # tracing warns of what is torch's own


def prepare_readme(folder: Path) -> None:
    fabricate_mae(folder / "runs" / "mine")
    write_photographs(folder, "cat.jpg", "dog.jpg")


def prepare_images(folder: Path) -> None:
    fabricate_mae(folder / "runs" / "photos")
    write_photographs(folder, "a.jpg", "b.jpg")


def prepare_transformers(folder: Path) -> None:
    from unmask.vision.interop.export import export

    run = fabricate_mae(folder / "run")
    for name, to in (
        ("vitmae-directory", "transformers"),
        ("continued", "transformers"),
        ("continued-encoder", "timm"),
    ):
        export(run, folder / name, to)
    write_photographs(folder, "a.jpg")


def prepare_recordings(folder: Path) -> None:
    speech.fabricate(folder / "runs" / "speech")
    speech.write_wav(folder / "a.wav", tone(200, 0.3))
    speech.write_wav(folder / "b.flac", tone(300, 0.5), rate=44_100)


def prepare_ctc(folder: Path) -> None:
    from unmask.speech_audio.interop.export import export

    export(speech.fabricate(folder / "run", encoder={"channels": 64, "dim": 64}), folder / "exported")


def prepare_clouds(folder: Path) -> None:
    scans.fabricate(folder / "runs" / "clouds", scans.write_scans(folder / "clouds", {"train": 1}, las=False))
    xyz, _ = scans.scan("box", 0)
    np.save(folder / "scan.npy", xyz)
    np.column_stack([xyz, np.zeros(len(xyz))]).astype(np.float32).tofile(folder / "sweep.bin")


def prepare_texts(folder: Path) -> None:
    from unmask.core.training.loop import train
    from unmask.core.training.recipe import load_recipe

    (folder / "texts").mkdir()
    for i in range(20):
        text = " ".join(f"word{i * j % 97} of it." for j in range(200))
        (folder / "texts" / f"{i}.txt").write_text(text, encoding="utf-8")
    overrides = {"data.source": str(folder / "texts"), "data.vocabulary_size": 300, "training.batch_size": 4}
    train(load_recipe("language/meap", "tiny", overrides, steps=1), folder / "runs" / "text", progress=False)


def write_tables(folder: Path) -> None:
    for i in range(20):
        np.save(folder / f"{i}.npy", np.full((16, 3), float(i)))


PREPARE: dict[str, Callable[[Path], None]] = {
    "README.md": prepare_readme,
    "packages/vision/README.md": prepare_readme,
    "docs/tutorials/own-images.md": prepare_images,
    "docs/tutorials/continue-from-transformers.md": prepare_transformers,
    "docs/tutorials/own-recordings.md": prepare_recordings,
    "docs/tutorials/speech-ctc.md": prepare_ctc,
    "docs/tutorials/own-clouds.md": prepare_clouds,
    "docs/tutorials/own-text.md": prepare_texts,
    "docs/guides/add-a-domain.md": write_tables,
}


def columns_are_hidden(names: Mapping[str, Any]) -> None:
    hidden = names["plan"].mask.hidden.view(8, 8, 8)
    assert (hidden == hidden[:, :1]).all() and (hidden[:, 0].sum(1) == 4).all()
    assert names["model"].decoder_pred.weight.grad is not None


def ctc_learns_the_letters(names: Mapping[str, Any]) -> None:
    assert names["losses"][-1] < 0.3 < names["losses"][0]
    with torch.no_grad():
        assert sum(names["transcribe"](text) == text for text in names["texts"]) >= 6


def recordings_are_vectors(names: Mapping[str, Any]) -> None:
    assert names["vectors"].shape == (2, 32)


def discs_are_trained_on(names: Mapping[str, Any]) -> None:
    assert (names["run"] / "model.safetensors").is_file()
    once, again = (names["train_set"][0, visit].image for visit in (0, 1))
    assert once.max() != again.max()  # the brightness follows the visit


def tables_are_read(names: Mapping[str, Any]) -> None:
    from unmask.core.training.position import Position

    splits = {split: names["open_split"](names["Settings"]("."), split) for split in ("train", "val", "all")}
    assert [len(split) for split in splits.values()] == [18, 2, 20]
    assert set(splits["train"].names).isdisjoint(splits["val"].names)
    position = Position(seed=0, samples=18, batch_size=6, micro_batch=6, total=3)
    batch = names["collate"]([splits["train"][item] for item in next(iter(position))])
    assert batch.tables.shape == (6, 16, 3) and len(batch.ids.unique()) == 6


CHECK: dict[str, Callable[[Mapping[str, Any]], None]] = {
    "docs/tutorials/new-masking.md": columns_are_hidden,
    "docs/tutorials/speech-ctc.md": ctc_learns_the_letters,
    "docs/tutorials/own-recordings.md": recordings_are_vectors,
    "docs/guides/own-data-set.md": discs_are_trained_on,
    "docs/guides/add-a-domain.md": tables_are_read,
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.filterwarnings("ignore")) if n == COMPILES else n for n in PAGES],
)
def test_python_blocks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unchecked: None) -> None:
    """A block that begins with a file's name in a comment is that file, for later blocks to import."""
    PREPARE.get(name, lambda folder: None)(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    page = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)  # where dataclasses look up the names of types
    for number, block in enumerate(blocks(DOCUMENTS[name], "python"), start=1):
        if file := re.match(r"# (\w+)\.py\n", block):
            monkeypatch.delitem(sys.modules, file[1], raising=False)
            Path(f"{file[1]}.py").write_text(block)
        exec(compile(block, f"{name}, Python block {number}", "exec"), vars(page))
    CHECK.get(name, lambda names: None)(vars(page))


def test_every_preparation_is_of_a_page() -> None:
    assert set(PREPARE) | set(CHECK) <= set(PAGES)
