"""From clips to a label set: every kind of target, one codebook for all splits, nothing that depends on order."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clips import FakeClips, tone, two_voices
from torch import Tensor, nn

from unmask.core.data.kinds import CorruptSampleError
from unmask.core.errors import UnmaskError
from unmask.speech_audio.data.frames import HOP, num_frames
from unmask.speech_audio.data.labels import LabelSet
from unmask.speech_audio.targets.clustering import ResidualKMeans
from unmask.speech_audio.targets.codebook import Codebook
from unmask.speech_audio.targets.features import LayerFeatures, mfcc
from unmask.speech_audio.targets.make import KMeansSettings, TargetSettings, make_labels

QUICK = KMeansSettings(n_init=1, batch=256, max_iter=5)
MFCC = TargetSettings("mfcc", 8, kmeans=QUICK)


class TinyEncoder(nn.Module):
    """Four layers of fixed random projections of a frame's samples; later layers are much larger."""

    dim, depth = 6, 4

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = torch.randn(5, 400, 6, generator=generator) * torch.logspace(-1, 3, 5)[:, None, None]

    def states(self, audio: Tensor, lengths: Tensor | None = None, final_norm: bool = True) -> list[Tensor]:
        frames = audio.unfold(1, 400, HOP)
        return [torch.tanh(frames @ weight / 20) * 20 for weight in self.weights]


def layer(layers: tuple[int, ...], **kwargs: Any) -> TargetSettings:
    return TargetSettings("layer", 8, layers, kmeans=QUICK, **kwargs)


def splits() -> tuple[FakeClips, list[FakeClips]]:
    return two_voices(10), [two_voices(3, "val"), two_voices(2, "test")]


def same(a: LabelSet, b: LabelSet) -> bool:
    return all(np.array_equal(a.get(i), b.get(i)) for i in a.ids.tolist()) and a.ids.tolist() == b.ids.tolist()


@pytest.mark.parametrize("kind", ["mfcc", "log_mel", "mfcc_prosody", "prosody"])
def test_initial_targets_label_every_split_with_one_codebook(tmp_path: Path, kind: str) -> None:
    train, others = splits()
    made = make_labels(replace(MFCC, kind=kind), train, others, tmp_path / "set")
    assert len(made) == 15 and made.rate == 100.0 and len(made.targets) == 1
    assert made.targets[0].name.startswith(kind) and made.targets[0].classes == 8
    book = Codebook.load(tmp_path / "set/codebook.safetensors")
    assert made.targets[0].digest == book.digest
    stage = next(iter(book.parts.values())).stages[0]
    assert (stage.mean is not None) == ("prosody" in kind)
    for clips in (train, *others):
        made.check_covers(clips.ids, clips.lengths, "voices", clips.name_of)


def test_labels_are_the_codebooks_of_the_feature(tmp_path: Path) -> None:
    train, others = splits()
    made = make_labels(MFCC, train, others, tmp_path / "set")
    book = Codebook.load(tmp_path / "set/codebook.safetensors")
    for clips in (train, *others):
        for index, sample_id in enumerate(clips.ids.tolist()):
            assert made.get(sample_id).tolist() == book.assign(mfcc(clips.waves[index])).tolist()


def test_labels_repeat_and_do_not_depend_on_the_order_of_the_clips(tmp_path: Path) -> None:
    train, others = splits()
    first = make_labels(MFCC, train, others, tmp_path / "a", seed=3)
    mixed = make_labels(MFCC, train.reordered([3, 9, 1, 0, 2, 8, 7, 6, 5, 4]), others[::-1], tmp_path / "b", seed=3)
    assert first.targets == mixed.targets and same(first, mixed)
    assert make_labels(MFCC, train, others, tmp_path / "c", seed=4).targets != first.targets


def test_validation_clips_do_not_move_the_codebook(tmp_path: Path) -> None:
    train, others = splits()
    alone = make_labels(MFCC, train, [], tmp_path / "a")
    assert alone.targets == make_labels(MFCC, train, others, tmp_path / "b").targets


def test_several_layers_become_streams_of_one_pass(tmp_path: Path) -> None:
    train, others = splits()
    both = make_labels(layer((2, 4)), train, others, tmp_path / "a", encoder=TinyEncoder(), teacher_digest="t1")
    assert [target.name for target in both.targets] == ["layer 2", "layer 4"] and both.rate == 50.0
    assert both.info["teacher"] == "t1"
    single = make_labels(layer((4,)), train, others, tmp_path / "b", encoder=TinyEncoder())
    for index, sample_id in enumerate(train.ids.tolist()):
        assert both.get(sample_id)[:, 1:].tolist() == single.get(sample_id).tolist()
        assert len(both.get(sample_id)) == num_frames(int(train.lengths[index]))


def explained_variance(part: ResidualKMeans, frames: Tensor) -> Tensor:
    """1 - sum of squares left / sum of squares around the frames' mean, after each stage."""
    known = part.stages[0].standardise(frames)
    return 1 - part.quantise(frames)[1][1:] / (known - known.mean(0)).double().square().sum()


