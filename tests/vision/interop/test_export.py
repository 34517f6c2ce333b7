"""What leaves for timm and transformers computes what ours does, and comes back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from classifiers import write_classifier
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import unmask.vision
from unmask.core.errors import UnmaskError
from unmask.core.mask import Mask
from unmask.core.method import Plan
from unmask.core.training import checkpoint
from unmask.core.training.checkpoint import load_run
from unmask.core.training.loop import train
from unmask.core.training.recipe import make_recipe, to_yaml
from unmask.vision.data.images import ImageBatch, open_split
from unmask.vision.interop.export import export
from unmask.vision.interop.pretrained import load_initial_weights, load_vitmae_directory

VIT = {"patch_size": 4, "dim": 48, "depth": 2, "heads": 3}
MAE = {"encoder": VIT, "decoder": {"dim": 32, "depth": 1, "heads": 2}}
BEIT = {**VIT, "kind": "vit"}
SWIN = {"kind": "swin", "patch_size": 2, "dim": 16, "depths": [2, 2], "heads": [2, 4], "window": 7}


def fabricate(out: Path, method: str, model: dict[str, Any], size: int = 28, channels: int = 1) -> Path:
    """A run directory as training leaves it, with random weights that are not those of initialisation."""
    statistics = {"mean": [0.4] * channels, "std": [0.3] * channels}
    data = {"source": "digits", "image_size": size, "channels": channels, **statistics}
    recipe = make_recipe({"method": method, "model": model, "data": data})
    from unmask.core import registry

    built = registry.load(recipe.method).build(recipe.model, recipe.data)
    generator = torch.Generator().manual_seed(0)
    for parameter in built.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    out.mkdir(parents=True)
    (out / "recipe.yaml").write_text(to_yaml(recipe))
    checkpoint.write(out / "model.safetensors", built.state_dict(), {"step": 7, "method": method})
    return out


def images(size: int = 28, channels: int = 1, batch: int = 3) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def batch_of(x: Tensor) -> ImageBatch:
    return ImageBatch(images=x, ids=torch.arange(len(x)), labels=None)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fabricate(tmp_path_factory.mktemp("runs") / "mae", "vision/mae", MAE)


@pytest.fixture(scope="module")
def vitmae(run: Path) -> Path:
    return export(run, run.parent / "transformers", to="transformers")


@pytest.mark.parametrize(
    ("method", "model", "channels"),
    [
        ("vision/mae", MAE, 1),
        ("vision/mae", {**MAE, "encoder": {**VIT, "class_token": False}}, 3),
        ("vision/mae", {**MAE, "encoder": {**VIT, "positions": "learned", "layer_scale": 0.1, "mlp_ratio": 3}}, 4),
        ("vision/simmim", {"encoder": BEIT, "mask_unit": 4}, 3),
        ("vision/simmim", {"encoder": SWIN, "mask_unit": 4}, 3),
    ],
    ids=["mae", "no class token", "learned positions and layer scale", "relative bias", "swin"],
)
def test_timm_gives_equal_features(tmp_path: Path, method: str, model: dict[str, Any], channels: int) -> None:
    import timm

    source = fabricate(tmp_path / "run", method, model, channels=channels)
    out = export(source, tmp_path / "out", to="timm")
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    ours = unmask.vision.load(source)
    x = images(channels=channels)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), ours(x).pooled, atol=1e-5, rtol=1e-5)
        tokens = theirs.forward_features(x)
        tokens = tokens.flatten(1, 2) if tokens.dim() == 4 else tokens[:, theirs.num_prefix_tokens :]
        torch.testing.assert_close(tokens, ours(x).tokens, atol=1e-5, rtol=1e-5)
    config = timm.data.resolve_model_data_config(theirs)
    assert config["input_size"] == (channels, 28, 28)
    assert list(config["mean"]) == pytest.approx([0.4] * channels)


# ---- fine-tuned classifiers ----------------------------------------------------------------------------------------


def fine_tune(run: Path, out: Path, classes: int = 5) -> Path:
    """A fine-tuned directory as `unmask finetune` leaves it, with random weights far from those of initialisation."""
    model = write_classifier(run, out, [f"digit {i}" for i in range(classes)])
    generator = torch.Generator().manual_seed(4)
    for parameter in (*model.norm.parameters(), *model.head.parameters()):
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    about = {"step": load_run(run).step, "classes": model.classes, "data": "/home/me/digits"}
    (out / "finetune.json").write_text(json.dumps(about))
    checkpoint.write(out / "model.safetensors", model.state_dict(), {"step": 1})
    return out


@pytest.fixture(scope="module")
def tuned(run: Path) -> Path:
    return fine_tune(run, run.parent / "tuned")


def test_a_classifier_is_loaded_like_a_run(tuned: Path, tmp_path: Path) -> None:
    encoder: Any = unmask.vision.load(tuned)
    assert not encoder.training and encoder.classes == [f"digit {i}" for i in range(5)]
    Image.new("L", (40, 60), 200).save(tmp_path / "grey.png")
    x = encoder.preprocess([tmp_path / "grey.png", Image.new("L", (28, 28), 9)])
    features = encoder(x)
    assert features.pooled.shape == (2, 48) and features.grid == (7, 7)
    classifier = encoder.classifier
    torch.testing.assert_close(encoder.logits(x), classifier.head(classifier.norm(features.pooled)))


@pytest.mark.parametrize(
    ("method", "model", "channels"),
    [
        ("vision/mae", MAE, 1),
        ("vision/mae", {**MAE, "encoder": {**VIT, "class_token": False}}, 3),
        ("vision/mae", {**MAE, "encoder": {**VIT, "positions": "learned", "layer_scale": 0.1}}, 4),
        ("vision/simmim", {"encoder": BEIT, "mask_unit": 4}, 3),
    ],
    ids=["mae", "no class token", "learned positions and layer scale", "relative bias"],
)
def test_timm_gives_equal_logits(tmp_path: Path, method: str, model: dict[str, Any], channels: int) -> None:
    import timm

    tuned = fine_tune(fabricate(tmp_path / "run", method, model, channels=channels), tmp_path / "tuned")
    out = export(tuned, tmp_path / "out", to="timm")
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    ours: Any = unmask.vision.load(tuned)
    x = images(channels=channels)
    with torch.no_grad():
        logits = ours.logits(x)
        torch.testing.assert_close(theirs(x), logits, atol=1e-5, rtol=1e-5)
    assert logits.std() > 0.1
    assert (theirs.num_classes, theirs.pretrained_cfg["num_classes"]) == (5, 5)
    assert theirs.pretrained_cfg["label_names"] == ours.classes
    text = (out / "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["pipeline_tag"] == "image-classification"
    for part in ("digit 4 (4)", "then fine-tuned on labels of 5 classes", "finetune.json", "label_names"):
        assert part in text
    assert "/home/me" not in text


@pytest.mark.parametrize(
    ("method", "model", "channels"),
    [
        ("vision/mae", MAE, 1),
        ("vision/mae", {**MAE, "encoder": {**VIT, "positions": "none", "layer_scale": 0.1}}, 3),
        ("vision/simmim", {"encoder": BEIT, "mask_unit": 4}, 3),
    ],
    ids=["mae", "no positions and layer scale", "relative bias"],
)
def test_transformers_gives_equal_logits(tmp_path: Path, method: str, model: dict[str, Any], channels: int) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    tuned = fine_tune(fabricate(tmp_path / "run", method, model, channels=channels), tmp_path / "tuned")
    out = export(tuned, tmp_path / "out", to="transformers")
    theirs = AutoModelForImageClassification.from_pretrained(out).eval()
    ours: Any = unmask.vision.load(tuned)
    x = images(channels=channels)
    with torch.no_grad():
        logits = ours.logits(x)
        torch.testing.assert_close(theirs(x).logits, logits, atol=1e-5, rtol=1e-5)
    assert logits.std() > 0.1
    assert [theirs.config.id2label[i] for i in range(5)] == ours.classes
    assert list(AutoImageProcessor.from_pretrained(out).image_mean) == pytest.approx([0.4] * channels)
    assert "AutoModelForImageClassification" in (out / "README.md").read_text()


def test_classifiers_that_a_format_cannot_hold_are_refused_with_what_works(tmp_path: Path) -> None:
    bare = fabricate(tmp_path / "bare", "vision/mae", {**MAE, "encoder": {**VIT, "class_token": False}})
    bare = fine_tune(bare, tmp_path / "bare tuned")
    with pytest.raises(UnmaskError, match="a class token and square images only; export this one with --to timm"):
        export(bare, tmp_path / "out", to="transformers")
    assert export(bare, tmp_path / "timm").is_dir()
    swin = fine_tune(fabricate(tmp_path / "run", "vision/simmim", {"encoder": SWIN, "mask_unit": 4}), tmp_path / "swin")
    with pytest.raises(UnmaskError, match="swin.* cannot hold this classifier.*unmask.vision.load, or export the run"):
        export(swin, tmp_path / "out")
    assert unmask.vision.load(swin).logits(images()).shape == (3, 5)  # type: ignore[operator]
    assert export(tmp_path / "run", tmp_path / "out").is_dir()  # both ways out that the message names


def test_transformers_gives_equal_loss_and_features(run: Path, vitmae: Path) -> None:
    from transformers import ViTMAEForPreTraining, ViTMAEModel

    theirs = ViTMAEForPreTraining.from_pretrained(vitmae).eval()
    ours = load_run(run).method
    x, noise = images(), torch.rand(3, 49, generator=torch.Generator().manual_seed(2))
    plan = Plan(Mask.from_scores(noise, int(49 * (1 - ours.masking.ratio))))
    with torch.no_grad():
        output = theirs(pixel_values=x, noise=noise)
        torch.testing.assert_close(ours(batch_of(x), plan).loss, output.loss, atol=1e-5, rtol=1e-5)
        encoder = ViTMAEModel.from_pretrained(vitmae, mask_ratio=0.0).eval()
        in_order = torch.arange(49.0).expand(3, -1)
        hidden = encoder(pixel_values=x, noise=in_order).last_hidden_state
        torch.testing.assert_close(hidden[:, 1:], ours.encoder(x).tokens, atol=1e-5, rtol=1e-5)


def test_transformers_directory_comes_back_whole(run: Path, vitmae: Path) -> None:
    ours, back = load_run(run).method, load_vitmae_directory(vitmae)
    assert ours.state_dict().keys() == back.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], tensor, atol=0, rtol=0, msg=name)
    assert (back.masking.ratio, back.norm_pix) == (0.75, True)


def test_image_processor_agrees_with_preprocess(vitmae: Path) -> None:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(vitmae)
    assert list(processor.image_mean) == pytest.approx([0.4])
    encoder = unmask.vision.load(vitmae)
    grey = torch.linspace(0, 255, 28 * 28).view(1, 28, 28).to(torch.uint8)
    theirs = processor(images=[grey], return_tensors="pt")["pixel_values"]
    picture = Image.fromarray(grey[0].numpy())
    torch.testing.assert_close(encoder.preprocess(picture), theirs, atol=1e-5, rtol=1e-5)


def test_load_in_three_lines(run: Path, vitmae: Path, tmp_path: Path) -> None:
    Image.new("RGB", (60, 40), (200, 30, 30)).save(tmp_path / "red.png")
    for place in (run, vitmae, str(vitmae)):
        encoder = unmask.vision.load(place)
        assert not encoder.training
        x = encoder.preprocess([tmp_path / "red.png", Image.new("L", (28, 28), 9)])
        assert x.shape == (2, 1, 28, 28)
        features = encoder(x)
        assert features.pooled.shape == (2, 48)
        assert features.grid == (7, 7)


def test_continued_pretraining_starts_where_it_ended(run: Path, vitmae: Path, tmp_path: Path) -> None:
    """The same loss, decoder included, from a run, an exported directory, and a file with the released names."""
    trained = load_run(run)
    released = {name.removeprefix("encoder."): t.clone() for name, t in trained.method.state_dict().items()}
    save_file(released, tmp_path / "full.safetensors")
    torch.save({"model": released}, tmp_path / "full.pth")
    x, plan = images(), Plan(Mask.from_scores(torch.rand(3, 49), 12))
    wanted = trained.method(batch_of(x), plan).loss
    for source in (run, vitmae, tmp_path / "full.safetensors", tmp_path / "full.pth", run / "model.safetensors"):
        fresh = _build(trained.recipe)
        assert not torch.isclose(fresh(batch_of(x), plan).loss, wanted)
        load_initial_weights(fresh, source)
        torch.testing.assert_close(fresh.eval()(batch_of(x), plan).loss, wanted, atol=1e-5, rtol=1e-5)
        fresh(batch_of(x), plan).loss.backward()
        assert fresh.decoder_pred.weight.grad is not None


def test_a_recipe_continues_from_an_exported_directory(run: Path, vitmae: Path, tmp_path: Path) -> None:
    data = {"source": "digits", "image_size": 28, "channels": 1}
    recipe = make_recipe(
        {
            "method": "vision/mae", "init": str(vitmae), "model": MAE, "data": data,
            "optimizer": {"base_lr": 1e-6, "reference_batch": 8, "weight_decay": 0},
            "schedule": {"epochs": 1, "steps": 2},
            "training": {"batch_size": 8, "precision": "32-true"},
        }
    )  # fmt: skip
    continued = load_run(train(recipe, tmp_path / "run", progress=False)).method.state_dict()
    before, fresh = load_run(run).method.state_dict(), _build(recipe).state_dict()
    for name in ("encoder.blocks.0.attn.qkv.weight", "decoder_blocks.0.mlp.fc1.weight", "decoder_pred.weight"):
        moved = (continued[name] - before[name]).abs().max()
        assert 0 < moved < 1e-4 < (continued[name] - fresh[name]).abs().max()


def test_continued_pretraining_at_another_image_size(vitmae: Path, tmp_path: Path) -> None:
    larger = load_run(fabricate(tmp_path / "larger", "vision/mae", MAE, size=32)).method
    load_initial_weights(larger, vitmae)
    small = load_vitmae_directory(vitmae)
    torch.testing.assert_close(larger.encoder(images(32)).pooled, small.encoder(images(32)).pooled)


def _build(recipe: Any) -> Any:
    from unmask.core import registry

    return registry.load(recipe.method).build(recipe.model, recipe.data)


def test_weights_of_another_model_are_refused_with_what_differs(run: Path, tmp_path: Path) -> None:
    wider = load_run(fabricate(tmp_path / "wider", "vision/mae", {**MAE, "encoder": {**VIT, "dim": 96}})).method
    with pytest.raises(
        UnmaskError, match=r"another model.*encoder\.cls_token \(1 x 1 x 48, the model's is 1 x 1 x 96\)"
    ):
        load_initial_weights(wider, run)
    simmim = load_run(fabricate(tmp_path / "simmim", "vision/simmim", {"encoder": BEIT, "mask_unit": 4})).method
    with pytest.raises(UnmaskError, match=r"missing: .*that the model does not have: .*and \d+ more"):
        load_initial_weights(simmim, run)


def test_an_encoder_alone_is_refused(run: Path, tmp_path: Path) -> None:
    method = load_run(run).method
    save_file({k: v.clone() for k, v in method.encoder.state_dict().items()}, tmp_path / "encoder.safetensors")
    with pytest.raises(UnmaskError, match="an encoder alone: take the full checkpoint"):
        load_initial_weights(method, tmp_path / "encoder.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"encoder": {**VIT, "class_token": False}}, "no class token"),
        ({"encoder": {**VIT, "positions": "learned"}}, "positions are 'learned'"),
        ({"encoder": {**VIT, "layer_scale": 0.1}}, "layer scale"),
    ],
)
def test_transformers_refuses_what_it_cannot_hold(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    source = fabricate(tmp_path / "run", "vision/mae", {**MAE, **change})
    with pytest.raises(UnmaskError, match=rf"{said}.*--to timm"):
        export(source, tmp_path / "out", to="transformers")
    assert not (tmp_path / "out").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"run"}  # nothing half-written either


def test_other_refusals(run: Path, vitmae: Path, tmp_path: Path) -> None:
    simmim = fabricate(tmp_path / "simmim", "vision/simmim", {"encoder": BEIT, "mask_unit": 4})
    with pytest.raises(UnmaskError, match="cannot hold vision/simmim; export its encoder instead"):
        export(simmim, tmp_path / "out", to="transformers")
    with pytest.raises(UnmaskError, match="choose one of: timm, transformers"):
        export(run, tmp_path / "out", to="onnx")  # type: ignore[arg-type]
    with pytest.raises(UnmaskError, match="not empty"):
        export(run, vitmae)
    with pytest.raises(UnmaskError, match="not a run"):
        export(tmp_path, tmp_path / "out")
    with pytest.raises(UnmaskError, match="no such file or directory"):
        unmask.vision.load(tmp_path / "nowhere")
    with pytest.raises(UnmaskError, match=r"no recipe.yaml.*no config.json"):
        unmask.vision.load(tmp_path)
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(UnmaskError, match="cannot be read as tensors alone"):
        load_initial_weights(load_run(run).method, tmp_path / "weights.pth")


def test_damaged_or_foreign_directories(vitmae: Path, tmp_path: Path) -> None:
    config = json.loads((vitmae / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(UnmaskError, match=r"describes 'bert'; expected 'vit_mae'"):
        load_vitmae_directory(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnmaskError, match="weights cannot be read"):
        load_vitmae_directory(tmp_path)
    tensors = load_file(vitmae / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("decoder")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnmaskError, match="the decoder was not saved"):
        load_vitmae_directory(tmp_path)


def test_model_card_says_what_it_is(run: Path, vitmae: Path, tmp_path: Path) -> None:
    for out, library, line in (
        (vitmae, "transformers", "ViTMAEForPreTraining.from_pretrained"),
        (export(run, tmp_path / "timm", to="timm"), "timm", "timm.create_model("),
    ):
        text = (out / "README.md").read_text()
        front = yaml.safe_load(text.split("---")[1])
        assert front["library_name"] == library
        for part in (line, "arXiv 2111.06377", "vision/mae", "7 optimizer steps", "Intended use", "Licence", "digits"):
            assert part in text
        recipe = text.split("```yaml\n")[1].split("```")[0]
        assert yaml.safe_load(recipe) == yaml.safe_load((run / "recipe.yaml").read_text())


def test_importing_the_package_brings_in_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, unmask.vision; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_preprocess_is_what_evaluation_sees(run: Path, tmp_path: Path) -> None:
    noise = torch.randint(0, 256, (50, 70, 3), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    (tmp_path / "photos").mkdir()
    Image.fromarray(noise.numpy()).save(tmp_path / "photos" / "noise.png")
    settings = replace(load_run(run).recipe.data, source=str(tmp_path / "photos"))
    seen = open_split(settings, "all")[0, 0].image
    encoder = unmask.vision.load(run)
    for picture in (tmp_path / "photos" / "noise.png", Image.fromarray(noise.numpy())):
        torch.testing.assert_close(encoder.preprocess(picture)[0], seen, atol=0, rtol=0)


def test_model_card_keeps_folders_private(tmp_path: Path) -> None:
    source = fabricate(tmp_path / "run", "vision/mae", MAE)
    text = (source / "recipe.yaml").read_text().replace("source: digits", "source: /home/somebody/holiday")
    (source / "recipe.yaml").write_text(text)
    card = (export(source, tmp_path / "out", to="timm") / "README.md").read_text()
    assert "source: holiday" in card
    assert "somebody" not in card


def test_pictures_that_cannot_be_prepared(run: Path, tmp_path: Path) -> None:
    encoder = unmask.vision.load(run)
    (tmp_path / "notes.jpg").write_text("not a picture")
    with pytest.raises(UnmaskError, match=r"notes\.jpg: a text file"):
        encoder.preprocess([tmp_path / "notes.jpg"])
    with pytest.raises(UnmaskError, match=r"missing\.png: cannot be read"):
        encoder.preprocess(str(tmp_path / "missing.png"))
