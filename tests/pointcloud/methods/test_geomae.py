"""GeoMAE: the checks of every method, the sheet's exact properties, and a plain rewrite of the released loss."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from unmask.core.errors import UnmaskError
from unmask.core.mask import Mask
from unmask.core.method import Clock
from unmask.core.randomness import Key
from unmask.pointcloud.checks import check_method, corrupt_pillars
from unmask.pointcloud.data.batches import PointBatch
from unmask.pointcloud.encoders.sparse_conv import ConvEncoderSettings
from unmask.pointcloud.encoders.window import WindowSettings, valid_pillars
from unmask.pointcloud.geometry.voxels import VoxelGrid, voxelise
from unmask.pointcloud.methods.geomae import GeoMAE, LossWeights, Prediction, Settings, occupancy_loss, unsigned_l2

GRID = VoxelGrid(lower=(-4.0, -4.0, -1.0), pillar=(0.5, 0.5, 2.0), shape=(16, 16))
ENCODER = WindowSettings(dim=32, depth=1, heads=4, window=4)
SETTINGS = Settings(encoder=ENCODER, decoder_depth=1)
TERMS = ["low", "med", "top", "low_occupancy", "med_occupancy", "normal", "curvature"]


def surfaces(*sizes: int, seed: int = 0) -> PointBatch:
    """Clouds of wavy ground with a wall, an intensity each, a few points outside GRID."""
    generator = torch.Generator().manual_seed(seed)
    clouds = []
    for size in sizes:
        xy = (torch.rand(size, 2, generator=generator) - 0.5) * 8.4
        z = (
            0.3 * torch.sin(xy[:, :1])
            + 0.1 * torch.cos(2 * xy[:, 1:])
            + 0.02 * torch.randn(size, 1, generator=generator)
        )
        wall = torch.rand(size, 1, generator=generator) < 0.3
        z = torch.where(wall, torch.rand(size, 1, generator=generator) * 1.8 - 0.9, z)
        xy[:, :1] = torch.where(wall, 1.3, xy[:, :1])
        clouds.append(torch.cat([xy, z, torch.rand(size, 1, generator=generator)], dim=1))
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    return PointBatch(torch.cat(clouds), offsets, torch.arange(len(sizes)) * 17 + 5)


def geomae(**changes: Any) -> GeoMAE:
    return GeoMAE(replace(SETTINGS, **changes), GRID, 4)


def drawn(method: GeoMAE, batch: PointBatch, visit: int = 0) -> Any:
    return method.draw(batch, Clock(), Key.of(0, batch.ids, visit))


# --- the checks of every method ---


@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore")
def test_passes_every_check() -> None:
    """BatchNorm's statistics are those of all points, as released: they are declared, nothing is exempt."""
    method = geomae()
    assert method.norms_over_all() == {"pillar_encoder.layers.0.norm", "pillar_encoder.layers.1.norm"}
    check_method(method, surfaces(300, 120, 500))


def test_passes_every_check_with_convolutions() -> None:
    method = geomae(convolutions=ConvEncoderSettings(dim=32, levels=2, backend="torch"))
    check_method(method, surfaces(300, 120, 500), skip={"compiles"})


def test_hidden_points_reach_the_answers_in_train_mode_only() -> None:
    """What is declared is as narrow as it says: eval is exact, and what train mode shows goes through BatchNorm."""
    method, batch = geomae(), surfaces(300, 120, 500)
    plan = drawn(method, batch)
    moved = corrupt_pillars(GRID)(batch, plan, 2.0)
    method.eval()
    assert torch.equal(method.predict(batch, plan), method.predict(moved, plan))
    nan = corrupt_pillars(GRID)(batch, plan, math.nan)
    assert torch.equal(method.predict(batch, plan), method.predict(nan, plan))
    asked, other = method.target(batch, plan), method.target(moved, plan)
    assert not torch.equal(asked.top, other.top)  # what is asked does change
    method.train()
    assert not torch.equal(method.predict(batch, plan), method.predict(moved, plan))


# --- masks ---


@pytest.mark.parametrize("ratio", [0.7, 0.5])
def test_visible_and_hidden_partition_the_pillars(ratio: float) -> None:
    method, batch = geomae(mask_ratio=ratio), surfaces(300, 1, 500, 9)
    plan = drawn(method, batch)
    both = torch.cat([plan.visible, plan.hidden])
    assert torch.equal(both.sort().values, torch.arange(len(plan.voxels.pillars)))
    pillars = plan.voxels.offsets.diff().tolist()
    visible = plan.voxels.pillars[plan.visible, 0].bincount(minlength=4).tolist()
    assert visible == [max(1, int(n * (1 - ratio))) for n in pillars]


