"""What a model predicts of hidden pillars: as scenes to draw, in numbers, and as a report's gallery."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmask.core.report.gather import RunFacts
from unmask.core.report.parts import Picture, Pictures, data_address
from unmask.core.report.pictures import Shown, draw_with
from unmask.pointcloud.data.batches import PointBatch
from unmask.pointcloud.geometry.targets import GeometryTargets
from unmask.pointcloud.geometry.voxels import VoxelGrid
from unmask.pointcloud.methods.geomae import GeoMAEPlan, Prediction
from unmask.pointcloud.report.scene import Compared, Scene, oblique

SAMPLES = 4
ONE_SURFACE = 0.01  # where the two smaller curvature values are nearer than this, a normal is a matter of chance


def draw_pictures(run: RunFacts) -> Pictures:
    """Hide pillars of `SAMPLES` validation clouds, and draw what the model predicts."""
    return draw_with(run, SAMPLES, _draw)


def _draw(shown: Shown) -> Pictures:
    from unmask.pointcloud.report.drawing import draw  # with matplotlib, which takes a while to import

    method: Any = shown.run.method
    if not all(hasattr(method, name) for name in ("predictions", "target")):
        return Pictures()
    batch, plan, settings = shown.batch, shown.plan, shown.run.recipe.data
    predicted, target = method.predictions(batch, plan), method.target(batch, plan)
    # Scaled clouds are objects, however flat; scenes are seen as they are.
    unit, view = ("", oblique()) if settings.normalize == "sphere" else ("m", None)
    scenes = [scene(batch, plan, predicted, target, method.grid, row) for row in range(len(shown.names))]
    pictures = [
        Picture(name, [(caption(one, unit), data_address(draw(one, unit, view)))])
        for name, one in zip(shown.names, scenes, strict=True)
    ]
    hidden = len(plan.hidden) / len(plan.voxels.pillars)
    note = describe(measure(predicted, target, method.grid), len(pictures), shown.run.step, hidden, unit)
    return Pictures(pictures, note, wide=True)


def caption(one: Scene, unit: str) -> str:
    """What the picture of a cloud shows: its caption, and before "of" and the cloud's name its alternative text."""
    width, depth = np.ptp(one.points[:, :2], axis=0)
    size = f" over {width:.2g} x {depth:.2g} {unit}" if unit else ""
    text = (
        f"The whole cloud of {len(one.points):,} points{size}; what the encoder sees, {len(one.corners)} pillars hidden"
    )
    pairs = {"hidden points": one.centroids, "normals": one.normals, "curvature": one.curvature}
    shown = [name for name, pair in pairs.items() if pair is not None]
    return text + ("; true and predicted " + ", ".join(shown) if shown else "")


def positions(
    grid: VoxelGrid, pillars: Int[np.ndarray, "n 3"], slots: Int[np.ndarray, "n"], within: Float[np.ndarray, "n 3"]
) -> Float[np.ndarray, "n 3"]:
    """Positions x, y, z in metres of points in finest cells.

    Each lies in the pillar (sample, y, x), in the cell with this slot, at `within` (z, y, x in units of the cell).
    """
    cell = np.stack(np.unravel_index(slots, grid.low), axis=1)
    of_pillar = np.stack([np.zeros_like(slots), pillars[:, 1], pillars[:, 2]], axis=1)
    zyx = (of_pillar * np.array(grid.low) + cell + within) * np.array(grid.low_cell)[::-1]
    return np.array(grid.lower) + zyx[:, ::-1]


def scene(
    batch: PointBatch, plan: GeoMAEPlan, predicted: Prediction, target: GeometryTargets, grid: VoxelGrid, row: int
) -> Scene:
    """One cloud of a batch with its targets and predictions, as plain arrays with components x, y, z."""
    voxels = plan.voxels
    mine = (voxels.pillars[plan.hidden, 0] == row).numpy()
    pillars = voxels.pillars[plan.hidden].numpy()[mine]
    nth = np.full(len(voxels.pillars), -1)
    nth[plan.hidden.numpy()[mine]] = np.arange(len(pillars))
    kept = (voxels.pillars[voxels.pillar_of, 0] == row).numpy()
    corners = np.array(grid.lower) + np.stack(
        [pillars[:, 2] * grid.pillar[0], pillars[:, 1] * grid.pillar[1], np.zeros(len(pillars))], axis=1
    )

    def compared(true: Tensor, given: Tensor | None) -> Compared | None:
        return None if given is None else Compared(true.numpy()[mine], given.numpy()[mine])

    normals = compared(target.normal.flip(1), None if predicted.normal is None else predicted.normal.flip(1))
    curvature = compared(target.curvature[:, 2], None if predicted.curvature is None else predicted.curvature[:, 2])
    return Scene(
        points=batch.points[voxels.order, :3].double().numpy()[kept],
        pillar_of=nth[voxels.pillar_of.numpy()[kept]],
        corners=corners,
        pillar=grid.pillar,
        centroids=_centroids(predicted, target, grid, mine, pillars),
        normals=normals,
        curvature=curvature,
    )


def _centroids(
    predicted: Prediction, target: GeometryTargets, grid: VoxelGrid, mine: np.ndarray, pillars: np.ndarray
) -> Compared | None:
    """The means of points in their cells, true and predicted; None without either head.

    A model that does not predict which cells hold points gets the true ones; one that does not predict where in the
    cell they lie gets its middle.
    """
    if predicted.low is None and predicted.low_occupancy is None:
        return None
    occupied = expected = target.low_occupied.numpy()[mine]
    if predicted.low_occupancy is not None:
        expected = likely(predicted.low_occupancy).numpy()[mine]
    true = target.low.numpy()[mine]
    within = np.full_like(true, 0.5) if predicted.low is None else predicted.low.numpy()[mine]

    def xyz(chosen: np.ndarray, inside: np.ndarray) -> np.ndarray:
        pillar, slot = chosen.nonzero()
        return positions(grid, pillars[pillar], slot, inside[chosen])

    return Compared(xyz(occupied, true), xyz(expected, within))


