"""Methods of every kind, added to a copy of the vision package by an outsider who touches none of its files.

Each is one file and its recipe, in ``tests/extension/vision``. They are trained, resumed, sampled from and used through
the command line, and pass the checks of their kind.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from outsider import FILES, Copy
from PIL import Image
from safetensors.torch import load_file

BATCH = """
import torch
from unmask.core import registry
from unmask.core.training.recipe import load_recipe
from unmask.core.training.launch import build
from unmask.vision.data import images
data = images.resolve(load_recipe("vision/bits").data)
split = images.open_split(data, "train", seed=0, augment=False)
batch = images.collate([split[i, 0] for i in range(4)])
"""
CHECK = """
from unmask.vision.checks import check_method
check_method(build(load_recipe("vision/METHOD")), batch, kind="KIND")
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Copy]:
    """The vision package with the outsider's methods, and two small networks at random weights to work on."""
    import timm
    from timm.models import save_for_hf
    from transformers import ViTConfig, ViTForImageClassification

    copy = Copy(tmp_path_factory.mktemp("vision"))
    copy.add_to("vision", FILES / "vision")
    torch.manual_seed(0)
    shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config = ViTConfig(**shape, image_size=8, patch_size=2, num_channels=1, num_labels=10)
    ViTForImageClassification(config).save_pretrained(copy.work / "classifier")
    arguments = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=5, **arguments)
    save_for_hf(network, copy.work / "timm", model_args=arguments, safe_serialization=True)
    yield copy
    copy.close()


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def test_they_are_listed_by_kind_and_task(copy: Copy) -> None:
    found = {card["id"]: card for card in json.loads(copy.ok("list", "--json"))}
    assert found["vision/masktune"]["kind"] == "finetune" and found["vision/masktune"]["task"] == "classification"
    assert found["vision/mae"]["task"] == "representation"
    assert "vision/bits" in copy.ok("list", "--kind", "generate").split()
    assert "vision/mae" not in copy.ok("list", "--kind", "generate")
    assert "choose one of pretrain, finetune, generate" in copy.refused("list", "--kind", "generator")


def test_a_generator(copy: Copy) -> None:
    run = copy.trained_and_resumed("vision/bits")
    copy.check(BATCH + CHECK.replace("METHOD", "bits").replace("KIND", "generate"))
    copy.ok("generate", run, "--out", "samples", "--count", 3, "--seed", 5)
    paths = sorted((copy.work / "samples").iterdir())
    assert [p.name for p in paths] == ["0000.png", "0001.png", "0002.png"]
    mean, std = (yaml.safe_load((run / "recipe.yaml").read_text())["data"][name][0] for name in ("mean", "std"))
    expected = {round(255 * max(0.0, mean - std)), round(255 * min(1.0, mean + std))}
    images = [pixels(path) for path in paths]
    assert images[0].shape == (8, 8) and set(np.unique(images)) == expected, "put back to the data's own scale"
    copy.ok("generate", run, "--out", "again", "--count", 3, "--seed", 5)
    assert all((copy.work / "again" / p.name).read_bytes() == p.read_bytes() for p in paths)
    assert "samples is there already and not empty" in copy.refused("generate", run, "--out", "samples")
    assert "does not evaluate" in copy.refused("evaluate", run) and "'generation'" in copy.refused("evaluate", run)
    copy.ok("report", run)
    assert "generate" in copy.ok("train", "--resume", run, "--quiet")


def test_an_explainer(copy: Copy) -> None:
    """What one network looks at: a third of the image is where its answer comes from."""
    pictures = copy.work / "pictures"
    pictures.mkdir()
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 255, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(noise).save(pictures / f"photo {i}.png")
    arguments = ["--method", "vision/occlusion", "--network", "network=timm"]
    said = json.loads(copy.ok("explain", "pictures", *arguments, "--out", "maps", "--set", "side=8", "--json"))
    assert [one["name"] for one in said["inputs"]] == ["photo 0.png", "photo 1.png", "photo 2.png"]
    assert said["settings"] == {"side": 8, "stride": 2} and len(said["networks"]["network"]["hash"]) == 32
    assert json.loads((copy.work / "maps/explanation.json").read_text())["inputs"] == said["inputs"]
    maps = [np.load(copy.work / "maps" / one["map"]) for one in said["inputs"]]
    assert all(m.shape == (16, 16) for m in maps) and not np.array_equal(maps[0], maps[1])
    assert pixels(copy.work / "maps" / said["inputs"][0]["picture"]).shape == (224, 224, 3)
    copy.ok("explain", "pictures/photo 1.png", *arguments, "--out", "one", "--set", "side=8")
    (alone,) = (copy.work / "one").glob("*.npy")
    assert np.allclose(np.load(alone), maps[1], atol=1e-5), "a file alone is explained as in its folder"
    copy.check("""
from functools import partial
import torch
from unmask.core.checks import check_explainer
from unmask.core.networks import open_network
from unmask.vision.methods.occlusion import Settings, explain
occlusion = partial(explain, settings=Settings(side=8))
check_explainer(occlusion, open_network("timm").module, torch.randn(3, 3, 16, 16))
""")


