"""What the documents tell people to type exists and can be parsed."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest
from documents import DOCUMENTS, ROOT, blocks
from typer.main import get_command

from unmask.core import cli

# What may stand before the command line of ours: a launcher with its own options.
_LAUNCHED = re.compile(r"^(?:srun .*?|torchrun .*? -m |python .*?-m )?(?:unmask\.core\.cli|unmask)\s")


def commands_of(name: str) -> list[list[str]]:
    """The words after ``unmask`` of every command line of ours in a document, in blocks and in sentences."""
    path = DOCUMENTS[name]
    text = "\n".join([*blocks(path, "", "bash"), *re.findall(r"`(unmask [^`\n]+)`", path.read_text(encoding="utf-8"))])
    lines = [line.strip() for line in text.splitlines() if "|" not in line]
    ours = [line[found.end() :] for line in lines if (found := _LAUNCHED.match(line))]
    return [shlex.split(re.sub(r"[\[\]]|\.\.\.", "", line), comments=True) for line in ours]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_are_understood(name: str) -> None:
    commands = get_command(cli.app).commands  # type: ignore[attr-defined]
    for verb, *arguments in commands_of(name):
        assert verb in commands, f"{name}: unmask {verb}"
        try:
            commands[verb].make_context(verb, arguments)
        except Exception as error:  # click's, of which some versions of typer bring their own
            asked = type(error).__name__ in ("MissingParameter", "Exit")  # named without its arguments, or with --help
            assert asked, f"{name}: unmask {verb} {shlex.join(arguments)}: {error}"


@pytest.mark.parametrize("name", [name for name, path in DOCUMENTS.items() if blocks(path, "bash")])
def test_shell_blocks_are_shell(name: str) -> None:
    for block in blocks(DOCUMENTS[name], "bash"):
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_launched_commands_are_found() -> None:
    found = [words for words in commands_of("docs/guides/several-gpus.md") if "--resume" in words]
    assert ["train", "--resume", "$RUN"] in found
    assert len(commands_of("docs/guides/several-gpus.md")) >= 7


def test_makefile_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name, path in DOCUMENTS.items():
        for block in blocks(path, "", "bash"):
            named = re.findall(r"^make ([a-z-]+)", block, re.MULTILINE)
            assert set(named) <= targets, name
