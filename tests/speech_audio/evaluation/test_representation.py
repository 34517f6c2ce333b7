"""Evaluating and embedding with a real (untrained) run, on tones whose speaker and class are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from clips import tone
from speech import fabricate, voices, write_shards, write_wav

from unmask.core.errors import UnmaskError
from unmask.core.evaluation.embedding import embed
from unmask.core.evaluation.encoding import untrained
from unmask.core.evaluation.finetune import finetune
from unmask.core.evaluation.run import evaluate, table
from unmask.core.training.checkpoint import load_run
from unmask.speech_audio.data.clips import Settings, collate, open_split
from unmask.speech_audio.evaluation import embedding, encoding
from unmask.speech_audio.evaluation import representation as evaluation
from unmask.speech_audio.evaluation.detail import Detail, Moments, score
from unmask.speech_audio.evaluation.encoding import encode_clips
from unmask.speech_audio.evaluation.representation import study_table
from unmask.speech_audio.evaluation.tables import measures

SIZES = {"train": 60, "val": 30, "test": 30}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("speech")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNMASK_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def shards(place: Path) -> Path:
    return write_shards(place / "shards", SIZES)


@pytest.fixture(scope="module")
def run(place: Path, shards: Path) -> Path:
    return fabricate(place / "run", str(shards), min_seconds=2.0)


@pytest.fixture(scope="module")
def evaluated(run: Path) -> dict[str, Any]:
    return evaluate(run, device="cpu")


# ---- evaluate ------------------------------------------------------------------------------------------------------


def test_four_rows_are_measured_in_the_same_way_and_written(run: Path, evaluated: dict[str, Any]) -> None:
    rows = evaluated["rows"]
    assert list(rows) == ["trained", "random", "mfcc", "logmel"]
    for row in rows.values():
        assert set(row["probes"]) == {"speaker", "class"}
        for found in row["probes"].values():
            assert all(0 <= found[name] <= 1 for name in ("weighted", "linear", "knn", "linear_val"))
        assert 1 <= row["rankme"] <= row["dim"] + 1e-3
    assert [row["dim"] for row in rows.values()] == [32, 32, 78, 160]
    for name in ("trained", "random"):
        assert len(rows[name]["probes"]["class"]["layer_weights"]) == 3
        assert 0 < rows[name]["detail"]["last"] <= 1
        assert rows[name]["detail"]["test_frames"] > 100
    assert "detail" not in rows["mfcc"]
    assert rows["mfcc"]["probes"]["class"]["weighted"] == rows["mfcc"]["probes"]["class"]["linear"]
    assert evaluated["splits"] == SIZES  # also what is shorter than the run's min_seconds
    assert evaluated["val_loss"] == 2.5 and evaluated["step"] == 7 and evaluated["labelled"]
    assert json.loads((run / "evaluation.json").read_text()) == evaluated


def test_easy_labels_are_found_by_the_spectral_baselines(evaluated: dict[str, Any]) -> None:
    for name in ("mfcc", "logmel"):
        assert evaluated["rows"][name]["probes"]["speaker"]["linear"] > 0.9
        assert evaluated["rows"][name]["probes"]["class"]["linear"] > 0.9
    assert evaluated["tasks"]["class"]["chance"] == pytest.approx(1 / 3, abs=0.05)
    assert evaluated["tasks"]["class"]["classes"] == 3


def test_content_is_also_probed_within_each_speaker(evaluated: dict[str, Any]) -> None:
    assert evaluated["speakers"] == {"class": 2}
    within = evaluated["rows"]["logmel"]["probes"]["class"]["within_speaker"]
    assert set(within["each"]) == {"low", "high"}
    assert within["mean"] == pytest.approx(sum(within["each"].values()) / 2)
    assert "within_speaker" not in evaluated["rows"]["logmel"]["probes"]["speaker"]


def test_quick_leaves_detail_and_speakers_out_and_repeats(run: Path, evaluated: dict[str, Any]) -> None:
    quick = evaluate(run, device="cpu", quick=True)
    assert "detail" not in quick["rows"]["trained"]
    assert quick["speakers"] == {}
    whole = evaluated["rows"]["trained"]["probes"]["speaker"]
    assert quick["rows"]["trained"]["probes"]["speaker"] == whole
    (run / "evaluation.json").write_text(json.dumps(evaluated))  # what other tests read


def test_the_reference_has_other_weights_than_the_run_began_with(run: Path) -> None:
    loaded = load_run(run)
    random: Any = untrained(loaded, seed=0).encoder
    weight = random.blocks[0].mlp.fc1.weight
    torch.manual_seed(loaded.recipe.seed)
    from unmask.core.training.launch import build

    first: Any = build(loaded.recipe)
    assert not weight.equal(first.encoder.blocks[0].mlp.fc1.weight)
    again: Any = untrained(loaded, seed=0).encoder
    assert weight.equal(again.blocks[0].mlp.fc1.weight)


def test_the_table_names_every_row_and_measure(evaluated: dict[str, Any]) -> None:
    text = table(evaluated)
    for part in (
        "trained encoder", "untrained encoder", "MFCC", "log-mel", "class: weighted sum of layers", "k-NN",
        "class: within speakers", "acoustic detail", "RankMe", "60 train", "chance 33.3",
    ):  # fmt: skip
        assert part in text
    lines = measures(evaluated)
    first = lines[0]
    assert first.text("trained") == f"{100 * evaluated['rows']['trained']['probes']['speaker']['weighted']:.1f}"
    assert any(first.best(name) for name in evaluated["rows"])
    assert not any(lines[-1].best(name) for name in evaluated["rows"])
    assert next(line for line in lines if "detail" in line.title).text("mfcc") == "–"


def test_unreadable_recordings_are_named_and_folders_may_have_any_name(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(24):
        write_wav(tmp_path / "new [1] ü" / f"{i:02}.wav", voices(i)[0])
    (tmp_path / "new [1] ü" / "broken.wav").write_bytes(b"")
    result = evaluate(run, data=str(tmp_path / "new [1] ü"), device="cpu", quick=True, references=False)
    assert "1 recordings are left out: broken.wav (empty file)" in capsys.readouterr().err
    assert "new [x] ü" in table(result | {"data": "new [x] ü"})


def test_a_study_shows_models_side_by_side(evaluated: dict[str, Any]) -> None:
    text = study_table({"layer 3": evaluated, "RVQ": evaluated})
    for part in ("layer 3", "RVQ", "untrained encoder", "log-mel", "2 models", "speaker: last layer"):
        assert part in text


def test_recordings_without_labels_are_said_to_be_so(run: Path, tmp_path: Path, evaluated: dict[str, Any]) -> None:
    for i in range(24):
        write_wav(tmp_path / "plain" / f"{i:02}.wav", voices(i)[0])
    result = evaluate(run, data=str(tmp_path / "plain"), device="cpu")
    assert result["labelled"] is False and result["tasks"] == {}
    assert "no labels" in result["note"] and "one folder per speaker" in result["note"]
    assert result["held_out_of_train"] == ["val"]  # its own val split is what is reported on
    assert set(result["rows"]["trained"]) == {"probes", "detail", "rankme", "deviation", "dim"}
    assert sum(result["splits"].values()) == 24
    assert "no labels" in table(result).replace("\n", " ")
    (run / "evaluation.json").write_text(json.dumps(evaluated))


def test_too_few_clips_are_refused(run: Path, tmp_path: Path) -> None:
    for i in range(3):
        write_wav(tmp_path / "few" / f"{i}.wav", voices(i)[0])
    with pytest.raises(UnmaskError, match="too few clips to measure features on"):
        evaluate(run, data=str(tmp_path / "few"), device="cpu")


def test_fine_tuning_points_to_transformers(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UnmaskError, match=r"unmask export RUN --to transformers.*HubertForCTC"):
        finetune(run, "x", tmp_path / "out")


def test_large_splits_are_thinned_by_clip_id(
    run: Path, evaluated: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "MOST_CLIPS", 40)
    result = evaluate(run, device="cpu", quick=True)
    assert result["splits"] == {"train": 40, "val": 30, "test": 30}
    (run / "evaluation.json").write_text(json.dumps(evaluated))


# ---- clips ---------------------------------------------------------------------------------------------------------


def test_batching_does_not_change_features(run: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_run(run)
    clips = open_split(encoding.audio_settings(loaded.recipe.data), "test")
    encoders: Any = {"trained": loaded.method.encoder}
    options: Any = {"device": torch.device("cpu"), "detail": Detail(frames=100)}
    whole = encode_clips(encoders, clips, torch.arange(30), **options)
    monkeypatch.setattr(encoding, "BATCH_SECONDS", 0.01)
    alone = encode_clips(encoders, clips, torch.arange(30), **options)
    for name in ("trained", "mfcc", "logmel"):
        torch.testing.assert_close(whole[name].x, alone[name].x, atol=2e-5, rtol=1e-4)
        assert whole[name].ids.equal(clips.ids)
    assert whole["trained"].detail is not None and alone["trained"].detail is not None
    torch.testing.assert_close(whole["trained"].detail.xy, alone["trained"].detail.xy, atol=1e-2, rtol=1e-4)
    assert whole["trained"].detail.count == alone["trained"].detail.count == 30 * 4
    batch = clips.__getitems__([(i, 0) for i in range(30)])
    with torch.no_grad():
        pooled = loaded.method.encode(batch).pooled  # type: ignore[operator]
    torch.testing.assert_close(whole["trained"].last, pooled, atol=2e-5, rtol=1e-4)


def test_a_subset_keeps_its_places(run: Path) -> None:
    loaded = load_run(run)
    clips = open_split(encoding.audio_settings(loaded.recipe.data), "test")
    index = torch.tensor([3, 17, 4])
    found = encode_clips({}, clips, index, device=torch.device("cpu"))["logmel"]
    assert found.index.tolist() == [3, 4, 17]
    assert found.ids.equal(clips.ids[found.index])


# ---- acoustic detail -----------------------------------------------------------------------------------------------


def moments_of(x: torch.Tensor, y: torch.Tensor, pieces: int = 3) -> Moments:
    found = Moments(x.shape[0], x.shape[2], y.shape[1])
    for part, target in zip(x.chunk(pieces, dim=1), y.chunk(pieces), strict=True):
        found.add(part, target)
    return found


def test_detail_agrees_with_scikit_learn() -> None:
    from sklearn.linear_model import Ridge
    from sklearn.metrics import r2_score
    from sklearn.preprocessing import StandardScaler

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 300, 8, generator=generator) * torch.logspace(-2, 2, 8) + 5
    weight = torch.randn(8, 4, generator=generator) / torch.logspace(-2, 2, 8)[:, None]
    y = x[0] @ weight + torch.randn(300, 4, generator=generator) + 3
    parts = [(x[:, a:b], y[a:b]) for a, b in ((0, 150), (150, 200), (200, 300))]
    protocol = Detail(strengths=(0.05,))
    found = score(*(moments_of(*part) for part in parts), protocol=protocol)
    scaler = StandardScaler().fit(parts[0][0][0].double())
    ridge = Ridge(alpha=0.05 * 150).fit(scaler.transform(parts[0][0][0].double()), parts[0][1].double())
    expected = r2_score(parts[2][1], ridge.predict(scaler.transform(parts[2][0][0].double())))
    assert found["last"] == found["best"] == pytest.approx(expected, abs=1e-5)


def test_detail_picks_the_layer_and_knows_perfect_and_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(400, 3, generator=generator)
    x = torch.stack([torch.randn(400, 5, generator=generator), torch.cat([y, torch.ones(400, 2)], 1)])
    x = torch.stack([x[1] @ torch.randn(5, 5, generator=generator), x[0]])
    parts = [moments_of(x[:, a:b], y[a:b]) for a, b in ((0, 200), (200, 300), (300, 400))]
    found = score(*parts)
    assert found["best_layer"] == 0 and found["best"] > 0.999
    assert -0.1 < found["last"] < 0.05


# ---- embed ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(place: Path) -> Path:
    """Seven recordings, one of them longer than the run's crops, one damaged."""
    for i in range(6):
        write_wav(place / "talk" / ("deep" if i % 2 else "") / f"{i}.wav", voices(i)[0])
    write_wav(place / "talk" / "long.wav", tone(150, 2.5, noise=0.1))
    (place / "talk" / "notes.wav").write_text("not a sound")
    return place / "talk"


