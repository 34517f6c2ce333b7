"""Making a label set from audio: one codebook fitted on training clips labels every split.

The options follow HuBERT (arXiv 2106.07447) and the axes of the study of prediction targets (arXiv 2409.10788): initial
features, layers, number of clusters, several layers at once, residual stages. Few of that study's own settings are
published, so the defaults for averaging and residual stages are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from unmask.core.errors import UnmaskError
from unmask.core.progress import Advance, progress_bar
from unmask.speech_audio.data.labels import LabelSet, Target
from unmask.speech_audio.targets.clustering import (
    KMeansSettings,
    Positive,
    ResidualKMeans,
    fit_residual,
    moments,
    readable,
    sample_frames,
)
from unmask.speech_audio.targets.codebook import Codebook, averaged
from unmask.speech_audio.targets.diagnostics import diagnose
from unmask.speech_audio.targets.features import FIXED, Feature, LayerFeatures, WaveformFeature, log_mel
from unmask.speech_audio.targets.labels import LabelWriter, check_free

__all__ = ["KMeansSettings", "TargetSettings", "fit_codebook", "make_feature", "make_labels"]


@dataclass(frozen=True)
class TargetSettings:
    """Which labels to make.

    Args:
        kind: ``mfcc`` (HuBERT's first iteration), ``log_mel``, ``mfcc_prosody`` (MFCC, pitch, voicing, energy),
            ``prosody`` (pitch, energy, voicing only), all at 100 Hz; or ``layer`` (features of an encoder, 50 Hz).
        clusters: clusters per codebook. HuBERT: 100 for MFCC, 500 for layers.
        layers: for ``layer``: 1-based, one stream each. HuBERT: 6 of the first BASE, 9 of the second.
        average: for several layers: quantise the mean of their standardised features as one stream.
        stages: 1 is k-means; more are residual stages, one stream each.
        bins: mel bins of ``log_mel``.
        max_frames: most frames that the codebook is fitted on. Memory is this x dimensions (of all layers) x 4 bytes,
            and one copy for a layer: 500,000 frames of one BASE layer are 1.5 GB and the copy 1.5 GB.
        share: largest share of the training clips that the codebook is fitted on, in (0, 1]. HuBERT: 0.1 from the
            second iteration on.
        standardise: bring each dimension to zero mean and unit deviation first. None: yes for layers, residual stages
            and prosody, no for MFCC and log-mel. HuBERT's scripts never do; but a few dimensions of a layer are so
            large that k-means clusters those alone.
        kmeans: how a codebook is fitted.
    """

    kind: Literal["mfcc", "log_mel", "mfcc_prosody", "prosody", "layer"] = "mfcc"
    clusters: Annotated[int, Field(ge=2)] = 100
    layers: tuple[Positive, ...] = ()
    average: bool = False
    stages: Positive = 1
    bins: Literal[40, 80] = 80
    max_frames: Positive = 500_000
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    standardise: bool | None = None
    kmeans: KMeansSettings = KMeansSettings()

    def __post_init__(self) -> None:
        if (self.kind == "layer") != bool(self.layers):
            raise ValueError(f"kind is {self.kind!r} and layers are {self.layers}; give layers with kind 'layer' only")
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers are {self.layers}; expected each once")
        if self.average and len(self.layers) < 2:
            raise ValueError("average needs two or more layers")
        if self.max_frames < self.clusters:
            raise ValueError(f"max_frames is {self.max_frames}; expected at least clusters, {self.clusters}")

    @property
    def standardised(self) -> bool:
        """Whether the dimensions are standardised, the default of the kind included."""
        if self.standardise is None:
            return self.stages > 1 or self.kind in ("layer", "mfcc_prosody", "prosody")
        return self.standardise


def make_feature(target: TargetSettings, encoder: Any = None, device: torch.device | str = "cpu") -> Feature:
    """The feature that a target quantises.

    Args:
        target: the target's settings.
        encoder: a `SpeechEncoder`, for kind ``layer``.
        device: the encoder's device; other features are computed on the CPU.

    Raises:
        UnmaskError: an encoder is missing, or does not have a layer.
    """
    if target.kind == "layer":
        if encoder is None:
            raise UnmaskError("labels of kind 'layer' need an encoder: give the run or checkpoint to take it from")
        return LayerFeatures(encoder, target.layers, device)
    if target.kind == "log_mel":
        return WaveformFeature(f"log_mel {target.bins}", target.bins, partial(log_mel, bins=target.bins))
    return FIXED[target.kind]


def fit_codebook(target: TargetSettings, feature: Feature, clips: Any, *, seed: int) -> Codebook:
    """A codebook for each part of a feature, fitted on a sample of the training clips.

    The same seed and clips give the same codebook, in whatever order the clips come; a layer's codebook does not depend
    on the other layers.

    Args:
        target: the target's settings.
        feature: from `make_feature`.
        clips: the training split: ``ids``, ``lengths``, ``waveform(index)``.
        seed: seed of the sample and of k-means.

    Raises:
        UnmaskError: no clips, too few frames, or frames that are not finite.
    """
    frames = sample_frames(clips, feature, max_frames=target.max_frames, share=target.share, seed=seed)
    width, average, parts = feature.dim // len(feature.parts), None, feature.parts
    pieces = frames.split(width, dim=1)
    if target.average:
        average = moments(frames)
        pieces = (averaged(frames, *average, dim=width),)
        parts = (f"mean of {feature.name}",)
    fitted: dict[str, ResidualKMeans] = {}
    with progress_bar(f"k-means of {len(frames)} frames, {target.clusters} clusters", len(parts)) as advance:
        for name, piece in zip(parts, pieces, strict=True):
            fitted[name] = fit_residual(
                piece,
                target.clusters,
                target.stages,
                seed=seed,
                settings=target.kmeans,
                standardise=target.standardised and average is None,
            )
            advance(1)
    return Codebook(fitted, average)


class _Labeller:
    """Labels one clip after another, and accumulates the share of the frames' variance that the streams explain."""

    def __init__(self, codebook: Codebook) -> None:
        self.codebook, self.frames = codebook, 0
        self.sums: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}

    def __call__(self, frames: Float[Tensor, "frames columns"]) -> Int[Tensor, "frames streams"]:
        """As `Codebook.assign`, and accumulate the sums that `explained` needs."""
        out = []
        for (name, part), piece in zip(self.codebook.parts.items(), self.codebook.split(frames), strict=True):
            labels, squares = part.quantise(piece)
            out.append(labels)
            self.sums[name] = self.sums.get(name, 0) + piece.sum(0, dtype=torch.float64)
            self.squares[name] = self.squares.get(name, 0) + squares
        self.frames += len(frames)
        return torch.cat(out, dim=1)

    def explained(self) -> list[float]:
        """1 - squares of the residuals / squares around the mean of all frames, one number per stream."""
        out: list[float] = []
        for name, part in self.codebook.parts.items():
            middle = part.stages[0].standardise((self.sums[name] / self.frames).float()[None])
            total = self.squares[name][0] - self.frames * middle.square().sum(dtype=torch.float64)
            out += (1 - self.squares[name][1:] / total.clamp(min=1e-12)).tolist()
        return out


