"""Decoding, folders of every layout, manifests, shards, and the embedded sets' decoders."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from unmask.core.data import headers, splits
from unmask.core.data.carriers import list_sets
from unmask.core.data.kinds import CorruptSampleError
from unmask.core.data.shards import Window
from unmask.core.errors import UnmaskError
from unmask.core.randomness import stable_id
from unmask.speech_audio.data.clips import Settings, SourceError, open_split
from unmask.speech_audio.data.decode import Header, examine, ratio, read, resample
from unmask.speech_audio.data.embedded import sets as embedded
from unmask.speech_audio.data.embedded.soundfont import SoundFont
from unmask.speech_audio.data.sources import CLIPS, open_source

FORMATS = [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, shape).astype(np.float32)


def encoded(audio: np.ndarray, rate: int = 16_000, kind: str = "WAV", subtype: str | None = None) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, audio, rate, format=kind, subtype=subtype)
    return stream.getvalue()


def write(path: Path, samples: int = 2_000, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(noise(seed, samples), kind=path.suffix[1:].upper()))
    return path


def opened(source: Path | str, split: str = "all", **changes):
    return open_split(Settings(str(source), **{"min_seconds": 0.1, "val_share": 0.2, **changes}), split)


# Decoding


@pytest.mark.parametrize(("kind", "subtype"), FORMATS)
@pytest.mark.parametrize("rate", [16_000, 8_000, 44_100])
def test_a_part_is_the_same_as_in_the_whole(kind, subtype, rate):
    data = encoded(noise(0, int(rate * 1.2), 2), rate, kind, subtype)
    header = examine(io.BytesIO(data))
    whole = read(io.BytesIO(data), header).audio
    assert len(whole) == header.samples == 19_200 and whole.dtype == torch.float32
    for start, stop in ((0, 700), (1, 2), (7_001, 12_345), (18_000, 19_200)):
        part = read(io.BytesIO(data), header, start, stop).audio
        torch.testing.assert_close(part, whole[start:stop], rtol=0, atol=3e-7)


def test_channels_are_averaged_and_rates_resampled():
    stereo = noise(0, 4_000, 2)
    data = encoded(stereo, subtype="FLOAT")
    torch.testing.assert_close(read(io.BytesIO(data), examine(io.BytesIO(data))).audio.numpy(), stereo.mean(1))
    time = np.arange(48_000) / 48_000
    data = encoded(0.5 * np.sin(2 * np.pi * 1_000 * time), 48_000, subtype="FLOAT")
    expected = 0.5 * torch.sin(2 * torch.pi * 1_000 * torch.arange(16_000) / 16_000)
    audio = read(io.BytesIO(data), examine(io.BytesIO(data))).audio
    torch.testing.assert_close(audio[200:-200], expected[200:-200], rtol=0, atol=2e-3)


def test_odd_rates_take_little_memory():
    exact = {8_000: "1/2", 16_000: "1", 44_100: "441/160", 11_025: "441/640", 48_000: "3"}
    assert {rate: str(ratio(rate)) for rate in exact} == exact
    for rate in (*range(15_950, 16_050), *range(22_000, 22_100)):
        assert ratio(rate).denominator <= 640 and abs(float(ratio(rate)) * 16_000 / rate - 1) < 8e-4
    assert len(resample(torch.zeros(22_051), 22_051)) == Header(22_051, 22_051).samples == 16_000


@pytest.mark.parametrize(("kind", "subtype"), FORMATS)
@pytest.mark.parametrize("share", [0.5, 0.95])
def test_cut_off_files_are_found_from_their_headers(kind, subtype, share):
    data = encoded(noise(0, 40_000), kind=kind, subtype=subtype)
    with pytest.raises(CorruptSampleError, match="cut off|damaged|ends"):
        examine(io.BytesIO(data[: int(share * len(data))]))


def test_wavs_written_to_a_pipe_are_no_errors():
    data = bytearray(encoded(noise(0, 2_000)))
    at = data.find(b"data") + 4
    data[at : at + 4] = struct.pack("<I", 0xFFFFFFFF)
    assert examine(io.BytesIO(bytes(data))).frames == 2_000


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "empty file"), (b"hello" * 99, "not audio"), (encoded(noise(0, 0)), "holds no samples")],
)
def test_files_that_are_no_audio(data, reason):
    with pytest.raises(CorruptSampleError, match=reason):
        examine(io.BytesIO(data))


def test_damage_in_the_middle_is_an_error():
    data = bytearray(encoded(noise(0, 40_000), kind="FLAC"))
    header = examine(io.BytesIO(bytes(data)))
    data[len(data) // 2 : len(data) // 2 + 4_000] = bytes(4_000)
    with pytest.raises(CorruptSampleError, match="damaged"):
        read(io.BytesIO(bytes(data)), header)


def test_clipping_is_measured():
    half = np.concatenate([np.ones(500), noise(0, 500)]).astype(np.float32)
    data = encoded(half)
    assert read(io.BytesIO(data), examine(io.BytesIO(data))).clipped == 0.5


# Layouts


def test_any_nesting_without_labels_and_classes_from_folders(tmp_path):
    for i, name in enumerate(("a.wav", "x/b.flac", "x/y/c.ogg", "x/y/z/d.mp3", ".hidden/e.wav")):
        write(tmp_path / "f" / name, seed=i)
    clips = opened(tmp_path / "f")
    assert len(clips) == 4 and clips.labels == {} and clips.texts == [None] * 4
    assert clips.name_of(stable_id("x/y/c.ogg")) == "x/y/c.ogg"
    for label in ("cat", "dog"):
        for i in range(10):
            write(tmp_path / "g" / label / f"{i}.wav", seed=i)
    found = {name: opened(tmp_path / "g", name) for name in ("train", "val", "test")}
    assert found["train"].classes == {"class": ["cat", "dog"]}
    assert {name: clips.labels["class"].bincount().tolist() for name, clips in found.items()} == {
        "train": [6, 6],
        "val": [2, 2],
        "test": [2, 2],
    }


def test_split_folders(tmp_path):
    for name in ("train/a.wav", "train/b.wav", "dev/c.wav", "test/d.wav"):
        write(tmp_path / "f" / name)
    for split, names in {"train": ["train/a.wav", "train/b.wav"], "val": ["dev/c.wav"], "test": ["test/d.wav"]}.items():
        clips = opened(tmp_path / "f", split)
        assert [clips.name_of(int(i)) for i in clips.ids] == names and clips.labels == {}


def test_librispeech(tmp_path):
    for part, speakers in {"train-clean-100": (19, 26, 27), "dev-clean": (84,), "test-other": (61,)}.items():
        for speaker in speakers:
            place = tmp_path / "LibriSpeech" / part / str(speaker) / "123"
            lines = []
            for i in range(2):
                write(place / f"{speaker}-123-{i:04}.flac")
                lines.append(f"{speaker}-123-{i:04} WORD {i} OF {speaker}")
            (place / f"{speaker}-123.trans.txt").write_text("\n".join(lines))
    clips = opened(tmp_path / "LibriSpeech")
    assert clips.classes == {"speaker": ["19", "26", "27", "61", "84"]} and len(clips) == 10
    at = clips.ids.tolist().index(stable_id("train-clean-100/26/123/26-123-0001.flac"))
    assert clips.texts[at] == "WORD 1 OF 26" and clips.labels["speaker"][at] == 1
    assert [len(opened(tmp_path / "LibriSpeech", name)) for name in ("train", "val", "test")] == [6, 2, 2]
    assert len(opened(tmp_path / "LibriSpeech" / "dev-clean")) == 2  # one speaker: split by clip


def test_a_stray_recording_does_not_cost_a_corpus_its_speakers(tmp_path):
    """One in a hundred files may be something else; it belongs to no speaker."""
    for part, speakers in {"train-clean-100": range(1, 7), "dev-clean": (7,), "test-clean": (8,)}.items():
        for speaker in speakers:
            for i in range(15):
                write(tmp_path / "f" / part / str(speaker) / "9" / f"{speaker}-9-{i:04}.wav")
    write(tmp_path / "f" / "noise.wav")
    clips = opened(tmp_path / "f")
    assert clips.classes == {"speaker": [str(i) for i in range(1, 9)]}
    assert clips.labels["speaker"][clips.ids.tolist().index(stable_id("noise.wav"))] == -1
    assert [len(opened(tmp_path / "f", name)) for name in ("train", "val", "test")] == [91, 15, 15]


def test_mls(tmp_path):
    for part, speakers in {"train": (10, 11, 12), "dev": (13,), "test": (14,)}.items():
        lines = []
        for speaker in speakers:
            for i in range(2):
                name = f"{speaker}_7_{i:06}"
                write(tmp_path / "mls" / part / "audio" / str(speaker) / "7" / f"{name}.flac")
                lines.append(f"{name}\tmot {i} de {speaker}")
        (tmp_path / "mls" / part / "transcripts.txt").write_text("\n".join(lines))
    clips = opened(tmp_path / "mls")
    assert clips.classes == {"speaker": ["10", "11", "12", "13", "14"]} and "mot 1 de 11" in clips.texts
    assert [len(opened(tmp_path / "mls", name)) for name in ("train", "val", "test")] == [6, 2, 2]


def test_one_librispeech_part_is_split_by_speaker(tmp_path):
    for speaker in range(1, 11):
        for i in range(3):
            write(tmp_path / "f" / str(speaker) / "7" / f"{speaker}-7-{i:04}.wav", seed=i)
    found = {name: opened(tmp_path / "f", name) for name in ("train", "val", "test")}
    speakers = [set(clips.labels["speaker"].tolist()) for clips in found.values()]
    assert [len(s) for s in speakers] == [6, 2, 2] and not speakers[0] & speakers[1] and not speakers[1] & speakers[2]


def test_libri_light(tmp_path):
    for speaker in ("100", "200"):
        for i in range(2):
            place = write(tmp_path / "small" / speaker / "a_book_64kb" / f"chapter_{i}.flac")
            place.with_suffix(".json").write_text("{}")
    clips = opened(tmp_path / "small")
    assert clips.classes == {"speaker": ["100", "200"]} and clips.labels["speaker"].tolist() == [0, 0, 1, 1]


def test_common_voice(tmp_path):
    root = tmp_path / "cv" / "en"
    head = "client_id\tpath\tsentence\tup_votes"
    for part, names in {"train": ("a", "b", "c"), "dev": ("d",), "test": ("e",)}.items():
        rows = [f"speaker {name}\t{name}.mp3\tSay “{name}”.\t2" for name in names]
        for name in names:
            write(root / "clips" / f"{name}.mp3")
        (root / f"{part}.tsv").write_text("\n".join([head, *rows]), encoding="utf-8")
    write(root / "clips" / "invalidated.mp3")
    (root / "clips" / "c.mp3").unlink()
    clips = opened(root)
    assert [clips.name_of(int(i)) for i in clips.ids] == [f"clips/{name}.mp3" for name in "abde"]
    assert clips.texts[0] == "Say “a”." and clips.classes["speaker"][0] == "speaker a"
    assert clips.problems == [("clips/c.mp3", "No such file or directory")]
    assert [len(opened(root, name)) for name in ("train", "val", "test")] == [2, 1, 1]
    for part in ("train", "dev", "test"):
        (root / f"{part}.tsv").rename(root / ("validated.tsv" if part == "dev" else f"{part}.old"))
    assert len(opened(root)) == 1


def test_sentences_of_common_voice_may_hold_any_character(tmp_path):
    for name in "ab":
        write(tmp_path / "clips" / f"{name}.mp3")
    rows = ["client_id\tpath\tsentence", "x\ta.mp3\tone\u2028two\x85three", "", "broken", "y\tb.mp3\tfour", ""]
    (tmp_path / "train.tsv").write_text("\n".join(rows), encoding="utf-8")
    assert opened(tmp_path).texts == ["one\u2028two\x85three", "four"]


def test_names_that_cannot_be_used_are_problems(tmp_path):
    write(tmp_path / "f" / "日本 ü.wav")
    os.rename(write(tmp_path / "f" / "b.wav"), os.fsencode(tmp_path / "f") + b"/\xff.wav")
    clips = opened(tmp_path / "f")
    assert clips.name_of(int(clips.ids[0])) == "日本 ü.wav"
    assert clips.problems == [("\\udcff.wav", "its name is not UTF-8: rename it")]
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.add(tmp_path / "f" / "日本 ü.wav", "a.wav")
        tar.add(tmp_path / "f" / "日本 ü.wav", "\udcff.wav")
    assert opened(tmp_path / "s.tar").problems == [("s.tar/\\udcff", "its name is not UTF-8: rename it")]
    (tmp_path / "nul.tsv").write_text(f"{tmp_path}/f\n日本 ü.wav\t2000\na\0.wav\t2000\n")
    assert opened(tmp_path / "nul.tsv").problems == [("a\0.wav", "no file can have this name (embedded null byte)")]


def test_a_large_manifest_with_a_name_twice_is_refused_at_once(tmp_path):
    rows = [f"{i}.wav\t9" for i in range(200_000)]
    (tmp_path / "m.tsv").write_text("\n".join([str(tmp_path), *rows, rows[-1]]))
    before = time.perf_counter()
    with pytest.raises(SourceError, match=r"199999.wav is there twice"):
        opened(tmp_path / "m.tsv")
    assert time.perf_counter() - before < 10


def test_manifests(tmp_path):
    for i in range(6):
        write(tmp_path / "audio" / f"{i}.wav", samples=2_000 + i, seed=i)
    rows = [f"{i}.wav\t{2_000 + i}" for i in range(6)]
    (tmp_path / "m").mkdir()
    one = tmp_path / "m" / "train.tsv"
    one.write_text("\n".join([str(tmp_path / "audio"), *rows[:4]]))
    clips = opened(one)
    assert len(clips) == 4 and clips.lengths.tolist() == [2_000, 2_001, 2_002, 2_003]
    (tmp_path / "m" / "valid.tsv").write_text("\n".join([str(tmp_path / "audio"), *rows[4:], ""]))
    assert [len(opened(tmp_path / "m", name)) for name in ("train", "val")] == [4, 2]
    (tmp_path / "m" / "valid.tsv").write_text("\n".join([str(tmp_path / "audio"), "4.wav\t9", "9.wav\t7", rows[5]]))
    assert opened(tmp_path / "m").problems == [
        ("4.wav", "has 2004 samples, the manifest says 9"),
        ("9.wav", "No such file or directory"),
    ]
    for text, message in {
        "": "a folder in the first line, which is empty",
        f"{tmp_path}/audio\n0.wav 2000": "line 2: expected path<tab>samples",
        f"{tmp_path}/audio\n0.wav\t2000\n0.wav\t2000": "0.wav is there twice",
        f"{tmp_path}/nowhere\n0.wav\t2000": "nowhere, does not exist",
        f"{tmp_path}/audio\n": "lists none",
    }.items():
        one.write_text(text)
        with pytest.raises(SourceError, match=message):
            opened(one)


# Shards


def shard(path: Path, n: int, first: int = 0, **beside: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i in range(first, first + n):
            audio = encoded(noise(i, 4_000 + i), kind="FLAC")
            files = {"flac": audio, "txt": f"text {i}".encode(), "pkl": b"never read"}
            files["json"] = json.dumps({"speaker": i % 4, "label": f"class {i % 2}"}).encode()
            for suffix, content in files.items():
                member = tarfile.TarInfo(f"{i:04}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def test_shards(tmp_path):
    for k in range(2):
        shard(tmp_path / "s" / f"part-{k}.tar", 6, 6 * k)
    clips = opened(tmp_path / "s")
    assert len(clips) == 12 and clips.lengths.tolist() == [4_000 + i for i in range(12)]
    assert clips.classes == {"speaker": ["0", "1", "2", "3"], "class": ["class 0", "class 1"]}
    assert clips.labels["speaker"].tolist() == [i % 4 for i in range(12)] and clips.texts[3] == "text 3"
    assert clips.name_of(int(clips.ids[7])) == "part-1.tar/0007"
    expected = torch.from_numpy(noise(7, 4_007))[:4_007]
    torch.testing.assert_close(clips[7, 0].audio, expected, rtol=0, atol=1e-4)
    train, val = (set(opened(tmp_path / "s", name).labels["speaker"].tolist()) for name in ("train", "val"))
    assert train and val and not train & val


def test_shards_named_after_splits_and_cut_off(tmp_path):
    shard(tmp_path / "s" / "train-000.tar", 4)
    place = shard(tmp_path / "s" / "test-000.tar", 4, 4)
    assert len(opened(tmp_path / "s", "test")) == 4
    place.write_bytes(place.read_bytes()[:16_000])
    clips = opened(tmp_path / "s")
    assert 4 < len(clips) < 8 and "shard" in clips.problems[0].reason
    write(tmp_path / "s" / "a.wav")
    with pytest.raises(SourceError, match="holds 2 .tar and 1 clip files"):
        opened(tmp_path / "s")


def test_a_window_is_a_file():
    window = Window(io.BytesIO(bytes(range(100))), 10, 20)
    assert window.read(3) == bytes([10, 11, 12]) and window.tell() == 3
    assert window.seek(-2, io.SEEK_END) == 18 and window.read() == bytes([28, 29])
    assert window.read(5) == b"" and window.seek(0) == 0 and window.seek(4, io.SEEK_CUR) == 4


# Headers


def test_headers_are_looked_at_once(tmp_path, monkeypatch):
    names = [write(tmp_path / "f" / f"{i}.wav", seed=i).name for i in range(3)]
    (tmp_path / "f" / "bad.wav").write_bytes(b"")
    first = headers.scan(tmp_path / "f", [*names, "bad.wav", "gone.wav"], CLIPS)
    assert first[3:] == ["empty file", "No such file or directory"]
    real = headers.examine
    monkeypatch.setattr(headers, "examine", lambda *_: pytest.fail("looked again"))
    assert headers.scan(tmp_path / "f", [*names, "bad.wav"], CLIPS) == first[:4]
    monkeypatch.setattr(headers, "examine", real)
    write(tmp_path / "f" / "1.wav", samples=3_000)
    assert headers.scan(tmp_path / "f", names, CLIPS)[1]["frames"] == 3_000
    for place in (tmp_path / "cache" / "headers").iterdir():
        place.write_text("{")
    assert headers.scan(tmp_path / "f", names, CLIPS)[1]["frames"] == 3_000


def test_a_source_is_opened_again_only_when_it_changed(tmp_path, monkeypatch):
    root = tmp_path / "f"
    write(root / "a" / "0.wav")
    first = open_source(str(root), "skip")
    assert open_source(str(root), "skip") is first
    write(root / "a" / "1.wav")
    assert len(open_source(str(root), "skip").names) == 2
    write(root / "a" / "1.wav", samples=999)
    os.utime(root / "a" / "1.wav", ns=(1, 1))
    assert open_source(str(root), "skip").lengths.tolist() == [2_000, 999]


def test_sources_that_are_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "zips").mkdir()
    (tmp_path / "zips" / "train.tar.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.wav").write_bytes(b"")
    for source, message in {
        "empty": r"no clips in .*any depth.*notes, syllables, prompts",
        "nowhere": "does not exist",
        "zips": "train.tar.gz is compressed: unpack it",
        "bad": r"1 of 1 clips cannot be read: a.wav \(empty file\). Remove or replace them\.$",
    }.items():
        with pytest.raises(SourceError, match=message) as caught:
            opened(tmp_path / source)
        assert "\n" not in str(caught.value)
    for source, message in {"https://example.org/x.tar": "never opened", "notes+notes": "names a set twice"}.items():
        with pytest.raises(SourceError, match=message):
            opened(source)


# Splits


def test_every_class_gives_its_share_however_many_there_are():
    """A pass over all samples for each class would take minutes here."""
    labels = torch.arange(200_000) // 10
    ids = torch.randint(1 << 62, (200_000,), generator=torch.Generator().manual_seed(0))
    before = time.perf_counter()
    codes = splits.assign(ids, labels, None, 0.1, 0.2).view(-1, 10)
    assert time.perf_counter() - before < 5
    assert ((codes == splits.VAL).sum(1) == 1).all() and ((codes == splits.TEST).sum(1) == 2).all()


def test_groups_stay_together():
    groups = torch.tensor([stable_id(str(i // 4)) for i in range(100)])  # 25 of 4
    ids = torch.tensor([stable_id(f"clip {i}") for i in range(100)])
    codes = splits.assign(ids, None, None, 0.1, 0.2, groups)
    assert codes.bincount().tolist() == [72, 8, 20]
    assert (codes.reshape(25, 4) == codes.reshape(25, 4)[:, :1]).all()
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(splits.assign(ids[order], None, None, 0.1, 0.2, groups[order]), codes[order])


def test_few_or_uneven_groups():
    sizes = [50, 30, 20]
    groups = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    codes = splits.assign(torch.arange(100), None, None, 0.05, 0.05, groups)
    assert sorted(codes.bincount().tolist()) == [20, 30, 50] and (codes == splits.TRAIN).sum() == 50
    one = splits.assign(torch.arange(5), None, None, 0.5, 0.5, torch.zeros(5, dtype=torch.int64))
    assert (one == splits.TRAIN).all()
    assert (splits.assign(torch.arange(100), None, None, 0.0, 0.0, groups) == splits.TRAIN).all()


# Embedded sets


def test_carriers_of_one_set_belong_together():
    sets = list_sets()
    assert [len(sets[name]) for name in embedded.EMBEDDED] == [1, 1, 10]
    assert all(carrier.registry == "pip" and len(carrier.digest) == 71 for carrier in sets["notes"])
    assert {carrier.part_of for carrier in sets["prompts"]} == {"prompts"}


def archive(place: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(place, "w") as made:
        for name, content in files.items():
            made.writestr(name, content)
    return place


def test_syllables_and_prompts_are_decoded_once(tmp_path, monkeypatch, capsys):
    names = [f"{initial}ㄚ{tone}" for initial in "ㄅㄆㄇㄈㄉ" for tone in ("", "2", "3", "4")] + ["ㄅㄜ1"]
    ogg = {
        f"usr/share/gcin-voice/ogg/{name}/{speaker}.ogg": encoded(noise(i, 5_000 + i), 44_100, "OGG")
        for i, name in enumerate(names)
        for speaker in ("3", "5")
    }
    places = {"syllables": archive(tmp_path / "syllables.whl", ogg)}
    for code in ("en", "es", "fr", "it", "ru"):
        root = f"usr/share/asterisk/sounds/{code}_X_f_Name"
        said = {"hello": "Hello.", "digits/1": "One.", "beep": "[a tone]"}
        wav = {f"{root}/{name}.wav": encoded(noise(len(name), 900), 8_000) for name in [*said, "silence/1"]}
        places[f"prompts-{code}"] = archive(tmp_path / f"{code}.whl", wav)
        text = "; Sounds\n" + "\n".join(f"{name}: {text}" for name, text in said.items())
        texts = {f"usr/share/doc/a/core-sounds-{code}.txt.gz": gzip.compress(text.encode())}
        places[f"prompts-{code}-text"] = archive(tmp_path / f"{code}-text.whl", texts)
    monkeypatch.setattr(embedded, "fetch", lambda carrier: places[carrier.name])
    clips = opened("syllables")
    assert len(clips) == 42 and clips.classes["tone"] == ["1", "2", "3", "4"]
    assert clips.classes["initial"] == sorted("ㄅㄆㄇㄈㄉ") and clips.classes["speaker"] == ["3", "5"]
    at = [clips.name_of(int(i)) for i in clips.ids].index("syllables:ㄅㄜ1/5")
    assert clips.labels["tone"][at] == -1 and clips.texts[at] == "ㄅㄜ1"
    codes = clips._source.codes.reshape(-1, 2)  # the two speakers' recordings of a syllable lie side by side
    assert torch.equal(codes[:, 0], codes[:, 1]) and {splits.TRAIN, splits.TEST} <= set(codes.flatten().tolist())
    prompts = opened("prompts+syllables")
    assert len(prompts) == 10 + 42 and prompts.labels["language"].tolist() == [0, 0, 4, 4, 1, 1, 2, 2, 3, 3] + [-1] * 42
    assert prompts.texts[0] == "One." and prompts.texts[1] == "Hello." and (prompts.labels["tone"][:10] == -1).all()
    assert set(prompts.classes["speaker"]) == {"3", "5", "English", "French", "Italian", "Russian", "Spanish"}
    assert torch.equal(prompts[10, 0].audio, clips[0, 0].audio)
    assert capsys.readouterr().err.count("decoding once") == 2


def test_note_keys_are_even_over_octaves_and_pitch_classes():
    keys = embedded.note_keys()
    assert len(set(keys)) == 24 and min(keys) >= 36 and max(keys) <= 83
    assert np.bincount([key % 12 for key in keys]).tolist() == [2] * 12
    assert np.bincount([(key - 36) // 12 for key in keys]).tolist() == [6] * 4


def sound_font(wave: np.ndarray, programs: tuple[int, ...] = (5,), mode: int = 1) -> bytes:
    """Programs of one instrument with one recording, of key 60 at 32 kHz, looped from sample 1,000 to 2,000."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return name + struct.pack("<I", len(content)) + content

    def records(form: str, *rows: tuple) -> bytes:
        return b"".join(struct.pack(form, *row) for row in rows)

    n = len(programs)
    tables = {
        b"phdr": records(
            "<20sHHHIII",
            *((b"Toy", program, 0, i, 0, 0, 0) for i, program in enumerate(programs)),
            (b"", 0, 0, n, 0, 0, 0),
        ),
        b"pbag": records("<HH", *((i, 0) for i in range(n + 1))),
        b"pgen": records("<Hh", *[(41, 0)] * n, (0, 0)),
        b"inst": records("<20sH", (b"Toy", 0), (b"", 1)),
        b"ibag": records("<HH", (0, 0), (3, 0)),
        b"igen": records("<Hh", (54, mode), (43, 0x4F00), (53, 0), (0, 0)),  # loop, keys 0 to 79, recording
        b"shdr": records("<20sIIIIIBbHH", (b"Toy", 0, len(wave), 1_000, 2_000, 32_000, 60, 0, 0, 1), (b"", *[0] * 9)),
    }
    pdta = b"pdta" + b"".join(chunk(name, content) for name, content in tables.items())
    sdta = b"sdta" + chunk(b"smpl", wave.astype("<i2").tobytes())
    content = b"sfbk" + chunk(b"LIST", sdta) + chunk(b"LIST", pdta)
    return b"RIFF" + struct.pack("<I", len(content)) + content


