"""Long recordings as segments: what is cut where, that an epoch hears all of it, labels, splits, and what is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from unmask.core.randomness import stable_id
from unmask.core.training.launch import open_data
from unmask.core.training.position import Position, data_digest
from unmask.core.training.recipe import make_recipe
from unmask.speech_audio.data import decode
from unmask.speech_audio.data.clips import Clips, Settings, open_split, resolve
from unmask.speech_audio.data.frames import num_frames
from unmask.speech_audio.data.labels import LabelError, Target
from unmask.speech_audio.data.segments import cut
from unmask.speech_audio.data.sources import Source
from unmask.speech_audio.targets.clustering import sample_frames
from unmask.speech_audio.targets.features import WaveformFeature, mfcc
from unmask.speech_audio.targets.labels import LabelWriter
from unmask.speech_audio.targets.make import KMeansSettings, TargetSettings, make_labels

RATE = 16_000
LAYER, MFCC = Target("layer 6", 100_000, 50.0, "bb"), Target("mfcc", 100_000, 100.0, "aa")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))


def folder(root: Path, seconds: list[float], suffix: str = "wav", **how: str) -> Path:
    """Recordings of noise."""
    root.mkdir(parents=True, exist_ok=True)
    for i, length in enumerate(seconds):
        noise = np.random.default_rng(i).uniform(-0.5, 0.5, round(length * RATE)).astype(np.float32)
        soundfile.write(root / f"{i:02}.{suffix}", noise, RATE, **how)
    return root


def opened(source: Path, split: str = "all", augment: bool = True, **changes) -> Clips:
    settings = Settings(str(source), **{"min_seconds": 0.1, "max_seconds": 1.0, "val_share": 0.0, **changes})
    return open_split(settings, split, augment=augment)


def names(clips: Clips) -> list[str]:
    return [clips.name_of(int(i)) for i in clips.ids]


def of_lengths(*lengths: int) -> Source:
    names = [f"{i}.wav" for i in range(len(lengths))]
    return Source(names=names, lengths=torch.tensor(lengths), read=lambda *_: pytest.fail("decoded"))


# What is cut where


def test_a_recording_is_cut_into_the_fewest_even_segments(tmp_path):
    clips = opened(folder(tmp_path / "f", [2.5, 1.0, 3.0, 1.00125]))
    assert names(clips) == [
        "00.wav[0.0-0.8s]", "00.wav[0.8-1.7s]", "00.wav[1.7-2.5s]", "01.wav",
        "02.wav[0.0-1.0s]", "02.wav[1.0-2.0s]", "02.wav[2.0-3.0s]", "03.wav[0.0-0.5s]", "03.wav[0.5-1.0s]",
    ]  # fmt: skip
    assert clips.lengths.tolist() == [13_120, 13_440, 13_440, 16_000, 16_000, 16_000, 16_000, 8_000, 8_020]
    assert torch.equal(clips.lengths, clips.whole_lengths)


@pytest.mark.parametrize(
    ("shortest", "longest"), [(1_600, 16_000), (32_000, 250_000), (400, 4_000), (400, 1_000), (9_000, 10_001)]
)
def test_segments_cover_recordings_of_any_length_exactly_once(shortest, longest):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(shortest, 20 * longest, (500,), generator=generator).tolist()
    lengths += [longest - 1, longest, longest + 1, 2 * longest, 2 * longest + 1, shortest]
    found = cut(of_lengths(*lengths), shortest, longest, 0.0)
    source = found.source
    stops = found.starts + source.lengths
    assert source.lengths.min() >= shortest and source.lengths.max() <= longest
    first = torch.cat([torch.tensor([True]), found.recording[1:] != found.recording[:-1]])
    assert torch.equal(found.starts == 0, first) and torch.equal(found.starts[~first], stops[:-1][~first[1:]])
    heard = torch.zeros(len(lengths), dtype=torch.int64).index_add(0, found.recording, source.lengths)
    total = torch.tensor(lengths)
    count = found.recording.bincount()
    if 2 * (shortest + 320) <= longest:
        assert torch.equal(heard, total) and (found.starts % 320 == 0).all()
        most = longest // 320 * 320
        assert torch.equal(count, torch.where(total > longest, (total + most - 1) // most, 1))
    else:  # segments of one length where even ones would be too short
        assert (total - heard < longest).all() and (heard < total).any()
        assert (source.lengths[(heard < total)[found.recording]] == longest).all()


def test_short_recordings_keep_their_ids_and_segments_have_stable_ones(tmp_path):
    source = folder(tmp_path / "f", [2.5, 0.9, 4.0])
    clips = opened(source)
    ids = dict(zip(names(clips), clips.ids.tolist(), strict=True))
    assert ids["01.wav"] == stable_id("01.wav") and len(set(ids.values())) == len(clips) == 8
    assert ids["00.wav[0.0-0.8s]"] == 3071025582488937318 and ids["00.wav[0.8-1.7s]"] == 3944966718630628026
    assert stable_id("00.wav") not in ids.values() and min(ids.values()) >= 0
    (source / "00.wav").rename(source / "zz.wav")  # the place in the list does not matter
    assert set(opened(source).ids.tolist()) & set(ids.values()) == {
        found for name, found in ids.items() if not name.startswith("00")
    }
    everything = cut(of_lengths(*[10**9] * 20), 32_000, 250_000, 0.0).source.ids
    assert len(everything) == 20 * 4_002 == len(everything.unique())


def test_nothing_long_is_nothing_cut(tmp_path):
    source = folder(tmp_path / "f", [0.5, 1.0])
    cropped, clips = opened(source, long="crop"), opened(source)
    assert torch.equal(cropped.ids, clips.ids) and names(clips) == ["00.wav", "01.wav"]
    for index in range(2):
        assert torch.equal(cropped[index, 3].audio, clips[index, 3].audio)


def test_splits_are_by_recording(tmp_path):
    source = folder(tmp_path / "f", [2.2] * 8)
    found = {split: opened(source, split, val_share=0.25) for split in ("train", "val")}
    assert [len(clips) for clips in found.values()] == [18, 6]
    apart = [set(clips.recordings.tolist()) for clips in found.values()]
    assert not apart[0] & apart[1] and len(apart[0] | apart[1]) == 8
    uncut = opened(source, "val", val_share=0.25, long="crop")
    assert apart[1] == set(uncut.recordings.tolist())  # evaluation, which does not cut, sees the same splits


def test_classes_of_a_recording_are_those_of_its_segments(tmp_path):
    for name in ("cat", "dog"):
        folder(tmp_path / "f" / name, [1.5, 0.5])
    clips = opened(tmp_path / "f")
    assert clips.classes == {"class": ["cat", "dog"]} and clips.labels["class"].tolist() == [0, 0, 0, 1, 1, 1]


# What is heard


def test_an_epoch_hears_every_sample_exactly_once(tmp_path):
    source = folder(tmp_path / "f", [3.3, 0.7, 2.0, 1.1, 2.9])  # 4 + 1 + 2 + 2 + 3
    clips = opened(source)
    position = Position(0, len(clips), 4, 4, 6, lengths=clips.lengths)
    seen = {name: np.zeros(0, np.float32) for name in names(clips)}
    for items in list(position)[3:]:  # the second epoch
        batch = clips.__getitems__(items)
        for row, length, sample_id in zip(batch.audio, batch.lengths, batch.ids, strict=True):
            name = clips.name_of(int(sample_id))
            assert not len(seen[name])
            seen[name] = row[:length].numpy()
    for i in range(5):
        whole = soundfile.read(source / f"{i:02}.wav", dtype="float32")[0]
        assert np.array_equal(np.concatenate([x for n, x in seen.items() if n.startswith(f"{i:02}")]), whole)


@pytest.mark.parametrize(
    ("suffix", "how"), [("wav", {}), ("wav", {"subtype": "FLOAT"}), ("flac", {}), ("ogg", {}), ("mp3", {})]
)
def test_a_segment_is_read_without_the_rest(tmp_path, monkeypatch, suffix, how, capfd):
    source = folder(tmp_path / "f", [60.0], suffix, **how)
    clips = opened(source, max_seconds=2.0)
    whole = clips.segments.recordings.read(0, 0, 60 * RATE).audio
    counts: list[int] = []
    real = decode._read_frames

    def read(*args):
        counts.append(len(found := real(*args)))
        return found

    monkeypatch.setattr(decode, "_read_frames", read)
    torch.testing.assert_close(clips[20, 0].audio, whole[40 * RATE : 42 * RATE], rtol=0, atol=3e-7)
    assert sum(counts) == (12 if suffix == "mp3" else 2) * RATE
    assert capfd.readouterr().err == ""


def test_damage_costs_a_segment_and_not_the_recording(tmp_path):
    source = folder(tmp_path / "f", [3.0])
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 3 * RATE).astype(np.float32)
    noise[20_000] = np.nan
    soundfile.write(source / "00.wav", noise, RATE, subtype="FLOAT")
    clips = opened(source)
    assert [sample.id for sample in (clips[i, 0] for i in range(3))] == clips.ids[[0, 2, 2]].tolist()
    assert clips.problems == [("00.wav[1.0-2.0s]", "has NaN or infinite samples")]


def test_normalising_takes_the_segment_alone(tmp_path):
    clips = opened(folder(tmp_path / "f", [3.0]), normalise=True)
    for i in range(3):
        audio = clips[i, 0].audio
        assert abs(audio.mean()) < 1e-5 and abs(audio.var(unbiased=False) - 1) < 1e-3


# Labels


def write(out: Path, ids: list[int], lengths: list[int], target: Target) -> str:
    """Label t is t, counted from 1000 times the clip's number."""
    with LabelWriter(out, (target,), {}) as writer:
        for i, (sample_id, samples) in enumerate(zip(ids, lengths, strict=True)):
            writer.add(sample_id, 1000 * i + np.arange(samples * int(target.rate) // RATE)[:, None])
    return str(out)


@pytest.mark.parametrize("target", [LAYER, MFCC])
def test_labels_of_whole_recordings_lie_on_their_segments(tmp_path, target):
    source = folder(tmp_path / "f", [3.3, 0.7])
    whole = opened(source, long="crop")
    labels = write(tmp_path / "l", whole.ids.tolist(), whole.whole_lengths.tolist(), target)
    clips = opened(source, label_sets=(labels,))
    batch = clips.__getitems__([(i, 0) for i in range(5)])
    for i, (start, recording) in enumerate(zip(clips.segments.starts.tolist(), clips.recordings.tolist(), strict=True)):
        times = start / RATE + np.arange(num_frames(int(clips.lengths[i]))) / 50  # of the frames, in seconds
        expected = 1000 * recording + np.floor(times * target.rate + 1e-9).astype(int)
        assert batch.frames[i] == len(expected)
        assert batch.labels[i, : len(expected), 0].tolist() == expected.tolist()


def test_labels_of_segments_are_their_own_and_found_again(tmp_path):
    source = folder(tmp_path / "f", [3.3, 0.7, 2.0, 1.2])
    train = opened(source, "train", augment=False)
    few = KMeansSettings(n_init=1, max_iter=2)
    made = make_labels(TargetSettings(clusters=4, kmeans=few), train, [], tmp_path / "l", seed=0)
    assert made.ids.tolist() == sorted(train.ids.tolist()) and made.info["diagnostics"]["clips"] == 9
    settings = resolve(Settings(str(source), 0.1, 1.0, val_share=0.0, label_sets=(str(tmp_path / "l"),)))
    clips = open_split(settings, "train", augment=True)
    for i, sample_id in enumerate(clips.ids.tolist()):
        labels = made.get(sample_id)
        assert len(labels) == len(mfcc(clips.waveform(i)))  # 100 a second
        batch = clips.__getitems__([(i, 0)])
        assert batch.labels[0, :, 0].tolist() == labels[: 2 * int(batch.frames[0]) : 2, 0].tolist()


def test_label_sets_that_do_not_fit_the_segments_are_refused(tmp_path):
    source = folder(tmp_path / "f", [3.3, 0.7])
    plain = Settings(str(source), 0.1, 1.0, val_share=0.0)
    whole = opened(source, long="crop")
    good = write(tmp_path / "good", whole.ids.tolist(), whole.whole_lengths.tolist(), LAYER)
    assert resolve(Settings(str(source), 0.1, 1.0, val_share=0.0, label_sets=(good,))).targets == (LAYER,)
    short = write(tmp_path / "short", whole.ids.tolist(), [RATE, 11_200], LAYER)
    with pytest.raises(LabelError, match=r"50 labels for 00.wav of .* lasts 3.30 s"):
        resolve(Settings(str(source), 0.1, 1.0, val_share=0.0, label_sets=(short,)))
    segments = open_split(plain, "all")
    cuts = write(tmp_path / "cuts", segments.ids.tolist(), segments.lengths.tolist(), LAYER)
    with pytest.raises(LabelError, match="1 of 2 clips of .* have no labels .* the first is 00.wav. Make the labels"):
        resolve(Settings(str(source), 0.1, 0.5, val_share=0.0, label_sets=(cuts,)))
    with pytest.raises(LabelError, match=r"labels for 00.wav\[0.0-1.6s\] of"):
        resolve(Settings(str(source), 0.1, 2.0, val_share=0.0, label_sets=(cuts,)))


def test_features_hold_a_segment_at_a_time(tmp_path):
    clips = opened(folder(tmp_path / "f", [8.0]), augment=False)
    longest = 0

    def watched(waveform):
        nonlocal longest
        longest = max(longest, len(waveform))
        return mfcc(waveform)

    frames = sample_frames(clips, WaveformFeature("mfcc", 39, watched), max_frames=10_000)
    assert longest == RATE and len(frames) == 8 * 98


# What is said, and runs


def test_ten_long_recordings_fill_batches_and_it_is_said(tmp_path):
    source = folder(tmp_path / "f", [6.0] * 10)
    raw = {
        "method": "speech_audio/hubert",
        "model": {"encoder": {"channels": 8, "dim": 16, "depth": 1, "heads": 1}},
        "data": {"source": str(source), "min_seconds": 0.1, "max_seconds": 1.0, "val_share": 0.1},
        "training": {"batch_size": 18},
    }
    said: list[str] = []
    _, train, val, _ = open_data(make_recipe(raw, try_build=False), said.append)
    assert len(train) == 54 and len(val) == 6
    assert said == ["to train on: 9 recordings, 0.9 min, in 54 segments of up to 1 s; an epoch hears all of it"]
    steps = list(Position(0, len(train), 18, 18, 6, lengths=train.lengths))
    assert [len(items) for items in steps] == [18] * 6
    on = list(Position(0, len(train), 18, 18, 6, start=2, lengths=open_split(train.settings, "train").lengths))
    assert on == steps[2:] and data_digest(open_split(train.settings, "train")) == data_digest(train)


@pytest.mark.parametrize(
    ("changes", "batch", "message"),
    [
        ({}, 2, "3 recordings, 0.2 min, in 12 segments of up to 1 s; an epoch hears all of it"),
        ({"max_seconds": 4.0}, 1, "3 recordings, 0.2 min; an epoch hears all of it"),
        ({"long": "crop"}, 3, "3 recordings, 0.2 min; an epoch hears about 25 % of it (of longer ones a crop of 1 s; "),
        ({"batching": "crop"}, 1, "hears at most 100 % of it (batches are cut to their shortest clip; "),
        ({}, 5, "about 83.3 % of it (2 of 12 do not fill a batch of 5, others in each epoch)"),
        ({"min_seconds": 2.5, "max_seconds": 3.0}, 3, "about 75 % of it (ends shorter than data.min_seconds are left"),
        ({}, 100, "hears all of it"),
    ],
)
def test_what_an_epoch_hears(tmp_path, changes, batch, message):
    assert message in opened(folder(tmp_path / "f", [4.0] * 3), **changes).notes(batch)[0]


def test_the_remedies_of_the_summary_help(tmp_path):
    source = folder(tmp_path / "f", [4.0] * 3)
    assert "data.long=segments takes all" in opened(source, long="crop").notes(1)[0]
    assert opened(source, long="segments").notes(1)[0].endswith("an epoch hears all of it")
    assert "data.batching=pad does not" in opened(source, batching="crop").notes(1)[0]
    assert opened(source, batching="pad").notes(1)[0].endswith("an epoch hears all of it")
