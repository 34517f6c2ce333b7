"""Networks from elsewhere: opened, refused in one line, left out of checkpoints, and held against their hash."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toyland
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from unmask.core import cli, registry
from unmask.core.errors import UnmaskError
from unmask.core.networks import Network, NetworkError, frozen_names, open_network
from unmask.core.targets import EMATeacher, FrozenTeacher
from unmask.core.training.build import make_method
from unmask.core.training.checkpoint import CheckpointError, load_model, load_run, read, saved_state
from unmask.core.training.recipe import RecipeError, load_recipe, make_recipe, to_yaml

VIT: dict[str, Any] = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small networks at random weights: transformers' ViT and BERT, timm's ViT."""
    import timm
    from timm.models import save_for_hf
    from transformers import BertConfig, BertForMaskedLM, ViTConfig, ViTImageProcessor, ViTModel

    root = tmp_path_factory.mktemp("networks")
    ViTModel(ViTConfig(**VIT)).save_pretrained(root / "vit")
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(root / "vit")
    shape = {name: VIT[name] for name in VIT if "size" not in name}
    bert = BertConfig(vocab_size=11, hidden_size=16, intermediate_size=16, **shape)
    BertForMaskedLM(bert).save_pretrained(root / "bert")
    arguments = {"img_size": 32, "patch_size": 16, "depth": 1}
    tiny = timm.create_model("vit_tiny_patch16_224", num_classes=5, **arguments)
    save_for_hf(tiny, root / "tiny", model_args=arguments, safe_serialization=True)
    return root