def make_labels(
    target: TargetSettings,
    train: Any,
    other_splits: Sequence[Any],
    out: str | Path,
    *,
    encoder: Any = None,
    teacher_digest: str | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> LabelSet:
    """Fit a codebook on training clips and label every split with it, in one pass over the audio.

    One stream per layer and stage, layers first: ``layer 6 stage 1``, ``layer 6 stage 2``, ``layer 9 stage 1``, ...
    Beside the sample that the codebook is fitted on, memory holds one clip. ``codebook.safetensors`` is in the label
    set's folder, diagnostics of the training clips are in its ``info["diagnostics"]``.

    Args:
        target: the target's settings.
        train: the training clips; whole, as `unmask.speech_audio.data.clips` gives them.
        other_splits: all other splits.
        out: the label set's folder; must not exist, or be empty.
        encoder: a `SpeechEncoder`, for kind ``layer``.
        teacher_digest: digest of the checkpoint that the encoder is from; stored, so that it can be checked.
        seed: seed of the sample, of k-means and of the clips that pitch is computed on.
        device: the device of encoder and assignment.

    Raises:
        UnmaskError: no clips, too few frames for the clusters, a missing encoder or layer, `out` holds something.
    """
    out = Path(out)
    check_free(out)  # before the work, not after it
    feature = make_feature(target, encoder, device)
    codebook = fit_codebook(target, feature, train, seed=seed)
    info: dict[str, Any] = {"target": asdict(target), "teacher": teacher_digest, "seed": seed, "unreadable": []}
    labeller = _Labeller(codebook.to(device if target.kind == "layer" else "cpu"))
    with LabelWriter(out, _targets(codebook, feature.rate), info) as writer:
        codebook.save(writer.folder / "codebook.safetensors")
        total = sum(len(clips.ids) for clips in (train, *other_splits))
        with progress_bar(f"labels from {feature.name}", total) as advance:
            explained: list[float] = []
            for clips in (train, *other_splits):
                _label(clips, feature, labeller, writer, advance)
                explained = explained or labeller.explained()  # of the training clips
        writer.info["diagnostics"] = diagnose(writer.so_far(), train, explained=explained, seed=seed)
    return LabelSet.open(out)


def _label(clips: Any, feature: Feature, labeller: _Labeller, writer: LabelWriter, advance: Advance) -> None:
    """Label every clip of a split; one that cannot be decoded gets no labels and is named in the set's info."""
    for index, sample_id in enumerate(clips.ids.tolist()):
        waveform = readable(clips, index)
        if waveform is None:
            writer.info["unreadable"].append(sample_id)
            writer.add(sample_id, np.empty((0, len(writer.targets)), dtype=np.int32))
        else:
            writer.add(sample_id, labeller(feature(waveform)).cpu().numpy())
        advance(1)


def _targets(codebook: Codebook, rate: float) -> tuple[Target, ...]:
    digest, out = codebook.digest, []
    for name, part in codebook.parts.items():
        for s, stage in enumerate(part.stages, start=1):
            suffix = f" stage {s}" if len(part.stages) > 1 else ""
            out.append(Target(f"{name}{suffix}", len(stage.centroids), rate, digest))
    return tuple(out)
