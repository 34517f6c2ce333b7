"""K-means codebooks: fit on a bounded sample with scikit-learn, assign on any device.

Fitting is MiniBatchKMeans with the settings of HuBERT's scripts (arXiv 2106.07447; fairseq examples/hubert). Assigning
is argmin_c |x|^2 - 2 x.c + |c|^2, where |x|^2 is left out because it is the same for every c. Residual quantisation
(arXiv 2409.10788) clusters the residual after subtracting the centroid, stage after stage.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from unmask.core.data.kinds import CorruptSampleError
from unmask.core.errors import UnmaskError
from unmask.core.progress import progress_bar
from unmask.core.randomness import Key, SampleKey
from unmask.speech_audio.data.frames import SAMPLE_RATE
from unmask.speech_audio.targets.features import Feature

_ROWS = 512  # frames compared with the centroids at once: the products stay in the cache
_ON_DEVICE = 64  # times as many on a GPU
Positive = Annotated[int, Field(ge=1)]


class ClusteringError(UnmaskError):
    """Frames that cannot be clustered, or a codebook that cannot be read or does not fit."""


@dataclass(frozen=True)
class KMeansSettings:
    """How a codebook is fitted; the defaults are HuBERT's, initialisation by k-means++ included.

    Args:
        n_init: initialisations, of which the best on a part of the sample is used; slow, and 1 to 3 suffice on small
            data.
        batch: frames per mini-batch.
        max_iter: passes over the sample at most.
        tol: stop when the centroids move less than this; 0 switches this off.
        max_no_improvement: stop after this many mini-batches without a better smoothed inertia.
        reassignment_ratio: share of the largest count below which a centroid is moved to a random frame; 0 for never.
    """

    n_init: Positive = 20
    batch: Positive = 10_000
    max_iter: Positive = 100
    tol: Annotated[float, Field(ge=0)] = 0.0
    max_no_improvement: Positive = 100
    reassignment_ratio: Annotated[float, Field(ge=0)] = 0.0


def nearest(
    frames: Float[Tensor, "frames dim"], centroids: Float[Tensor, "classes dim"], rows: int = _ROWS
) -> Int[Tensor, "frames"]:
    """Index of the nearest centroid by Euclidean distance, on the frames' device.

    Of distances that are equal in fp32 the lowest index wins.
    """
    if frames.device.type == "cpu":
        return torch.from_numpy(_nearest_on_cpu(frames.detach().numpy(), centroids.detach().numpy(), rows))
    return _nearest_on_device(frames, centroids, rows * _ON_DEVICE)


def _nearest_on_device(frames: Tensor, centroids: Tensor, rows: int) -> Tensor:
    square, transposed = centroids.square().sum(1), centroids.T.contiguous()
    out = torch.empty(len(frames), dtype=torch.int64, device=frames.device)
    for start in range(0, len(frames), rows):
        out[start : start + rows] = torch.addmm(square, frames[start : start + rows], transposed, alpha=-2).argmin(1)
    return out


def _nearest_on_cpu(
    frames: Float[np.ndarray, "frames dim"], centroids: Float[np.ndarray, "classes dim"], rows: int
) -> Int[np.ndarray, "frames"]:
    """The same in NumPy, whose argmin over short rows takes a quarter of torch's time."""
    square, transposed = (centroids**2).sum(1), np.ascontiguousarray(-2 * centroids.T)
    out = np.empty(len(frames), dtype=np.int64)
    products = np.empty((min(rows, len(frames)), len(centroids)), dtype=np.result_type(frames, centroids))
    for start in range(0, len(frames), rows):
        piece = frames[start : start + rows]
        distance = products[: len(piece)]
        np.matmul(piece, transposed, out=distance)
        distance += square
        distance.argmin(1, out=out[start : start + rows])
    return out


