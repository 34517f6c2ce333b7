"""What every domain's data share: folders, headers, splits, damaged samples; tried on poems in text files."""

from __future__ import annotations

import os
import pickle
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch

from unmask.core.data import headers, stored
from unmask.core.data.carriers import CarrierError
from unmask.core.data.dataset import SplitDataset
from unmask.core.data.folders import Place, sort_classes, walk
from unmask.core.data.kinds import CorruptSampleError, Kind, SourceError, naming
from unmask.core.data.shards import Window
from unmask.core.data.sources import Source, absolute, members_of, open_files, open_shards, open_source
from unmask.core.data.splits import TRAIN
from unmask.core.errors import UnmaskError
from unmask.core.randomness import stable_id


def examine(file: BinaryIO, name: str) -> dict[str, Any]:
    head = file.read(4)
    if not head:
        raise CorruptSampleError("empty file")
    return {"first": head.decode()[0]}


POEMS = Kind("poem", (".txt", ".md"), examine, "Give a folder of poems", groups="poet")


def decode(file: Path | Window, name: str) -> str:
    text = file.read_bytes().decode()
    if "damaged" in text:
        raise CorruptSampleError("damaged")
    return text


def open_place(place: Place) -> Source:
    pack, names = place.pick(POEMS)
    return open_shards(place, names, POEMS, decode) if pack else open_files(place, names, POEMS, decode)


@dataclass(frozen=True)
class Settings:
    source: str
    corrupt: str = "skip"
    val_share: float = 0.2


class Poems(SplitDataset[str]):
    kind = POEMS

    def __getitem__(self, item: tuple[int, int]) -> str:
        return self.first_good(item[0], self.read_plain)


def opened(root: Path, corrupt: str = "skip") -> Source:
    return open_source(str(root), POEMS, open_place, corrupt=corrupt)


def split(root: Path, name: Any = "all", **changes: Any) -> Poems:
    settings = Settings(str(root), **changes)
    source = opened(root, settings.corrupt)
    return Poems(source, members_of(source, name, settings.val_share, settings.source, POEMS), settings)


def write(root: Path, *names: str, text: str = "Roses are red") -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))


# Folders


def test_only_regular_files_are_taken(tmp_path: Path) -> None:
    root = write(tmp_path / "f", "b.txt", "a/c.txt", "a-b.txt", ".hidden.txt", ".git/x.txt")
    os.mkfifo(root / "pipe.txt")
    (root / "a" / "up").symlink_to(root, target_is_directory=True)
    (root / "itself").symlink_to(root / "itself")
    (root / "gone.txt").symlink_to(root / "nowhere")
    names, folders = walk(root)
    assert set(names) == {"b.txt", "a/c.txt", "a-b.txt", "gone.txt", "itself"} and folders == [root, root / "a"]
    source = opened(root)  # would wait for ever at the pipe
    assert source.names == ["a/c.txt", "a-b.txt", "b.txt"]  # folder by folder, as paths are sorted
    assert source.problems == (("gone.txt", "No such file or directory"),)


def test_what_is_not_taken_is_counted_and_said(tmp_path: Path) -> None:
    root = write(tmp_path / "f", "a.txt", "b.MD", "c.doc", "d.doc", "e.pdf", "README", "x.1", "x.2", "x.3", "x.4")
    poems = split(root)
    assert len(poems) == 2
    said = "other files there, which are no poems: 2 .doc, 1 without a suffix, 1 .1, 1 .2, 1 .3 and 2 more kinds"
    assert poems.notes(1) == [said]
    assert split(root / "a.txt").notes(1) == []
    (root / "a.txt").unlink()
    (root / "b.MD").unlink()
    with pytest.raises(
        SourceError, match=r"no poems in .*looked for .txt .md at any depth\)\. There are 2 .doc, .* Give"
    ):
        opened(root)


def test_samples_beside_shards_are_refused(tmp_path: Path) -> None:
    root = write(tmp_path / "f", "a.txt", "b.tar", "c.tar")
    with pytest.raises(SourceError, match="holds 2 .tar and 1 poem files; give a folder with one kind"):
        opened(root)


