"""Pictures of clouds, the numbers beside them, and the page of a small run."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from matplotlib import colormaps
from PIL import Image

from unmask.core import registry
from unmask.core.method import Clock
from unmask.core.randomness import Key
from unmask.core.report import write_report
from unmask.core.report.gather import read_run
from unmask.core.report.parts import Probes
from unmask.core.training import checkpoint
from unmask.core.training.recipe import make_recipe
from unmask.pointcloud.data.batches import PointBatch
from unmask.pointcloud.encoders.window import WindowSettings
from unmask.pointcloud.geometry.targets import GeometryTargets
from unmask.pointcloud.geometry.voxels import VoxelGrid
from unmask.pointcloud.methods.geomae import GeoMAE, GeoMAEPlan, Prediction, Settings, occupancy_loss, unsigned_l2
from unmask.pointcloud.report.drawing import (
    DIRECTIONS,
    DPI,
    LEAST_CURVED,
    curvature_scale,
    draw,
    height_scale,
    normal_colours,
)
from unmask.pointcloud.report.pictures import caption, describe, likely, measure, positions, scene
from unmask.pointcloud.report.scene import (
    ABOVE,
    ZOOM,
    Compared,
    Scene,
    View,
    blocks,
    choose_view,
    crop,
    discs,
    oblique,
    subset,
)
from unmask.pointcloud.report.sections import probes, sections

PAIRS = ("centroids", "normals", "curvature")
GRID = VoxelGrid((-1.0, -1.0, -1.0), (0.25, 0.25, 2.0), (8, 8))


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def ink(image: np.ndarray) -> float:
    """The share of pixels that are not white."""
    return float((image < 250).any(2).mean())


def coloured(image: np.ndarray) -> float:
    """The share of pixels that are not grey."""
    return float((np.ptp(image, axis=2) > 40).mean())


def parts(png: bytes, rows: int, columns: int = 4) -> list[list[np.ndarray]]:
    """Panels with their titles, without the keys: pixels [height, width, 3]."""
    whole = np.array_split(pixels(png), rows)
    return [np.array_split(row[: -round(0.4 * DPI)], columns, axis=1) for row in whole]


def keys(png: bytes, rows: int, columns: int = 2) -> list[list[np.ndarray]]:
    whole = np.array_split(pixels(png), rows)
    return [np.array_split(row[-round(0.4 * DPI) :], columns, axis=1) for row in whole]


def different(a: np.ndarray, b: np.ndarray) -> float:
    """The share of pixels that are clearly different."""
    return float((np.abs(a - b).max(2) > 60).mean())


def amount(image: np.ndarray, colour: Any) -> int:
    """Pixels of a colour, red, green and blue in [0, 1]."""
    return int((np.abs(image - 255 * np.asarray(colour)).max(2) < 12).sum())


def make_scene(points: np.ndarray, pillar: tuple[float, float, float]) -> Scene:
    """Every other occupied pillar hidden; answers are the truth with noise."""
    rng = np.random.default_rng(0)
    index = np.floor(points[:, :2] / pillar[:2]).astype(int)
    unique, of = np.unique(index, axis=0, return_inverse=True)
    hidden = np.arange(len(unique)) % 2 == 0
    pillar_of = np.where(hidden, hidden.cumsum() - 1, -1)[of.ravel()]
    corners = np.column_stack([unique[hidden] * pillar[:2], np.full(hidden.sum(), points[:, 2].min())])
    count = len(corners)
    cells = points[pillar_of >= 0]
    normals = rng.normal(size=(count, 3))
    curvature = rng.random(count) / 3
    return Scene(
        points,
        pillar_of,
        corners,
        pillar,
        Compared(cells, cells[::2] + 0.01),
        Compared(normals, -normals),
        Compared(curvature, curvature * 0.5),
    )


@pytest.fixture(scope="module")
def solid() -> Scene:
    return make_scene(np.random.default_rng(1).random((600, 3)), (0.125, 0.125, 1.0))


@pytest.fixture(scope="module")
def bare(solid: Scene) -> Scene:
    return replace(solid, centroids=None, normals=None, curvature=None)


@pytest.fixture(scope="module")
def street() -> Scene:
    """Rows of points 2 m apart, 80 m wide: more than `ZOOM` pillars."""
    points = np.random.default_rng(2).random((40_000, 3)) * [80, 40, 4] - [40, 20, 2]
    return make_scene(np.round(points * [1, 1, 0.5]) * [1, 2, 2] + 0.1 * points, (0.5, 0.5, 8.0))


@pytest.fixture(scope="module")
def pictures(solid: Scene, street: Scene, bare: Scene) -> dict[str, bytes]:
    return {"solid": draw(solid), "street": draw(street), "bare": draw(bare)}


# ---- drawing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["solid", "street"])
def test_a_picture_has_eight_panels_with_something_in_each_and_stays_small(
    name: str, pictures: dict[str, bytes]
) -> None:
    png = pictures[name]
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and len(png) < 250_000
    height, width, _ = pixels(png).shape
    assert 1200 < width < 2000 and 700 < height < 1500
    for panel in (panel for row in parts(png, 2) for panel in row):
        assert 0.02 < ink(panel) < 0.95
        assert coloured(panel) > 0.005, "every panel has colours, not only text and grey"


def test_a_picture_repeats(bare: Scene, pictures: dict[str, bytes]) -> None:
    assert draw(bare) == pictures["bare"]


def test_what_has_no_answer_has_no_panel(solid: Scene, pictures: dict[str, bytes]) -> None:
    whole, bare = pixels(pictures["solid"]).shape, pixels(pictures["bare"]).shape
    cells = pixels(draw(replace(solid, normals=None, curvature=None))).shape
    assert cells[1] == whole[1] and cells[0] == pytest.approx(whole[0] / 2, abs=2)
    assert bare[1] < cells[1] and bare[1] / bare[0] == pytest.approx(cells[1] / cells[0] / 2, rel=0.1)
    top, bottom = parts(draw(replace(solid, curvature=None)), 2)
    assert all(ink(panel) > 0.02 for panel in [*top, *bottom[:2]])
    assert ink(bottom[2]) == ink(bottom[3]) == 0.0


def test_a_model_that_expects_nothing_is_drawn_without_cells(solid: Scene) -> None:
    assert solid.centroids is not None
    nothing = replace(solid, centroids=Compared(solid.centroids.true, np.empty((0, 3))), normals=None, curvature=None)
    ((_, _, true, predicted),) = parts(draw(nothing), 1)
    assert coloured(true) > 0.01 and coloured(predicted) == 0.0
    assert ink(predicted) > 0.02, "what is visible is there, and the title"


def test_only_what_is_visible_is_coloured_in_what_the_encoder_sees(bare: Scene, pictures: dict[str, bytes]) -> None:
    def seen(png: bytes) -> float:
        return coloured(parts(png, 1, 2)[0][1])

    assert seen(draw(replace(bare, pillar_of=np.zeros(len(bare.points), dtype=int)))) == 0.0
    everything = seen(draw(replace(bare, pillar_of=np.full(len(bare.points), -1))))
    assert 0.01 < seen(pictures["bare"]) < 0.8 * everything


def test_opposite_normals_have_one_colour_and_axes_their_own() -> None:
    normals = np.random.default_rng(0).normal(size=(100, 3))
    assert np.array_equal(normal_colours(normals), normal_colours(-normals))
    assert np.allclose(normal_colours(7.0 * normals), normal_colours(normals))
    assert np.allclose(normal_colours(np.eye(3)), DIRECTIONS)
    assert np.allclose(normal_colours(np.array([[1.0, -1.0, 0.0]])), DIRECTIONS[:2].mean(0))
    walls = normal_colours(np.array([[1.0, 0.0, 1e-3], [1.0, 0.0, -1e-3]]))
    assert np.allclose(walls[0], walls[1]), "a wall that leans a little up or down does not jump"
    assert np.all(normal_colours(np.zeros((1, 3))) == 0.0)


def test_normals_are_drawn_without_sign(solid: Scene, street: Scene) -> None:
    for one in (solid, street):
        assert one.normals is not None
        turned = Compared(-one.normals.true, -3.0 * one.normals.predicted)
        kept = replace(one, centroids=None, curvature=None)
        assert different(pixels(draw(replace(kept, normals=turned))), pixels(draw(kept))) < 1e-3
        true, predicted = parts(draw(kept), 1)[0][2:]
        assert different(true[50:], predicted[50:]) < 1e-3, "the answer in this scene is the opposite"
        other = replace(kept, normals=Compared(one.normals.true, one.normals.true[:, [1, 2, 0]]))
        assert different(pixels(draw(other)), pixels(draw(kept))) > 5e-3


@pytest.mark.parametrize("name", ["solid", "street"])
def test_true_and_predicted_are_drawn_alike(name: str, request: pytest.FixtureRequest) -> None:
    """The same values give the same panels: view, place, size and colours."""
    one: Scene = request.getfixturevalue(name)
    assert one.centroids is not None and one.normals is not None and one.curvature is not None
    same = (Compared(pair.true, pair.true) for pair in (one.centroids, one.normals, one.curvature))
    (_, _, *first), second = parts(draw(replace(one, **dict(zip(PAIRS, same, strict=True)))), 2)
    for true, predicted in (first, second[:2], second[2:]):
        assert different(true[50:], predicted[50:]) < 1e-3


def test_discs_lie_in_the_surface_around_the_points_of_their_pillar(solid: Scene) -> None:
    assert solid.normals is not None
    normals = solid.normals.true
    rings = discs(solid, normals)
    middle = rings.mean(1)
    assert np.allclose(middle[3], solid.points[solid.pillar_of == 3].mean(0))
    spokes = rings - middle[:, None]
    assert np.allclose(np.einsum("pck,pk->pc", spokes, normals), 0, atol=1e-9)
    radius = np.linalg.norm(spokes, axis=2)
    assert np.allclose(radius, radius[0, 0]) and 0.4 * 0.125 < radius[0, 0] < 0.5 * 0.125
    centred = discs(solid, normals, centred=True).mean(1)
    assert np.allclose(centred[:, :2], solid.corners[:, :2] + 0.0625) and np.allclose(centred[:, 2], middle[:, 2])
    assert np.isfinite(discs(solid, np.zeros_like(normals))).all()
    assert discs(replace(solid, points=solid.points[:0], pillar_of=solid.pillar_of[:0]), normals).shape == rings.shape


def test_blocks_are_as_high_as_the_points_in_them_and_show_the_sides_that_face_the_eye() -> None:
    points = np.array([[0.5, 0.5, 2.0], [0.2, 0.1, 5.0], [3.5, 0.5, 1.0]])
    scene = Scene(points, np.array([0, 0, -1]), np.array([[0.0, 0.0, -9.0]]), (1.0, 2.0, 20.0))
    x, y, top = blocks(scene, oblique(azimuth=0.5))[0]
    assert np.all(x[:, 0] == 1.0) and np.all(y[:, 1] == 2.0) and np.all(top[:, 2] == 5.0)
    assert sorted(set(x[:, 1])) == [0.0, 2.0] and sorted(set(x[:, 2])) == [2.0, 5.0]
    assert sorted(set(y[:, 0])) == [0.0, 1.0] and sorted(set(y[:, 2])) == [2.0, 5.0]
    x, y, _ = blocks(scene, oblique(azimuth=0.5 + np.pi))[0]
    assert np.all(x[:, 0] == 0.0) and np.all(y[:, 1] == 0.0), "from the other side"
    (ground,) = blocks(scene, ABOVE)[0]
    assert {tuple(corner) for corner in ground} == {(0, 0, 0), (1, 0, 0), (0, 2, 0), (1, 2, 0)}


def test_scales_end_where_true_and_predicted_values_do(solid: Scene) -> None:
    scale = curvature_scale(replace(solid, curvature=Compared(np.array([0.0, 0.12]), np.array([0.25, -0.1]))))
    assert (scale.low, scale.high) == (0.0, 0.25)
    assert np.array_equal(scale.colours(np.array([-1.0])), scale.colours(np.array([0.0])))
    assert curvature_scale(replace(solid, curvature=Compared(np.zeros(1), np.array([9.0])))).high == 1 / 3
    assert curvature_scale(replace(solid, curvature=None)).high == LEAST_CURVED
    height = height_scale(replace(solid, points=np.array([[0.0, 0.0, z] for z in [*np.linspace(2, 4, 400), 90.0]])))
    assert (height.low, height.high) == pytest.approx((2.0, 4.0), abs=0.05), "one outlier does not decide"


def test_hidden_pillars_are_grey_from_above_and_from_the_side(solid: Scene, street: Scene) -> None:
    grey = np.array([0xAA, 0xB4, 0xC2]) / 255
    one = np.array([[0.1, 0.1, 0.0], [0.9, 0.9, 0.5], [1.5, 0.5, 0.2]])
    for view in (ABOVE, oblique()):
        bare = Scene(one, np.array([0, 0, -1]), np.zeros((1, 3)), (1.0, 1.0, 1.0))
        hidden = parts(draw(bare, view=view), 1, 2)[0][1]
        shown = parts(draw(replace(bare, pillar_of=np.full(3, -1), corners=np.empty((0, 3))), view=view), 1, 2)[0][1]
        cool = [np.mean((image.max(2) < 235) & (np.ptp(image, axis=2) < 40)) for image in (hidden, shown)]
        assert cool[0] > 0.05 and cool[1] < 0.02
    (key,) = keys(draw(replace(street, centroids=None, normals=None, curvature=None)), 1, 1)[0]
    assert amount(key, grey) > 50


@pytest.mark.parametrize("view", [ABOVE, oblique()])
def test_clouds_of_one_pillar_or_one_point_are_drawn(view: View) -> None:
    none, one = np.empty((0, 3)), np.zeros((1, 3))
    seen = Scene(
        np.random.default_rng(0).random((5, 3)),
        np.full(5, -1),
        none,
        (1.0, 1.0, 1.0),
        Compared(none, none),
        Compared(none, none),
        Compared(np.empty(0), np.empty(0)),
    )
    hidden = Scene(
        one,
        np.zeros(1, int),
        one,
        (1.0, 1.0, 1.0),
        Compared(one, none),
        Compared(one, np.eye(3)[:1]),
        Compared(np.zeros(1), np.ones(1)),
    )
    for scene_ in (seen, hidden):
        assert all(ink(panel) > 0.002 for row in parts(draw(scene_, view=view), 2) for panel in row)


def test_a_part_around_a_hole_has_points() -> None:
    angle = np.linspace(0, 2 * np.pi, 500)
    ring = np.column_stack([90 * np.cos(angle), 90 * np.sin(angle), np.zeros(500)])
    assert len(draw(Scene(ring, np.full(500, -1), np.empty((0, 3)), (0.5, 0.5, 8.0)))) > 1000


def test_flat_scenes_are_seen_from_above_and_objects_obliquely() -> None:
    points = np.random.default_rng(0).random((500, 3))
    assert choose_view(points * [80, 60, 6]).above
    assert not choose_view(points).above
    birds = np.concatenate([points * [80, 60, 6], [[0, 0, 90.0]]])
    assert choose_view(birds).above, "one outlier does not decide"


def test_a_view_is_a_rotation_and_nearer_is_deeper() -> None:
    view = oblique(azimuth=0.3, elevation=0.5)
    assert np.allclose(view.axes @ view.axes.T, np.eye(3)) and np.linalg.det(view.axes) == pytest.approx(1.0)
    eye = np.array([np.cos(0.5) * np.cos(0.3), np.cos(0.5) * np.sin(0.3), np.sin(0.5)])
    assert np.allclose(view(eye), [0, 0, 1])
    assert view(np.array([0.0, 0.0, 1.0]))[1] == pytest.approx(np.cos(0.5)), "up stays up"
    assert np.array_equal(ABOVE(eye), eye)


def test_what_is_higher_covers_what_is_lower() -> None:
    flat = np.column_stack([np.random.default_rng(0).random((300, 2)), np.zeros(300)])
    both = np.concatenate([flat + [0, 0, 0.1], flat])  # the lower ones come last
    png = draw(Scene(both, np.full(600, -1), np.empty((0, 3)), (0.5, 0.5, 1.0)))
    lower, upper = (colormaps["viridis"](value)[:3] for value in (0.0, 0.93))
    cloud = parts(png, 1, 2)[0][0]
    assert amount(cloud, upper) > 1000 and amount(cloud, lower) == 0
    (key,) = keys(png, 1, 1)[0]
    assert min(amount(key, lower), amount(key, upper)) > 50, "the scale below has both ends"


def test_the_same_points_are_always_drawn() -> None:
    assert np.array_equal(subset(10), np.arange(10))
    chosen = subset(100_000, 500)
    assert len(np.unique(chosen)) == 500 and np.all(np.diff(chosen) > 0)
    assert np.array_equal(chosen, subset(100_000, 500))
    assert 45_000 < chosen.mean() < 55_000


def test_a_part_of_a_scene_keeps_what_belongs_together() -> None:
    points = np.array([[0.5, 0.5, 0], [1.5, 0.5, 1], [2.5, 0.5, 2], [3.5, 0.5, 3]])
    normals = np.eye(3)[[0, 1]]
    whole = Scene(
        points,
        np.array([-1, 0, 1, -1]),
        np.array([[1.0, 0, 0], [2.0, 0, 0]]),
        (1, 1, 4),
        Compared(points[1:3], points[:2]),
        Compared(normals, normals + 1),
    )
    part = crop(whole, (2.0, 4.0, 0.0, 1.0))
    assert np.array_equal(part.points, points[2:])
    assert part.pillar_of.tolist() == [0, -1]
    assert np.array_equal(part.corners, [[2.0, 0, 0]])
    assert part.centroids is not None and part.normals is not None and part.curvature is None
    assert np.array_equal(part.centroids.true, points[2:3]) and part.centroids.predicted.shape == (0, 3)
    assert np.array_equal(part.normals.true, normals[1:]) and np.array_equal(part.normals.predicted, normals[1:] + 1)


def test_wide_scenes_are_shown_in_part_with_a_frame_in_the_first_panel(
    street: Scene, pictures: dict[str, bytes]
) -> None:
    def framed(png: bytes) -> int:
        """Columns of the first panel with a long dark line."""
        first = parts(png, 2)[0][0]
        return int(((np.abs(first - (22, 32, 44)).max(2) < 25).mean(0) > 0.2).sum())

    assert np.ptp(street.points[:, 0]) > ZOOM * street.pillar[0]
    assert framed(pictures["street"]) >= 2
    assert framed(pictures["solid"]) == 0


# ---- from a batch --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answered() -> tuple[PointBatch, GeoMAEPlan, GeometryTargets, Prediction]:
    """Two clouds, a plan of a small model, its targets, and the perfect answer."""
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(700, 3, generator=generator)
    points = torch.cat([2 * random[:400] - 1, 3 * random[400:] - 1.5])
    batch = PointBatch(points, torch.tensor([0, 400, 700]), torch.tensor([5, 9]))
    method = GeoMAE(Settings(encoder=WindowSettings(dim=8, depth=1, heads=2)), GRID, 3)
    plan = method.draw(batch, Clock(0, 1), Key.of(0, batch.ids))
    asked = method.target(batch, plan)
    logit = torch.where(asked.low_occupied, 30.0, -30.0)
    return (
        batch,
        plan,
        asked,
        Prediction(
            low=asked.low,
            low_occupancy=torch.stack([-logit, logit], dim=2),
            normal=-2.0 * asked.normal,
            curvature=asked.curvature,
        ),
    )


Answered = tuple[PointBatch, GeoMAEPlan, GeometryTargets, Prediction]


def test_positions_are_the_corner_and_so_many_cells() -> None:
    grid = VoxelGrid((-2.0, 1.0, -5.0), (4.0, 2.0, 8.0), (3, 3), low=(8, 4, 2), med=(4, 2, 1))
    slot = (5 * 4 + 3) * 2 + 1  # cell z 5, y 3, x 1; a cell is 2 x 0.5 x 1
    found = positions(grid, np.array([[0, 2, 1]]), np.array([slot]), np.array([[0.5, 0.25, 0.75]]))
    assert np.allclose(found, [[-2 + 4 + 1.75 * 2.0, 1 + 2 * 2 + 3.25 * 0.5, -5 + 5.5 * 1.0]])


def test_a_scene_has_the_points_of_its_cloud_and_means_of_cells_where_they_are(answered: Answered) -> None:
    batch, plan, asked, answer = answered
    shown = scene(batch, plan, answer, asked, GRID, 1)
    own = batch.points[400:].double().numpy()
    own = own[(np.abs(own) < 1).all(1)]
    assert sorted(map(tuple, shown.points)) == sorted(map(tuple, own))
    inside = shown.pillar_of >= 0
    place = shown.points[inside] - shown.corners[shown.pillar_of[inside]]
    assert inside.sum() > 20 and np.all(place >= -1e-6) and np.all(place <= np.array(GRID.pillar) + 1e-6)
    assert len(np.unique(shown.pillar_of[inside])) == len(shown.corners)

    cell = np.floor((shown.points[inside] + 1) / np.array(GRID.low_cell)).astype(int)
    means = [shown.points[inside][(cell == one).all(1)].mean(0) for one in np.unique(cell, axis=0)]
    assert shown.centroids is not None and shown.normals is not None and shown.curvature is not None
    assert np.allclose(np.sort(shown.centroids.true, axis=0), np.sort(means, axis=0), atol=1e-6)
    assert np.allclose(shown.centroids.predicted, shown.centroids.true)
    mine = plan.voxels.pillars[plan.hidden, 0] == 1
    assert np.array_equal(shown.normals.true[:, 2], asked.normal[mine, 0].numpy()), "z, y, x becomes x, y, z"
    assert np.array_equal(shown.curvature.predicted, asked.curvature[mine, 2].numpy())


def test_cells_without_their_own_answer_take_the_middle_or_the_true_occupancy(answered: Answered) -> None:
    batch, plan, asked, answer = answered
    no_place = scene(batch, plan, replace(answer, low=None), asked, GRID, 0).centroids
    assert no_place is not None
    offset = (no_place.predicted + 1) / np.array(GRID.low_cell) % 1
    assert np.allclose(offset, 0.5) and not np.allclose(no_place.true, no_place.predicted)
    no_cells = scene(batch, plan, replace(answer, low_occupancy=None), asked, GRID, 0).centroids
    assert no_cells is not None and np.array_equal(no_cells.true, no_cells.predicted)
    bare = scene(batch, plan, Prediction(), asked, GRID, 0)
    assert bare.centroids is bare.normals is bare.curvature is None


def test_the_caption_says_what_is_there(solid: Scene, bare: Scene) -> None:
    count = len(solid.corners)
    assert caption(solid, "m").startswith("The whole cloud of 600 points over 1 x 1 m; what")
    assert caption(solid, "").endswith(f"{count} pillars hidden; true and predicted hidden points, normals, curvature")
    assert caption(replace(solid, normals=None), "").endswith("true and predicted hidden points, curvature")
    assert caption(bare, "") == f"The whole cloud of 600 points; what the encoder sees, {count} pillars hidden"


# ---- numbers -------------------------------------------------------------------------------------------------------


def test_numbers_of_the_perfect_answer(answered: Answered) -> None:
    _, _, asked, answer = answered
    found = measure(answer, asked, GRID)
    assert all(found[name] == 1.0 for name in ("precision", "recall", "sure_precision", "sure_recall"))
    assert found["centroid"] == found["curvature"] == 0.0 and found["angle"] == pytest.approx(0.0, abs=1e-4)
    assert found["share"] == pytest.approx(float(asked.low_occupied.float().mean()))
    assert 0 < found["middle"] < 0.5 * np.linalg.norm(GRID.low_cell) and 0 < found["common"] < 90
    assert measure(Prediction(), asked, GRID) == {}


def test_numbers_of_answers_made_by_hand() -> None:
    """One cell size along z, another along y and x; four pillars of two cells."""
    grid = VoxelGrid((0.0, 0.0, 0.0), (2.0, 2.0, 6.0), (2, 2), low=(2, 1, 1), med=(1, 1, 1))  # cells of 2 x 2 x 3
    low = torch.full((4, 2, 3), 0.5)
    occupied = torch.tensor([[True, True], [True, False], [True, False], [True, False]])
    normal = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 0, 1.0], [0, 1.0, 0]])
    curvature = torch.tensor([[0.5, 0.4, 0.1], [0.6, 0.4, 0.0], [0.5, 0.3, 0.2], [1 / 3, 1 / 3, 1 / 3]])
    asked = GeometryTargets(low, low[:, :1], low[:, 0], occupied, occupied[:, :1], normal, curvature)
    # Right in three of the five cells with points, and in one that has none.
    expected = torch.tensor([[True, False], [True, True], [True, False], [False, False]])
    logits = torch.stack([torch.zeros(4, 2), torch.where(expected, 0.1, -30.0)], dim=2)
    shifted = low.clone()
    shifted[0, 0, 0] += 0.4  # 1.2 m along z in one of five cells
    shifted[1, 1] += 9.0  # in a cell without points, which does not count
    # 0, 45 and 90 degrees; the last pillar has no one surface.
    turned = torch.tensor([[-5.0, 0, 0], [1.0, 1.0, 0], [1.0, 0, 0], [1.0, 0, 0]])
    answer = Prediction(low=shifted, low_occupancy=logits, normal=turned, curvature=torch.zeros(4, 3))
    found = measure(answer, asked, grid)
    assert found["sure_precision"] == 3 / 4 and found["sure_recall"] == 3 / 5 and found["share"] == 5 / 8
    assert found["precision"] == 4 / 4 and found["recall"] == 4 / 5, "one of the two is expected in the second pillar"
    assert found["centroid"] == pytest.approx(1.2 / 5) and found["middle"] == 0.0
    assert found["angle"] == pytest.approx(45.0) and found["common"] == pytest.approx(30.0)  # 0, 0, 90
    true = np.array([0.1, 0.0, 0.2, 1 / 3])
    assert found["curvature"] == pytest.approx(true.mean())
    assert found["mean_curvature"] == pytest.approx(np.abs(true - true.mean()).mean())

    text = describe(found, 3, 1200, 0.7, "m")
    for part in ("3 validation clouds at step 1,200", "70% of the pillars", "62.5% of all"):
        assert part in text, part
    for part in ("100% of them hold points", "80% of those", "given to cells of which 75% do, 60% of all"):
        assert part in text, part
    for part in ("missed by 0.24 m", "45° off", "30° off", "0.158"):
        assert part in text, part
    unsure = measure(replace(answer, low_occupancy=logits - 1), asked, grid)
    assert "sure_precision" not in unsure and "is given to no cell." in describe(unsure, 3, 1, 0.7, "")
    assert "radius 1" in describe(found, 3, 1, 0.7, "")
    assert describe({}, 3, 1, 0.7, "m").endswith("only where it stands.")


def test_as_many_cells_are_expected_as_their_probabilities_add_up_to() -> None:
    probability = torch.tensor([[0.2, 0.4, 0.3, 0.3], [0.9, 0.1, 0.8, 0.4], [0.0, 0.0, 0.01, 0.0]])
    found = likely(torch.stack([torch.zeros(3, 4), probability.logit(eps=1e-6)], dim=2))
    assert found.tolist() == [[False, True, False, False], [True, False, True, False], [False, False, True, False]]


# ---- the page ------------------------------------------------------------------------------------------------------

RECIPE: dict[str, Any] = {
    "method": "pointcloud/geomae",
    "model": {
        "encoder": {"dim": 16, "depth": 1, "heads": 2, "window": 4},
        "decoder_depth": 1,
        "low": [4, 2, 2],
        "med": [2, 1, 1],
        "weights": {"med": 0.0, "curvature": 0.0},
    },
    "data": {
        "source": "shapes",
        "normalize": "sphere",
        "range": [-1.0, -1.0, -1.0, 1.0, 1.0, 1.0],
        "pillar": [0.25, 0.25],
        "max_points": 128,
    },
    "schedule": {"steps": 20},
    "training": {"batch_size": 8},
}
ROWS: dict[str, Any] = {
    "trained": {"knn": 0.8, "linear": 0.9, "few_label": {"1": 0.3, "100": 0.9}, "rankme": 20.0, "dim": 32},
    "random": {"knn": 0.6, "linear": 0.7, "few_label": {"1": 0.2, "100": 0.7}, "rankme": 9.0, "dim": 32},
    "coordinates": {"knn": 0.7, "linear": 0.6, "few_label": {"1": 0.4, "100": 0.6}, "rankme": 5.0, "dim": 10},
}
EVALUATION: dict[str, Any] = {
    "labelled": True,
    "point_labelled": False,
    "data": "shapes",
    "names": {"trained": "trained encoder", "random": "untrained encoder", "coordinates": "coordinates"},
    "splits": {"train": 800, "val": 100, "test": 400, "classes": 10},
    "skipped": {},
    "rows": ROWS,
}
DENSE = {
    "points": {"train": 3000, "val": 1500, "test": 40_000},
    "classes": ["bottom", "side", "top"],
    "outside": 12,
    "majority": 0.5,
    "ceiling": {"accuracy": 0.95, "mean_iou": 0.9},
    "pillar": [0.25, 0.25],
}


def make_run(path: Path, evaluation: dict[str, Any] | None = None) -> Path:
    """The directory of a run that has random weights and a few logged lines."""
    path.mkdir()
    (path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    terms = {"low": 0.5, "top": 0.4, "low_occupancy": 0.7, "normal": 0.33}
    lines: list[dict[str, Any]] = [
        {"step": step, "loss": 8.0 / step, **{name: value / step for name, value in terms.items()}} for step in (1, 10)
    ]
    lines.append({"step": 10, "val_loss": 1.0, "val_low": 0.0625})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if evaluation is not None:
        (path / "evaluation.json").write_text(json.dumps(evaluation))
    recipe = make_recipe(RECIPE)
    method = registry.load(recipe.method).build(recipe.model, recipe.data)
    checkpoint.write(path / "model.safetensors", method.state_dict(), {"step": 10, "method": recipe.method})
    return path


def test_the_page_of_a_run_has_pictures_terms_and_probes(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path / "run", EVALUATION)).read_text()
    images = re.findall(r'src="data:image/png;base64,([^"]+)" alt="([^"]*)"', page)
    assert len(images) == 4 and len({alt for _, alt in images}) == 4
    for data, alt in images:
        assert re.fullmatch(r"The whole cloud of 128 points; .* hidden points, normals of shapes:\S+", alt), alt
        assert ink(pixels(base64.b64decode(data))) > 0.02
    for part in ("4 validation clouds at step 10", "radius 1", "Predicted normals are", "What the loss is made of"):
        assert part in page, part
    assert "Curvature is" not in page, "its weight is 0"
    assert "unmask export" in page and "--to sst" in page
    assert write_report(tmp_path / "run").read_text() == page


def test_a_run_whose_clouds_are_gone_still_has_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    recipe = RECIPE | {"data": RECIPE["data"] | {"source": str(tmp_path / "gone")}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    page = write_report(run).read_text()
    assert "No pictures: data source" in page and "parameters" in page
    (run / "model.safetensors").unlink()
    assert "has no weights yet" in write_report(run).read_text()


def test_the_loss_is_listed_by_term(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run"))
    (section,) = sections(run)
    cells = {title: [text for text, _ in row] for title, row in section.rows}
    assert list(cells) == ["centroids, finest cells", "centroids, pillars", "occupied, finest cells", "normals"]
    assert cells["centroids, finest cells"] == ["–", "0.5000", "0.0500", "0.0625", "about 1/3"]
    assert cells["occupied, finest cells"][-1] == "0.6931" and cells["normals"][-1] == "0.3333"
    assert sections(replace(run, metrics=[{"step": 1, "loss": 1.0}])) == []


def test_the_loss_of_answering_zero_is_what_the_table_says() -> None:
    normal = torch.nn.functional.normalize(torch.randn(50, 3), dim=1)
    occupied = torch.rand(50, 8) > 0.7
    zero = torch.zeros(50, 8, 2)
    assert float(occupancy_loss(zero, occupied).mean()) == pytest.approx(0.6931, abs=1e-4)
    assert float(unsigned_l2(torch.zeros(50, 3), normal).mean()) == pytest.approx(0.3333, abs=1e-4)


def probed(run: Path, evaluation: dict[str, Any]) -> Probes:
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    found = probes(read_run(run))
    assert found is not None
    return found


def test_probes_of_clouds_and_of_points(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert probes(read_run(run)) is None
    clouds = probed(run, EVALUATION)
    assert clouds.columns == ["k-NN", "linear", "1 % labels", "RankMe"]
    assert clouds.rows[0] == (
        "trained encoder",
        [("80.0", True), ("90.0", True), ("30.0", False), ("20.0 of 32", False)],
    )
    assert clouds.rows[2][1][2] == ("40.0", True)
    assert clouds.summary.tone == "good" and clouds.figure is not None
    assert "90.0 %: 20.0 points above the best reference (untrained encoder, 70.0 %)" in clouds.summary.text
    # 1.96 times the deviation of a difference of two shares of 400.
    assert "about 5.4 points may be chance" in clouds.summary.text

    scores = {"trained": (0.8, 0.6), "random": (0.85, 0.65), "coordinates": (0.7, 0.5)}
    rows = {
        name: {"rankme": 5.0, "dim": 32, "dense": {"accuracy": accuracy, "mean_iou": iou}}
        for name, (accuracy, iou) in scores.items()
    }
    points = EVALUATION | {"labelled": False, "point_labelled": True, "note": "no probes", "rows": rows, "dense": DENSE}
    found = probed(run, points)
    assert found.columns == ["points", "mean IoU", "RankMe"] and found.figure is None
    assert found.rows[1] == ("untrained encoder", [("85.0", True), ("65.0", True), ("5.0 of 32", False)])
    assert found.summary.tone == "warn" and "60.0 %: 5.0 points below the best" in found.summary.text
    for part in ("Points: 3 classes", "95.0, mean IoU 90.0", "12 more are out of range"):
        assert part in found.note, part
    assert "no probes" not in found.note

    both = {name: row | rows[name] for name, row in ROWS.items()}
    assert probed(run, EVALUATION | {"rows": both, "dense": DENSE}).summary.tone == "warn"


def test_probes_without_labels_or_with_chance(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    bare = {name: {"rankme": row["rankme"], "dim": row["dim"]} for name, row in ROWS.items()}
    none = {"labelled": False, "rows": bare, "note": "There are no labels.", "skipped": {"points": "no test point"}}
    found = probed(run, EVALUATION | none)
    assert found.columns == ["RankMe"] and found.summary.text == "There are no labels."
    assert found.note == "Points: not probed, no test point."
    near = {name: row | {"linear": 0.9 if name == "trained" else 0.89} for name, row in ROWS.items()}
    level = probed(run, EVALUATION | {"rows": near}).summary
    assert level.tone == "plain" and "within chance of the best reference" in level.text
    alone = probed(run, EVALUATION | {"rows": {"trained": ROWS["trained"]}}).summary
    assert alone.tone == "plain" and alone.text == "Linear probe of clouds 90.0 %, measured without references."
