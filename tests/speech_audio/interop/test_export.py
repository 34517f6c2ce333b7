"""What leaves for transformers and torchaudio computes what ours does, and comes back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torchaudio
import yaml
from clips import tone
from safetensors.torch import load_file, save_file
from speech import LARGE, fabricate, target, write_wav
from torch import Tensor

from unmask.core.errors import UnmaskError
from unmask.core.networks import open_network
from unmask.core.training import checkpoint
from unmask.core.training.checkpoint import load_run
from unmask.core.training.launch import build
from unmask.core.training.recipe import make_recipe, to_yaml
from unmask.speech_audio import load
from unmask.speech_audio.data.clips import open_split
from unmask.speech_audio.interop.export import export
from unmask.speech_audio.interop.pretrained import HEADS, HEADS_FILE, load_initial_weights

KINDS = {"base": {}, "large": LARGE, "biased": {**LARGE, "conv_bias": True}}


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        name: fabricate(folder / name, encoder=encoder, normalise=name != "base") for name, encoder in KINDS.items()
    }


@pytest.fixture(scope="module")
def exported(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    folder = tmp_path_factory.mktemp("exported")
    return {
        (name, to): export(run, folder / f"{name}-{to}", to)  # type: ignore[arg-type]
        for name, run in runs.items()
        for to in ("transformers", "torchaudio")
    }


def waves(seconds: float = 0.5) -> Tensor:
    return torch.stack([tone(hertz, seconds, noise=0.1, seed=int(hertz)) for hertz in (120, 300)])


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


# ---- out -----------------------------------------------------------------------------------------------------------


def test_transformers_gives_equal_features(runs: Any, exported: Any, kind: str) -> None:
    from transformers import HubertModel

    theirs = HubertModel.from_pretrained(exported[kind, "transformers"]).eval()
    ours: Any = load_run(runs[kind]).method
    with torch.no_grad():
        found = theirs(waves(), output_hidden_states=True)
        close(found.last_hidden_state, ours.encoder(waves()))
        states = ours.encoder.states(waves(), final_norm=False)  # as transformers 5 gives them
        assert len(found.hidden_states) == len(states) == 3
        for a, b in zip(found.hidden_states, states, strict=True):
            close(a, b)
    close(theirs.masked_spec_embed, ours.mask_embedding)


def test_the_feature_extractor_agrees_with_preprocess(exported: Any, kind: str) -> None:
    from transformers import AutoFeatureExtractor

    theirs = AutoFeatureExtractor.from_pretrained(exported[kind, "transformers"])
    wave = waves()[0]
    found = theirs(wave.numpy(), sampling_rate=16_000, return_tensors="pt")["input_values"]
    assert theirs.do_normalize is (kind != "base")
    torch.testing.assert_close(load(exported[kind, "transformers"]).preprocess(wave).audio, found, atol=1e-3, rtol=1e-3)


def test_torchaudio_gives_equal_features(runs: Any, exported: Any, kind: str) -> None:
    place = exported[kind, "torchaudio"]
    config = json.loads((place / "config.json").read_text())
    assert config["factory"] == "hubert_pretrain_model"
    theirs = getattr(torchaudio.models, config["factory"])(**config["arguments"])
    theirs.load_state_dict(load_file(place / "model.safetensors"))
    ours: Any = load_run(runs[kind]).method
    with torch.no_grad():
        close(theirs.eval().wav2vec2(waves())[0], ours.encoder(waves()))
    close(theirs.logit_generator.label_embeddings, ours.label_embeddings)


def test_an_export_for_torchaudio_is_a_network_for_other_methods(runs: Any, exported: Any) -> None:
    network, run = (open_network(place) for place in (exported["base", "torchaudio"], runs["base"]))
    assert network.kind == "unmask" and network.hash == run.hash


def test_several_targets_go_to_torchaudio_as_an_encoder(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", targets=[target("layer 3", 5, 50.0), target("layer 6", 7, 50.0)])
    place = export(run, tmp_path / "out", "torchaudio")
    config = json.loads((place / "config.json").read_text())
    theirs = getattr(torchaudio.models, config["factory"])(**config["arguments"])
    theirs.load_state_dict(load_file(place / "model.safetensors"))
    with torch.no_grad():
        close(theirs.eval()(waves())[0], load(run).encoder(waves()))
        close(load(place).encoder(waves()), load(run).encoder(waves()))
    assert "model.extract_features" in (place / "README.md").read_text()


# ---- and back ------------------------------------------------------------------------------------------------------


def test_everything_comes_back(runs: Any, exported: Any, kind: str, tmp_path: Path) -> None:
    wanted = load(runs[kind])
    batch = wanted.preprocess(list(waves()))
    places = [exported[kind, "transformers"], exported[kind, "torchaudio"], runs[kind] / "model.safetensors"]
    places.append(exported[kind, "torchaudio"] / "model.safetensors")
    with torch.no_grad():
        for place in places:
            back = load(str(place))
            assert not back.training
            close(back(back.preprocess(list(waves()))).tokens, wanted(batch).tokens)
            for name in ("dim", "depth", "heads", "norm", "extractor", "conv_bias", "positional_groups"):
                assert getattr(back.encoder.settings, name) == getattr(wanted.encoder.settings, name)


def test_continued_pretraining_starts_where_it_ended(
    runs: Any, exported: Any, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = load_run(runs[kind])
    for place in (runs[kind], exported[kind, "transformers"], exported[kind, "torchaudio"]):
        fresh = build(trained.recipe)
        load_initial_weights(fresh, place)
        for name, tensor in trained.method.state_dict().items():
            torch.testing.assert_close(fresh.state_dict()[name], tensor, atol=0, rtol=0, msg=f"{place} {name}")
    assert "random" not in capsys.readouterr().err


def test_heads_for_other_labels_start_anew_and_that_is_said(
    runs: Any, exported: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other: Any = load_run(fabricate(tmp_path / "other", targets=[target("layer 1", 12, 50.0)])).method
    before = other.label_embeddings.clone()
    load_initial_weights(other, exported["base", "transformers"])
    assert "heads start at random values (they are for 10 classes" in capsys.readouterr().err
    assert other.label_embeddings.equal(before)
    wanted: Any = load_run(runs["base"]).method
    close(other.encoder(waves()), wanted.encoder(waves()))
    assert other.mask_embedding.equal(wanted.mask_embedding)

    bare = tmp_path / "bare"
    shutil.copytree(exported["base", "transformers"], bare)
    (bare / HEADS_FILE).unlink()
    load_initial_weights(build(load_run(runs["base"]).recipe), bare)
    assert "heads start at random values (there are none)" in capsys.readouterr().err


def test_a_recipe_names_weights_to_start_from(runs: Any, exported: Any) -> None:
    from dataclasses import replace

    recipe = replace(load_run(runs["base"]).recipe, init=str(exported["base", "transformers"]))
    built: Any = build(recipe)
    close(built.eval().encoder(waves()), load(runs["base"]).encoder(waves()))


# ---- directories that others made ----------------------------------------------------------------------------------


def hubert(path: Path, kind: str = "HubertModel", **config: Any) -> Any:
    import transformers

    small = {
        "conv_dim": [16] * 7, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
    }  # fmt: skip
    torch.manual_seed(1)
    model = getattr(transformers, kind)(transformers.HubertConfig(**{**small, **config})).eval()
    model.save_pretrained(path)
    return model


def test_directories_of_transformers_are_read(tmp_path: Path) -> None:
    plain = hubert(tmp_path / "plain")
    ctc = hubert(tmp_path / "ctc", "HubertForCTC", vocab_size=9)
    with torch.no_grad():
        close(load(tmp_path / "plain").encoder(waves()), plain(waves()).last_hidden_state)
        found = load(tmp_path / "ctc")
        close(found.encoder(waves()), ctc.hubert(waves()).last_hidden_state)
    assert found.normalise is False  # no feature extractor beside a group-norm model


def test_a_directory_with_pickles_alone_is_refused(tmp_path: Path) -> None:
    hubert(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UnmaskError, match=r"pytorch_model\.bin: .* only safetensors are read.*save_pretrained"):
        load(tmp_path)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_of_a_pickle_only_tensors_are_read(exported: Any, runs: Any, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"hubert_base{suffix}"
    torch.save({"args": Path("code"), "state_dict": {}}, file)
    with pytest.raises(UnmaskError, match="cannot be read as tensors alone .*safetensors.torch.save_file"):
        load(file)
    torch.save(load_file(exported["base", "torchaudio"] / "model.safetensors"), file)
    shutil.copy(exported["base", "torchaudio"] / "config.json", tmp_path / "config.json")
    assert load(file).encoder(waves()).equal(load(runs["base"]).encoder(waves()))


def test_a_bare_torchaudio_file_needs_its_number_of_heads(exported: Any, tmp_path: Path) -> None:
    shutil.copy(exported["base", "torchaudio"] / "model.safetensors", tmp_path / "some.safetensors")
    with pytest.raises(UnmaskError, match="does not say how many attention heads a model of width 32 has"):
        load(tmp_path / "some.safetensors")


def test_damaged_or_foreign_directories(exported: Any, tmp_path: Path) -> None:
    good = exported["base", "transformers"]
    config = json.loads((good / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(UnmaskError, match=r"describes 'bert'; expected 'hubert'"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnmaskError, match="not readable as JSON"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnmaskError, match="weights cannot be read"):
        load(tmp_path)
    tensors = load_file(good / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if ".layers.1." not in k}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UnmaskError, match="not the weights that its config.json describes"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((good / "model.safetensors").read_bytes()[:999])
    with pytest.raises(UnmaskError, match="weights cannot be read"):
        load(tmp_path)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(b"short")
    with pytest.raises(UnmaskError, match="not a complete safetensors file"):
        load(cut)


def test_wrong_keys_are_named(exported: Any, tmp_path: Path) -> None:
    place = tmp_path / "audio"
    shutil.copytree(exported["base", "torchaudio"], place)
    tensors = load_file(place / "model.safetensors")
    name = "wav2vec2.encoder.transformer.layers.1.layer_norm.bias"
    save_file({("wav2vec2.odd" if k == name else k): v for k, v in tensors.items()}, place / "model.safetensors")
    with pytest.raises(UnmaskError, match=r"unknown: wav2vec2\.odd; missing: .*layers\.1\.layer_norm\.bias"):
        load(place)
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UnmaskError, match="not the weights of a torchaudio HuBERT"):
        load(tmp_path / "other.safetensors")


def test_weights_of_another_model_are_refused_with_what_differs(runs: Any, tmp_path: Path) -> None:
    wider = load_run(fabricate(tmp_path / "wider", encoder={"dim": 64})).method
    with pytest.raises(UnmaskError, match=r"another model: .*of another shape: .*32.*the model's is 64"):
        load_initial_weights(wider, runs["base"])
    deeper = load_run(fabricate(tmp_path / "deeper", encoder={"depth": 3})).method
    with pytest.raises(UnmaskError, match=r"missing: blocks\.2\..*and \d+ more"):
        load_initial_weights(deeper, runs["base"])


def test_other_refusals(runs: Any, exported: Any, tmp_path: Path) -> None:
    with pytest.raises(UnmaskError, match="choose one of: transformers, torchaudio"):
        export(runs["base"], tmp_path / "out", "timm")  # type: ignore[arg-type]
    with pytest.raises(UnmaskError, match="not empty"):
        export(runs["base"], exported["base", "torchaudio"])
    with pytest.raises(UnmaskError, match="not a run"):
        export(tmp_path, tmp_path / "out")
    with pytest.raises(UnmaskError, match="no such file or directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(UnmaskError, match=r"no recipe.yaml.*no config.json"):
        load(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_speech_encoder_is_refused(tmp_path: Path) -> None:
    model = {"encoder": {"patch_size": 14, "dim": 48, "depth": 1, "heads": 3}, "decoder": {"dim": 32, "depth": 1}}
    data = {"source": "digits", "image_size": 28, "channels": 1, "mean": [0.4], "std": [0.3]}
    recipe = make_recipe({"method": "vision/mae", "model": model, "data": data})
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    checkpoint.write(tmp_path / "model.safetensors", build(recipe).state_dict(), {"step": 1, "method": recipe.method})
    with pytest.raises(UnmaskError, match="a run of vision/mae; give one of a speech_audio method"):
        load(tmp_path)


# ---- use -----------------------------------------------------------------------------------------------------------


def test_load_in_three_lines(runs: Any, tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", tone(200, 0.5))
    write_wav(tmp_path / "b.wav", tone(200, 0.9), rate=22_050)
    encoder = load(runs["base"])
    features = encoder(encoder.preprocess([tmp_path / "a.wav", str(tmp_path / "b.wav"), tone(300, 0.2).numpy()]))
    assert features.pooled.shape == (3, 32)
    assert features.valid is not None and features.valid.sum(1).tolist() == [24, 32, 9]
    alone = encoder(encoder.preprocess(tmp_path / "a.wav"))
    close(features.pooled[:1], alone.pooled)
    states = encoder.states(encoder.preprocess(tmp_path / "a.wav"))
    assert len(states) == encoder.depth + 1 and states[-1].equal(alone.tokens)


@pytest.mark.parametrize("normalise", [False, True])
def test_preprocess_is_what_evaluation_sees(normalise: bool, tmp_path: Path) -> None:
    write_wav(tmp_path / "talk" / "a.wav", tone(200, 0.5, noise=0.1), rate=22_050)
    run = fabricate(tmp_path / "run", str(tmp_path / "talk"), normalise=normalise, min_seconds=0.1)
    seen = open_split(load_run(run).recipe.data, "all")[0, 0].audio
    assert load(run).preprocess(tmp_path / "talk" / "a.wav").audio[0].equal(seen)


def test_recordings_that_cannot_be_prepared(runs: Any, tmp_path: Path) -> None:
    encoder = load(runs["base"])
    (tmp_path / "notes.wav").write_text("not a sound, whatever its name may say of it")
    with pytest.raises(UnmaskError, match=r"notes\.wav: "):
        encoder.preprocess(tmp_path / "notes.wav")
    with pytest.raises(UnmaskError, match=r"missing\.wav: cannot be read"):
        encoder.preprocess([str(tmp_path / "missing.wav")])
    with pytest.raises(UnmaskError, match="shape \\(2, 8000\\); expected one channel"):
        encoder.preprocess([waves()])
    with pytest.raises(UnmaskError, match="at least 400 samples"):
        encoder.preprocess(torch.zeros(399))
    with pytest.raises(UnmaskError, match="int16; expected floating point"):
        encoder.preprocess(torch.zeros(800, dtype=torch.int16))
    with pytest.raises(UnmaskError, match="recording 0: has NaN or infinite samples"):
        encoder.preprocess(torch.full((800,), torch.nan))
    with pytest.raises(UnmaskError, match="no recordings"):
        encoder.preprocess([])


def test_model_card_says_what_it_is(runs: Any, exported: Any, tmp_path: Path) -> None:
    for to, line in (("transformers", "HubertModel.from_pretrained"), ("torchaudio", "hubert_pretrain_model(**config")):
        text = (exported["base", to] / "README.md").read_text()
        front = yaml.safe_load(text.split("---")[1])
        assert front["library_name"] == to
        for part in (line, "arXiv 2106.07447", "7 optimizer steps", "Intended use", "Licence", "mfcc (10 clusters)"):
            assert part in text
        recipe = text.split("```yaml\n")[1].split("```")[0]
        assert yaml.safe_load(recipe) == yaml.safe_load((runs["base"] / "recipe.yaml").read_text())
    private = fabricate(tmp_path / "private", "/home/somebody/holiday", label_sets=("/home/somebody/labels",))
    card = (export(private, tmp_path / "out") / "README.md").read_text()
    assert "source: holiday" in card and "somebody" not in card


def test_heads_file_holds_the_heads_alone(exported: Any) -> None:
    assert set(load_file(exported["base", "transformers"] / HEADS_FILE)) == set(HEADS)
