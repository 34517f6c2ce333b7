"""Diagnostics against closed forms and cases whose answer is known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from clips import FakeClips, tone, two_voices

from unmask.speech_audio.data.labels import LabelSet, Target
from unmask.speech_audio.targets.diagnostics import (
    cluster_purity,
    diagnose,
    entropy,
    label_r2,
    phone_purity,
    pnmi,
    runs,
)
from unmask.speech_audio.targets.features import log_f0
from unmask.speech_audio.targets.labels import LabelWriter


def joint_table(y: np.ndarray, z: np.ndarray, values: int, labels: int) -> np.ndarray:
    """How often each pair of y and z occurs."""
    return np.histogram2d(y, z, bins=[np.arange(values + 1), np.arange(labels + 1)])[0]


def test_labels_that_are_the_phones_know_everything() -> None:
    y = np.array([0, 0, 1, 2, 2, 2, 3])
    table = joint_table(y, np.array([5, 3, 1, 0])[y], 4, 6)
    assert pnmi(table) == pytest.approx(1) and phone_purity(table) == cluster_purity(table) == 1


def test_finer_labels_know_everything_but_split_the_phones() -> None:
    table = joint_table(np.array([0, 0, 1, 1]), np.array([0, 1, 2, 3]), 2, 4)
    assert pnmi(table) == pytest.approx(1) and phone_purity(table) == 1 and cluster_purity(table) == 0.5


def test_independent_labels_know_nothing() -> None:
    table = np.outer([1.0, 2, 3], [4.0, 1, 1, 2])
    assert pnmi(table) == pytest.approx(0, abs=1e-12)
    assert phone_purity(table) == pytest.approx(3 / 6) and cluster_purity(table) == pytest.approx(4 / 8)


def test_a_two_by_two_table_by_hand() -> None:
    """Counts [[3, 1], [1, 3]]: y is uniform, I = ln 2 - H(1/4)."""
    table = np.array([[3.0, 1], [1, 3]])
    binary = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert pnmi(table) == pytest.approx((math.log(2) - binary) / math.log(2))
    assert phone_purity(table) == cluster_purity(table) == 0.75
    assert pnmi(table * 1000) == pytest.approx(pnmi(table))


def test_pnmi_is_scikit_learns_mutual_information_over_the_entropy_of_y() -> None:
    from sklearn.metrics import mutual_info_score

    generator = np.random.default_rng(0)
    y = generator.integers(0, 7, 2000)
    z = (y + generator.integers(0, 4, 2000)) % 11
    known = entropy(np.bincount(y).astype(float))
    assert pnmi(joint_table(y, z, 7, 11)) == pytest.approx(mutual_info_score(y, z) / known)


def test_where_there_is_nothing_to_know_there_is_no_answer() -> None:
    assert pnmi(np.array([[3.0, 4], [0, 0]])) is None


def test_entropy_and_runs() -> None:
    assert entropy(np.array([2.0, 2, 2, 2, 0])) == pytest.approx(math.log(4))
    assert entropy(np.array([0.0, 7])) == 0
    assert [runs(np.array(z, dtype=int)) for z in ([], [1], [1, 1, 2, 2, 1])] == [0, 1, 3]


def test_label_r2_is_that_of_a_regression_on_one_hot_labels() -> None:
    from sklearn.linear_model import LinearRegression

    generator = np.random.default_rng(0)
    z = generator.integers(0, 5, 300)
    value = 0.3 * z + generator.normal(size=300) + 5
    hot = np.eye(6)[z]
    assert label_r2(z, value) == pytest.approx(LinearRegression(fit_intercept=False).fit(hot, value).score(hot, value))
    assert label_r2(np.empty(0, int), np.empty(0)) is None
    assert label_r2(np.array([0, 1, 2]), np.array([5.0, 5, 5])) is None


def label(folder: Path, clips: FakeClips, streams: dict[str, list[np.ndarray]], classes: int, rate: float) -> LabelSet:
    """A label set of one array per clip and stream."""
    targets = tuple(Target(name, classes, rate, "") for name in streams)
    with LabelWriter(folder, targets) as writer:
        for i, sample_id in enumerate(clips.ids.tolist()):
            writer.add(sample_id, np.stack([labels[i] for labels in streams.values()], axis=1))
    return LabelSet.open(folder)


def test_labels_that_are_the_speaker_or_the_word_are_recognised(tmp_path: Path) -> None:
    clips = two_voices(12)
    frames = [int(n) // 160 - 2 for n in clips.lengths]
    streams = {
        what: [np.full(n, v) for n, v in zip(frames, clips.labels[what].tolist(), strict=True)]
        for what in ("speaker", "word")
    }
    streams["frame"] = [np.arange(n) % 2 for n in frames]
    result = diagnose(label(tmp_path / "set", clips, streams, 5, 100.0), clips, explained=[0.1, 0.2, 0.3])
    json.loads(json.dumps(result, allow_nan=False))
    who, word, frame = result["streams"]
    assert result["clips"] == 12 and result["frames"] == sum(frames) and result["missing"] == 0
    assert who["information"]["speaker"] == pytest.approx(1) and who["information"]["word"] < 0.1
    assert word["information"]["word"] == pytest.approx(1) and word["phone_purity"] == {"word": 1}
    assert frame["information"]["speaker"] < 0.01 and frame["information"]["word"] < 0.01
    assert who["f0_predictability"] > 0.98 and frame["f0_predictability"] < 0.1  # the two voices differ in pitch
    assert (who["used"], who["empty"], who["classes"]) == (2, 3, 5)
    assert who["run"] == pytest.approx(sum(frames) / 12) and frame["run"] == 1 and frame["run_seconds"] == 0.01
    assert frame["perplexity"] == pytest.approx(2, rel=0.01)
    assert [stream["explained_variance"] for stream in result["streams"]] == [0.1, 0.2, 0.3]


def test_speaker_information_counts_clips_and_content_counts_frames(tmp_path: Path) -> None:
    """One clip of speaker 0 is 9 times as long as the one of speaker 1, and half of its labels are those of 1."""
    clips = FakeClips(
        {"a": tone(100, 0.9), "b": tone(100, 0.1)},
        {"speaker": [0, 1], "word": [0, 1], "unknown": [-1, -1]},
        {"speaker": ["x", "y"], "word": ["x", "y"], "unknown": ["x", "y"]},
    )
    labels = [np.repeat([0, 1], 45), np.ones(10, int)]
    found = diagnose(label(tmp_path / "set", clips, {"z": labels}, 2, 100.0), clips, pitch_clips=0)["streams"][0]
    assert found["information"] == {
        "speaker": pytest.approx(pnmi(np.array([[0.5, 0.5], [0, 1]]))),
        "word": pytest.approx(pnmi(np.array([[45.0, 45], [0, 10]]))),
    }
    assert found["f0_predictability"] is None and found["explained_variance"] is None


def test_labels_at_50_hz_meet_the_pitch_of_their_own_frame(tmp_path: Path) -> None:
    """Labels made from the pitch itself, at either rate, predict it."""
    clips = FakeClips({f"{i}": tone(80 + 25 * i, 0.4) for i in range(8)})
    for rate, step in ((100.0, 1), (50.0, 2)):
        pitch = [log_f0(wave)[0].numpy()[::step] for wave in clips.waves]
        labels = [np.round((p - 4) * 20).astype(int) for p in pitch]
        found = diagnose(label(tmp_path / f"{rate}", clips, {"z": labels}, 60, rate), clips)
        assert found["streams"][0]["f0_predictability"] > 0.98


def test_clips_without_labels_are_counted(tmp_path: Path) -> None:
    clips = two_voices(4)
    part = FakeClips(dict(zip(clips.names[:2], clips.waves[:2], strict=True)))
    found = label(tmp_path / "set", part, {"z": [np.zeros(30, int), np.zeros(0, int)]}, 2, 100.0)
    result = diagnose(found, clips)
    assert (result["clips"], result["missing"]) == (1, 3)
    assert result["streams"][0]["information"] == {"speaker": None, "word": None}
