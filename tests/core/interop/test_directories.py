"""A wrong directory is one clear line, and only what can be an id is looked up on the hub."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from unmask.core.errors import UnmaskError
from unmask.core.interop.directories import directory, is_run, read_config


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, list[str]]]:
    """What is asked of the hub, which has one model."""
    hub = pytest.importorskip("huggingface_hub")
    names: list[tuple[str, list[str]]] = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        names.append((name, allow_patterns))
        if name != "somebody/model":
            raise OSError("offline\nand more")
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    return names


def test_ids_of_the_hub(asked: list[tuple[str, list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert directory("somebody/model", ["config.json"]) == tmp_path
    assert asked == [("somebody/model", ["config.json"])]
    with pytest.raises(UnmaskError, match=r"no directory some/other.*from the hub \(offline\)$"):
        directory("some/other", [])
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UnmaskError, match="pip install huggingface_hub"):
        directory("somebody/model", [])


def test_a_misspelt_run_is_not_looked_up(asked: list[tuple[str, list[str]]], tmp_path: Path) -> None:
    (tmp_path / "runs" / "first").mkdir(parents=True)
    with pytest.raises(UnmaskError, match=r"^runs/frist: no such file or directory; did you mean runs/first\?$"):
        directory("runs/frist", [])
    for path in (tmp_path / "nowhere", "a/b/c", "nowhere"):
        with pytest.raises(UnmaskError, match="no such file or directory"):
            directory(path, [])
    assert asked == []
    with pytest.raises(UnmaskError, match=r"no recipe.yaml.*no config.json"):
        directory("runs/first", [])
    (tmp_path / "runs" / "first" / "config.json").write_text("{}")
    assert directory("runs/first", []) == Path("runs/first")


def test_a_run_is_known_by_its_recipe(tmp_path: Path) -> None:
    assert not is_run(tmp_path)
    (tmp_path / "recipe.yaml").write_text("method: some/method")
    assert is_run(str(tmp_path))


@pytest.mark.parametrize(("text", "said"), [("{", "not readable as JSON"), ("[]", "not a model's configuration")])
def test_configurations(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UnmaskError, match=said):
        read_config(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert read_config(tmp_path / "config.json") == {"a": 1}