def test_embeddings_are_the_encoders_and_name_their_recordings(
    run: Path, place: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    short = fabricate(tmp_path / "run", str(folder), min_seconds=0.2, max_seconds=1.0)
    monkeypatch.setattr(embedding, "_WINDOW", 3)
    found = pq.read_table(embed(short, str(folder), tmp_path / "features.parquet", device="cpu"))
    assert [str(field.type) for field in found.schema] == ["int64", "string", "list<element: float>"]
    loaded = load_run(short)
    clips = open_split(encoding.audio_settings(loaded.recipe.data, str(folder)), "all")
    assert found["id"].to_pylist() == clips.ids.tolist()
    names = found["name"].to_pylist()
    assert "deep/1.wav" in names and "long.wav" in names and len(names) == 7
    method: Any = loaded.method
    vectors = dict(zip(names, torch.tensor(found["embedding"].to_pylist()), strict=True))
    with torch.no_grad():
        for index, name in enumerate(names):
            if name == "long.wav":
                pieces = [method.encoder(p[None])[0] for p in clips.waveform(index).split([13_120, 13_440, 13_440])]
                assert [len(p) for p in pieces] == [40, 41, 41]
                expected = torch.cat(pieces).mean(0)
            else:
                expected = method.encode(collate([clips[index, 0]])).pooled[0]
            torch.testing.assert_close(vectors[name], expected, atol=1e-5, rtol=1e-4)
    assert "notes.wav" in capsys.readouterr().err


def test_embedding_into_nowhere_leaves_nothing(run: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UnmaskError, match="cannot write"):
        embed(run, str(folder), tmp_path / "file" / "features.parquet", device="cpu")
    with pytest.raises(UnmaskError, match="does not exist"):
        embed(run, str(tmp_path / "missing"), tmp_path / "features.parquet", device="cpu")
    assert not (tmp_path / "features.parquet").exists()


def test_settings_for_encoding_need_no_label_sets() -> None:
    settings = encoding.audio_settings(Settings("notes", label_sets=("gone",), batching="crop"), "prompts")
    assert (settings.source, settings.label_sets, settings.batching, settings.long) == ("prompts", (), "pad", "crop")
    assert settings.min_seconds == 0.1
