"""What the documents tell people to type exists and runs."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from unmask.core import cli

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/tutorials/*.md"), *ROOT.glob("packages/*/*.md")]
)


def blocks(path: Path, *languages: str) -> list[str]:
    """The fenced code blocks in one of the languages ("" is plain)."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [block for language, block in found if language in languages]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_their_options_exist(path: Path) -> None:
    commands = get_command(cli.app).commands  # type: ignore[attr-defined]
    text = "\n".join([*blocks(path, "", "bash"), *re.findall(r"`(unmask [^`\n]+)`", path.read_text(encoding="utf-8"))])
    for line in text.splitlines():
        words = shlex.split(line.replace("...", "").replace("[", "").replace("]", ""), comments=True)
        if len(words) < 2 or words[0] != "unmask" or "|" in line:
            continue
        assert words[1] in commands, f"{path.name}: {line}"
        known = {
            name for parameter in commands[words[1]].params for name in (*parameter.opts, *parameter.secondary_opts)
        }
        assert {word for word in words if word.startswith("--")} <= known | {"--help"}, f"{path.name}: {line}"


def test_makefile_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in DOCUMENTS:
        for block in blocks(path, "", "bash"):
            named = re.findall(r"^make ([a-z-]+)", block, re.MULTILINE)
            assert set(named) <= targets, path.name


def test_the_masking_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = blocks(ROOT / "docs/tutorials/new-masking.md", "python")
    (tmp_path / "columns.py").write_text(first)
    (tmp_path / "use.py").write_text(second)
    monkeypatch.syspath_prepend(tmp_path)
    ran = runpy.run_path(str(tmp_path / "use.py"))
    hidden = ran["plan"].mask.hidden.view(8, 8, 8)
    assert (hidden == hidden[:, :1]).all()
    assert (hidden[:, 0].sum(1) == 4).all()
    assert ran["model"].decoder_pred.weight.grad is not None
