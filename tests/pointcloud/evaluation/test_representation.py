"""Evaluating, fine-tuning and embedding with runs of random weights over small scans whose answers are known."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scans import fabricate, scan, write_las, write_scans
from torch import Tensor

import unmask.pointcloud
from unmask.core.errors import UnmaskError
from unmask.core.evaluation import samples
from unmask.core.evaluation.classifier import Classifier, layers_of
from unmask.core.evaluation.embedding import embed
from unmask.core.evaluation.encoding import at_source, settle, settle_on, untrained
from unmask.core.evaluation.features import FeatureSplit, Splits
from unmask.core.evaluation.finetune import FineTuning, finetune, load_classifier
from unmask.core.evaluation.predict import predict
from unmask.core.evaluation.run import evaluate, table
from unmask.core.evaluation.samples import probe
from unmask.core.report.gather import read_run
from unmask.core.training import checkpoint
from unmask.core.training.checkpoint import load_run
from unmask.core.training.launch import build
from unmask.core.training.recipe import Tuning
from unmask.pointcloud.data.batches import PointBatch
from unmask.pointcloud.data.clouds import collate, open_split
from unmask.pointcloud.encoders.sparse_conv import ConvEncoderSettings, SparseConvEncoder
from unmask.pointcloud.encoders.window import PillarEncoder
from unmask.pointcloud.evaluation import dense, finetuning
from unmask.pointcloud.evaluation.dense import NoPointLabels, Reading, dense_probe
from unmask.pointcloud.evaluation.encoding import ENCODING
from unmask.pointcloud.evaluation.features import BINS, QUANTILES, cloud_vectors, coordinates, point_coordinates
from unmask.pointcloud.evaluation.finetuning import protocol_for
from unmask.pointcloud.geometry.voxels import VoxelGrid, Voxels, voxelise
from unmask.pointcloud.interop.export import export
from unmask.pointcloud.report.sections import probes

SIZES = {"train": 12, "val": 4, "test": 5}  # of each of three kinds
GRID = VoxelGrid((-2.0, -2.0, -1.0), (0.5, 0.5, 4.0), (8, 8), (4, 2, 2), (2, 1, 1))


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scans(tmp_path_factory.mktemp("data") / "scans", SIZES)


@pytest.fixture(scope="module")
def run(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fabricate(tmp_path_factory.mktemp("runs") / "run", scans)


@pytest.fixture(scope="module")
def evaluated(run: Path) -> dict[str, Any]:
    return evaluate(run, device="cpu", quick=True)


def batch_of(*clouds: Tensor) -> PointBatch:
    offsets = torch.tensor([0, *map(len, clouds)]).cumsum(0)
    return PointBatch(torch.cat(clouds).float(), offsets, torch.arange(len(clouds)) * 7 + 3)


def clouds(*sizes: int) -> PointBatch:
    generator = torch.Generator().manual_seed(1)
    return batch_of(*(torch.rand(size, 3, generator=generator) * 2.8 - 0.9 for size in sizes))


# ---- features ------------------------------------------------------------------------------------------------------


def test_a_clouds_vector_is_the_maximum_and_the_mean_over_its_pillars_and_nobody_elses(run: Path) -> None:
    method: Any = load_run(run).method
    batch = clouds(40, 300, 9)
    with torch.no_grad():
        features = method.encode(batch)
        vectors = cloud_vectors(features)
        for i in range(3):
            own = features.packed[features.voxels.pillars[:, 0] == i]
            torch.testing.assert_close(vectors[i], torch.cat([own.amax(0), own.mean(0)]))
            for rows in ([i], [i, 1, 0], [2, i]):
                again = cloud_vectors(method.encode(batch.take(rows)))[rows.index(i)]
                torch.testing.assert_close(again, vectors[i], atol=1e-5, rtol=1e-5)


def test_padding_is_not_a_maximum() -> None:
    """Features below zero in every pillar stay below zero, whatever the padding is filled with."""
    voxels = voxelise(clouds(30, 5).points, clouds(30, 5).offsets, GRID)
    from unmask.pointcloud.encoders.window import pad

    vectors = cloud_vectors(pad(torch.full((len(voxels.pillars), 4), -2.0), voxels))
    assert vectors.unique().tolist() == [-2.0]


def test_coordinates_are_what_they_say() -> None:
    points = clouds(501).points
    outside = torch.tensor([[9.0, 0.0, 0.0], [0.0, 0.0, 7.0]])
    found = coordinates(batch_of(torch.cat([points, outside])), GRID)[0]
    mean, deviation, skewness, rest = found[:3], found[3:6], found[6:9], found[9:]
    torch.testing.assert_close(mean, points.mean(0))
    torch.testing.assert_close(deviation, points.std(0, correction=0))
    centred = points.double() - points.double().mean(0)
    torch.testing.assert_close(skewness.double(), (centred / centred.std(0, correction=0)).pow(3).mean(0))
    ranked = rest[: 4 * len(QUANTILES)].view(len(QUANTILES), 4)
    values = torch.cat([points, centred.norm(dim=1, keepdim=True).float()], dim=1)
    expected = values.quantile(torch.tensor(QUANTILES), dim=0)
    torch.testing.assert_close(ranked, expected, atol=0.02, rtol=0)
    torch.testing.assert_close(ranked[[0, -1]], torch.stack([values.amin(0), values.amax(0)]))
    axes = rest[4 * len(QUANTILES) :][:3]
    torch.testing.assert_close(axes.square().sum(), deviation.square().sum())
    assert axes.diff().max() <= 0
    shares = rest[4 * len(QUANTILES) + 3 :]
    assert len(shares) == BINS and float(shares.sum()) == pytest.approx(1)
    distances = torch.pdist(points)
    near = float((distances < distances.mean() * 1.5).float().mean())
    assert float(shares[: BINS // 2].sum()) == pytest.approx(near, abs=0.06)


def test_coordinates_do_not_depend_on_the_batch_or_the_place() -> None:
    batch = clouds(50, 2, 200)
    whole = coordinates(batch, GRID)
    assert whole.isfinite().all()
    for i in range(3):
        torch.testing.assert_close(coordinates(batch.take([i]), GRID)[0], whole[i], atol=0, rtol=0)
    flat = coordinates(batch_of(torch.tensor([[0.1, 0.1, 1.7], [0.2, 0.3, 1.7], [0.4, 0.3, 1.7]])), GRID)
    assert flat[0, 8] == 0  # the skewness of a constant height


def test_coordinates_of_points_see_the_ground_around() -> None:
    """A post of two points beside ground in the next pillar, and one point that stands alone."""
    points = torch.tensor([[0.1, 0.1, 1.0], [0.3, 0.1, 2.0], [0.6, 0.1, -0.5], [-1.9, -1.9, 0.7]])
    batch = batch_of(points)
    voxels = voxelise(batch.points, batch.offsets, GRID)
    found = torch.empty(4, 9)
    found[voxels.order] = point_coordinates(batch, voxels, GRID)
    ln2 = float(np.log(2))
    expected = torch.tensor(
        [  # height, x, y, z from the mean; log count; mean, least, largest height; deviation
            [1.5, -0.1, 0.0, -0.5, ln2, 2.0, 1.5, 2.5, 0.5],
            [2.5, 0.1, 0.0, 0.5, ln2, 2.0, 1.5, 2.5, 0.5],
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        ]
    )
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


# ---- the random encoder --------------------------------------------------------------------------------------------


def test_settling_takes_statistics_and_leaves_the_rest(run: Path) -> None:
    method: Any = load_run(run).method
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    first, second = clouds(300, 200), clouds(100)
    settle(method, [first, second])
    norm = method.pillar_encoder.layers[0].norm
    assert (norm.momentum, norm.training, int(norm.num_batches_tracked)) == (0.01, False, 2)
    seen = []
    norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    method.encode(first), method.encode(second)
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean(0) for x in seen]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([x.var(0) for x in seen]).mean(0))
    moved = {name for name, tensor in method.state_dict().items() if not tensor.equal(before[name])}
    assert moved == {f"pillar_encoder.layers.{i}.norm.{part}" for i in (0, 1) for part in STATISTICS}


def test_evaluation_settles_the_trained_encoder_too_and_leaves_the_run_alone(run: Path, tmp_path: Path) -> None:
    """Statistics that tell of training's start must not be held against it."""
    other = shutil.copytree(run, tmp_path / "other")
    saved = checkpoint.read(other / "model.safetensors")
    stale = {n: t.zero_() + float(n.endswith("var")) if "running" in n else t for n, t in saved.tensors.items()}
    checkpoint.write(other / "model.safetensors", stale, saved.meta)
    before = (other / "model.safetensors").read_bytes()
    mine, theirs = (evaluate(place, quick=True, device="cpu")["rows"]["trained"] for place in (run, other))
    assert mine == theirs
    assert (other / "model.safetensors").read_bytes() == before