@dataclass(frozen=True)
class KMeans:
    """A codebook.

    Args:
        centroids: of standardised frames, where `mean` and `std` are given.
        mean: subtracted from each frame first; None: frames are not standardised.
        std: divides each dimension after that.
    """

    centroids: Float[Tensor, "classes dim"]
    mean: Float[Tensor, "dim"] | None = None
    std: Float[Tensor, "dim"] | None = None

    def standardise(self, frames: Float[Tensor, "frames dim"]) -> Float[Tensor, "frames dim"]:
        """The frames in the space of the centroids.

        Raises:
            ClusteringError: the frames have another number of dimensions.
        """
        if frames.shape[1] != self.centroids.shape[1]:
            raise ClusteringError(
                f"frames have {frames.shape[1]} dimensions and the codebook {self.centroids.shape[1]}: it was made "
                "from another feature or another model"
            )
        return _standardised(frames, self.mean, self.std)

    def assign(self, frames: Float[Tensor, "frames dim"]) -> Int[Tensor, "frames"]:
        """The label of each frame."""
        return nearest(self.standardise(frames), self.centroids)


def _standardised(frames: Tensor, mean: Tensor | None, std: Tensor | None) -> Tensor:
    return frames if mean is None or std is None else (frames - mean).div_(std)


@dataclass(frozen=True)
class ResidualKMeans:
    """Codebooks of the residuals of earlier ones; a single stage is plain k-means.

    Args:
        stages: one codebook after the other; only the first one standardises.
    """

    stages: tuple[KMeans, ...]

    def assign(self, frames: Float[Tensor, "frames dim"]) -> Int[Tensor, "frames stages"]:
        """One label per stage."""
        return self.quantise(frames)[0]

    def quantise(
        self, frames: Float[Tensor, "frames dim"]
    ) -> tuple[Int[Tensor, "frames stages"], Float[Tensor, "stages_and_one"]]:
        """Labels, and the sum of squares (fp64) of the standardised frames and of each stage's residuals."""
        rest = self.stages[0].standardise(frames)
        labels, squares = [], [rest.square().sum(dtype=torch.float64)]
        for stage in self.stages:
            labels.append(nearest(rest, stage.centroids))
            rest = rest - stage.centroids[labels[-1]]
            squares.append(rest.square().sum(dtype=torch.float64))
        return torch.stack(labels, dim=1), torch.stack(squares)


def moments(frames: Float[Tensor, "frames dim"]) -> tuple[Float[Tensor, "dim"], Float[Tensor, "dim"]]:
    """Mean and standard deviation of each dimension, in pieces and summed in fp64; the std of a constant one is 1."""
    pieces = frames.split(1 << 16)
    mean = sum(piece.sum(0, dtype=torch.float64) for piece in pieces) / len(frames)
    variance = sum((piece.double() - mean).square().sum(0) for piece in pieces) / len(frames)
    assert isinstance(mean, Tensor) and isinstance(variance, Tensor)
    std = torch.where(variance > 1e-12 * mean.square().clamp(min=1e-12), variance.sqrt(), 1.0)
    return mean.float(), std.float()


def fit_residual(
    frames: Float[Tensor, "frames dim"],
    classes: int,
    stages: int = 1,
    *,
    seed: int,
    settings: KMeansSettings = KMeansSettings(),
    standardise: bool = False,
) -> ResidualKMeans:
    """`stages` codebooks of `classes` centroids, each fitted to the residuals of those before it.

    Needs memory for one more copy of the frames.

    Args:
        frames: the sample; fp32, on any device, fitted on the CPU.
        classes: number of centroids.
        stages: 1 is plain k-means.
        seed: of the initialisations and the mini-batches; the same seed and frames give the same codebook.
        settings: of scikit-learn's MiniBatchKMeans.
        standardise: bring each dimension to zero mean and unit deviation over the sample first.

    Raises:
        ClusteringError: fewer frames than classes, or a value that is not finite.
    """
    if len(frames) < classes:
        raise ClusteringError(
            f"{len(frames)} frames are too few for {classes} clusters; give more audio, raise share or max_frames, "
            "or ask for fewer clusters"
        )
    rest = frames.float().cpu()
    if not bool(torch.isfinite(rest).all()):
        raise ClusteringError("some frames hold NaN or infinity; the model that gave them has diverged")
    mean, std = moments(rest) if standardise else (None, None)
    rest = _standardised(rest, mean, std)
    fitted = []
    for stage in range(stages):
        centroids = _fit_centroids(rest, classes, SampleKey.of(seed, stage).stream("k-means"), settings)
        fitted.append(KMeans(centroids, mean, std) if stage == 0 else KMeans(centroids))
        if stage + 1 < stages:
            rest = rest - centroids[nearest(rest, centroids)]
    return ResidualKMeans(tuple(fitted))


