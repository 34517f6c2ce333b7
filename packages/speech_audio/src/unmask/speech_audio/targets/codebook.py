"""A codebook file: the k-means of every part of a feature, in safetensors, with a digest."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unmask.core.training.files import write_atomically
from unmask.speech_audio.targets.clustering import ClusteringError, KMeans, ResidualKMeans


@dataclass(frozen=True)
class Codebook:
    """The quantiser of a feature's frames: for each part of its columns, one label stream per stage.

    Args:
        parts: by name, in the order of the feature's columns.
        average: mean and std of every column, where the parts' columns are standardised, averaged and quantised as
            one. None: each part is quantised on its own.
    """

    parts: dict[str, ResidualKMeans]
    average: tuple[Float[Tensor, "columns"], Float[Tensor, "columns"]] | None = None

    def split(self, frames: Float[Tensor, "frames columns"]) -> list[Float[Tensor, "frames dim"]]:
        """The frames that each part quantises."""
        if self.average is not None:
            return [averaged(frames, *self.average, dim=_width(self.parts))]
        return list(frames.split(_width(self.parts), dim=1))

    def assign(self, frames: Float[Tensor, "frames columns"]) -> Int[Tensor, "frames streams"]:
        """One label per part and stage, parts first.

        Raises:
            ClusteringError: the frames are of another feature.
        """
        pieces = self.split(frames)
        if len(pieces) != len(self.parts):
            raise ClusteringError(f"frames have {frames.shape[1]} columns; the codebook is of {', '.join(self.parts)}")
        return torch.cat([part.assign(piece) for part, piece in zip(self.parts.values(), pieces, strict=True)], dim=1)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by name."""
        out: dict[str, Tensor] = {}
        for p, part in enumerate(self.parts.values()):
            for s, stage in enumerate(part.stages):
                named = {"centroids": stage.centroids, "mean": stage.mean, "std": stage.std}
                out |= {f"{p}.{s}.{name}": value for name, value in named.items() if value is not None}
        if self.average is not None:
            out |= {"average.mean": self.average[0], "average.std": self.average[1]}
        return {name: value.detach().cpu().contiguous() for name, value in out.items()}

    @property
    def digest(self) -> str:
        """A hash of the parts' names and all tensors."""
        total = hashlib.blake2b(json.dumps(list(self.parts)).encode(), digest_size=16)
        for name, value in sorted(self.tensors().items()):
            total.update(f"{name} {tuple(value.shape)}".encode() + value.numpy().tobytes())
        return total.hexdigest()

    def to(self, device: torch.device | str) -> Codebook:
        """The same codebook on a device."""
        return self._from_tensors(list(self.parts), {name: t.to(device) for name, t in self.tensors().items()})

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; the names of the parts and the digest are in its header."""
        about = {"parts": json.dumps(list(self.parts)), "digest": self.digest}
        write_atomically(Path(path), lambda temporary: save_file(self.tensors(), temporary, about))

    @classmethod
    def load(cls, path: str | Path) -> Codebook:
        """Read what `save` wrote.

        Raises:
            ClusteringError: the file is missing, is not a codebook, or does not have the digest it was saved with.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a mapping)
            book = cls._from_tensors(json.loads(about["parts"]), tensors)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ClusteringError(f"codebook {path} cannot be read ({error}). Make the labels again") from None
        if book.digest != about.get("digest"):
            raise ClusteringError(f"codebook {path} is damaged: its digest is not the one it was saved with")
        return book

    @classmethod
    def _from_tensors(cls, names: list[str], tensors: dict[str, Tensor]) -> Codebook:
        parts = {}
        for p, name in enumerate(names):
            count = sum(key.startswith(f"{p}.") and key.endswith(".centroids") for key in tensors)
            keys = [(f"{p}.{s}.centroids", f"{p}.{s}.mean", f"{p}.{s}.std") for s in range(count)]
            stages = tuple(KMeans(tensors[c], tensors.get(mean), tensors.get(std)) for c, mean, std in keys)
            parts[name] = ResidualKMeans(stages)
        average = (tensors["average.mean"], tensors["average.std"]) if "average.mean" in tensors else None
        return cls(parts, average)


def _width(parts: dict[str, ResidualKMeans]) -> int:
    return next(iter(parts.values())).stages[0].centroids.shape[1]


def averaged(
    frames: Float[Tensor, "frames columns"],
    mean: Float[Tensor, "columns"],
    std: Float[Tensor, "columns"],
    dim: int,
) -> Float[Tensor, "frames dim"]:
    """The mean over groups of `dim` columns, each column standardised first, or else the largest group dominates."""
    return ((frames - mean) / std).unflatten(1, (-1, dim)).mean(1)
