"""What leaves computes what the run does and comes back bit for bit, by our names and by SST's."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from scans import MODEL, fabricate, scan, write_las, write_scans
from torch import Tensor, nn

import unmask.pointcloud
from unmask.core import registry
from unmask.core.errors import UnmaskError
from unmask.core.method import Clock
from unmask.core.nn.ragged import segment_max, segment_mean
from unmask.core.randomness import Key
from unmask.core.training.checkpoint import load_run
from unmask.core.training.loop import train
from unmask.core.training.recipe import make_recipe
from unmask.pointcloud.data.batches import PointBatch
from unmask.pointcloud.data.clouds import open_split
from unmask.pointcloud.data.readers import Cloud
from unmask.pointcloud.geometry.voxels import voxelise
from unmask.pointcloud.interop import convert
from unmask.pointcloud.interop.export import export
from unmask.pointcloud.interop.model import CloudEncoder
from unmask.pointcloud.interop.pretrained import load_initial_weights


def deep(**changes: int) -> dict[str, Any]:
    return {"encoder": {"dim": 16, "depth": 2, "heads": 2, "window": 4, **changes}}


DEEP = deep()
CONVOLUTIONS = {"convolutions": {"dim": 16, "levels": 2}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def scans(place: Path) -> Path:
    return write_scans(place / "scans", {"train": 3, "val": 1}, flat=True)


@pytest.fixture(scope="module")
def run(place: Path, scans: Path) -> Path:
    return fabricate(place / "run", scans, model=DEEP, features=["intensity"])


@pytest.fixture(scope="module")
def exported(run: Path, place: Path) -> Path:
    return export(run, place / "ours")


@pytest.fixture(scope="module")
def sst(run: Path, place: Path) -> Path:
    return export(run, place / "sst", to="sst")


def clouds(channels: int = 4) -> PointBatch:
    generator = torch.Generator().manual_seed(1)
    points = torch.rand(700, channels, generator=generator) * 3.8 - 1.8
    return PointBatch(points, torch.tensor([0, 200, 220, 700]), torch.arange(3))


def build(run: Path) -> Any:
    recipe = load_run(run).recipe
    return registry.load(recipe.method).build(recipe.model, recipe.data)


def drawn(method: Any, batch: PointBatch) -> Any:
    return method.draw(batch, Clock(), Key.of(0, batch.ids))


# ---- there and back ------------------------------------------------------------------------------------------------


def test_every_form_gives_the_runs_features_bit_for_bit(run: Path, exported: Path, sst: Path) -> None:
    method: Any = load_run(run).method
    batch = clouds()
    with torch.no_grad():
        expected = method.encode(batch)
        for source in (run, exported, str(exported), sst):
            encoder = unmask.pointcloud.load(source)
            found = encoder(batch)
            assert not encoder.training and encoder.dim == 16 and encoder.grid == method.grid
            assert found.tokens.equal(expected.tokens) and found.pooled.equal(expected.pooled)
            assert all(a.equal(b) for a, b in zip(found.per_point(), expected.per_point(), strict=True))


def test_the_whole_model_comes_back(run: Path, exported: Path) -> None:
    state, back = load_run(run).method.state_dict(), load_file(exported / "model.safetensors")
    assert state.keys() == back.keys() and all(back[name].equal(tensor) for name, tensor in state.items())
    assert {path.name for path in exported.iterdir()} == {"model.safetensors", "config.json", "README.md"}


def test_converting_to_sst_and_back_changes_no_bit(run: Path) -> None:
    state = load_run(run).method.state_dict()
    encoder = {name: tensor for name, tensor in state.items() if convert.is_encoder(name)}
    assert 0 < len(encoder) < len(state)
    back = convert.from_sst(convert.to_sst(state) | {"bbox_head.shared.weight": torch.zeros(1)})
    assert back.keys() == encoder.keys() and all(back[name].equal(tensor) for name, tensor in encoder.items())


def test_an_encoder_of_sparse_convolutions_is_exported_by_our_names_only(scans: Path, tmp_path: Path) -> None:
    source = fabricate(tmp_path / "run", scans, model=CONVOLUTIONS)
    with pytest.raises(UnmaskError, match=r"SST cannot hold an encoder of SparseConvEncoder.*--to unmask"):
        export(source, tmp_path / "sst", to="sst")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}  # nothing half-written either
    encoder = unmask.pointcloud.load(export(source, tmp_path / "ours"))
    with torch.no_grad():
        assert encoder(clouds(3)).tokens.equal(load_run(source).method.encode(clouds(3)).tokens)  # type: ignore[operator]
    with pytest.raises(UnmaskError, match="that SST's detectors can hold; unknown: encoder"):
        convert.to_sst(load_run(source).method.state_dict())


# ---- SST -----------------------------------------------------------------------------------------------------------


def test_names_and_shapes_of_sst(sst: Path) -> None:
    shapes = {name: list(tensor.shape) for name, tensor in load_file(sst / "model.safetensors").items()}
    expected: dict[str, list[int]] = {}
    for i, (width_in, width) in enumerate([(10, 8), (16, 16)]):
        stem = f"voxel_encoder.vfe_layers.{i}"
        expected[f"{stem}.linear.weight"] = [width, width_in]
        expected |= {f"{stem}.norm.{part}": [width] for part in ("weight", "bias", "running_mean", "running_var")}
        expected[f"{stem}.norm.num_batches_tracked"] = []
    for stem in (f"backbone.block_list.{i}.encoder_list.{j}" for i in (0, 1) for j in (0, 1)):
        attention = f"{stem}.win_attn.self_attn"
        expected |= {f"{attention}.in_proj_weight": [48, 16], f"{attention}.in_proj_bias": [48]}
        expected |= {f"{attention}.out_proj.weight": [16, 16], f"{attention}.out_proj.bias": [16]}
        expected |= {f"{stem}.linear1.weight": [32, 16], f"{stem}.linear1.bias": [32]}
        expected |= {f"{stem}.linear2.weight": [16, 32], f"{stem}.linear2.bias": [16]}
        expected |= {f"{stem}.norm{n}.{part}": [16] for n in (1, 2) for part in ("weight", "bias")}
    assert shapes == expected


class Layer(nn.Module):
    """SST's layer as the sheet writes it, on torch's own attention, for the pillars of one window."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.win_attn = nn.ModuleDict({"self_attn": nn.MultiheadAttention(dim, heads)})
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        q = x + position
        x = self.norm1(x + self.win_attn["self_attn"](q, q, x, need_weights=False)[0])
        return self.norm2(x + self.linear2(F.gelu(self.linear1(x))))