def _fit_centroids(
    frames: Float[Tensor, "frames dim"], classes: int, key: SampleKey, settings: KMeansSettings
) -> Float[Tensor, "classes dim"]:
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning

    model = MiniBatchKMeans(
        n_clusters=classes,
        init="k-means++",
        n_init=settings.n_init,
        batch_size=settings.batch,
        init_size=max(3 * settings.batch, 3 * classes),
        max_iter=settings.max_iter,
        tol=settings.tol,
        max_no_improvement=settings.max_no_improvement,
        reassignment_ratio=settings.reassignment_ratio,
        compute_labels=False,
        random_state=key.state % (1 << 32),
    )
    with warnings.catch_warnings():
        # Fewer distinct frames than clusters (silence): clusters stay empty, which the diagnostics count.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(frames.contiguous().numpy())
    return torch.from_numpy(model.cluster_centers_).float()


def readable(clips: Any, index: int) -> Float[Tensor, "samples"] | None:
    """A clip's waveform; None where it is damaged and the data settings skip damaged clips."""
    try:
        waveform: Tensor = clips.waveform(index)
    except CorruptSampleError:
        if clips.settings.corrupt == "fatal":
            raise
        return None
    return waveform


def sample_frames(
    clips: Any,
    feature: Feature,
    *,
    max_frames: int,
    share: float = 1.0,
    seed: int = 0,
) -> Float[Tensor, "frames dim"]:
    """Frames of a random share of the clips, at most `max_frames`, on the CPU.

    Clips are taken in an order that follows from (seed, sample id) until the share or the maximum is reached, so the
    result does not depend on the order of `clips`, and no more audio is read than needed. Of a recording longer than
    its entry in ``clips.lengths`` (which are capped), that many frames are taken at even distances, so that a few long
    recordings do not fill the sample.

    Args:
        clips: has ``ids``, ``lengths`` (samples at 16 kHz) and ``waveform(index)``.
        feature: the feature to compute.
        max_frames: most frames; memory is max_frames x feature.dim x 4 bytes at most, and one clip.
        share: share of the clips, in (0, 1]; at least one clip is taken.
        seed: seed of the choice.

    Raises:
        ClusteringError: no clips, or they have no frames.
    """
    if not len(clips.ids):
        raise ClusteringError("there are no clips to make labels from; see what was left out of the source, and why")
    rank = Key.of(seed, clips.ids.cpu()).stream("k-means clips").bits(1)[:, 0]
    chosen = rank.argsort()[: max(1, round(share * len(rank)))].tolist()
    room = [-(-int(clips.lengths[i]) * round(feature.rate) // SAMPLE_RATE) for i in chosen]
    out = torch.empty(min(max_frames, sum(room)), feature.dim)
    filled = 0
    with progress_bar(f"frames of {feature.name} for k-means", len(out)) as advance:
        for index, most in zip(chosen, room, strict=True):
            waveform = readable(clips, index)
            if waveform is None:
                continue
            frames = feature(waveform)
            if len(frames) > most:
                frames = frames[torch.linspace(0, len(frames) - 1, most, device=frames.device).long()]
            frames = frames[: len(out) - filled]
            out[filled : filled + len(frames)] = frames
            filled += len(frames)
            advance(len(frames))
            if filled == len(out):
                break
    if not filled:
        raise ClusteringError(f"the {len(chosen)} clips chosen give no frames of {feature.name}: too short or damaged")
    return out[:filled]