def pitch_of(audio: torch.Tensor) -> float:
    spectrum = torch.fft.rfft(audio * torch.hann_window(len(audio))).abs()
    return float(spectrum.argmax()) * 16_000 / len(audio)


def test_a_sound_font_plays_its_recording_at_any_pitch():
    wave = 20_000 * np.sin(2 * np.pi * np.arange(3_000) * 0.02)  # 640 Hz at 32 kHz: whole periods in the loop
    font = SoundFont(sound_font(wave))
    assert font.names == {5: "Toy"} and font.has(5, 79) and not font.has(5, 80) and not font.has(6, 60)
    for key in (48, 60, 67):
        audio = font.note(5, key)
        assert audio.shape == (16_000,) and abs(audio.abs().max() - 0.9) < 0.01
        assert abs(pitch_of(audio) - 640 * 2 ** ((key - 60) / 12)) <= 1
        assert audio[-100:-80].abs().max() > 0.01 and abs(audio[-1]) < 0.01
    once = SoundFont(sound_font(wave, mode=0)).note(5, 60)
    assert (once[1_600:] == 0).all() and (once[:1_400] != 0).any()
    with pytest.raises(UnmaskError, match="no recording for program 6, key 60"):
        font.note(6, 60)
    with pytest.raises(UnmaskError, match="not a SoundFont"):
        SoundFont(b"RIFF\0\0\0\0WAVE")


