"""Frozen features of a data set, and stratified subsets of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unmask.core.errors import UnmaskError
from unmask.core.method import to_device
from unmask.core.progress import Advance
from unmask.core.randomness import Key
from unmask.core.training.position import batches


@dataclass(frozen=True)
class FeatureSplit:
    """One vector per sample of a split.

    Args:
        x: the vectors.
        ids: the samples' stable ids.
        y: class indices, or None.
    """

    x: Float[Tensor, "n dim"]
    ids: Int[Tensor, "n"]
    y: Int[Tensor, "n"] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def labels(self) -> Int[Tensor, "n"]:
        """The class indices, where there have to be some."""
        assert self.y is not None, "these features have no labels"
        return self.y

    def take(self, index: Int[Tensor, "m"]) -> FeatureSplit:
        """The samples at `index`."""
        return FeatureSplit(self.x[index], self.ids[index], None if self.y is None else self.y[index])


@dataclass(frozen=True)
class Splits:
    """The features to fit on, to choose on and to report on."""

    train: FeatureSplit
    val: FeatureSplit
    test: FeatureSplit


def epoch_batches(dataset: Any, collate: Any, batch_size: int, workers: int = 0) -> Iterator[tuple[Any, list[int]]]:
    """Every sample once, in order, as (batch, indices). The dataset takes (index, visit)."""
    chunks = [list(range(i, min(i + batch_size, len(dataset)))) for i in range(0, len(dataset), batch_size)]
    sampler = [[(index, 0) for index in chunk] for chunk in chunks]
    yield from zip(batches(dataset, sampler, collate, workers, pin=False), chunks, strict=True)


def stand_ins(batch: Any, dataset: Any, chunk: list[int]) -> Tensor | None:
    """Rows of a batch that stand in for a sample that could not be read (True), or None where there are none."""
    wrong = batch.ids.cpu() != dataset.ids[torch.tensor(chunk)]
    return wrong if bool(wrong.any()) else None


@torch.no_grad()
def extract(
    encode: Callable[[Any], Float[Tensor, "batch dim"]],
    dataset: Any,
    collate: Any,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    workers: int = 0,
    advance: Advance | None = None,
) -> FeatureSplit:
    """The features of every sample of a dataset, in order, in fp32; a sample that cannot be read is left out.

    Args:
        encode: a batch on `device` to one vector per sample.
        dataset: map-style, taking (index, visit); has ``ids``.
        collate: samples to a batch with ``ids`` and perhaps ``labels``.
        batch_size: samples per forward pass.
        device: where to compute; features stay there.
        workers: data loading processes.
        advance: told after each batch how many samples are done.
    """
    x, ids, y = [], [], []
    for batch, chunk in epoch_batches(dataset, collate, batch_size, workers):
        moved = to_device(batch, device)
        wrong = stand_ins(batch, dataset, chunk)
        keep = slice(None) if wrong is None else (~wrong).to(device)
        x.append(encode(moved)[keep].float())
        ids.append(moved.ids[keep])
        labels = getattr(moved, "labels", None)
        if labels is not None:
            y.append(labels[keep])
        if advance is not None:
            advance(len(chunk))
    return FeatureSplit(torch.cat(x), torch.cat(ids), torch.cat(y) if y else None)


def keyed_subset(
    ids: Int[Tensor, "n"], labels: Int[Tensor, "n"], share: float, seed: int, stream: str = "few labels"
) -> Int[Tensor, "m"]:
    """Indices of a stratified share of the samples: max(1, round(share * n)) of each class of n, in their old order.

    Who is chosen depends on (seed, sample id) alone, and a smaller share is part of a larger one.

    Args:
        ids: stable sample ids.
        labels: class indices.
        share: in (0, 1].
        seed: of the choice.
        stream: an independent choice for each name.

    Raises:
        UnmaskError: such a share cannot be.
    """
    if not 0 < share <= 1:
        raise UnmaskError(f"a share of {share:g} of the labels; expected more than 0 and at most 1 (0.1 is 10 %)")
    ids, labels = ids.cpu(), labels.cpu()
    rank = Key.of(seed, ids).stream(stream).bits(1)[:, 0]
    chosen = []
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        wanted = max(1, round(share * len(members)))
        chosen.append(members[rank[members].argsort()[:wanted]])
    return torch.cat(chosen).sort().values


def pick_device(device: str) -> torch.device:
    """``auto`` is a CUDA GPU where there is one, else the CPU.

    Raises:
        UnmaskError: the device asked for is not here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise UnmaskError(f"--device {device} cannot be used here ({reason}); choose cpu or auto") from None
