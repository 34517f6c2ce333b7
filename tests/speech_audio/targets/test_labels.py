"""Label sets: what goes in comes out, nothing half is ever seen, and every mismatch with data or model is named."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from unmask.core.randomness import stable_id
from unmask.speech_audio.data.labels import LabelError, LabelSet, Target
from unmask.speech_audio.targets.km import import_km
from unmask.speech_audio.targets.labels import LabelWriter

MFCC = Target("mfcc", 10, 100.0, "abc")


def write(out: Path, clips: dict[int, int], targets: tuple[Target, ...] = (MFCC,), **info: object) -> LabelSet:
    """A label set with so many labels per id."""
    generator = np.random.default_rng(0)
    with LabelWriter(out, targets, info) as writer:
        for sample_id, frames in clips.items():
            writer.add(sample_id, generator.integers(0, 10, (frames, len(targets))))
    return LabelSet.open(out)


def check(labels: LabelSet, ids: torch.Tensor, lengths: torch.Tensor) -> None:
    labels.check_covers(ids, lengths, "speech", lambda i: f"c{i}.wav")


# ---- round trip ----------------------------------------------------------------------------------------------------


def test_labels_come_back_whatever_the_order_they_were_written_in(tmp_path: Path) -> None:
    targets = (MFCC, Target("layer 6", 7, 100.0, "def"))
    written = {9: np.array([[1, 2], [3, 4], [9, 6]]), 2**62: np.zeros((0, 2), int), 4: np.array([[5, 0]])}
    with LabelWriter(tmp_path / "set", targets, {"teacher": "t"}) as writer:
        for sample_id, labels in written.items():
            writer.add(sample_id, labels)
        assert writer.so_far().get(9).tolist() == written[9].tolist()
        assert not (tmp_path / "set").exists()
    found = LabelSet.open(tmp_path / "set")
    assert found.targets == targets and found.rate == 100.0 and found.info == {"teacher": "t"} and len(found) == 3
    for sample_id, labels in written.items():
        assert sample_id in found and found.get(sample_id).dtype == np.int32
        np.testing.assert_array_equal(found.get(sample_id), labels)
    assert 5 not in found
    np.testing.assert_array_equal(np.load(tmp_path / "set/labels.npy"), found.labels)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set"]


def test_labels_stay_in_their_file_also_in_another_process(tmp_path: Path) -> None:
    found = write(tmp_path / "set", {1: 50_000})
    assert isinstance(found.labels, np.memmap)
    copy = pickle.dumps(found)
    assert len(copy) < 1000
    np.testing.assert_array_equal(pickle.loads(copy).get(1), found.get(1))


def test_the_digest_follows_labels_and_codebook(tmp_path: Path) -> None:
    first = write(tmp_path / "a", {1: 5, 2: 5}).digest
    assert write(tmp_path / "b", {1: 5, 2: 5}).digest == first
    others = [write(tmp_path / "c", {1: 5, 2: 6}), write(tmp_path / "d", {1: 5, 3: 5})]
    others.append(write(tmp_path / "e", {1: 5, 2: 5}, (Target("mfcc", 10, 100.0, "other"),)))
    assert len({first, *(other.digest for other in others)}) == 4


def test_an_error_or_a_kill_leaves_nothing_that_looks_like_labels(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), LabelWriter(tmp_path / "set", (MFCC,)) as writer:
        writer.add(1, np.zeros((3, 1), int))
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    (tmp_path / ".set.tmp").mkdir()  # as a kill leaves it
    (tmp_path / ".set.tmp/labels.npy").write_bytes(b"half")
    (tmp_path / "set").mkdir()  # a stage's folder is there, and empty
    assert len(write(tmp_path / "set", {1: 5})) == 1


def test_a_place_that_is_taken_is_refused_at_the_start(tmp_path: Path) -> None:
    write(tmp_path / "set", {1: 5})
    with pytest.raises(LabelError, match="holds something already"):
        LabelWriter(tmp_path / "set", (MFCC,)).__enter__()


# ---- start-up checks -----------------------------------------------------------------------------------------------


def test_a_missing_or_empty_label_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="does not exist. Make one with make_labels"):
        LabelSet.open(tmp_path / "nothing")
    with pytest.raises(LabelError, match="is empty: it holds no labels"):
        write(tmp_path / "set", {})
    with pytest.raises(LabelError, match="is empty"):
        write(tmp_path / "set", {1: 0, 2: 0})
    write(tmp_path / "set", {1: 5})
    np.save(tmp_path / "set/labels.npy", np.zeros((0, 1), np.int32))
    with pytest.raises(LabelError, match="is empty"):
        LabelSet.open(tmp_path / "set")
    with pytest.raises(LabelError, match="one or more streams of one rate"):
        LabelWriter(tmp_path / "other", (MFCC, Target("layer 6", 7, 50.0, "def")))


@pytest.mark.parametrize("name", ["labels.npy", "ids.npy", "offsets.npy", "label_set.json"])
def test_a_damaged_label_set_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path / "set", {1: 500, 2: 500})
    path = tmp_path / "set" / name
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(LabelError, match="is damaged"):
        LabelSet.open(tmp_path / "set")
    path.unlink()
    with pytest.raises(LabelError, match="missing|holds no label_set.json"):
        LabelSet.open(tmp_path / "set")


def test_tables_that_do_not_fit_each_other_are_damage_and_pickles_are_not_read(tmp_path: Path) -> None:
    write(tmp_path / "set", {1: 5, 2: 5})
    np.save(tmp_path / "set/ids.npy", np.array([2, 1]))
    with pytest.raises(LabelError, match="do not fit each other"):
        LabelSet.open(tmp_path / "set")
    np.save(tmp_path / "set/ids.npy", np.array([1, "x"], dtype=object), allow_pickle=True)
    with pytest.raises(LabelError, match="ids.npy is damaged"):
        LabelSet.open(tmp_path / "set")
    about = json.loads((tmp_path / "set/label_set.json").read_text()) | {"format": 99}
    (tmp_path / "set/label_set.json").write_text(json.dumps(about))
    with pytest.raises(LabelError, match="has format 99"):
        LabelSet.open(tmp_path / "set")


def test_a_clip_without_labels_is_named(tmp_path: Path) -> None:
    found = write(tmp_path / "set", {1: 98, 2: 98})
    with pytest.raises(LabelError, match="no labels for sample id 3"):
        found.get(3)
    ids, lengths = torch.tensor([2, 3, 1]), torch.full((3,), 16_000)
    with pytest.raises(LabelError, match=r"1 of 3 clips of speech have no labels in .*the first is c3.wav\. Make"):
        check(found, ids, lengths)
    check(found, ids[[0, 2]], lengths[:2])


@pytest.mark.parametrize(("said", "real"), [(50.0, 100), (100.0, 50)])
def test_a_label_rate_that_does_not_fit_the_durations_is_named(tmp_path: Path, said: float, real: int) -> None:
    target = Target("units", 10, said, "abc")
    found = write(tmp_path / "set", {i: i * real - 1 for i in (1, 2, 3)}, (target,))
    ids = torch.tensor([1, 2, 3])
    expected = rf"1.00 s: expected about {said:g} at the set's rate of {said:g} .* got {real - 1}.0 per second"
    with pytest.raises(LabelError, match=expected) as error:
        check(found, ids, ids * 16_000)
    assert "50 for features of a model and 100 for MFCC" in str(error.value)
    right = write(tmp_path / "right", {i: i * real - 1 for i in (1, 2, 3)}, (Target("units", 10, float(real), "abc"),))
    check(right, ids, ids * 16_000)


def test_clips_with_more_or_fewer_labels_are_named_and_unreadable_ones_need_none(tmp_path: Path) -> None:
    found = write(tmp_path / "set", {1: 5000, 2: 98, 3: 0}, unreadable=[3])
    ids, lengths = torch.tensor([1, 2, 3]), torch.tensor([800_000, 16_000, 16_000])
    check(found, ids, lengths)
    for samples in (32_000, 960_000):
        lengths[0] = samples
        with pytest.raises(LabelError, match=f"lasts {samples / 16_000:.2f} s"):
            check(found, ids, lengths)


def test_labels_out_of_range_are_named_when_written_and_when_opened(tmp_path: Path) -> None:
    for wrong in (-1, 10):
        with (
            pytest.raises(LabelError, match=r"sample id 7: labels lie between .*; expected 0 to \[9\]"),
            LabelWriter(tmp_path / "set", (MFCC,)) as writer,
        ):
            writer.add(7, np.array([[3], [wrong]]))
    found = write(tmp_path / "set", {1: 98})
    stored = np.load(tmp_path / "set/labels.npy", mmap_mode="r+")
    stored[40] = 10
    stored.flush()
    with pytest.raises(LabelError, match="labels of 'mfcc' lie between 0 and 10; expected 0 to 9"):
        check(found, torch.tensor([1]), torch.tensor([16_000]))


def test_a_clip_that_comes_twice_or_has_other_streams_is_refused(tmp_path: Path) -> None:
    with LabelWriter(tmp_path / "set", (MFCC,)) as writer:
        writer.add(7, np.zeros((3, 1), int))
        with pytest.raises(LabelError, match="sample id 7 comes twice"):
            writer.add(7, np.zeros((3, 1), int))
        with pytest.raises(LabelError, match=r"\(3, 2\); expected \[frames, 1\]"):
            writer.add(8, np.zeros((3, 2), int))


# ---- fairseq's text files ------------------------------------------------------------------------------------------


def fairseq_files(folder: Path, km: str, manifest: str = "/data\na/x.flac\t1600\nb.flac\t960\n") -> tuple[Path, Path]:
    (folder / "train.tsv").write_text(manifest)
    (folder / "train.km").write_text(km)
    return folder / "train.tsv", folder / "train.km"


def test_fairseq_labels_are_imported_by_the_path_below_the_root(tmp_path: Path) -> None:
    found = import_km(*fairseq_files(tmp_path, "0 0 3 1\n2 2\n"), 50.0, tmp_path / "set")
    assert found.get(stable_id("a/x.flac")).tolist() == [[0], [0], [3], [1]]
    assert found.get(stable_id("b.flac")).tolist() == [[2], [2]]
    assert [(t.name, t.classes, t.rate) for t in found.targets] == [("train", 4, 50.0)]
    again = import_km(*fairseq_files(tmp_path, "0 0 3 1\n2 2\n"), 50.0, tmp_path / "again", classes=100)
    assert again.targets[0].classes == 100


@pytest.mark.parametrize(
    ("km", "rate", "message"),
    [
        ("", 50.0, "holds no labels"),
        ("\n\n", 50.0, "holds no labels"),
        ("0 0 3 1\n", 50.0, "lists 2 clips and .* has 1 lines"),
        ("0 0 3 1\n2 2\n1\n", 50.0, "lists 2 clips and .* has 3 lines"),
        ("0 0 3 1\n2 x\n", 50.0, "line 2: expected whole numbers"),
        ("0 0 3 -1\n2 2\n", 50.0, r"labels lie between \[-1\]"),
        (f"{'1 ' * 30}\n2 2\n", 50.0, r"line 1 \(a/x.flac\): 30 labels for 0.10 s; expected about 5 at 50 per second"),
    ],
)
def test_what_is_wrong_with_fairseqs_files_is_named(tmp_path: Path, km: str, rate: float, message: str) -> None:
    with pytest.raises(LabelError, match=message):
        import_km(*fairseq_files(tmp_path, km), rate, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_train_and_valid_of_fairseq_make_one_set(tmp_path: Path) -> None:
    train, km = fairseq_files(tmp_path, "0 0 3 1\n2 2\n")
    (tmp_path / "valid.tsv").write_text("/data\nc.flac\t960\n")
    (tmp_path / "valid.km").write_text("4 1\n")
    manifests, kms = [train, tmp_path / "valid.tsv"], [km, str(tmp_path / "valid.km")]
    found = import_km(manifests, kms, 50.0, tmp_path / "set")
    assert len(found) == 3 and found.targets[0].classes == 5
    assert found.get(stable_id("c.flac")).tolist() == [[4], [1]]
    with pytest.raises(LabelError, match=r"2 manifests and 1 .km files"):
        import_km(manifests, km, 50.0, tmp_path / "other")
    with pytest.raises(LabelError, match="rate is 0"):
        import_km(train, km, 0, tmp_path / "other")
    km.write_bytes(b"\x93NUMPY\x01\xff")
    with pytest.raises(LabelError, match=r"train.km is not a text file"):
        import_km(train, km, 50.0, tmp_path / "other")


def test_a_wrong_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match=r"line 2: expected path<tab>samples, got 'a/x.flac 1600'"):
        import_km(*fairseq_files(tmp_path, "1 1\n", "/data\na/x.flac 1600\n"), 50.0, tmp_path / "set")
    with pytest.raises(LabelError, match="cannot be read: No such file"):
        import_km(tmp_path / "none.tsv", tmp_path / "train.km", 50.0, tmp_path / "set")
    with pytest.raises(LabelError, match="expected 0 to .1.. Give the number of classes"):
        import_km(*fairseq_files(tmp_path, "0 0 3 1\n2 2\n"), 50.0, tmp_path / "set", classes=2)
