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

import torch
from processes import pipe, start, wait
from safetensors.torch import load_file

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

    def ok(self, *arguments: object) -> str:
        """What a command prints that does what it is asked."""
        said = self.unmask(*arguments)
        assert said.code == 0, said.err
        return said.out

    def refused(self, *arguments: object) -> str:
        """What a command says that cannot do what it is asked."""
        said = self.unmask(*arguments)
        assert said.code == 2 and "error: " in said.err, said.err
        return said.err

    def trained_and_resumed(self, method: str, *options: str) -> Path:
        """A run of six steps; one that was killed after the third goes on to the same weights, bit for bit."""
        run, cut = self.work / "runs" / method, self.work / "cut" / method
        arguments = ["--steps", 6, "--set", "training.checkpoint_every_steps=3", "--quiet", *options]
        self.ok("train", method, "--out", run, *arguments)
        shutil.copytree(run, cut)
        (cut / "model.safetensors").unlink()
        (cut / "checkpoints" / "step-00000006.safetensors").unlink()
        self.ok("train", "--resume", cut, "--quiet")
        whole, again = (load_file(path / "model.safetensors") for path in (run, cut))
        assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
        return run

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