def settled(run: Any, train: Any, seed: int) -> Any:
    method = untrained(run, seed)
    settle_on(method, run, train, torch.device("cpu"), seed)
    return method


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def test_the_reference_has_other_weights_than_the_run_began_with(run: Path) -> None:
    loaded = load_run(run)
    train = open_split(loaded.recipe.data, "train")
    first, again, other = (settled(loaded, train, seed) for seed in (0, 0, 1))
    weight = first.encoder.layers[0].mlp.fc1.weight  # type: ignore[union-attr]
    for different in (loaded.method, build(loaded.recipe), other):
        assert not weight.equal(different.encoder.layers[0].mlp.fc1.weight)  # type: ignore[union-attr]
    assert all(a.equal(b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    norm: Any = first.pillar_encoder.layers[0].norm  # type: ignore[union-attr]
    assert not norm.training and int(norm.num_batches_tracked) == 5  # 36 clouds, 8 at once
    assert (norm.running_var != 1).all()


# ---- evaluate ------------------------------------------------------------------------------------------------------


def test_three_rows_are_measured_in_the_same_way_and_written(run: Path, evaluated: dict[str, Any]) -> None:
    rows = evaluated["rows"]
    assert list(rows) == list(evaluated["names"]) == ["trained", "random", "coordinates"]
    for row in rows.values():
        assert list(row["few_label"]) == ["1", "5", "10", "100"] and row["few_label"]["100"] == row["linear"]
        assert all(0 <= row[name] <= 1 for name in ("knn", "linear", "linear_val"))
        assert 1 <= row["rankme"] <= row["dim"] + 1e-3
        assert list(row["dense"]["iou"]) == ["ground", "building"]
        assert "finetune" not in row
    assert [row["dim"] for row in rows.values()] == [32, 32, 9 + 4 * len(QUANTILES) + 3 + BINS]
    assert [row["dense"]["dim"] for row in rows.values()] == [16, 16, 9]
    assert evaluated["splits"] == {"train": 36, "val": 12, "test": 15, "classes": 3}
    assert evaluated["dense"]["points"] == {"train": 2000, "val": 1000, "test": 15 * 179}
    assert evaluated["dense"]["classes"] == ["ground", "building"] and evaluated["dense"]["outside"] == 0
    assert (evaluated["val_loss"], evaluated["step"], evaluated["labelled"]) == (2.5, 7, True)
    assert set(evaluated["protocol"]) == {"knn", "linear", "few_label", "dense"}
    assert json.loads((run / "evaluation.json").read_text()) == evaluated


def test_what_is_easy_is_found(evaluated: dict[str, Any]) -> None:
    """Boxes, poles and slabs differ in height; buildings are what stands above the ground."""
    raw = evaluated["rows"]["coordinates"]
    assert raw["linear"] >= 0.8
    assert raw["dense"]["accuracy"] > 0.99 and raw["dense"]["mean_iou"] > 0.98
    ceiling = evaluated["dense"]["ceiling"]["accuracy"]
    assert evaluated["dense"]["majority"] == pytest.approx(120 / 179) and ceiling > 0.85
    assert all(evaluated["rows"][name]["dense"]["accuracy"] <= ceiling for name in ("trained", "random"))


def test_evaluation_repeats(run: Path, evaluated: dict[str, Any]) -> None:
    again = evaluate(run, device="cpu", quick=True)
    assert (again["rows"], again["dense"]) == (evaluated["rows"], evaluated["dense"])


def test_without_references_only_the_trained_encoder_is_measured(
    run: Path, evaluated: dict[str, Any], tmp_path: Path
) -> None:
    alone = shutil.copytree(run, tmp_path / "run")
    assert evaluate(alone, device="cpu", quick=True, references=False)["rows"] == {
        "trained": evaluated["rows"]["trained"]
    }


def test_the_table_names_every_row_and_split(evaluated: dict[str, Any]) -> None:
    text = table(evaluated)
    for part in ("trained encoder", "untrained encoder", "coordinates", "k-NN", "1 % labels", "mean IoU", "15 test"):
        assert part in text
    for value in (evaluated["rows"]["trained"]["linear"], evaluated["dense"]["ceiling"]["mean_iou"]):
        assert f"{100 * value:.1f}" in text
    assert "scored on 2,685" in text and "(0.5 x 0.5)" in text


def test_the_report_shows_them(run: Path, evaluated: dict[str, Any]) -> None:
    found = probes(replace(read_run(run), evaluation=evaluated))
    assert found is not None and "mean IoU" in found.columns and len(found.rows) == 3
    assert f"{100 * evaluated['rows']['trained']['linear']:.1f} %" in found.summary.text


def test_probes_find_a_label_that_the_features_hold() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = {}
    for name, size in (("train", 60), ("val", 30), ("test", 30)):
        y = torch.arange(size) % 3
        x = torch.cat([torch.eye(3)[y], 0.01 * torch.randn(size, 5, generator=generator)], dim=1)
        parts[name] = FeatureSplit(x, torch.arange(size), y)
    row = probe(Splits(**parts), seed=0)
    assert (row["knn"], row["linear"], row["few_label"]["100"]) == (1.0, 1.0, 1.0)


def test_fine_tuning_stands_beside_training_from_scratch(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decays = []
    tune = samples.tune

    def watched(run: Any, splits: Any, recipe: Any, **options: Any) -> Any:
        decays.append(recipe.finetune.layer_decay)
        return tune(run, splits, recipe, **options)

    monkeypatch.setattr(samples, "tune", watched)
    result = evaluate(run, device="cpu", epochs=1)
    assert decays == [0.65, 1.0]
    assert (result["protocol"]["finetune"]["epochs"], result["protocol"]["finetune"]["batch_size"]) == (1, 8)
    assert all(0 <= result["rows"][name]["finetune"] <= 1 for name in ("trained", "random"))
    assert "finetune" not in result["rows"]["coordinates"]
    assert "fine-tuned" in table(result)


def test_data_without_labels_are_said_to_be_so(run: Path, tmp_path: Path) -> None:
    folder = write_scans(tmp_path / "plain", {"train": 3, "val": 1}, las=False, flat=True)
    result = evaluate(run, data=str(folder), device="cpu")
    assert (result["labelled"], result["point_labelled"], result["splits"]) == (False, False, {"train": 9})
    assert "has no labels" in result["note"] and "one folder per class" in result["note"]
    assert all(set(row) == {"rankme", "deviation", "dim"} for row in result["rows"].values())
    assert "no labels" in table(result).replace("\n", " ") and "mean IoU" not in table(result)
    shown = probes(read_run(run))
    assert shown is not None and shown.summary.text == result["note"]


def test_data_with_classes_of_points_alone(run: Path, tmp_path: Path) -> None:
    for i in range(9):
        split = "train" if i < 5 else "val" if i < 7 else "test"
        write_las(tmp_path / "tiles" / split / f"{i}.las", *scan("box", i))
    result = evaluate(run, data=str(tmp_path / "tiles"), device="cpu")
    assert (result["labelled"], result["point_labelled"]) == (False, True)
    assert "classes of points" in result["note"]
    assert all(set(row) == {"rankme", "deviation", "dim", "dense"} for row in result["rows"].values())
    assert result["dense"]["points"] == {"train": 5 * 179, "val": 2 * 179, "test": 2 * 179}
    assert "mean IoU" in table(result) and "k-NN" not in table(result)
    shown = probes(read_run(run))
    assert shown is not None and "mean IoU" in shown.columns and "linear" not in shown.columns


def test_points_that_nobody_classified_are_skipped(run: Path, tmp_path: Path) -> None:
    for i in range(9):
        xyz, labels = scan("box", i)
        split = "train" if i < 5 else "val" if i < 7 else "test"
        write_las(tmp_path / "tiles" / split / f"{i}.las", xyz, np.where(i < 5, 1, labels))
    result = evaluate(run, data=str(tmp_path / "tiles"), device="cpu")
    assert (result["labelled"], result["point_labelled"]) == (False, False)
    assert result["skipped"] == {"points": "none of 5 train clouds has a labelled point inside data.range"}
    assert "has no labels" in result["note"] and "points: not probed" in table(result)
    assert all("dense" not in row for row in result["rows"].values())


# ---- the dense probe -----------------------------------------------------------------------------------------------


def height(batch: PointBatch, voxels: Voxels) -> tuple[Tensor, Tensor]:
    return batch.points[voxels.order][:, 2:3], torch.arange(len(voxels.order))


def told(batch: PointBatch, voxels: Voxels) -> tuple[Tensor, Tensor]:
    """The label itself, as read-out features of points."""
    assert batch.point_labels is not None
    return torch.eye(500)[batch.point_labels[voxels.order]], torch.arange(len(voxels.order))


class Labelled:
    """A split in memory: clouds whose points have a class by their height."""

    def __init__(self, sizes: list[int], seed: int, classes: int = 3) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.points = [torch.rand(size, 3, generator=generator) * 3.4 - 1.0 for size in sizes]
        self.labels = [((p[:, 2] + 1.0) / 3.4 * classes).long() for p in self.points]
        self.ids = torch.arange(len(sizes)) + 100 * seed

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, item: tuple[int, int]) -> Any:
        from unmask.pointcloud.data.batches import Sample

        i = item[0]
        labels = self.labels[i].clone()
        labels[::5] = -1
        return Sample(self.points[i], int(self.ids[i]), None, labels)


@pytest.fixture
def splits() -> dict[str, Any]:
    return {"train": Labelled([300, 400, 120], 1), "val": Labelled([200, 50], 2), "test": Labelled([500, 90], 3)}


READING = Reading(GRID, torch.device("cpu"), batch_size=2)
NAMES = ["low", "middle", "high"]


def test_the_dense_probe_learns_what_height_tells(splits: dict[str, Any]) -> None:
    rows, about = dense_probe({"height": height, "told": told}, splits, NAMES, READING)
    assert rows["told"]["accuracy"] == rows["told"]["mean_iou"] == rows["told"]["val_accuracy"] == 1.0
    assert rows["height"]["accuracy"] > 0.9 and set(rows["height"]["iou"]) == set(NAMES)
    test = splits["test"]
    inside = [
        ((p >= torch.tensor([-2.0, -2.0, -1.0])) & (p < torch.tensor([2.0, 2.0, 3.0]))).all(1) for p in test.points
    ]
    known = [torch.arange(len(p)) % 5 != 0 for p in test.points]
    scored = sum(int((i & k).sum()) for i, k in zip(inside, known, strict=True))
    assert about["points"]["test"] == scored
    assert about["outside"] == sum(int((~i & k).sum()) for i, k in zip(inside, known, strict=True)) > 0


def test_the_ceiling_is_every_pillars_commonest_label(splits: dict[str, Any]) -> None:
    _, about = dense_probe({"told": told}, splits, NAMES, READING)
    right = total = 0
    for i in range(2):
        sample = splits["test"][i, 0]
        cells = (sample.points[:, :2] / 0.5).floor().long()
        keep = (sample.point_labels >= 0) & (sample.points[:, :2] < 2).all(1) & (sample.points[:, 2] < 3)
        for cell in cells[keep].unique(dim=0):
            mine = sample.point_labels[keep & (cells == cell).all(1)]
            right, total = right + int(mine.bincount().max()), total + len(mine)
    assert about["ceiling"]["accuracy"] == pytest.approx(right / total)
    assert 0 < about["ceiling"]["mean_iou"] < 1


def test_which_points_are_fitted_on_does_not_depend_on_batches_or_order(splits: dict[str, Any]) -> None:
    def sample(batch_size: int, seed: int = 0, clouds: int = 9, most: int = 40) -> Any:
        reading = replace(READING, batch_size=batch_size, seed=seed)
        return dense._sample({"height": height}, splits["train"], clouds, most, "train", reading)

    whole = sample(3)
    assert whole.y.bincount().tolist() == [40, 40, 40]
    for size in (1, 2):
        again = sample(size)
        assert again.rank.equal(whole.rank) and again.x["height"].equal(whole.x["height"])
    assert not sample(3, seed=1).rank.equal(whole.rank)
    assert set(sample(3, most=10).rank.tolist()) < set(whole.rank.tolist())
    all_points = sample(2, most=10_000)
    inside = sum(int(((p < 2)[:, :2].all(1) & (torch.arange(len(p)) % 5 != 0)).sum()) for p in splits["train"].points)
    assert len(all_points.y) == inside and len(sample(2, clouds=2, most=10_000).y) < inside


def test_points_of_one_class_cannot_be_probed(splits: dict[str, Any]) -> None:
    for part in splits.values():
        part.labels = [torch.ones_like(labels) for labels in part.labels]
    with pytest.raises(NoPointLabels, match="all labelled training points are of one class, middle"):
        dense_probe({"height": height}, splits, NAMES, READING)


# ---- fine-tuning ---------------------------------------------------------------------------------------------------


def test_layers_learn_at_rates_by_their_depth(scans: Path, tmp_path: Path) -> None:
    encoder_settings = {"dim": 16, "depth": 2, "heads": 2, "window": 4}
    method: Any = load_run(fabricate(tmp_path / "deep", scans, model={"encoder": encoder_settings})).method
    model = Classifier(method, ENCODING, 32, Tuning(("a", "b", "c"), layer_decay=0.5))
    scale = {name: group["lr_scale"] for group in model.param_groups() for name, _ in group["params"]}
    assert set(scale) == {name for name, _ in model.named_parameters()}
    assert {value for name, value in scale.items() if name.startswith("method.pillar_encoder.")} == {0.5**5}
    for i in range(4):  # two blocks of two layers
        found = {value for name, value in scale.items() if name.startswith(f"method.encoder.layers.{i}.")}
        assert found == {0.5 ** (4 - i)}
    top = {name for name, value in scale.items() if value == 1}
    assert top == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    batch = clouds(40, 80)
    with torch.no_grad():
        vectors = cloud_vectors(method.encode(batch))
        torch.testing.assert_close(model.eval().predict(batch), model.head(model.norm(vectors)))


def test_layers_of_sparse_convolutions_come_in_the_order_of_computation() -> None:
    whole = SparseConvEncoder(ConvEncoderSettings(dim=8, levels=3))
    layers = layers_of(torch.nn.ModuleDict({"pillar_encoder": PillarEncoder(3, 8, GRID), "encoder": whole}))
    numbers = {id(part): i for i, layer in enumerate(layers) for part in layer}
    order = [
        whole.before[0], whole.downs[0], whole.before[1], whole.downs[1], whole.before[2],
        whole.ups[1], whole.after[1], whole.ups[0], whole.after[0],
    ]  # fmt: skip
    assert [numbers[id(part)] for part in order] == [1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert len(layers) == 6 and id(whole.norm) not in numbers


def test_few_clouds_get_small_batches_and_enough_steps() -> None:
    usual = FineTuning()
    assert replace(protocol_for(5_000, 128), base_lr=usual.base_lr, reference_batch=256) == usual
    for count in (3, 30, 300, 1500):
        found = protocol_for(count, 32 if count == 1500 else 128)
        steps = found.epochs * (count // found.batch_size)
        assert steps >= finetuning.FEWEST_STEPS and found.batch_size <= count
        assert found.base_lr * found.batch_size / found.reference_batch == finetuning.PEAK_LR
    assert protocol_for(30, 128, epochs=2).epochs == 2
    assert protocol_for(5_000, 4).batch_size == 4


def test_a_fine_tuned_classifier_comes_back_as_it_was(run: Path, tmp_path: Path) -> None:
    folder = write_scans(tmp_path / "scans", SIZES, las=False)
    result = finetune(run, str(folder), tmp_path / "out", epochs=30, progress=False)
    assert len(result["losses"]) == 30 and result["losses"][-1] < result["losses"][0] - 0.15
    assert json.loads((tmp_path / "out" / "finetune.json").read_text()) == result
    model = load_classifier(tmp_path / "out")
    assert model.classes == ["box", "pole", "slab"]
    test = open_split(at_source(load_run(run).recipe.data, str(folder)), "test")
    batch = collate([test[i, 0] for i in range(len(test))])
    files = [folder / test.name_of(int(i)) for i in batch.ids]
    with torch.no_grad():
        answered = model.predict(batch)
    right = (answered.argmax(1) == batch.labels).float().mean()
    assert float(right) == pytest.approx(result["accuracy"])
    predicted = pq.read_table(predict(tmp_path / "out", str(folder), tmp_path / "said.parquet", device="cpu"))
    assert len(predicted) == 3 * sum(SIZES.values())
    by_name = dict(zip(predicted["name"].to_pylist(), predicted["label"].to_pylist(), strict=True))
    said = [by_name[test.name_of(int(i))] for i in batch.ids]
    assert said == [model.classes[i] for i in answered.argmax(1).tolist()]
    names = set(checkpoint.read(tmp_path / "out" / "model.safetensors").tensors)
    assert {".".join(name.split(".")[:2]) for name in names if name.startswith("method.")} == {
        "method.pillar_encoder",
        "method.encoder",
    }

    loaded: Any = unmask.pointcloud.load(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(loaded.logits(loaded.preprocess(files)), answered)
        features = loaded(batch)
    assert loaded.classes == model.classes and len(features.per_point()[1]) == len(batch.points)
    for to in ("unmask", "sst"):
        with pytest.raises(UnmaskError, match=f"--to {to} writes none; use it with unmask.pointcloud.load, or export"):
            export(tmp_path / "out", tmp_path / "exported", to)  # type: ignore[arg-type]


def test_from_scratch_the_trained_weights_have_no_say(run: Path, tmp_path: Path) -> None:
    folder = write_scans(tmp_path / "scans", SIZES, las=False)
    other = shutil.copytree(run, tmp_path / "other")
    saved = checkpoint.read(other / "model.safetensors")
    checkpoint.write(other / "model.safetensors", {n: t * 1.1 for n, t in saved.tensors.items()}, saved.meta)

    def losses(start: Path, *, scratch: bool) -> list[float]:
        out = tmp_path / f"{start.name}-{scratch}"
        result = finetune(start, str(folder), out, epochs=1, labels=0.5, scratch=scratch, progress=False)
        assert result["splits"]["train"] == 3 * max(1, round(0.5 * SIZES["train"]))
        return result["losses"]

    assert losses(run, scratch=True) == losses(other, scratch=True)
    assert losses(run, scratch=False) != losses(other, scratch=False)


def test_fine_tuning_needs_labels_and_a_directory_of_its_own(run: Path, tmp_path: Path) -> None:
    folder = write_scans(tmp_path / "plain", {"train": 2, "val": 1}, las=False, flat=True)
    with pytest.raises(UnmaskError, match="no class for each of its point clouds; .* one folder of point clouds per"):
        finetune(run, str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UnmaskError, match="already holds a run"):
        finetune(run, str(load_run(run).recipe.data.source), run)


# ---- embeddings ----------------------------------------------------------------------------------------------------


def test_embeddings_are_the_encoders_and_name_their_clouds(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_scans(tmp_path / "plain", {"train": 3, "val": 1}, las=False, flat=True)
    np.save(folder / "train" / "far.npy", np.full((5, 3), 80.0) + np.arange(15).reshape(5, 3))
    (folder / "train" / "notes.npy").write_text("not a cloud")
    found = pq.read_table(embed(run, str(folder), tmp_path / "features.parquet", device="cpu"))
    assert [str(field.type) for field in found.schema] == ["int64", "string", "list<element: float>"]
    data = open_split(at_source(load_run(run).recipe.data, str(folder)), "all")
    names = found["name"].to_pylist()
    assert len(names) == 12 and names == [data.name_of(i) for i in found["id"].to_pylist()]
    assert set(found["id"].to_pylist()) < set(data.ids.tolist())
    by_name = {data.name_of(int(data.ids[i])): data[i, 0] for i in range(len(data))}
    method: Any = load_run(run).method
    with torch.no_grad():
        expected = cloud_vectors(method.encode(collate([by_name[name] for name in names])))
    torch.testing.assert_close(torch.tensor(found["embedding"].to_pylist()), expected, atol=1e-5, rtol=1e-5)
    said = capsys.readouterr().err
    assert "2 point clouds are left out" in said and "notes.npy" in said and "far.npy" in said


def test_embedding_into_nowhere_leaves_nothing(run: Path, scans: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UnmaskError, match="cannot write"):
        embed(run, str(scans), tmp_path / "file" / "features.parquet", device="cpu")
    with pytest.raises(UnmaskError, match="does not exist"):
        embed(run, str(tmp_path / "missing"), tmp_path / "features.parquet", device="cpu")
    assert not (tmp_path / "features.parquet").exists()