def likely(logits: Float[Tensor, "hidden cells 2"]) -> Bool[Tensor, "hidden cells"]:
    """The likeliest cells of every pillar, as many as their probabilities of holding points add up to; one at least.

    Few cells hold points, and which of them a sparse scan happens to hit cannot be known: most probabilities stay far
    below 1/2 in a model that is well calibrated.
    """
    probability = logits[..., 1].sigmoid()
    rank = probability.sort(dim=1, descending=True, stable=True).indices.argsort(1)
    return rank < probability.sum(1, keepdim=True).round().clamp(min=1)


# ---- numbers -------------------------------------------------------------------------------------------------------


def measure(predicted: Prediction, target: GeometryTargets, grid: VoxelGrid) -> dict[str, float]:
    """What the pictures' note says in numbers, over all hidden pillars; only of terms that are predicted.

    ``precision`` and ``recall`` of the finest cells that are drawn as expected (`likely`): how many of them hold
    points, and how many of those that do are among them; ``share`` of all cells that do. ``sure_precision`` (absent
    where there are none) and ``sure_recall``: the same of cells that hold points with more than 50 %.
    ``centroid`` and ``middle``: mean distance of the prediction and of the cell's middle from the points' mean, metres.
    ``angle`` and ``common``: mean angle in degrees, without sign, of the prediction and of the one direction nearest to
    all, over pillars that have a normal (`ONE_SURFACE`). ``curvature`` and ``mean_curvature``: mean error of the
    smallest curvature value, and that of predicting its mean.
    """
    values: dict[str, float] = {}
    occupied = target.low_occupied
    if predicted.low_occupancy is not None:
        values["share"] = float(occupied.float().mean())
        # A logit of 0 is a probability of 1/2.
        for name, chosen in (("", likely(predicted.low_occupancy)), ("sure_", predicted.low_occupancy[..., 1] > 0)):
            both = float((chosen & occupied).sum())
            values[f"{name}recall"] = both / float(occupied.sum())
            if chosen.any():
                values[f"{name}precision"] = both / float(chosen.sum())
    if predicted.low is not None:
        true, size = target.low[occupied], torch.tensor(grid.low_cell[::-1])
        for name, given in (("centroid", predicted.low[occupied]), ("middle", torch.full_like(true, 0.5))):
            values[name] = float(((given - true) * size).norm(dim=1).mean())
    clear = target.curvature[:, 1] - target.curvature[:, 2] > ONE_SURFACE
    if predicted.normal is not None and clear.any():
        true = target.normal[clear].double()
        common = torch.linalg.eigh(true.T @ true).eigenvectors[:, -1]
        values |= {
            "angle": _angle(predicted.normal[clear].double(), true),
            "common": _angle(common.expand_as(true), true),
        }
    if predicted.curvature is not None:
        true, given = target.curvature[:, 2], predicted.curvature[:, 2]
        values |= {"curvature": _error(given, true), "mean_curvature": _error(true.mean(), true)}
    return values


def _angle(a: Tensor, b: Tensor) -> float:
    """Mean angle between lines, in degrees."""
    cosine = torch.cosine_similarity(a, b, dim=1).abs().clamp(max=1)
    return float(cosine.acos().mean().rad2deg())


def _error(given: Tensor, true: Tensor) -> float:
    return float((given - true).abs().mean())


def describe(values: dict[str, float], count: int, step: int, hidden: float, unit: str) -> str:
    """The note under the pictures, from the numbers of `measure`; `hidden` is the share of hidden pillars."""
    length = f" {unit}" if unit else " (clouds have radius 1)"
    text = [
        f"{count} validation clouds at step {step:,}, coloured by height. {hidden:.0%} of the pillars are hidden: the "
        "grey ones. A block is as high as the points that were in it; the model is told only where it stands."
    ]
    if "recall" in values:
        sure = "no cell"
        if "sure_precision" in values:
            sure = f"cells of which {values['sure_precision']:.0%} do, {values['sure_recall']:.0%} of all that do"
        text.append(
            "A hidden point is the mean of one of the pillar's finest cells. Predicted cells are the likeliest of each "
            f"pillar, as many as their probabilities add up to: {values['precision']:.0%} of them hold points, where "
            f"{values['share']:.1%} of all cells in hidden pillars do, and {values['recall']:.0%} of those that do "
            f"are among them. More than 50 % is given to {sure}."
        )
    if "centroid" in values:
        text.append(
            f"In cells with points their mean is missed by {values['centroid']:.2g}{length}; predicting the middle of "
            f"the cell would miss it by {values['middle']:.2g}."
        )
    if "angle" in values:
        text.append(
            "Discs lie in the surface, so that a normal and its opposite look the same. Predicted normals are "
            f"{values['angle']:.0f}° off on average, whichever side they point to; the one direction that suits all "
            f"best is {values['common']:.0f}° off."
        )
    if "curvature" in values:
        text.append(
            f"Curvature is the share of the surroundings' spread along its smallest axis, 0 to 1/3; it is missed by "
            f"{values['curvature']:.3f}, and would be by {values['mean_curvature']:.3f} if its mean were the predicted."
        )
    return " ".join(text)