def test_notes_leave_out_what_an_instrument_cannot_play(tmp_path, monkeypatch):
    wave = 20_000 * np.sin(2 * np.pi * np.arange(3_000) * 0.02)
    font = sound_font(wave, tuple(range(8)))
    wheel = archive(tmp_path / "notes.whl", {"pretty_midi/TimGM6mb.sf2": font})
    monkeypatch.setattr(embedded, "FAMILIES", ("piano",))
    monkeypatch.setattr(embedded, "fetch", lambda carrier: wheel)
    clips = opened("notes")
    playable = [key for key in embedded.note_keys() if key < 80]
    assert len(clips) == 8 * len(playable) and clips.classes["instrument"][0] == "1 Toy"
    assert clips.classes["family"] == ["piano"] and len(clips.classes["pitch"]) == 12
    # All programs are the same here, so what is in two splits is dropped from the one for training.
    assert len(opened("notes", "train")) < 8 * len(playable) * 0.7
    left = {split: {clip.tobytes() for clip in clips_of(split)} for split in ("train", "val", "test")}
    assert not left["train"] & left["val"] and not left["val"] & left["test"] and not left["train"] & left["test"]


def clips_of(split: str) -> list[np.ndarray]:
    clips = opened("notes", split)
    return [clips.waveform(i).numpy() for i in range(len(clips))]