def test_a_mask_from_elsewhere() -> None:
    method, batch = geomae(), surfaces(200, 100)
    voxels = voxelise(batch.points, batch.offsets, GRID)
    valid = valid_pillars(voxels)
    hidden = torch.zeros_like(valid)
    hidden[:, ::2] = True
    plan = method.plan(Mask.from_hidden(hidden, valid), voxels)
    assert torch.equal(plan.hidden, (hidden & valid)[valid].nonzero()[:, 0])
    assert method.predict(batch, plan).shape == (len(plan.hidden), 128 * 5 + 16 * 5 + 3 + 6)


@pytest.mark.parametrize("points", [3, 1])
def test_clouds_of_one_pillar_teach_nothing_and_stop_nothing(points: int) -> None:
    batch = PointBatch(torch.zeros(points, 4), torch.tensor([0, points]), torch.tensor([1]))
    method = geomae()
    plan = drawn(method, batch)
    assert (len(plan.visible), len(plan.hidden)) == (1, 0)
    output = method(batch, plan)
    assert output.loss.item() == 0
    assert all(float(count) == 0 for count in method.counts(batch, plan).values())
    output.loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in method.parameters())


def test_no_pillar_at_all_is_an_error() -> None:
    batch = PointBatch(torch.full((3, 4), 99.0), torch.tensor([0, 3]), torch.tensor([1]))
    with pytest.raises(UnmaskError, match=r"1 clouds without a visible pillar: are their points in data\.range\?"):
        drawn(geomae(), batch)


def test_double_precision_throughout() -> None:
    method, batch = geomae().eval(), surfaces(300, 120)
    plan = drawn(method, batch)
    wanted = method(batch, plan).loss
    double = replace(batch, points=batch.points.double())
    assert method.double()(double, plan).loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_a_cloud_outside_the_range_has_no_features() -> None:
    batch = PointBatch(torch.full((3, 4), 99.0), torch.tensor([0, 3]), torch.tensor([1]))
    with pytest.raises(UnmaskError, match=r"no point inside data\.range"):
        geomae().eval().encode(batch)


# --- the loss ---


def test_terms_equal_a_plain_rewrite() -> None:
    """Dense tables and boolean selection, as the released loss is written."""
    method, batch = geomae().eval(), surfaces(300, 120, 500)
    plan = drawn(method, batch)
    answer, asked = method.predictions(batch, plan), method.target(batch, plan)
    terms = method(batch, plan).terms
    assert list(terms) == TERMS
    assert {name: term.weight for name, term in terms.items()} == vars(LossWeights())
    for name, where in (("low", asked.low_occupied), ("med", asked.med_occupied)):
        expected = F.mse_loss(getattr(answer, name)[where], getattr(asked, name)[where])
        torch.testing.assert_close(terms[name].mean, expected)
        two = F.one_hot(where.long(), 2).float()  # (1, 0) empty, (0, 1) occupied
        expected = F.binary_cross_entropy_with_logits(getattr(answer, f"{name}_occupancy"), two)
        torch.testing.assert_close(terms[f"{name}_occupancy"].mean, expected)
    for name in ("top", "normal", "curvature"):
        expected = F.mse_loss(getattr(answer, name), getattr(asked, name))
        torch.testing.assert_close(terms[name].mean, expected)
    released = 10 * terms["low"].mean + 8 * terms["med"].mean + 10 * terms["top"].mean + 4 * terms["normal"].mean
    released = released + 5 * terms["low_occupancy"].mean + 2 * terms["med_occupancy"].mean
    torch.testing.assert_close(method(batch, plan).loss, released + 4 * terms["curvature"].mean)


def test_values_at_zero_and_at_perfect_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch = geomae().eval(), surfaces(300, 120, 500)
    plan = drawn(method, batch)
    asked = method.target(batch, plan)
    zero = {name: torch.zeros_like(x) for name, x in vars(method.predictions(batch, plan)).items()}
    monkeypatch.setattr(method, "predictions", lambda *_: Prediction(**zero))
    at_zero = method(batch, plan).terms
    torch.testing.assert_close(at_zero["normal"].mean, torch.tensor(1 / 3))
    for name in ("low_occupancy", "med_occupancy"):
        torch.testing.assert_close(at_zero[name].mean, torch.tensor(math.log(2)))
    perfect = {name: getattr(asked, name) for name in ("low", "med", "top", "normal", "curvature")}
    two = {f"{name}_occupancy": F.one_hot(getattr(asked, f"{name}_occupied").long(), 2) for name in ("low", "med")}
    sure = {name: 400.0 * x - 200.0 for name, x in two.items()}
    monkeypatch.setattr(method, "predictions", lambda *_: Prediction(**perfect, **sure))
    assert all(float(term.mean) == 0 for term in method(batch, plan).terms.values())


def test_uniform_points_cost_a_third_at_zero() -> None:
    """The centroid of one uniform point in a cell has mean square 1/3 from the cell's corner."""
    points = torch.rand(40_000, 3) * torch.tensor([8.0, 8.0, 2.0]) + torch.tensor(GRID.lower)
    fine = VoxelGrid(lower=GRID.lower, pillar=(0.1, 0.1, 2.0), shape=(80, 80), low=(20, 1, 1), med=(10, 1, 1))
    batch = PointBatch(points, torch.tensor([0, len(points)]), torch.tensor([1]))
    method = GeoMAE(SETTINGS, fine, 3)
    asked = method.target(batch, drawn(method, batch))
    values = asked.low[asked.low_occupied].square().mean()
    assert abs(float(values) - 1 / 3) < 0.02