def test_shards(tmp_path: Path) -> None:
    root = write(tmp_path / "f", "0.txt", "1.txt") / "s"
    for name in ("train-0", "val-0"):
        root.mkdir(exist_ok=True)
        with tarfile.open(root / f"{name}.tar", "w") as tar:
            tar.add(tmp_path / "f" / "0.txt", "0.txt")
            tar.add(tmp_path / "f" / "1.txt", "1.txt")
    poems = split(root, "val")
    assert [poems.name_of(i) for i in poems.ids.tolist()] == ["val-0.tar/0", "val-0.tar/1"]
    assert poems[1, 0] == "Roses are red"


def test_classes_are_sorted_as_numbers_where_they_are() -> None:
    assert sort_classes(["10", "9", "-1"]) == ["-1", "9", "10"] and sort_classes(["10", "9", "a"]) == ["10", "9", "a"]


# Opened once


def test_a_source_is_opened_once_as_long_as_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "f", "a/0.txt", "a/1.txt")
    first = opened(root)
    with monkeypatch.context() as patched:
        patched.setattr(headers, "scan", lambda *_: pytest.fail("opened again"))
        assert opened(root) is first
    write(root, "a/2.txt")
    assert len(opened(root).names) == 3
    os.utime(write(root, "a/2.txt", text="") / "a" / "2.txt", ns=(1, 1))
    assert opened(root).problems == (("a/2.txt", "empty file"),)
    os.remove(root / "a" / "1.txt")
    assert opened(root).names == ["a/0.txt"]


def test_headers_are_kept_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "f", "0.txt", "1.txt")
    first = headers.scan(root, ["0.txt", "1.txt", "gone.txt"], POEMS)
    assert first == [{"first": "R"}, {"first": "R"}, "No such file or directory"]
    write(root, "1.txt", text="Violets are blue")
    looked: list[str] = []
    real = headers.examine
    monkeypatch.setattr(headers, "examine", lambda kind, file, name: looked.append(name) or real(kind, file, name))
    assert headers.scan(root, ["0.txt", "1.txt"], POEMS) == [{"first": "R"}, {"first": "V"}] and looked == ["1.txt"]


# Errors


def test_a_sample_is_named_once() -> None:
    message = r"^a.txt: part b.txt: damaged$"
    with (
        pytest.raises(CorruptSampleError, match=message) as caught,
        naming("a.txt"),
        naming("a.txt"),
        naming("part b.txt"),
    ):
        raise CorruptSampleError("damaged")
    assert caught.value.reason == "part b.txt: damaged"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(CorruptSampleError, match=r"^a.txt: No such file"), naming("a.txt"):
        Path("/nowhere/a.txt").read_text()
    with pytest.raises(SourceError, match="a.txt: Input/output error. Put the storage right"), naming("a.txt"):
        raise OSError(5, "Input/output error")


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    for address in ("pipe:cat x.tar", "https://example.org/x.tar"):
        with pytest.raises(SourceError, match="never opened. Give a folder of poems"):
            open_source(address, POEMS, open_place, corrupt="skip")
    with pytest.raises(SourceError, match="does not exist. Give a folder of poems"):
        opened(tmp_path / "nowhere")


def test_unreadable_samples_are_fatal_where_they_should_be(tmp_path: Path) -> None:
    root = write(write(tmp_path / "f", "a.txt"), "b.txt", text="")
    assert opened(root).names == ["a.txt"]
    with pytest.raises(SourceError, match=r"1 of 2 poems cannot be read: b.txt \(empty file\).*set data.corrupt=skip"):
        opened(root, "fatal")


@pytest.mark.parametrize(
    ("name", "source", "val_share", "remedy"),
    [
        ("test", {}, 0.2, "Without labels none are set aside for testing: put poems in one folder a class"),
        ("val", {}, 0.0, "Raise data.val_share, add poems, or put some in a folder val/"),
        ("val", {"groups": ["Sappho"] * 9}, 0.2, "Those of one poet stay together, and there are 1: add more"),
        ("val", {"groups": list("abcdefghi")}, 0.0, "Raise data.val_share"),
        ("train", {"codes": torch.ones(9, dtype=torch.int8)}, 0.2, "Put some in the folder train/"),
    ],
)
def test_an_empty_split_says_what_to_do(name: Any, source: dict[str, Any], val_share: float, remedy: str) -> None:
    found = Source([f"{i}.txt" for i in range(9)], decode, **source)
    with pytest.raises(SourceError, match=f"^mine has no {name} poems. {remedy}"):
        members_of(found, name, val_share, "mine", POEMS)