def test_residual_stages_become_streams_and_explain_more(tmp_path: Path) -> None:
    train, others = splits()
    made = make_labels(layer((2, 4), stages=3), train, others, tmp_path / "set", encoder=TinyEncoder())
    assert [target.name for target in made.targets] == [f"layer {i} stage {s}" for i in (2, 4) for s in (1, 2, 3)]
    plain = make_labels(layer((2, 4)), train, others, tmp_path / "plain", encoder=TinyEncoder())
    for sample_id in made.ids.tolist():
        assert made.get(sample_id)[:, [0, 3]].tolist() == plain.get(sample_id).tolist()
    streams = made.info["diagnostics"]["streams"]
    explained = [stream["explained_variance"] for stream in streams]
    assert 0 < explained[0] < explained[1] < explained[2] < 1 and 0 < explained[3] < explained[4] < explained[5] < 1
    book = Codebook.load(tmp_path / "set/codebook.safetensors")
    frames = torch.cat([LayerFeatures(TinyEncoder(), (2, 4))(wave) for wave in train.waves])
    expected = [
        explained_variance(part, piece) for part, piece in zip(book.parts.values(), book.split(frames), strict=True)
    ]
    assert explained == pytest.approx(torch.cat(expected).tolist(), abs=1e-4)


def test_layers_can_be_averaged_into_one_stream_where_each_counts_alike(tmp_path: Path) -> None:
    train, others = splits()
    made = make_labels(layer((1, 4), average=True), train, others, tmp_path / "set", encoder=TinyEncoder())
    assert [target.name for target in made.targets] == ["mean of layer 1, layer 4"]
    book = Codebook.load(tmp_path / "set/codebook.safetensors")
    x = LayerFeatures(TinyEncoder(), (1, 4))(train.waves[0])
    assert book.assign(x).tolist() == made.get(int(train.ids[0])).tolist()
    assert book.average is not None
    known = (x - book.average[0]) / book.average[1]
    torch.testing.assert_close(book.split(x)[0], (known[:, :6] + known[:, 6:]) / 2)


def test_what_labels_are_made_from_and_what_they_say_lies_beside_them(tmp_path: Path) -> None:
    train, others = splits()
    make_labels(MFCC, train, others, tmp_path / "set", seed=7)
    about = json.loads((tmp_path / "set/label_set.json").read_text())
    assert about["clips"] == 15 and about["info"]["seed"] == 7 and about["info"]["target"]["kind"] == "mfcc"
    found = about["info"]["diagnostics"]
    assert found["clips"] == 10 and found["seconds"] == pytest.approx(float(train.lengths.sum()) / 16_000, rel=0.1)
    (stream,) = found["streams"]
    assert stream["information"]["speaker"] > 0.2 and stream["f0_predictability"] > 0.5
    assert 0.3 < stream["explained_variance"] < 1 and stream["used"] + stream["empty"] == 8


def test_a_clip_that_cannot_be_decoded_is_named_and_does_not_stop_the_work(tmp_path: Path) -> None:
    class Damaged(FakeClips):
        def waveform(self, index: int) -> Tensor:
            if index == 1:
                raise CorruptSampleError("b: no audio")
            return super().waveform(index)

    train = Damaged({name: tone(100, 0.5, noise=0.1) for name in "abc"})
    made = make_labels(MFCC, train, [], tmp_path / "set")
    assert made.info["unreadable"] == [int(train.ids[1])] and len(made.get(int(train.ids[1]))) == 0
    made.check_covers(train.ids, train.lengths, "voices", train.name_of)
    train.settings.corrupt = "fatal"
    with pytest.raises(CorruptSampleError):
        make_labels(MFCC, train, [], tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_mistakes_are_named_before_the_work(tmp_path: Path) -> None:
    train, others = splits()
    with pytest.raises(UnmaskError, match="need an encoder"):
        make_labels(layer((1,)), train, others, tmp_path / "set")
    with pytest.raises(UnmaskError, match="layers are \\[9\\]"):
        make_labels(layer((9,)), train, others, tmp_path / "set", encoder=TinyEncoder())
    with pytest.raises(UnmaskError, match="too few for 5000 clusters"):
        make_labels(replace(MFCC, clusters=5000), train, others, tmp_path / "set")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/notes.txt").touch()
    train.read.clear()
    with pytest.raises(UnmaskError, match="holds something already"):
        make_labels(MFCC, train, others, tmp_path / "set")
    assert not train.read


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "layer"}, "give layers with kind 'layer' only"),
        ({"layers": (6,)}, "give layers with kind 'layer' only"),
        ({"kind": "layer", "layers": (6, 6)}, "expected each once"),
        ({"kind": "layer", "layers": (6,), "average": True}, "average needs two or more"),
        ({"max_frames": 50}, "max_frames is 50; expected at least clusters, 100"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TargetSettings(**wrong)


def test_settings_are_read_from_a_recipe_and_checked() -> None:
    from pydantic import TypeAdapter, ValidationError

    read = TypeAdapter(TargetSettings).validate_python
    settings = read({"kind": "layer", "layers": [3, 6], "clusters": 500, "stages": 2, "kmeans": {"n_init": 3}})
    assert settings.layers == (3, 6) and settings.kmeans.n_init == 3 and settings.standardised
    assert not read({}).standardised and read({"kind": "prosody"}).standardised
    assert read({"stages": 2}).standardised and not read({"stages": 2, "standardise": False}).standardised
    for wrong in ({"clusters": 1}, {"share": 0.0}, {"kind": "pitch"}, {"kmeans": {"n_init": 0}}):
        with pytest.raises(ValidationError):
            read(wrong)
