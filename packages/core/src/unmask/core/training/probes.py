"""Online probes of a run: its features with labels, gathered from all ranks, for `unmask.core.evaluation.online`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unmask.core.errors import UnmaskError
from unmask.core.evaluation.features import FeatureSplit
from unmask.core.evaluation.online import TRAIN, VAL, keyed_choice, online_probes
from unmask.core.method import to_device
from unmask.core.training.gradients import evaluating

Batches = Callable[[Any, Int[Tensor, "n"]], Iterator[Any]]


class OnlineProbes:
    """k-NN and linear probes on bounded subsets, which seed and ids decide.

    Every rank encodes its share, in eval mode and under the run's autocast; all features are gathered, rank zero fits,
    and the others hear its numbers.

    Args:
        fabric: Lightning Fabric, launched.
        method: what is trained.
        train_set: samples to fit on, better without augmentation. Its ``labels`` are class indices, -1 where unknown,
            or several of them by name.
        val_set: samples to score on; likewise.
        seed: the run's.

    Raises:
        UnmaskError: there is no label to probe.
    """

    def __init__(self, fabric: Any, method: Any, train_set: Any, val_set: Any | None, seed: int) -> None:
        self.fabric, self.method, self.seed = fabric, method, seed
        self.sets: tuple[Any, Any] = (train_set, val_set)
        self.names = [] if val_set is None else _shared(_labels(train_set), _labels(val_set))
        if not self.names:
            raise UnmaskError(
                "training.probe_every_epochs: the data have no labels that training and validation samples share, so "
                "there is nothing to probe. Leave out --probe-every (training.probe_every_epochs=null), or train on "
                "labelled data"
            )
        self.index = [keyed_choice(s.ids, n, seed).sort().values for s, n in zip(self.sets, (TRAIN, VAL), strict=True)]

    def measure(self, batches: Batches) -> dict[str, float]:
        """``knn`` and ``linear`` accuracies in [0, 1]; with names of labels, ``knn_NAME`` and ``linear_NAME``.

        Args:
            batches: this rank's batches of the samples of a data set at some indices.
        """
        features = [self._encode(batches(*both)) for both in zip(self.sets, self.index, strict=True)]
        numbers: dict[str, float] = {}
        if self.fabric.is_global_zero:
            for name in self.names:
                train, val = (_labelled(f, s, name) for f, s in zip(features, self.sets, strict=True))
                found = online_probes(train, val, self.seed)
                numbers |= {f"{kind}_{name}" if name else kind: value for kind, value in found.items()}
        return self.fabric.broadcast(numbers)

    def _encode(self, batches: Iterator[Any]) -> FeatureSplit:
        """One vector per sample, of all ranks, in fp32."""
        x, ids = [], []
        with evaluating(self.method):
            for batch in batches:
                moved = to_device(batch, self.fabric.device)
                with self.fabric.autocast():
                    x.append(self.method.encode(moved).pooled.float())
                ids.append(moved.ids)
        return FeatureSplit(gathered(self.fabric, torch.cat(x)), gathered(self.fabric, torch.cat(ids)))


def gathered(fabric: Any, rows: Float[Tensor, "n *rest"] | Int[Tensor, "n *rest"]) -> Tensor:
    """The rows of all ranks, rank after rank, however many each has."""
    if fabric.world_size == 1:
        return rows
    counts = fabric.all_gather(torch.tensor(len(rows), device=rows.device)).tolist()
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    return torch.cat([part[:count] for part, count in zip(fabric.all_gather(padded), counts, strict=True)])


def _labels(dataset: Any) -> dict[str, Int[Tensor, "n"]]:
    """The data set's labels by name; the name is empty where it has labels of one kind."""
    labels = getattr(dataset, "labels", None)
    if labels is None:
        return {}
    return dict(labels) if isinstance(labels, Mapping) else {"": labels}


def _shared(train: dict[str, Tensor], val: dict[str, Tensor]) -> list[str]:
    """Labels of several classes in training, of which validation has some: splits by speaker share no speaker."""
    known = {name: labels[labels >= 0].unique() for name, labels in train.items()}
    return [name for name, k in known.items() if len(k) > 1 and name in val and bool(torch.isin(val[name], k).any())]


def _labelled(features: FeatureSplit, dataset: Any, name: str) -> FeatureSplit:
    """The features with their samples' labels, found by id: a sample that stands in for a damaged one has its own."""
    ids, order = dataset.ids.sort()
    labels = _labels(dataset)[name][order[torch.searchsorted(ids, features.ids.cpu())]].to(features.x.device)
    return FeatureSplit(features.x, features.ids, labels).take((labels >= 0).nonzero()[:, 0])