def sine_code(place: Tensor, half: int) -> Tensor:
    """Of one axis: sine at even channels, cosine at odd ones."""
    channel = torch.arange(half)
    angle = place[:, None] / 10000 ** (2 * (channel // 2) / half)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())


@torch.no_grad()
def test_a_detector_with_these_names_computes_the_same(sst: Path) -> None:
    """A plain rewrite of voxel encoder and backbone, loaded strictly by the exported names and settings."""
    config = json.loads((sst / "config.json").read_text())["detector"]
    ours, batch = unmask.pointcloud.load(sst), clouds()
    widths = config["voxel_encoder"]["feat_channels"]
    layers = [(batch.points.shape[1] + 6, widths[0]), (2 * widths[0], widths[1])]
    vfe = nn.ModuleList(
        nn.ModuleDict({"linear": nn.Linear(a, b, bias=False), "norm": nn.BatchNorm1d(b, eps=1e-3)}) for a, b in layers
    )
    dims = zip(*(config["backbone"][key] for key in ("d_model", "nhead", "dim_feedforward")), strict=True)
    blocks = nn.ModuleList(nn.ModuleDict({"encoder_list": nn.ModuleList([Layer(*d), Layer(*d)])}) for d in dims)
    detector = nn.ModuleDict(
        {"voxel_encoder": nn.ModuleDict({"vfe_layers": vfe}), "backbone": nn.ModuleDict({"block_list": blocks})}
    ).eval()
    detector.load_state_dict(load_file(sst / "model.safetensors"))

    voxels = voxelise(batch.points, batch.offsets, ours.grid)
    points, pillar, starts = batch.points[voxels.order], voxels.pillar_of, voxels.pillar_starts
    size, low = torch.tensor(config["voxel_size"]), torch.tensor(config["point_cloud_range"][:3])
    cells = torch.stack([voxels.pillars[:, 2], voxels.pillars[:, 1], torch.zeros_like(starts[1:])], dim=1)
    xyz = points[:, :3]
    x = torch.cat([points, xyz - segment_mean(xyz, starts)[pillar], xyz - ((cells + 0.5) * size + low)[pillar]], dim=1)
    for i, layer in enumerate(vfe):
        x = layer["norm"](layer["linear"](x)).relu()  # type: ignore[index]
        most = segment_max(x, starts)
        x = torch.cat([x, most[pillar]], dim=1) if i == 0 else most

    side = config["window_shape"][0]
    for block in blocks:
        for shift, layer in zip((0, side // 2), block["encoder_list"], strict=True):  # type: ignore[index]
            u = voxels.pillars[:, 1:] + (side - shift if shift else 0)
            window = torch.cat([voxels.pillars[:, :1], u // side], dim=1)
            y_in, x_in = (u % side - side / 2).unbind(1)
            code = torch.cat([sine_code(x_in, 8), sine_code(y_in, 8)], dim=1)
            out = torch.empty_like(x)
            for one in window.unique(dim=0):
                mine = (window == one).all(1)
                out[mine] = layer(x[mine], code[mine])
            x = out
    torch.testing.assert_close(ours(batch).packed, x, atol=1e-5, rtol=1e-5)


# ---- use -----------------------------------------------------------------------------------------------------------


def test_preprocess_is_what_evaluation_sees(run: Path, exported: Path, tmp_path: Path) -> None:
    for i in range(3):
        write_las(tmp_path / "tiles" / f"{i}.las", *scan("box", i))
    data = load_run(run).recipe.data
    for limit in (None, 50):
        source = fabricate(tmp_path / f"run {limit}", tmp_path / "tiles", features=["intensity"], max_points=limit)
        encoder = unmask.pointcloud.load(source)
        seen = open_split(load_run(source).recipe.data, "all")
        batch = encoder.preprocess(sorted((tmp_path / "tiles").iterdir()))
        for i in range(3):
            assert batch.take([i]).points.equal(seen[i, 0].points)
    assert data.max_points is None
    alone = unmask.pointcloud.load(exported).preprocess(tmp_path / "tiles" / "0.las")
    assert len(alone.ids) == 1 and alone.points.shape == (180, 4)


def test_arrays_are_prepared_like_files(exported: Path, tmp_path: Path) -> None:
    encoder = unmask.pointcloud.load(exported)
    table = np.random.default_rng(0).uniform(-1, 1, (40, 4))
    np.save(tmp_path / "cloud.npy", table)
    cloud = Cloud(table[:, :3], {"intensity": table[:, 3:]})
    batch = encoder.preprocess([table, torch.from_numpy(table), cloud, tmp_path / "cloud.npy"])
    for i in range(4):
        torch.testing.assert_close(batch.take([i]).points, torch.from_numpy(table).float(), atol=0, rtol=0)
    assert encoder(batch).pooled.shape == (4, 16)


def test_clouds_that_cannot_be_prepared(exported: Path, tmp_path: Path) -> None:
    encoder = unmask.pointcloud.load(exported)
    (tmp_path / "notes.npy").write_text("not a cloud")
    table = np.random.default_rng(0).uniform(-1, 1, (40, 4))
    for given, said in (
        ([], "no clouds to encode"),
        (tmp_path / "notes.npy", "notes.npy"),
        (tmp_path / "missing.npy", "missing.npy"),
        (table[:, :3], r"cloud 0: an array of shape \(40, 3\).*\[points, 4\]: x, y, z, intensity"),
        ([table, table + 99], "cloud 1: no points inside data.range"),
        (Cloud(table[:, :3]), "has no intensity"),
    ):
        with pytest.raises(UnmaskError, match=said):
            encoder.preprocess(given)  # type: ignore[arg-type]


def test_a_batch_without_points_in_range_is_refused(exported: Path) -> None:
    far = PointBatch(torch.full((4, 4), 50.0), torch.tensor([0, 4]), torch.tensor([0]))
    with pytest.raises(UnmaskError, match="no point inside data"):
        unmask.pointcloud.load(exported)(far)


# ---- going on ------------------------------------------------------------------------------------------------------


def test_continued_pretraining_starts_where_it_ended(run: Path, exported: Path) -> None:
    """The same loss, decoders and heads included, from a run, an exported directory and a file."""
    trained: Any = load_run(run).method
    batch = clouds()
    plan = drawn(trained, batch)
    wanted = trained(batch, plan).loss
    for source in (run, exported, exported / "model.safetensors"):
        fresh = build(run).eval()
        assert not torch.isclose(fresh(batch, plan).loss, wanted)
        load_initial_weights(fresh, source)
        assert fresh(batch, plan).loss.equal(wanted)


def test_an_encoder_by_ssts_names_leaves_the_heads_alone(
    run: Path, sst: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: Any = load_run(run).method
    for source in (sst, sst / "model.safetensors"):
        fresh = build(run).eval()
        before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
        load_initial_weights(fresh, source)
        assert fresh.encode(clouds()).tokens.equal(trained.encode(clouds()).tokens)
        rest = [name for name in before if not convert.is_encoder(name)]
        assert rest and all(fresh.state_dict()[name].equal(before[name]) for name in rest)
        assert "decoders and heads start at random values" in capsys.readouterr().err


def test_a_recipe_continues_from_an_exported_directory(run: Path, exported: Path, scans: Path, tmp_path: Path) -> None:
    raw = {
        "method": "pointcloud/geomae", "init": str(exported), "model": {**MODEL, **DEEP},
        "data": {"source": str(scans), "features": ["intensity"], "normalize": "none",
                 "range": [-2.0, -2.0, -1.0, 2.0, 2.0, 3.0], "pillar": [0.5, 0.5]},
        "optimizer": {"base_lr": 1e-6, "reference_batch": 4, "weight_decay": 0},
        "schedule": {"steps": 2}, "training": {"batch_size": 4, "precision": "32-true"},
    }  # fmt: skip
    recipe = make_recipe(json.loads(json.dumps(raw)))
    continued = load_run(train(recipe, tmp_path / "run", progress=False)).method.state_dict()
    before, fresh = load_run(run).method.state_dict(), build(run).state_dict()
    for name in ("encoder.layers.0.attn.qkv.weight", "cell_decoder.layers.0.mlp.fc1.weight", "heads.low.weight"):
        moved = (continued[name] - before[name]).abs().max()
        assert 0 < moved < 1e-4 < (continued[name] - fresh[name]).abs().max()


@pytest.mark.parametrize(
    ("model", "data", "said"),
    [
        (deep(dim=32), {}, r"mask_token \(1 x 16, the model's is 1 x 32\).*encoder.dim is"),
        (deep(depth=1), {}, r"that the model does not have.*encoder.depth is 2 there and 1"),
        (DEEP, {"features": []}, r"8 x 10, the model's is 8 x 9.*4 channels there and 3 here \(data.features\)"),
        ({**DEEP, "low": [8, 4, 4]}, {}, r"heads.low.weight \(48 x 16.*model.low is \(4, 2, 2\) there and \(8, 4, 4\)"),
        ({**DEEP, "weights": {"curvature": 0}}, {}, r"heads.curvature.*weights.curvature is 4.0 there and 0"),
        ({**DEEP, **CONVOLUTIONS}, {}, r"missing: encoder\.before.*convolutions.dim is None there and 16 here"),
        (deep(heads=4), {}, r"fit, but mean something else: model.encoder.heads is 2 there"),
        (deep(window=8), {}, r"mean something else: model.encoder.window is 4 there and 8"),
        ({**DEEP, "low": [2, 4, 2], "med": [1, 2, 1]}, {}, r"mean something else: model.low is \(4, 2, 2\) there"),
    ],
)  # fmt: skip
def test_weights_of_another_model_are_refused_with_what_differs(
    exported: Path, scans: Path, tmp_path: Path, model: dict[str, Any], data: dict[str, Any], said: str
) -> None:
    other = build(fabricate(tmp_path / "other", scans, model=model, **{"features": ["intensity"], **data}))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(UnmaskError, match=said):
        load_initial_weights(other, exported)
    assert all(tensor.equal(before[name]) for name, tensor in other.state_dict().items())


def test_pillars_of_another_size_are_named(
    exported: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = fabricate(tmp_path / "other", scans, model=DEEP, features=["intensity"], pillar=[1.0, 0.5])
    load_initial_weights(build(other), exported)
    assert "trained on pillars of 0.5 x 0.5 m, goes on with 1 x 0.5 m" in capsys.readouterr().err


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_refusals_of_export(run: Path, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UnmaskError, match="cannot export to 'onnx'; choose one of: unmask, sst"):
        export(run, tmp_path / "out", to="onnx")  # type: ignore[arg-type]
    with pytest.raises(UnmaskError, match="not empty"):
        export(run, exported)
    with pytest.raises(UnmaskError, match="not a run"):
        export(tmp_path, tmp_path / "out")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UnmaskError, match="cannot write the export"):
        export(run, tmp_path / "file" / "out")
    assert not (tmp_path / "out").exists()


def test_places_that_hold_no_model(run: Path, exported: Path, sst: Path, tmp_path: Path) -> None:
    method = build(run)
    with pytest.raises(UnmaskError, match="no such file or directory"):
        unmask.pointcloud.load(tmp_path / "nowhere")
    with pytest.raises(UnmaskError, match=r"no recipe.yaml.*no config.json"):
        unmask.pointcloud.load(tmp_path)
    with pytest.raises(UnmaskError, match="do not say how the model is shaped"):
        unmask.pointcloud.load(exported / "model.safetensors")
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(UnmaskError, match="cannot be read as tensors alone"):
        load_initial_weights(method, tmp_path / "weights.pth")
    (tmp_path / "weights.safetensors").write_bytes(b"cut off")
    with pytest.raises(UnmaskError, match="not a complete safetensors file"):
        load_initial_weights(method, tmp_path / "weights.safetensors")
    for text, said in (("{", "not readable as JSON"), ('{"model_type": "vit"}', "not an exported encoder")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UnmaskError, match=said):
            unmask.pointcloud.load(tmp_path)
    config = json.loads((exported / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model": {**config["model"], "depht": 1}}))
    with pytest.raises(UnmaskError, match=r"config\.json: model.*depht"):
        unmask.pointcloud.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnmaskError, match="not a complete safetensors file"):
        unmask.pointcloud.load(tmp_path)  # the weights are not there
    save_file(load_file(sst / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(UnmaskError, match=r"damaged: .*missing: pillar_encoder"):
        unmask.pointcloud.load(tmp_path)
    save_file({"backbone.block_list.0.encoder_list.0.gamma": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**config, "format": "sst"}))
    with pytest.raises(UnmaskError, match=r"not those of SST's detectors; unknown: .*gamma"):
        unmask.pointcloud.load(tmp_path)


def test_ids_of_the_hub(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(exported)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert isinstance(unmask.pointcloud.load("somebody/lidar"), CloudEncoder)
    assert asked == [("somebody/lidar", ["config.json", "model.safetensors"])]

    def gone(name: str, allow_patterns: list[str]) -> str:
        raise OSError("offline\nand more")

    monkeypatch.setattr(hub, "snapshot_download", gone)
    with pytest.raises(UnmaskError, match=r"no directory somebody/lidar.*from the hub \(offline\)"):
        unmask.pointcloud.load("somebody/lidar")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UnmaskError, match="pip install huggingface_hub"):
        unmask.pointcloud.load("somebody/lidar")


# ---- the card ------------------------------------------------------------------------------------------------------


def test_model_card_says_what_it_is(run: Path, exported: Path, sst: Path) -> None:
    parts = ["arXiv 2305.08808", "pointcloud/geomae", "7 optimizer steps", "Intended use", "Licence"]
    parts += ["x in [-2, 2), y in [-2, 2), z in [-1, 3)", "0.5 x 0.5 m", "8 along x, 8 along y", "4 x 2 x 2 finest"]
    parts += ["x, y, z, intensity", "4 in all", "as they are"]
    for out, library in ((exported, "unmask"), (sst, "sst")):
        text = (out / "README.md").read_text()
        assert yaml.safe_load(text.split("---")[1])["library_name"] == library
        for part in parts:
            assert part in text
        recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
        assert recipe["model"] == yaml.safe_load((run / "recipe.yaml").read_text())["model"]
    assert "not checked against the code" in (sst / "README.md").read_text()
    detector = json.loads((sst / "config.json").read_text())["detector"]
    assert detector["voxel_size"] == [0.5, 0.5, 4.0] and detector["point_cloud_range"] == [-2, -2, -1, 2, 2, 3]
    assert detector["sparse_shape"] == [8, 8, 1] and detector["window_shape"] == [4, 4, 1]
    assert detector["backbone"]["nhead"] == [2, 2] and detector["voxel_encoder"]["in_channels"] == 4


def test_model_card_documents_every_key(exported: Path, sst: Path) -> None:
    for out in (exported, sst):
        text = (out / "README.md").read_text()
        rows = re.findall(r"^\| `(.+)` \| (.*) \| (.+) \|$", text, re.MULTILINE)
        documented = set()
        for pattern, numbers, shape in rows:
            taken = {}
            for part in numbers.split("; ") if numbers else ():
                letter, values = part.split(" = ")
                first, _, last = values.partition("..")
                taken[letter] = range(int(first), int(last) + 1) if last else [int(v) for v in values.split(", ")]
            for i in taken.get("i", [0]):
                documented |= {(pattern.format(i=i, j=j), shape) for j in taken.get("j", [0])}
        tensors = load_file(out / "model.safetensors")
        assert documented == {(n, " x ".join(map(str, t.shape)) or "scalar") for n, t in tensors.items()}


def test_exports_keep_folders_private(run: Path, scans: Path, tmp_path: Path) -> None:
    source = fabricate(tmp_path / "run", "/home/somebody/sweeps")
    (source / "evaluation.json").write_text(
        json.dumps(
            {"run": "/home/somebody/run", "data": "/home/somebody/other", "note": "/home/somebody/other has no labels"}
        )
    )
    out = export(source, tmp_path / "out")
    for name in ("README.md", "config.json"):
        text = (out / name).read_text()
        assert "sweeps" in text and "somebody" not in text
    assert '"data": "other"' in (out / "README.md").read_text()


def test_importing_the_package_brings_in_no_torch() -> None:
    code = "import sys, unmask.pointcloud; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