def test_members_that_are_left_out_of_every_split() -> None:
    found = Source([f"{i}.txt" for i in range(9)], decode)
    usable = torch.arange(9) != 4
    assert 4 not in members_of(found, "all", 0.2, "mine", POEMS, usable).tolist()
    codes = found.splits(0.2)
    expected = ((codes == TRAIN) & usable).nonzero()[:, 0]
    assert torch.equal(members_of(found, "train", 0.2, "mine", POEMS, usable), expected)
    with pytest.raises(SourceError, match="^mine has no val poems. They are all bad: write better ones"):
        members_of(found, "val", 0.2, "mine", POEMS, codes == TRAIN, "They are all bad: write better ones")


def test_a_source_becomes_absolute_unless_it_is_a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute(Settings("odes"), ("odes",)).source == "odes"
    assert absolute(Settings("odes")).source == str(tmp_path / "odes")


# Damaged samples


def test_a_damaged_sample_is_skipped_named_and_not_read_again(tmp_path: Path) -> None:
    root = write(write(tmp_path / "f", "a.txt", "c.txt"), "b.txt", text="it is damaged")
    poems = split(root)
    assert poems[1, 0] == "Roses are red" and poems.problems == [("b.txt", "damaged")]
    reads: list[int] = []
    poems.read_plain = lambda index: reads.append(index) or "read"  # type: ignore[method-assign,func-returns-value]
    assert poems[1, 1] == "read" and reads == [2]
    poems._always_damaged = lambda index: False  # type: ignore[method-assign]
    poems[1, 1]
    assert reads == [2, 1]
    with pytest.raises(UnmaskError, match=r"^b.txt: damaged. Remove or replace it, or set data.corrupt=skip.$"):
        split(root, corrupt="fatal")[1, 0]
    for name in ("a.txt", "c.txt"):
        write(root, name, text="damaged")
    with pytest.raises(SourceError, match=r"none of the 3 poems of this split can be used \(a.txt: damaged\)"):
        split(root)[2, 0]


def test_views_and_names(tmp_path: Path) -> None:
    poems = split(write(tmp_path / "f", *(f"{i}.txt" for i in range(4))))
    some = poems.view(torch.tensor([3, 1]), seed=5, augment=True)
    assert (len(some), some.seed, some.augment) == (2, 5, True) and some.ids.tolist() == poems.ids[[3, 1]].tolist()
    assert some.name_of(stable_id("3.txt")) == "3.txt" and type(some) is Poems


# Sets in the cache


def test_a_set_is_made_once(tmp_path: Path) -> None:
    place = tmp_path / "cache" / "odes"

    def build(folder: Path) -> dict[str, Any]:
        rows = [np.arange(3), np.arange(0), np.arange(10, 14)]
        stored.Ragged.write(folder, x=rows, y=[np.stack([r, -r], 1) for r in rows])
        return {"names": ["ä", "b", "c"]}

    assert stored.stored(place, build) == {"names": ["ä", "b", "c"]}
    assert stored.stored(place, lambda _: pytest.fail("made again")) == {"names": ["ä", "b", "c"]}
    found = pickle.loads(pickle.dumps(stored.Ragged(place, ("x", "y"))))
    assert found.rows(0)["y"].tolist() == [[0, 0], [1, -1], [2, -2]] and found.rows(1)["x"].tolist() == []
    assert found.rows(2, 1, 3)["x"].tolist() == [11, 12] and found.rows(0, 1, 99)["x"].tolist() == [1, 2]
    (place / "about.json").unlink()
    with pytest.raises(CarrierError, match="odes is damaged; delete it and try again"):
        stored.stored(place, build)
