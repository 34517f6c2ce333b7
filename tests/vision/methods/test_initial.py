"""An encoder goes from one method to another: MAE, ColorMAE, SimMIM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from classifiers import write_classifier

from unmask.core.errors import UnmaskError
from unmask.core.networks import open_network
from unmask.core.training import checkpoint
from unmask.core.training.build import make_method
from unmask.core.training.launch import build
from unmask.core.training.recipe import Recipe, make_recipe, to_yaml

VIT = {"patch_size": 7, "dim": 32, "depth": 1, "heads": 2}


def recipe(method: str, encoder: dict[str, Any] | None = None, init: Path | None = None, size: int = 28) -> Recipe:
    model: dict[str, Any] = {"encoder": {**VIT, **(encoder or {})}}
    model |= {"mask_unit": 7} if "simmim" in method else {"decoder": {"dim": 16, "depth": 1, "heads": 2}}
    data = {"source": "digits", "image_size": size, "channels": 1, "mean": [0.4], "std": [0.3]}
    return make_recipe({"method": method, "model": model, "data": data, "init": init and str(init)})


@pytest.fixture
def mae(tmp_path: Path) -> Path:
    run, made = tmp_path / "mae", recipe("vision/mae")
    run.mkdir()
    (run / "recipe.yaml").write_text(to_yaml(made))
    torch.manual_seed(1)
    checkpoint.write(run / "model.safetensors", make_method(made).state_dict(), {"step": 7})
    return run


PLAIN = {"kind": "vit", "positions": "sincos", "relative_bias": False, "layer_scale": None}


@pytest.mark.parametrize(("method", "encoder"), [("vision/colormae", {}), ("vision/simmim", PLAIN)])
def test_from_mae(method: str, encoder: dict[str, Any], mae: Path) -> None:
    said: list[str] = []
    made: Any = build(recipe(method, encoder, mae), say=said.append)
    trained: Any = checkpoint.load_run(mae).method
    for name, tensor in trained.encoder.state_dict().items():
        assert torch.equal(made.encoder.state_dict()[name], tensor), name
    assert f"took {len(trained.encoder.state_dict())} tensors of the encoder of vision/mae ({mae})" in said[0]
    left = len(trained.state_dict()) - len(trained.encoder.state_dict())
    assert f"left {left} (mask_token, decoder_pos_embed, decoder_embed, decoder_blocks and" in said[0]
    assert f"new in {method}: " in said[0]


@pytest.mark.parametrize("method", ["vision/mae", "vision/colormae"])
def test_from_a_classifier(method: str, mae: Path, tmp_path: Path) -> None:
    """Its encoder; its own norm and head stay behind, and the norm that they replaced begins anew."""
    tuned, said = write_classifier(mae, tmp_path / "tuned", ["a", "b"]), list[str]()
    made: Any = build(recipe(method, init=tmp_path / "tuned"), say=said.append)
    fresh: Any = build(recipe(method))
    encoder = tuned.encoder_of().state_dict()
    assert set(made.encoder.state_dict()) - set(encoder) == {"norm.weight", "norm.bias"}
    for name, tensor in made.encoder.state_dict().items():
        assert torch.equal(tensor, encoder.get(name, fresh.encoder.state_dict()[name])), name
    assert torch.equal(made.decoder_embed.weight, fresh.decoder_embed.weight), "the rest is what the seed gives"
    (text,) = said
    assert text.startswith(
        f"took {len(encoder)} tensors of the encoder of a classifier of vision/mae ({tmp_path / 'tuned'}); "
        f"left 4 (head, norm); new in {method}: "
    )
    assert "(encoder.norm, mask_token, decoder_pos_embed, decoder_embed" in text


def test_a_classifier_of_another_shape_names_the_setting(mae: Path, tmp_path: Path) -> None:
    write_classifier(mae, tmp_path / "tuned", ["a", "b"])
    with pytest.raises(UnmaskError, match=r"encoder of a classifier of vision/mae does not fit.*depth is 1 there"):
        build(recipe("vision/mae", {"depth": 2}, tmp_path / "tuned"), say=lambda text: None)


def test_fixed_positions_follow_the_image_size(mae: Path) -> None:
    made: Any = build(recipe("vision/colormae", init=mae, size=56), say=lambda text: None)
    trained: Any = checkpoint.load_run(mae).method
    assert made.encoder.pos_embed.shape[1] == 65 and trained.encoder.pos_embed.shape[1] == 17
    assert torch.equal(made.encoder.blocks[0].attn.qkv.weight, trained.encoder.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize(
    ("encoder", "text"),
    [
        ({"depth": 2}, r"model.encoder.depth is 1 there and 2 here. What differs: blocks.1"),
        ({"heads": 4}, r"model.encoder.heads is 2 there and 4 here. What differs: no shape, but what the weights mean"),
        ({"class_token": False}, r"model.encoder.class_token is true there and false here.*Set .*class_token=true"),
    ],
)
def test_one_error_names_the_setting(encoder: dict[str, Any], text: str, mae: Path) -> None:
    with pytest.raises(UnmaskError, match=text):
        build(recipe("vision/colormae", encoder, mae), say=lambda text: None)


def test_a_run_and_its_export_are_networks_for_other_methods(mae: Path, tmp_path: Path) -> None:
    """The encoder with the run's own statistics; timm's is the same function."""
    from unmask.vision.interop.export import export

    network = open_network(mae)
    assert (network.kind, network.mean, network.std) == ("unmask", (0.4,), (0.3,))
    images = torch.randn(2, 1, 28, 28)
    features = network.module(images).pooled
    assert torch.equal(features, checkpoint.load_run(mae).method.encoder(images).pooled)  # type: ignore[operator]
    exported = open_network(export(mae, tmp_path / "timm", to="timm"))
    assert (exported.kind, exported.mean, exported.std) == ("timm", (0.4,), (0.3,))
    torch.testing.assert_close(exported.module(images), features)
    masked = open_network(export(mae, tmp_path / "transformers", to="transformers"))
    assert masked.kind == "transformers" and masked.mean == (0.4,)
