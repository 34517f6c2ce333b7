"""A copy of an installed package with an outsider's files added, and its command line."""

from __future__ import annotations

import io
import os
import shutil
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import pipe, start, wait

from unmask.core import registry

FILES = Path(__file__).parents[1] / "extension"


@dataclass(frozen=True)
class Said:
    """What a command answered."""

    code: int
    out: str
    err: str


class Copy:
    """A folder that is imported before what is installed, and a directory to work in.

    Args:
        root: an empty folder.
    """

    def __init__(self, root: Path) -> None:
        self.packages, self.work = root / "packages", root / "work"
        self.work.mkdir(parents=True)
        self._process: Any = None

    def add_to(self, domain: str, files: Path) -> list[str]:
        """Copy an installed domain and add files to it, none of which it has; gives their paths in the copy."""
        copy = self.packages / "unmask" / domain
        shutil.copytree(registry.domain_folder(domain), copy, ignore=shutil.ignore_patterns("__pycache__"))
        added = [str(p.relative_to(files)) for p in sorted(files.rglob("*.*")) if "__pycache__" not in p.parts]
        assert not [name for name in added if (copy / name).exists()], "an outsider's file touches another"
        shutil.copytree(files, copy, dirs_exist_ok=True)
        return added

    def install(self, domain: str, files: Path) -> None:
        """Install a whole new domain, as pip would: its files, and its entry point."""
        shutil.copytree(files, self.packages / "unmask" / domain, ignore=shutil.ignore_patterns("__pycache__"))
        about = self.packages / f"unmask_{domain}-0.1.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: unmask-{domain}\nVersion: 0.1\n")
        (about / "entry_points.txt").write_text(f"[unmask.domains]\n{domain} = unmask.{domain}\n")

    def unmask(self, *arguments: object) -> Said:
        """Run ``unmask ARGUMENTS`` in the copy's own process, in the working directory."""
        return self._ask("command", [str(a) for a in arguments])

    def check(self, code: str) -> None:
        """Run some Python there, as an outsider's test would."""
        said = self._ask("code", [code])
        assert said.code == 0, said.err

    def _ask(self, what: str, arguments: list[str]) -> Said:
        if self._process is None:
            self._here, there = pipe()
            self._process = start(_serve, self.packages, self.work, there)
        self._here.send((what, arguments))
        return self._here.recv()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._here.send(None)
            wait(self._process)


def _serve(packages: Path, work: Path, there: Any) -> None:
    """The copy's process: first on the path what was added, then one command after another."""
    sys.path.insert(0, str(packages))
    os.chdir(work)
    import torch

    torch.set_num_threads(1)
    while (asked := there.recv()) is not None:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = _run(*asked)
        there.send(Said(code, out.getvalue(), err.getvalue()))


def _run(what: str, arguments: list[str]) -> int:
    from unmask.core import cli

    try:
        if what == "code":
            exec(compile(arguments[0], "check", "exec"), {"__name__": "check"})
        else:
            sys.argv = ["unmask", *arguments]
            cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    except Exception:
        traceback.print_exc()
        return 1
    return 0