def test_transformers(folders: Path) -> None:
    from transformers import ViTModel

    before = torch.get_rng_state()
    network = open_network(folders / "vit")
    assert torch.equal(torch.get_rng_state(), before), "opening a network draws nothing from the run's generator"
    assert (network.kind, network.mean, network.std) == ("transformers", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert network.facts["resample"] == 2 and network.folder == folders / "vit"
    pixels = torch.randn(2, 3, 8, 8)
    expected = ViTModel.from_pretrained(folders / "vit").eval()(pixels).last_hidden_state
    assert torch.equal(network.module(pixels).last_hidden_state, expected)


def test_heads_are_opened_too(folders: Path) -> None:
    network = open_network(folders / "bert")
    ids = torch.randint(0, 11, (2, 3))
    assert network.module(ids).logits.shape == (2, 3, 11)
    assert network.module.base_model(ids).last_hidden_state.shape == (2, 3, 16)
    assert network.mean is None and network.facts == {}
    assert open_network(folders / "bert").hash == network.hash


def test_timm(folders: Path) -> None:
    network = open_network(folders / "tiny")
    assert (network.kind, network.mean, network.std) == ("timm", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert network.facts["input_size"] == (3, 32, 32)
    assert torch.equal(network.module.head.weight, load_file(folders / "tiny" / "model.safetensors")["head.weight"])


@pytest.mark.parametrize("name", ["vit", "bert", "tiny"])
def test_frozen_in_eval_mode_and_known_by_its_weights(name: str, folders: Path, tmp_path: Path) -> None:
    network = open_network(str(folders / name))
    assert not network.module.training and not any(p.requires_grad for p in network.module.parameters())
    shutil.copytree(folders / name, tmp_path / "other")
    assert open_network(tmp_path / "other").hash == network.hash
    state = load_file(tmp_path / "other" / "model.safetensors")
    first = sorted(state)[-1]
    save_file({**state, first: state[first] + 1e-3}, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    assert open_network(tmp_path / "other").hash != network.hash


# ---- what cannot be opened -----------------------------------------------------------------------------------------


def refuses(source: str) -> str:
    with pytest.raises(NetworkError) as error:
        open_network(source)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", never)


@pytest.mark.usefixtures("no_hub")
def test_a_misspelt_path_is_never_looked_up_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "first").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for text in ("runs/frist", "./runs/frist", f"{tmp_path}/runs/frist", "rnus/first"):
        assert "no such directory; did you mean" in refuses(text) and "runs/first?" in refuses(text)
    assert "runs holds first" in refuses("runs/zebra")
    for text in ("a/b/c", "../elsewhere/x", "/nowhere", "~/nothing-of-that-name"):
        assert "no such directory" in refuses(text)
    assert "neither a directory nor an id" in refuses("hf-hub:owner/name/more")
    assert "neither a directory nor an id" in refuses("two words")


def test_the_hub(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An id is fetched without pickles and opened like a directory; a failure is one line."""
    import huggingface_hub

    asked: list[tuple[str, list[str]]] = []

    def download(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        if name != "timm/tiny":
            raise OSError("Got: ConnectError\nPlease check your internet connection")
        return str(folders / "tiny")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert (
        open_network("timm/tiny").hash == open_network("hf-hub:timm/tiny").hash == open_network(folders / "tiny").hash
    )
    assert [name for name, _ in asked] == ["timm/tiny", "timm/tiny"]
    assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in asked[0][1])
    said = refuses("someone/model")
    assert "no network of that id could be read from the hub (Got: ConnectError Please check" in said


@pytest.mark.parametrize("library", ["transformers", "timm", "huggingface_hub"])
def test_a_library_that_is_not_installed_is_named(library: str, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    source = {"transformers": str(folders / "vit"), "timm": str(folders / "tiny")}.get(library, "owner/name")
    assert f"pip install {library}" in refuses(source)


def test_directories_that_hold_no_network(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no recipe.yaml" in refuses(str(tmp_path / "empty")) and "holds nothing" in refuses(str(tmp_path / "empty"))
    assert "give the directory that holds it" in refuses(str(folders / "vit" / "model.safetensors"))
    for name, config, message in (
        ("list", [1], "expected a mapping, got list"),
        ("other", {"weights": 3}, "neither transformers' (no model_type), timm's (no architecture) nor ours"),
        ("unknown", {"model_type": "nothing-known"}, "transformers cannot open it"),
        ("code", {"model_type": "x", "auto_map": {"AutoModel": "code.Model"}}, "transformers cannot open it"),
        ("unheard", {"architecture": "vit_unheard_of"}, "timm cannot open it"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        save_file({"w": torch.zeros(1)}, tmp_path / name / "model.safetensors")
        assert message in refuses(str(tmp_path / name)), name
    (tmp_path / "list" / "config.json").write_text("{")
    assert "not readable as JSON" in refuses(str(tmp_path / "list"))


@pytest.mark.parametrize("name", ["vit", "tiny"])
def test_pickles_are_refused_and_the_remedy_works(name: str, folders: Path, tmp_path: Path) -> None:
    place = tmp_path / name
    shutil.copytree(folders / name, place)
    torch.save(load_file(place / "model.safetensors"), place / "pytorch_model.bin")
    (place / "model.safetensors").unlink()
    said = refuses(str(place))
    assert "only safetensors are read" in said and "pytorch_model.bin can run code" in said
    if name == "vit":
        from transformers import ViTModel

        ViTModel.from_pretrained(place).save_pretrained(tmp_path / "again")
    else:
        import timm
        from timm.models import save_for_hf

        model = timm.create_model(f"local-dir:{place}", pretrained=True)
        arguments = json.loads((place / "config.json").read_text())["model_args"]
        save_for_hf(model, tmp_path / "again", model_args=arguments, safe_serialization=True)
    assert open_network(tmp_path / "again").hash == open_network(folders / name).hash


def test_weights_that_are_missing_or_damaged(folders: Path, tmp_path: Path) -> None:
    for name, message in (("vit", "1 weights of ViTModel are missing or misshapen"), ("tiny", "timm cannot open it")):
        shutil.copytree(folders / name, tmp_path / name)
        weights = tmp_path / name / "model.safetensors"
        state = load_file(weights)
        del state[sorted(state)[-1]]
        save_file(state, weights, {"format": "pt"})
        assert message in refuses(str(tmp_path / name))
        weights.write_bytes(weights.read_bytes()[:-100])
        assert "cannot open it" in refuses(str(tmp_path / name))


# ---- what is saved -------------------------------------------------------------------------------------------------


class Beside(nn.Module):
    """A method's own layer beside a network, and an average of that."""

    def __init__(self, network: Network, *, average: bool = False) -> None:
        super().__init__()
        self.own = nn.Linear(2, 2)
        self.teacher = FrozenTeacher(network.module)
        if average:
            self.mean = EMATeacher(network.module, 0.5)


def test_a_frozen_network_is_not_saved_and_what_is_loads_back(folders: Path) -> None:
    method = Beside(open_network(folders / "vit")).to(torch.device("cpu"))
    assert saved_state(method).keys() == {"own.weight", "own.bias"}
    other = Beside(open_network(folders / "vit"))
    load_model(other, saved_state(method), "there")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in method.state_dict().items())
    with pytest.raises(CheckpointError, match="missing in the file: own.bias"):
        load_model(other, {"own.weight": method.own.weight}, "there")
    with pytest.raises(CheckpointError, match="only in the file: teacher"):
        load_model(other, method.state_dict(), "there")


def test_a_copy_of_a_network_is_the_methods_own(folders: Path) -> None:
    saved = saved_state(Beside(open_network(folders / "vit"), average=True))
    assert saved and not [name for name in saved if name.startswith("teacher.")]
    assert len([name for name in saved if name.startswith("mean.module.")]) == len(
        open_network(folders / "vit").module.state_dict()
    )


class Gate(nn.Module):
    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(shape))
        self.register_buffer("kept", torch.ones(shape))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scores.sigmoid() * self.kept


def test_what_is_trainable_or_registered_on_a_network_is_saved() -> None:
    """Masks on frozen weights: the masks. Unfrozen layers: these, and the network's running statistics."""
    toy = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    from unmask.core.networks import _remember

    method = nn.ModuleDict({"net": toy.requires_grad_(False)})
    _remember(toy, "abc")
    assert saved_state(method) == {}
    parametrize.register_parametrization(toy[0], "weight", Gate(toy[0].weight.shape))  # type: ignore[arg-type, union-attr]
    toy[2].register_buffer("extra", torch.zeros(1))
    masks = {"net.0.parametrizations.weight.0.scores", "net.0.parametrizations.weight.0.kept", "net.2.extra"}
    assert saved_state(method).keys() == masks
    method["net"][0].parametrizations.weight[0].scores.requires_grad_(False)  # type: ignore[index]
    toy[2].requires_grad_(True)
    statistics = {"net.1.running_mean", "net.1.running_var", "net.1.num_batches_tracked"}
    assert saved_state(method).keys() == masks | {"net.2.weight", "net.2.bias"} | statistics
    assert frozen_names(method) == {
        "net.0.parametrizations.weight.original",
        "net.0.bias",
        "net.1.weight",
        "net.1.bias",
    }


# ---- recipes and runs ----------------------------------------------------------------------------------------------


@pytest.fixture
def teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of the toy domain, which is put in place."""
    toyland.install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "train", "toyland/plain", "--out", "runs/first", "--quiet") == 0
    return Path("runs/first")


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["unmask", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def problems(raw: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as error:
        make_recipe(raw)
    return "\n".join(error.value.problems)


def test_names_are_recipe_problems_among_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    toyland.install(monkeypatch)
    found = problems({"method": "toyland/guided", "sed": 1, "networks": {"techer": "x"}})
    assert "sed: unknown key" in found and "networks.techer: unknown key; did you mean teacher?" in found
    assert "networks.teacher: missing: the network whose features are the targets. Give it with --network" in found
    assert "toyland/plain uses no network" in problems({"method": "toyland/plain", "networks": {"clip": "x"}})
    assert "expected names and sources" in problems({"method": "toyland/guided", "networks": "x"})
    wrong = {"method": "toyland/guided", "networks": {"teacher": {"sourc": "x"}}}
    assert "networks.teacher.sourc: unknown key; did you mean source?" in problems(wrong)
    assert "networks.teacher.source: missing" in problems(wrong)
    recipe = make_recipe({"method": "toyland/guided", "networks": {"teacher": "runs/a"}})
    assert make_recipe(yaml.safe_load(to_yaml(recipe))) == recipe
    assert "networks" not in to_yaml(make_recipe({"method": "toyland/plain"}))


def test_trained_resumed_and_loaded_with_the_network_opened_again(
    teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "toyland/guided", "--network", f"teacher={teacher}", "--quiet"]
    assert command(monkeypatch, *arguments, "--out", "runs/x", "--dry-run") == 0
    assert not Path("runs/x").exists() and "source: runs/first" in capsys.readouterr().out
    assert command(monkeypatch, *arguments, "--out", "runs/whole") == 0
    expected = open_network(teacher).hash
    written = yaml.safe_load(Path("runs/whole/recipe.yaml").read_text())
    assert written["networks"] == {"teacher": {"source": "runs/first", "hash": expected}}
    for name, prefix in (("model.safetensors", ""), ("checkpoints/step-00000006.safetensors", "model/")):
        saved = read(Path("runs/whole") / name).tensors
        assert not [key for key in saved if "teacher" in key], "a network from elsewhere is not copied"
        assert f"{prefix}encoder.0.weight" in saved and f"{prefix}mean.module.0.weight" in saved

    shutil.copytree("runs/whole", "runs/cut")  # as a kill between the steps 3 and 6 leaves it
    Path("runs/cut/model.safetensors").unlink()
    Path("runs/cut/checkpoints/step-00000006.safetensors").unlink()
    assert command(monkeypatch, "train", "--resume", "runs/cut", "--quiet") == 0
    whole, cut = (read(Path(f"runs/{name}/model.safetensors")).tensors for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[key], cut[key]) for key in whole)

    method: Any = load_run("runs/whole").method
    assert torch.equal(method.teacher.module[0].weight, open_network(teacher).module[0].weight)
    assert not method.train().teacher.training


def test_changed_weights_are_refused_and_moved_ones_found_again(
    teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--network", f"teacher={teacher}", "--quiet"]
    assert command(monkeypatch, "train", "toyland/guided", *arguments, "--out", "runs/one") == 0
    teacher.rename("runs/moved")
    assert command(monkeypatch, "train", "--resume", "runs/one", "--quiet") == 2
    said = capsys.readouterr().err
    assert "networks.teacher: runs/first: no such directory" in said and len(said.splitlines()) == 1
    assert "If it has moved: unmask train --resume RUN --network teacher=DIR" in said
    assert command(monkeypatch, "train", "--resume", "runs/one", "--network", "teacher=runs/moved", "--quiet") == 0
    assert load_run("runs/one").step == 6

    assert command(monkeypatch, "train", "toyland/plain", "--seed", 5, "--out", "runs/first", "--quiet") == 0
    shutil.rmtree("runs/moved")
    Path("runs/first").rename("runs/moved")
    capsys.readouterr()
    assert command(monkeypatch, "train", "--resume", "runs/one", "--quiet") == 2
    said = capsys.readouterr().err
    assert "networks.teacher: the weights in runs/moved are not those that the run was started with" in said
    with pytest.raises(NetworkError, match="not those that the run was started with"):
        load_run("runs/one")
    assert command(monkeypatch, "train", "--resume", "runs/one", "--network", "teacher=runs/moved", "--quiet") == 2
    assert "networks.teacher.hash was" in capsys.readouterr().err, "naming it anew does not get round that"


@pytest.mark.parametrize("text", ["teacher", "teacher=", "=runs/first", "a.b=runs/first"])
def test_what_the_option_does_not_take(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toyland.install(monkeypatch)
    assert command(monkeypatch, "train", "toyland/guided", "--network", text, "--out", "x") == 2
    assert f"--network {text}: expected NAME=DIR_OR_HUB_ID" in capsys.readouterr().err


def test_a_wrong_directory_leaves_nothing_in_the_way(
    teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "toyland/guided", "--out", "runs/two", "--quiet", "--network"]
    assert command(monkeypatch, *arguments, "teacher=runs/frist") == 2
    assert "networks.teacher: runs/frist: no such directory; did you mean runs/first?" in capsys.readouterr().err
    assert command(monkeypatch, *arguments, "teacher=runs/first") == 0


def test_make_method_opens_what_it_is_not_given(teacher: Path) -> None:
    recipe = load_recipe("toyland/guided", "tiny", {"networks.teacher": str(teacher)})
    network = open_network(teacher)
    assert make_method(recipe, {"teacher": network}).teacher.module is network.module  # type: ignore[union-attr]
    assert make_method(recipe).teacher.module is not network.module  # type: ignore[union-attr]
    assert registry.load("toyland/plain")
    with pytest.raises(UnmaskError, match="no such directory"):
        make_method(load_recipe("toyland/guided", "tiny", {"networks.teacher": "runs/none"}))