def test_what_explain_refuses(copy: Copy) -> None:
    from transformers import ViTImageProcessor

    arguments = ["--method", "vision/occlusion", "--out", "x"]
    said = copy.refused("explain", "digits", *arguments, "--network", "network=classifier")
    assert "mean and deviation of its 1 channels are not known; add a preprocessor_config.json" in said
    ViTImageProcessor(image_mean=[0.3], image_std=[0.4], size=8).save_pretrained(copy.work / "classifier")

    said = copy.refused("explain", "digits", *arguments, "--network", "net=timm", "--set", "sid=1")
    assert "settings.sid: unknown key; did you mean side?" in said, said
    assert "networks.network: missing: the classifier that is explained" in said and "networks.net: unknown key" in said
    said = copy.refused("explain", "digits", "--method", "vision/mae", "--network", "a=timm", "--out", "x")
    assert "of the kind 'pretrain' and explains nothing; methods that do: vision/occlusion" in said
    said = copy.refused("train", "vision/occlusion", "--out", "x")
    assert "unmask explain INPUT --method vision/occlusion --network network=DIR_OR_HUB_ID --out DIR" in said
    remedy = said.split("with: unmask ")[1].replace("INPUT", "digits").replace("DIR_OR_HUB_ID", "classifier")
    copy.ok(*remedy.replace("--out DIR", "--out remedy --count 1").split())
    (copy.work / "x").write_text("kept")
    assert "not empty" in copy.refused("explain", "digits", *arguments, "--network", "network=classifier")
    assert (copy.work / "x").read_text() == "kept"
    assert "nowhere" in copy.refused("explain", "nowhere", *arguments[:2], "--network", "network=timm", "--out", "y")
    assert not (copy.work / "y").exists() and not list(copy.work.glob(".y*")), "nothing is left of what failed"


def test_masks_that_a_teacher_guides(copy: Copy) -> None:
    run = copy.trained_and_resumed("vision/guided")
    copy.check(BATCH + CHECK.replace("METHOD", "guided").replace("KIND", "pretrain"))
    saved = load_file(run / "model.safetensors")
    teacher = {name: tensor for name, tensor in saved.items() if name.startswith("teacher.module.")}
    trained = [name for name in teacher if "pos_embed" not in name]
    assert trained and all(not torch.equal(saved[n], saved[n.replace("teacher.module", "encoder")]) for n in trained)
    occlusion = ["--method", "vision/occlusion", "--network", f"network={run}", "--set", "side=2"]
    assert "2 maps" in copy.ok("explain", "digits", *occlusion, "--count", 2, "--out", "of a run")
    assert np.load(next((copy.work / "of a run").glob("*.npy"))).shape == (8, 8), "a run's own size and normalisation"
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert "val_loss" in line and "unmask embed" in copy.ok("train", "--resume", run, "--quiet")


def test_latent_targets_of_a_split(copy: Copy) -> None:
    run = copy.trained_and_resumed("vision/latent")
    copy.check(BATCH + CHECK.replace("METHOD", "latent").replace("KIND", "pretrain"))
    said = json.loads(copy.ok("train", "vision/latent", "--dry-run", "--json", "--out", "none"))
    assert said["estimate"]["tokens"] is None, "a split does not say how many tokens there are"
    copy.ok("report", run)
    assert "What it hides" not in (run / "report.html").read_text(), "it has no `picture`, so no gallery"
    evaluated = json.loads(copy.ok("evaluate", run, "--quick", "--json"))
    assert set(evaluated["rows"]) == {"trained", "random", "pixels"}


def test_masks_on_the_weights_of_a_frozen_network(copy: Copy) -> None:
    run = copy.trained_and_resumed("vision/masktune", "--network", "classifier=classifier")
    saved = load_file(run / "model.safetensors")
    assert saved and all(name.endswith(".parametrizations.weight.0.scores") for name in saved), "only masks are saved"
    assert not all((scores == 1).all() for scores in saved.values()), "masks are learnt"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert 0 <= lines[0]["accuracy"] <= 1 and "hidden_share" not in lines[0]
    copy.ok("train", "vision/masktune", "--network", "classifier=classifier", "--dry-run", "--out", "none")
    copy.ok("report", run)
    assert "'classification', which unmask-vision does not evaluate" in copy.refused("evaluate", run)
    assert "does not generate; methods that do: vision/bits" in copy.refused("generate", run, "--out", "none")
    copy.check(
        BATCH
        + CHECK.replace('"vision/METHOD"', '"vision/masktune", "tiny", {"networks.classifier": "classifier"}')
        .replace("KIND", "finetune")
        .replace("vision.checks", "core.checks")
    )