def test_occupancy_is_two_sigmoids_not_a_softmax() -> None:
    logits, occupied = torch.tensor([[[1.0, -2.0]]]), torch.tensor([[True]])
    expected = (math.log(1 + math.exp(1.0)) + math.log(1 + math.exp(2.0))) / 2
    torch.testing.assert_close(occupancy_loss(logits, occupied), torch.tensor([[expected]]))


def test_sign_invariant_normals() -> None:
    p, n = torch.randn(50, 3), F.normalize(torch.randn(50, 3), dim=1)
    torch.testing.assert_close(unsigned_l2(p, n), unsigned_l2(p, -n))
    assert (unsigned_l2(p, n) <= (p - n).square().mean(1) + 1e-7).all()
    assert not unsigned_l2(-n, n).any()
    method, batch = geomae(normal_loss="sign_invariant").eval(), surfaces(300)
    plan = drawn(method, batch)
    term = method(batch, plan).terms["normal"]
    answer, asked = method.predictions(batch, plan), method.target(batch, plan)
    torch.testing.assert_close(term.total, unsigned_l2(answer.normal, asked.normal).sum())


@pytest.mark.parametrize(
    ("weights", "terms"),
    [
        (LossWeights(curvature=0.0), TERMS[:-1]),
        (LossWeights(low=0.0, med=0.0, top=0.0, normal=0.0, curvature=0.0), ["low_occupancy", "med_occupancy"]),
        (LossWeights(*[0.0] * 5, 4.0, 0.0), ["normal"]),
    ],
)
def test_a_term_without_weight_has_neither_head_nor_decoder(weights: LossWeights, terms: list[str]) -> None:
    method, batch = geomae(weights=weights), surfaces(300, 120)
    plan = drawn(method, batch)
    assert list(method(batch, plan).terms) == terms == list(method.heads)
    assert (method.cell_decoder is None) == (terms == ["normal"])
    assert (method.surface_decoder is None) == ("normal" not in terms and "curvature" not in terms)
    counts = {name: float(term.count) for name, term in method(batch, plan).terms.items()}
    assert {name: float(count) for name, count in method.counts(batch, plan).items()} == counts
    method(batch, plan).loss.backward()
    assert all(p.grad is not None for p in method.parameters())


def test_no_weight_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to learn"):
        LossWeights(*[0.0] * 7)


# --- invariances ---


def test_the_order_of_points_does_not_matter() -> None:
    method, batch = geomae().eval(), surfaces(300, 120)
    order = torch.cat([torch.randperm(300), 300 + torch.randperm(120)])
    mixed = replace(batch, points=batch.points[order])
    torch.testing.assert_close(method.encode(batch).tokens, method.encode(mixed).tokens, rtol=1e-4, atol=1e-5)
    one, two = method(batch, drawn(method, batch)), method(mixed, drawn(method, mixed))
    torch.testing.assert_close(one.loss, two.loss, rtol=1e-5, atol=1e-5)


def test_the_encoder_pays_for_visible_pillars_only() -> None:
    method, batch = geomae(), surfaces(300, 120)
    plan, seen = drawn(method, batch), []
    for part in (method.encoder, method.cell_decoder, method.surface_decoder):
        part.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    for head in method.heads.values():
        head.register_forward_pre_hook(lambda module, inputs: seen.append(-len(inputs[0])))
    method(batch, plan)
    pillars = len(plan.voxels.pillars)
    assert seen[0] == len(plan.visible) < 0.35 * pillars
    assert sorted(seen[1:]) == sorted([pillars] * 2 + [-len(plan.hidden)] * 7)


def test_start() -> None:
    """Xavier-uniform matrices, the mask token's too; zero attention biases."""
    method = GeoMAE(Settings(), GRID, 5)
    bound = math.sqrt(6 / (128 + 1))
    assert 0.9 * bound < float(method.mask_token.detach().abs().max()) <= bound
    qkv = method.encoder.layers[0].attn.qkv
    assert float(qkv.weight.detach().abs().max()) <= math.sqrt(6 / (384 + 128)) and not qkv.bias.any()
    assert len(method.encoder.layers) == 12 and len(method.cell_decoder.layers) == 4
    sizes = {name: head.out_features for name, head in method.heads.items()}
    assert sizes == dict(zip(TERMS, [384, 48, 3, 256, 32, 3, 3], strict=True))
    assert method.pillar_encoder.layers[0].linear.in_features == 11


def test_convolutions_need_the_decoders_width() -> None:
    with pytest.raises(ValueError, match=r"convolutions\.dim is 16 and encoder\.dim 32"):
        geomae(convolutions=ConvEncoderSettings(dim=16))
