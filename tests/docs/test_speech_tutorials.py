"""The code in the speech tutorials runs, on a model of random weights."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
from clips import tone
from speech import fabricate, write_wav

from unmask.speech_audio.interop.export import export

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"


def python_of(name: str) -> str:
    (block,) = re.findall(r"^```python\n(.*?)^```$", (TUTORIALS / name).read_text(), re.MULTILINE | re.DOTALL)
    return str(block)


def test_ctc_learns_the_three_letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(fabricate(tmp_path / "run", encoder={"channels": 64, "dim": 64}), tmp_path / "exported")
    (tmp_path / "ctc.py").write_text(python_of("speech-ctc.md"))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    ran = runpy.run_path("ctc.py")
    assert ran["losses"][-1] < 0.3 < ran["losses"][0]
    with torch.no_grad():
        assert sum(ran["transcribe"](text) == text for text in ran["texts"]) >= 6


def test_features_of_recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fabricate(tmp_path / "runs" / "speech")
    write_wav(tmp_path / "a.wav", tone(200, 0.3))
    write_wav(tmp_path / "b.flac", tone(300, 0.5), rate=44_100)
    (tmp_path / "use.py").write_text(python_of("own-recordings.md"))
    monkeypatch.chdir(tmp_path)
    ran = runpy.run_path("use.py")
    assert ran["vectors"].shape == (2, 32)
