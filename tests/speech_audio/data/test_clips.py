"""Clips and batches: crops, label alignment, padding and cutting, bad clips, what `resolve` refuses."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydantic
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader

from unmask.core.errors import UnmaskError
from unmask.core.randomness import stable_id
from unmask.speech_audio.data import readers
from unmask.speech_audio.data.batches import Sample
from unmask.speech_audio.data.clips import Clips, Settings, SourceError, Target, collate, open_split, resolve
from unmask.speech_audio.data.frames import num_frames
from unmask.speech_audio.data.labels import LabelError
from unmask.speech_audio.targets.labels import LabelWriter

MFCC = Target("mfcc", 100, 100.0, "aa")
LAYER = Target("layer 6", 500, 50.0, "bb")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))


def tone(seed: int, samples: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, samples).astype(np.float32)


def folder(root: Path, lengths: list[int], rate: int = 16_000, suffix: str = "wav") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for i, samples in enumerate(lengths):
        soundfile.write(root / f"{i:02}.{suffix}", tone(i, samples), rate)
    return root


def settings(source: Path | str, **changes) -> Settings:
    defaults = {"min_seconds": 0.1, "max_seconds": 0.5, "long": "crop", "val_share": 0.2}
    return Settings(str(source), **{**defaults, **changes})


def write_labels(out: Path, clips: Clips, target: Target, seconds_less: float = 0.0) -> str:
    """Label i of a clip is i modulo the number of classes."""
    with LabelWriter(out, (target,), {}) as writer:
        for sample_id, samples in zip(clips.ids.tolist(), clips.whole_lengths.tolist(), strict=True):
            n = int((samples / 16_000 - seconds_less) * target.rate)
            writer.add(sample_id, (np.arange(n) % target.classes)[:, None])
    return str(out)


def load(clips: Clips, workers: int = 0, batch: int = 4, visit: int = 1) -> dict[int, torch.Tensor]:
    items = [(i, visit) for i in range(len(clips))]
    sampler = [items[i : i + batch] for i in range(0, len(items), batch)]
    found = {}
    for b in DataLoader(clips, batch_sampler=sampler, num_workers=workers, collate_fn=collate):
        found |= {int(i): row[:n] for i, row, n in zip(b.ids, b.audio, b.lengths, strict=True)}
    return found


# Settings


def test_settings_from_a_recipe():
    read = pydantic.TypeAdapter(Settings).validate_python
    parsed = read({"source": "notes", "min_seconds": 1, "label_sets": ["a", "b"], "batching": "crop"})
    assert parsed.min_seconds == 1.0 and parsed.label_sets == ("a", "b") and parsed.targets is None
    again = read({"source": "x", "targets": [{"name": "mfcc", "classes": 100, "rate": 100, "digest": "aa"}]})
    assert again.targets == (MFCC,)
    with pytest.raises(pydantic.ValidationError) as caught:
        read({"source": "notes", "min_seconds": -1, "val_share": 1, "batching": "bucket", "corrupt": "hide"})
    assert {error["loc"][0] for error in caught.value.errors()} == {"min_seconds", "val_share", "batching", "corrupt"}
    with pytest.raises(ValueError, match=r"max_seconds is 1, less than min_seconds=2"):
        Settings("notes", max_seconds=1.0)


# Splits


def test_splits_are_disjoint_and_the_same_for_every_seed(tmp_path):
    source = folder(tmp_path / "f", [3200] * 20)
    found = {name: open_split(settings(source), name, seed=seed) for seed, name in enumerate(("train", "val"))}
    assert [len(clips) for clips in found.values()] == [16, 4]
    assert sorted(torch.cat([clips.ids for clips in found.values()]).tolist()) == sorted(
        open_split(settings(source), "all").ids.tolist()
    )
    assert torch.equal(found["val"].ids, open_split(settings(source), "val", seed=9).ids)
    with pytest.raises(SourceError, match=r"no test clips.*one folder a class"):
        open_split(settings(source), "test")
    assert found["val"].name_of(int(found["val"].ids[0])).endswith(".wav")


def test_min_seconds_does_not_move_clips_between_splits(tmp_path):
    source = folder(tmp_path / "f", [3200, 4800] * 10)
    wide, narrow = (open_split(settings(source, min_seconds=s), "val").ids.tolist() for s in (0.1, 0.25))
    assert set(narrow) <= set(wide)


# Crops


def test_long_clips_are_cropped_by_key_in_training_and_at_the_start_otherwise(tmp_path):
    source = folder(tmp_path / "f", [16_000, 4_000])
    plain = open_split(settings(source, val_share=0), "all")
    assert plain.lengths.tolist() == [8_000, 4_000] and plain.whole_lengths.tolist() == [16_000, 4_000]
    whole = plain.waveform(0)
    assert len(whole) == 16_000 and torch.equal(plain[0, 3].audio, whole[:8_000])
    clips = open_split(settings(source, val_share=0), "all", seed=1, augment=True)
    starts = {clips[0, visit].start for visit in range(8)}
    assert len(starts) == 8 and all(0 <= start <= 8_000 for start in starts)
    sample = clips[0, 3]
    assert torch.equal(sample.audio, whole[sample.start : sample.start + 8_000])
    assert open_split(settings(source, val_share=0), "all", seed=2, augment=True)[0, 3].start != sample.start
    assert clips[1, 3].start == 0 and len(clips[1, 3].audio) == 4_000


@pytest.mark.parametrize("normalise", [False, True])
def test_same_sample_same_crop_in_any_batch_and_worker(tmp_path, normalise):
    source = folder(tmp_path / "f", [6_000 + 2_000 * i for i in range(9)], rate=22_050)
    clips = open_split(settings(source, normalise=normalise, val_share=0), "all", seed=3, augment=True)
    reference = load(clips, batch=9)
    for workers, batch in ((0, 1), (2, 2), (1, 5)):
        other = load(clips, workers, batch)
        assert reference.keys() == other.keys()
        assert all(torch.equal(reference[key], other[key]) for key in reference)


def test_the_whole_clip_is_normalised_before_it_is_cropped(tmp_path):
    source = folder(tmp_path / "f", [16_000])
    clips = open_split(settings(source, normalise=True, val_share=0), "all", augment=True)
    whole = clips.waveform(0)
    assert abs(whole.mean()) < 1e-5 and abs(whole.var(unbiased=False) - 1) < 1e-3
    sample = clips[0, 1]
    assert torch.equal(sample.audio, whole[sample.start : sample.start + 8_000])


def test_a_crop_reads_only_its_part(tmp_path, monkeypatch):
    source = folder(tmp_path / "f", [16_000 * 60])
    clips = open_split(settings(source, val_share=0), "all", augment=True)
    counts: list[int] = []
    real = soundfile.SoundFile.read

    def read(self, frames=-1, *args, **kwargs):
        found = real(self, frames, *args, **kwargs)
        counts.append(len(found))
        return found

    monkeypatch.setattr(soundfile.SoundFile, "read", read)
    assert len(clips[0, 0].audio) == 8_000 and sum(counts) == 8_000


def test_clips_travel_to_spawned_workers(tmp_path):
    source = folder(tmp_path / "f", [9_000, 3_000])
    labels = write_labels(tmp_path / "l", open_split(settings(source), "all"), LAYER)
    clips = open_split(settings(source, label_sets=(labels,), val_share=0), "train", augment=True)
    copy = pickle.loads(pickle.dumps(clips))
    assert torch.equal(copy[0, 1].audio, clips[0, 1].audio)
    assert np.array_equal(copy[0, 1].labels[0], clips[0, 1].labels[0])


# Batches


def sample(audio: torch.Tensor, start: int, *sets: tuple[np.ndarray, float], batching: str = "pad") -> Sample:
    return Sample(audio, 7, start, tuple(a for a, _ in sets), tuple(r for _, r in sets), None, batching)


@pytest.mark.parametrize("start", [0, 1, 79, 80, 81, 160, 240, 319, 12_345])
def test_labels_lie_on_the_frame_grid(start):
    mfcc, layer = np.arange(1000)[:, None], np.stack([np.arange(500), 1000 + np.arange(500)], 1)
    batch = collate([sample(torch.zeros(4_000), start, (mfcc, 100.0), (layer, 50.0))])
    frames = (4_000 - 400) // 320 + 1
    assert batch.labels.shape == (1, frames, 3) and batch.frames.tolist() == [frames] and batch.ids.tolist() == [7]
    first, second = round(start / 160), round(start / 320)
    expected = [[first + 2 * t, second + t, 1000 + second + t] for t in range(frames)]
    assert batch.labels[0].tolist() == expected


def test_a_rate_that_is_no_multiple_of_the_frame_rate():
    batch = collate([sample(torch.zeros(4_000), 500, (np.arange(300)[:, None], 75.0))])
    assert batch.labels[0, :, 0].tolist() == [2 + int(t * 1.5) for t in range(12)]  # 500 * 75 / 16000 = 2.34


def test_frames_end_where_the_labels_do():
    mfcc, layer = np.arange(19)[:, None], np.arange(11)[:, None]
    batch = collate(
        [
            sample(torch.zeros(4_000), 320, (mfcc, 100.0), (layer, 50.0)),
            sample(torch.zeros(1_000), 0, (mfcc, 100.0), (layer, 50.0)),
        ]
    )
    assert batch.frames.tolist() == [8, 2]  # (19 - 2) // 2 = 8 and 11 - 1 = 10 frames have labels; 12 have samples
    assert batch.labels[0, 7].tolist() == [16, 8] and (batch.labels[0, 8:] == -1).all()
    assert (batch.labels[1, 2:] == -1).all() and batch.labels.shape == (2, 12, 2)


def test_pad_and_crop_batches(tmp_path):
    source = folder(tmp_path / "f", [8_000, 5_000, 6_500])
    padded = open_split(settings(source, val_share=0), "all").__getitems__([(i, 0) for i in range(3)])
    assert padded.audio.shape == (3, 8_000) and padded.lengths.tolist() == [8_000, 5_000, 6_500]
    assert (padded.audio[1, 5_000:] == 0).all() and (padded.audio[1, :5_000] != 0).any()
    assert torch.equal(padded.frames, num_frames(padded.lengths)) and padded.labels is None

    labels = write_labels(tmp_path / "l", open_split(settings(source), "all"), MFCC)
    chosen = settings(source, val_share=0, batching="crop", label_sets=(labels,))
    clips = open_split(chosen, "all", augment=True)
    items = [(i, 1) for i in range(3)]
    batch = clips.__getitems__(items)
    assert batch.audio.shape == (3, 5_000) and batch.lengths.tolist() == [5_000] * 3 and batch.labels.min() >= 0
    again = collate([clips[item] for item in items])
    assert torch.equal(batch.audio, again.audio) and torch.equal(batch.labels, again.labels)
    for i, row in enumerate(batch.audio):
        whole = clips.waveform(i)
        start = next(s for s in range(len(whole) - 4_999) if torch.equal(whole[s : s + 5_000], row))
        assert batch.labels[i, :, 0].tolist() == [(round(start / 160) + 2 * t) % 100 for t in range(15)]
    assert torch.equal(open_split(chosen, "all").__getitems__(items).audio[0], clips.waveform(0)[:5_000])


# Bad clips


def test_bad_clips_are_counted_named_and_replaced(tmp_path):
    source = folder(tmp_path / "f", [4_000] * 6)
    folder(tmp_path / "f", [4_000, 300, 1_000])  # 01 has no frame, 02 is short
    (source / "empty.wav").write_bytes(b"")
    (source / "text.flac").write_bytes(b"shopping list")
    broken = tone(0, 4_000)
    broken[7] = np.nan
    soundfile.write(source / "03.wav", broken, 16_000, subtype="FLOAT")
    loud = np.clip(tone(1, 4_000) * 4, -1, 1)
    soundfile.write(source / "04.wav", loud, 16_000)
    clips = open_split(settings(source, val_share=0), "all", augment=True)
    assert [clips.name_of(int(i)) for i in clips.ids] == ["00.wav", "03.wav", "04.wav", "05.wav"]
    found = dict(clips.problems)
    assert found.keys() == {"empty.wav", "text.flac", "01.wav", "02.wav"}
    assert found["empty.wav"] == "empty file" and found["text.flac"].startswith("not audio")
    assert found["02.wav"] == "too short: 0.06 s, less than 0.1 s"
    batch = clips.__getitems__([(i, 0) for i in range(4)])
    assert batch.ids.tolist() == [stable_id(name) for name in ("00.wav", "04.wav", "04.wav", "05.wav")]
    assert torch.equal(batch.audio[1], batch.audio[2])
    assert dict(clips.problems)["03.wav"] == "has NaN or infinite samples"
    assert [warning.name for warning in clips.warnings] == ["04.wav"]
    assert "at full scale" in clips.warnings[0].reason
    with pytest.raises(UnmaskError, match=r"03.wav: has NaN"):
        clips.waveform(1)
    with pytest.raises(SourceError, match=r"2 of 8 clips cannot be read: empty.wav \(empty file\); text.flac.*skip"):
        open_split(settings(source, corrupt="fatal"), "all")
    for name in ("empty.wav", "text.flac"):
        (source / name).unlink()
    with pytest.raises(UnmaskError, match=r"03.wav: has NaN.*corrupt=skip"):
        open_split(settings(source, corrupt="fatal", val_share=0), "all")[1, 0]


def test_workers_report_what_they_found(tmp_path):
    source = folder(tmp_path / "f", [4_000] * 3)
    broken = np.full(4_000, np.inf, np.float32)
    soundfile.write(source / "01.wav", broken, 16_000, subtype="FLOAT")
    clips = open_split(settings(source, val_share=0), "all")
    assert len(load(clips, workers=1)) == 2
    assert clips.problems == [("01.wav", "has NaN or infinite samples")]


def test_a_damaged_clip_is_not_decoded_again_unless_another_part_of_it_may_be_whole(tmp_path, monkeypatch):
    source = folder(tmp_path / "f", [16_000] * 2)
    broken = np.zeros(16_000, np.float32)
    broken[8_000:] = np.nan
    soundfile.write(source / "00.wav", broken, 16_000, subtype="FLOAT")
    read: list[str] = []
    real = readers.read
    monkeypatch.setattr(readers, "read", lambda file, *rest: read.append(file.name) or real(file, *rest))
    clips = open_split(settings(source, val_share=0, max_seconds=1), "all")
    assert clips[0, 0].id == clips[0, 1].id == stable_id("01.wav")
    assert read == ["00.wav", "01.wav", "01.wav"]
    crops, resumed = (open_split(settings(source, val_share=0, max_seconds=0.25), "all", augment=True) for _ in "ab")
    whole = [crops[0, visit].id == stable_id("00.wav") for visit in range(40)]
    assert set(whole) == {True, False}
    assert [resumed[0, visit].id == stable_id("00.wav") for visit in reversed(range(40))] == whole[::-1]


def test_nothing_usable_is_one_error(tmp_path):
    source = folder(tmp_path / "f", [1_000, 1_200])
    with pytest.raises(SourceError, match=r"all 2 clips are shorter than data.min_seconds=2; the longest lasts 0.07 s"):
        resolve(Settings(str(source)))
    for i in range(2):
        soundfile.write(source / f"0{i}.wav", np.full(4_000, np.nan, np.float32), 16_000, subtype="FLOAT")
    clips = open_split(settings(source, val_share=0), "train")
    with pytest.raises(SourceError, match=r"none of the 2 clips of this split can be used.*00.wav: has NaN"):
        clips[0, 0]


def test_a_split_of_short_clips_says_so(tmp_path):
    source = folder(tmp_path / "f" / "train", [1_000]).parent
    folder(source / "val", [6_000])
    with pytest.raises(SourceError, match=r"no train clips. Those of this split are all shorter.*min_seconds=0.1: set"):
        open_split(settings(source), "train")
    assert len(open_split(settings(source, min_seconds=0.05), "train")) == 1


def test_storage_that_fails_is_not_the_clips_fault(tmp_path, monkeypatch):
    clips = open_split(settings(folder(tmp_path / "f", [4_000]), val_share=0), "all")

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(readers, "read", fail)
    with pytest.raises(SourceError, match=r"00.wav: Input/output error. Put the storage right"):
        clips[0, 0]


# resolve


def test_resolve_fills_in_paths_and_targets(tmp_path, monkeypatch):
    source = folder(tmp_path / "f", [6_000] * 10)
    everything = open_split(settings(source), "all")
    write_labels(tmp_path / "a", everything, MFCC)
    write_labels(tmp_path / "b", everything, LAYER)
    monkeypatch.chdir(tmp_path)
    resolved = resolve(settings("f", label_sets=("a", "b")))
    assert resolved.source == str(source) and resolved.label_sets == (str(tmp_path / "a"), str(tmp_path / "b"))
    assert resolved.targets == (MFCC, LAYER) and resolve(resolved) == resolved
    batch = open_split(resolved, "train", augment=True).__getitems__([(0, 0), (1, 0)])
    assert batch.labels.shape == (2, 18, 2)
    assert open_split(settings("f", label_sets=("a",)), "val").settings.targets == (MFCC,)
    without = replace(resolved, label_sets=())
    assert open_split(without, "val").__getitems__([(0, 0)]).labels is None


def test_resolve_refuses_labels_that_do_not_fit(tmp_path):
    source = folder(tmp_path / "f", [16_000] * 10)
    everything = open_split(settings(source), "all")
    train = open_split(settings(source), "train")
    missing = write_labels(tmp_path / "train only", train, MFCC)
    with pytest.raises(LabelError, match=r"2 of 10 clips .* have no labels.*\d\d\.wav"):
        resolve(settings(source, label_sets=(missing,)))
    short = write_labels(tmp_path / "short", everything, MFCC, seconds_less=0.5)
    with pytest.raises(LabelError, match="50 labels for .*lasts 1.00 s: expected about 100"):
        resolve(settings(source, label_sets=(short,)))
    with pytest.raises(LabelError, match="nowhere does not exist"):
        resolve(settings(source, label_sets=(str(tmp_path / "nowhere"),)))
    good = resolve(settings(source, label_sets=(write_labels(tmp_path / "good", everything, MFCC),)))
    other = replace(good, targets=(replace(MFCC, digest="cc"),))
    for use in (resolve, lambda chosen: open_split(chosen, "train")):
        with pytest.raises(UnmaskError, match=r"codebook aa\); the run was made with .*codebook cc"):
            use(other)
