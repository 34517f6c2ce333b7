"""GeoMAE: Masked Geometric Target Prediction for Self-supervised Point Cloud Pre-Training.

Tian et al., CVPR 2023, arXiv 2305.08808.

A sweep is cut into pillars, and 70 % of those that hold points are hidden. A sparse window transformer encodes the
visible ones; two light decoders of the same kind see them and a learned mask token at every hidden position, and
predict the geometry there: the points' centre of mass in the pillar and in the cells of two finer grids, which cells
hold points, and the normal and curvature of the surrounding surface.

Where the released code differs from the paper or leaves a choice, this file does the following:

* Curvature is predicted and scored, as in the paper; the released training loss leaves it out. Its weight is not
  known: 4, the normal's, is ours. ``weights: {curvature: 0}`` is the released loss.
* Normals are scored by their squared error, as released (``normal_loss: plain``). The sign of an eigenvector is
  arbitrary: the released targets have whatever sign their SVD returns, ours the one that `geometry_targets` fixes, and
  ``normal_loss: sign_invariant`` takes the better of both signs.
* The pillar encoder runs on all pillars and the visible ones are taken from its result, as released. So in training
  its BatchNorm statistics include hidden points; in eval mode nothing of them reaches the encoder.
* At least one pillar of a sample stays visible.
* Cells of all sizes follow from the finest cell's index by integer division; the released code divides coordinates
  again for every size, which can disagree by one cell on a border.
* A step whose clouds have one pillar each, so that nothing can be hidden, has a loss of 0 instead of failing.
* Optimizer and augmentation are the recipe's: ``paper`` holds the released values but for what its comment names.

BatchNorm normalises by the points of one micro-batch on one device, and its running statistics move with each of them.
So unlike other methods' training, GeoMAE's depends on how a batch is cut into micro-batches and ranks, though every
mean in the loss is exact. They move by 1 % a time, as released: an encoder of fewer than some hundred steps carries
statistics of its start, which `evaluate` renews and `encode` does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from unmask.core.errors import UnmaskError
from unmask.core.losses import l2, mean_term
from unmask.core.mask import Mask
from unmask.core.masking import RandomMasking
from unmask.core.method import Clock, Output, Plan
from unmask.core.randomness import Key
from unmask.core.training.recipe import Recipe
from unmask.pointcloud.data.batches import PointBatch
from unmask.pointcloud.data.clouds import Settings as DataSettings
from unmask.pointcloud.encoders.sparse_conv import ConvEncoderSettings, SparseConvEncoder
from unmask.pointcloud.encoders.window import (
    PillarEncoder,
    PillarFeatures,
    Windows,
    WindowSettings,
    WindowTransformer,
    encode,
    init_weights,
    valid_pillars,
)
from unmask.pointcloud.geometry.targets import GeometryTargets, geometry_targets
from unmask.pointcloud.geometry.voxels import VoxelGrid, Voxels, voxelise

CARD = {
    "title": "GeoMAE: Masked Geometric Target Prediction for Self-supervised Point Cloud Pre-Training",
    "paper": "Tian et al., CVPR 2023, arXiv 2305.08808",
    "summary": "70 % of pillars; centroids, occupancy, normal and curvature of what they hold",
    "kind": "pretrain",
    "evidence": "full",
    "reference": "Tsinghua-MARS-Lab/GeoMAE",
    "reference_licence": "Apache-2.0",
}

Weight = Annotated[float, Field(ge=0)]
Cells = tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]


@dataclass(frozen=True)
class LossWeights:
    """The weight of each term; the defaults are the released ones, `curvature` is ours. A term of weight 0 has no head.

    Args:
        low: centroids in the finest cells.
        med: centroids in the middle cells.
        top: the pillar's centroid.
        low_occupancy: which of the finest cells hold points.
        med_occupancy: which of the middle cells do.
        normal: the surface normal.
        curvature: the three curvature values.
    """

    low: Weight = 10.0
    med: Weight = 8.0
    top: Weight = 10.0
    low_occupancy: Weight = 5.0
    med_occupancy: Weight = 2.0
    normal: Weight = 4.0
    curvature: Weight = 4.0

    def __post_init__(self) -> None:
        if not any(vars(self).values()):
            raise ValueError("all loss weights are 0: there is nothing to learn; give at least one term a weight")


@dataclass(frozen=True)
class Settings:
    """What a recipe may set under ``model``; the defaults are the released configuration.

    Args:
        encoder: the window transformer. The pillar encoder, the decoders and their windows take width, heads and window
            from it.
        convolutions: an encoder of sparse convolutions instead of the window transformer (ours, not the paper's); null
            for none. The decoders do not change.
        decoder_depth: blocks of each of the two decoders.
        mask_ratio: share of non-empty pillars hidden, in (0, 1).
        low: finest cells per pillar along z, y, x.
        med: middle cells per pillar along z, y, x; each divides the finest.
        weights: of the loss terms.
        normal_loss: ``plain`` squared error, or ``sign_invariant``: that to the nearer of the normal and its opposite.
    """

    encoder: WindowSettings = field(default_factory=WindowSettings)
    convolutions: ConvEncoderSettings | None = None
    decoder_depth: Annotated[int, Field(ge=1)] = 2
    mask_ratio: float = 0.7
    low: Cells = (8, 4, 4)
    med: Cells = (4, 2, 2)
    weights: LossWeights = field(default_factory=LossWeights)
    normal_loss: Literal["plain", "sign_invariant"] = "plain"


def build(settings: Settings, data: DataSettings) -> GeoMAE:
    """The model that a recipe describes; `data` is resolved, so that range and pillars are known.

    Raises:
        UnmaskError: they are not.
    """
    return GeoMAE(settings, voxel_grid(data, settings), data.channels)


def voxel_grid(data: DataSettings, settings: Settings) -> VoxelGrid:
    """The cells that data and model settings define together: pillars over the whole height of the range."""
    shape = data.grid_shape
    assert data.range is not None and data.pillar is not None
    x, y, bottom, _, _, top = data.range
    return VoxelGrid((x, y, bottom), (*data.pillar, top - bottom), shape, settings.low, settings.med)


def planned(recipe: Recipe) -> Recipe:
    """The recipe with a stand-in range and pillar where the data have not been read: weights depend on neither."""
    data: DataSettings = recipe.data
    span = data.range or (0.0, 0.0, 0.0, 1.0, 1.0, 1.0)
    pillar = data.pillar or (span[3] - span[0], span[4] - span[1])
    return replace(recipe, data=replace(data, range=span, pillar=pillar))


@dataclass(frozen=True)
class CloudPlan(Plan):
    """A mask over pillars, and these pillars.

    Args:
        voxels: which point lies in which cell, computed from positions.
    """

    voxels: Voxels

    def take(self, rows: Sequence[int]) -> CloudPlan:
        """The part that belongs to these samples."""
        return CloudPlan(self.mask.take(rows), self.voxels.take(rows))


@dataclass(frozen=True)
class GeoMAEPlan(CloudPlan):
    """The indices and structures that the networks need for a mask; `GeoMAE.plan` computes them.

    Args:
        visible: rows of ``voxels.pillars``, ascending.
        hidden: rows of ``voxels.pillars``, ascending.
        seen: the encoder's structure, over visible pillars.
        whole: the decoders' windows, over all pillars.
    """

    visible: Int[Tensor, "visible"]
    hidden: Int[Tensor, "hidden"]
    seen: Any
    whole: Windows


@dataclass(frozen=True)
class Prediction:
    """The heads' outputs for the hidden pillars; None where the term has no weight. Components are z, y, x."""

    low: Float[Tensor, "hidden low 3"] | None = None
    med: Float[Tensor, "hidden med 3"] | None = None
    top: Float[Tensor, "hidden 3"] | None = None
    low_occupancy: Float[Tensor, "hidden low 2"] | None = None
    med_occupancy: Float[Tensor, "hidden med 2"] | None = None
    normal: Float[Tensor, "hidden 3"] | None = None
    curvature: Float[Tensor, "hidden 3"] | None = None


class GeoMAE(nn.Module):
    """Pillar encoder, backbone, two decoders and their heads.

    Args:
        settings: the shape.
        grid: where pillars and cells are.
        channels: values per point, x, y, z first.
    """

    def __init__(self, settings: Settings, grid: VoxelGrid, channels: int) -> None:
        super().__init__()
        dim, conv = settings.encoder.dim, settings.convolutions
        if conv is not None and conv.dim != dim:
            raise ValueError(f"convolutions.dim is {conv.dim} and encoder.dim {dim}; the decoders need them equal")
        self.grid, self.settings = grid, settings
        self.masking = RandomMasking(settings.mask_ratio)
        self.pillar_encoder = PillarEncoder(channels, dim, grid)
        self.encoder = WindowTransformer(settings.encoder) if conv is None else SparseConvEncoder(conv)
        self.mask_token = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, dim)))
        of_cells, of_surface = self._outputs()
        self.cell_decoder = WindowTransformer(settings.encoder, settings.decoder_depth) if of_cells else None
        self.surface_decoder = WindowTransformer(settings.encoder, settings.decoder_depth) if of_surface else None
        self.heads = nn.ModuleDict({name: nn.Linear(dim, n) for name, n in {**of_cells, **of_surface}.items()})
        init_weights(self.heads)

    def _outputs(self) -> tuple[dict[str, int], dict[str, int]]:
        """Values per hidden pillar of every head with a weight: those of the first decoder, and of the second."""
        low, med = self.grid.num_low, self.grid.num_med
        cells = {"low": 3 * low, "med": 3 * med, "top": 3, "low_occupancy": 2 * low, "med_occupancy": 2 * med}
        surface = {"normal": 3, "curvature": 3}
        weights = vars(self.settings.weights)

        def weighted(part: dict[str, int]) -> dict[str, int]:
            return {name: n for name, n in part.items() if weights[name] > 0}

        return weighted(cells), weighted(surface)

    def draw(self, batch: PointBatch, clock: Clock, key: Key) -> GeoMAEPlan:
        """Cut the clouds into pillars and choose which are hidden. Costs host syncs for the numbers of both."""
        voxels = voxelise(batch.points, batch.offsets, self.grid)
        valid = valid_pillars(voxels)
        return self.plan(self.masking(key.stream("mask"), (valid.shape[1],), valid), voxels)

    def plan(self, mask: Mask, voxels: Voxels) -> GeoMAEPlan:
        """The plan of a given mask [batch, most pillars].

        Raises:
            UnmaskError: the clouds have no pillar at all.
        """
        hidden = mask.hidden[valid_pillars(voxels)]
        rows = hidden.nonzero()[:, 0], (~hidden).nonzero()[:, 0]
        if not len(rows[1]):
            raise UnmaskError(f"{len(mask.hidden)} clouds without a visible pillar: are their points in data.range?")
        seen = self.encoder.partition(voxels.pillars[rows[1]], self.grid.shape)
        whole = (self.cell_decoder or self.surface_decoder).partition(voxels.pillars, self.grid.shape)  # type: ignore[union-attr]
        return GeoMAEPlan(mask, voxels, visible=rows[1], hidden=rows[0], seen=seen, whole=whole)

    def predictions(self, batch: PointBatch, plan: GeoMAEPlan) -> Prediction:
        """Encode the visible pillars, decode all, and predict the hidden ones."""
        tokens = self.pillar_encoder(batch.points, plan.voxels)  # [pillars, dim]
        latent = self.encoder(tokens[plan.visible], plan.seen)  # [visible, dim]
        masked = self.mask_token.to(latent.dtype).expand(len(tokens), -1)  # [pillars, dim]
        x = masked.index_copy(0, plan.visible, latent)  # [pillars, dim]

        outputs: dict[str, Tensor] = {}
        for decoder, names in zip((self.cell_decoder, self.surface_decoder), self._outputs(), strict=True):
            if decoder is not None:
                decoded = decoder(x, plan.whole)[plan.hidden]  # [hidden, dim]
                outputs |= {name: self.heads[name](decoded).float() for name in names}  # [hidden, cells * width]
        for name, width in (("low", 3), ("med", 3), ("low_occupancy", 2), ("med_occupancy", 2)):
            if name in outputs:
                outputs[name] = outputs[name].unflatten(1, (-1, width))  # [hidden, cells, width]
        return Prediction(**outputs)

    def predict(self, batch: PointBatch, plan: GeoMAEPlan) -> Float[Tensor, "hidden values"]:
        """All outputs for the hidden pillars, concatenated in the order of `Prediction`."""
        outputs = vars(self.predictions(batch, plan)).values()
        return torch.cat([x.flatten(1) for x in outputs if x is not None], dim=1)  # [hidden, values]

    def target(self, batch: PointBatch, plan: GeoMAEPlan) -> GeometryTargets:
        """The geometry of the hidden pillars, from all points of the cloud."""
        return geometry_targets(batch.points, plan.voxels, self.grid, plan.hidden)

    def forward(self, batch: PointBatch, plan: GeoMAEPlan) -> Output:
        """The weighted terms; every mean is over the whole batch, not per sample.

        Centroids in cells that hold no points do not count; occupancy counts in all cells.
        """
        predicted, targets = self.predictions(batch, plan), self.target(batch, plan)
        normal_loss = l2 if self.settings.normal_loss == "plain" else unsigned_l2
        scored: dict[str, tuple[Callable[..., Tensor], Tensor, Tensor | None]] = {  # how, against what, where it counts
            "low": (l2, targets.low, targets.low_occupied),  # of [hidden, low]
            "med": (l2, targets.med, targets.med_occupied),  # of [hidden, med]
            "top": (l2, targets.top, None),  # of [hidden]
            "low_occupancy": (occupancy_loss, targets.low_occupied, None),  # of [hidden, low]
            "med_occupancy": (occupancy_loss, targets.med_occupied, None),  # of [hidden, med]
            "normal": (normal_loss, targets.normal, None),  # of [hidden]
            "curvature": (l2, targets.curvature, None),  # of [hidden]
        }
        weights = vars(self.settings.weights)
        terms = {}
        for name, (loss, target, where) in scored.items():
            if name in self.heads:
                terms[name] = mean_term(loss(getattr(predicted, name), target), where, weights[name])
        return Output(terms)

    def counts(self, batch: PointBatch, plan: GeoMAEPlan) -> dict[str, Tensor | float]:
        """Each term's count without a forward pass (which would move BatchNorm's statistics)."""
        voxels, hidden, med = plan.voxels, float(len(plan.hidden)), self.grid.num_med
        is_hidden = plan.visible.new_zeros(len(voxels.pillars), dtype=torch.bool).index_fill_(0, plan.hidden, True)
        in_low = is_hidden[voxels.low_pillar]
        in_med = in_low.new_zeros(len(is_hidden) * med)
        in_med[voxels.low_pillar * med + self.grid.med_slot(voxels.low_slot)] = in_low  # equal within a pillar
        counts: dict[str, Tensor | float] = {"low": in_low.sum(), "med": in_med.sum()}
        counts |= {"low_occupancy": hidden * self.grid.num_low, "med_occupancy": hidden * med}
        return {name: counts.get(name, hidden) for name in self.heads}

    def norms_over_all(self) -> set[str]:
        """The pillar encoder's BatchNorms: in training their statistics are those of hidden points too, as released."""
        return {name for name, module in self.named_modules() if isinstance(module, nn.BatchNorm1d)}

    def encoder_of(self) -> nn.ModuleDict:
        """What transfers: pillar encoder and backbone."""
        return nn.ModuleDict({"pillar_encoder": self.pillar_encoder, "encoder": self.encoder})

    def encode(self, batch: PointBatch) -> PillarFeatures:
        """Features of whole clouds: nothing is masked, whatever the mode.

        Raises:
            UnmaskError: a cloud of the batch has no point inside the range.
        """
        return encode(batch, self.pillar_encoder, self.encoder)

    @torch.no_grad()
    def picture(self, batch: PointBatch, plan: GeoMAEPlan) -> dict[str, Float[Tensor, "batch 1 rows columns"]]:
        """The clouds from above: the share of each pillar's finest cells that hold points.

        ``masked`` has 0 at hidden pillars, and ``reconstruction`` the share that the model predicts there.
        """
        cells = torch.bincount(plan.voxels.low_pillar, minlength=len(plan.voxels.pillars))
        share = cells / self.grid.num_low
        shown = {"input": share, "masked": share.index_fill(0, plan.hidden, 0.0)}
        logits = self.predictions(batch, plan).low_occupancy
        if logits is not None:
            expected = logits[..., 1].sigmoid().mean(1)
            shown["reconstruction"] = share.index_copy(0, plan.hidden, expected)
        return {name: self._from_above(x, plan.voxels, len(batch.ids)) for name, x in shown.items()}

    def _from_above(self, values: Tensor, voxels: Voxels, samples: int) -> Tensor:
        image = values.new_zeros(samples, 1, *self.grid.shape)
        sample, row, column = voxels.pillars.unbind(1)
        image[sample, 0, row, column] = values
        return image


def occupancy_loss(
    logits: Float[Tensor, "hidden cells 2"], occupied: Bool[Tensor, "hidden cells"]
) -> Float[Tensor, "hidden cells"]:
    """Binary cross-entropy of two logits, for empty and for occupied, each on its own; their mean."""
    target = torch.stack([~occupied, occupied], dim=2).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(2)


def unsigned_l2(prediction: Float[Tensor, "n 3"], normal: Float[Tensor, "n 3"]) -> Float[Tensor, "n"]:
    """Mean squared error to a normal or to its opposite, whichever is nearer."""
    return torch.minimum(l2(prediction, normal), l2(prediction, -normal))
