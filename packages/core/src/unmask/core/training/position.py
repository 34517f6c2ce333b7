"""Where a run is in its data: the batches of every step, as a function of the seed and the step alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.utils.data import DataLoader

from unmask.core.errors import UnmaskError
from unmask.core.method import Clock, map_tensors
from unmask.core.randomness import epoch_order

Collate = Callable[[Sequence[Any]], Any]
_BUCKET = 50  # batches: long enough for batches of like lengths, short enough that an epoch stays well mixed
_BUCKET_STREAM = 0x6275636B
_CURRICULUM_STREAM = 0x63757272


@dataclass(frozen=True)
class Position:
    """The order of samples over a whole run, and one rank's share of it.

    A step takes the next `batch_size` samples of its epoch's order, cut into micro-batches that go round the ranks.
    The last, incomplete batch of an epoch is dropped. Where samples have lengths, those of a batch are alike: every run
    of `_BUCKET` batches of the random order is sorted by length, and the batches are put into a random order again.

    A curriculum has no such order. Every step draws its batch anew from the samples that are admitted by then, all with
    the same probability and none twice; `steps_per_epoch` still says when an epoch's worth of samples was seen.

    Iterating gives, from `start` on, one list of (index, visit) per micro-batch: the batch sampler of a DataLoader.

    Args:
        seed: decides the order.
        samples: size of the training split.
        batch_size: samples per step over all ranks.
        micro_batch: samples per rank and forward pass; `batch_size` is a multiple of it times `world`.
        total: steps of the run.
        start: steps already done.
        rank: this process.
        world: processes.
        lengths: of the samples, in any unit; None where all are alike. A curriculum takes no notice of them.
        admitted: a curriculum: from the share of the run that is done to which samples may be drawn; None admits all.
    """

    seed: int
    samples: int
    batch_size: int
    micro_batch: int
    total: int
    start: int = 0
    rank: int = 0
    world: int = 1
    lengths: Int[Tensor, "samples"] | None = None
    admitted: Callable[[float], Bool[Tensor, "samples"]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass."""
        return self.samples // self.batch_size

    @property
    def micro_batches(self) -> int:
        """Forward passes per step on each rank."""
        return self.batch_size // (self.micro_batch * self.world)

    def epoch(self, step: int) -> int:
        """The epoch that a step belongs to."""
        return step // self.steps_per_epoch

    def visit(self, step: int) -> int:
        """What tells visits of a sample apart: the epoch; the step in a curriculum, where it may come back sooner."""
        return self.epoch(step) if self.admitted is None else step

    def clock(self, step: int) -> Clock:
        """The clock before a step; at `total`, that of the end of the run."""
        epochs = -(-self.total // self.steps_per_epoch)
        return Clock(step, self.total, self.epoch(step) if step < self.total else epochs, epochs)

    def __len__(self) -> int:
        return (self.total - self.start) * self.micro_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order: list[int] = []
        for step in range(self.start, self.total):
            if not order or self.admitted is not None or step % self.steps_per_epoch == 0:
                order = self._order(step).tolist()
            for micro in range(self.micro_batches):
                yield [(index, self.visit(step)) for index in order[self._slice(step, micro, self.rank)]]

    def indices(self, step: int, micro: int, rank: int | None = None) -> list[int]:
        """The dataset's indices in one micro-batch: what a message about it names."""
        return self._order(step)[self._slice(step, micro, self.rank if rank is None else rank)].tolist()

    def _order(self, step: int) -> Int[Tensor, "some"]:
        """What a step's micro-batches are cut from: the order of its epoch, or with a curriculum one batch."""
        if self.admitted is not None:
            return self._draw(step, self.admitted(step / self.total))
        epoch = self.epoch(step)
        order = epoch_order(self.seed, epoch, self.samples)
        if self.lengths is None:
            return order
        steps = self.steps_per_epoch
        runs = order[: steps * self.batch_size].split(_BUCKET * self.batch_size)  # what is dropped stays random
        alike = torch.cat([run[self.lengths[run].argsort(stable=True)] for run in runs])
        shuffled = epoch_order(self.seed ^ _BUCKET_STREAM, epoch, steps)
        return alike.view(steps, self.batch_size)[shuffled].flatten()

    def _draw(self, step: int, admitted: Bool[Tensor, "samples"]) -> Int[Tensor, "batch_size"]:
        order = epoch_order(self.seed ^ _CURRICULUM_STREAM, step, self.samples)
        chosen = order[admitted[order]][: self.batch_size]
        if len(chosen) < self.batch_size:
            raise UnmaskError(
                f"step {step}: the data's curriculum admits {len(chosen)} of {self.samples} samples, fewer than "
                f"training.batch_size={self.batch_size}. Let it begin with more, or lower training.batch_size"
            )
        return chosen

    def _slice(self, step: int, micro: int, rank: int) -> slice:
        first = 0 if self.admitted is not None else (step % self.steps_per_epoch) * self.batch_size
        begin = first + (micro * self.world + rank) * self.micro_batch
        return slice(begin, begin + self.micro_batch)


class Pinnable:
    """A batch that a DataLoader can pin, whatever the batch is made of."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def pin_memory(self) -> Pinnable:
        """The same batch in page-locked memory."""
        return Pinnable(map_tensors(self.batch, lambda tensor: tensor.pin_memory()))


@dataclass(frozen=True)
class _Collate:
    collate: Collate

    def __call__(self, samples: Sequence[Any]) -> Pinnable:
        return Pinnable(self.collate(samples))


def batches(dataset: Any, sampler: Any, collate: Collate, workers: int, pin: bool) -> Iterator[Any]:
    """Batches in the sampler's order. Draws nothing from torch's global generator."""
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=_Collate(collate),
        num_workers=workers,
        pin_memory=pin,
        generator=torch.Generator(),  # an iterator draws a base seed: from here, so that dropout does not see it
    )
    try:
        for item in loader:
            yield item.batch
    except (ConnectionError, EOFError, FileNotFoundError) as error:
        # Tensors come through a socket of the worker. When it is killed just then, this side meets the broken socket
        # before torch sees the death, and torch passes that on. An error of the worker's own comes as "Caught ...".
        if workers == 0 or str(error).startswith("Caught "):
            raise
        raise RuntimeError(f"a DataLoader worker was lost while it sent a batch: {error!r}") from error


@contextmanager
def loading_errors(remedy: str) -> Iterator[None]:
    """Say plainly what goes wrong in data workers.

    Their own errors arrive with a traceback as text; their death arrives as a signal, at any moment of the step.
    """
    try:
        yield
    except UnmaskError as error:
        if not str(error).startswith("Caught "):
            raise
        raise UnmaskError(str(error).rstrip().rpartition(f"{type(error).__name__}: ")[2]) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UnmaskError(
            "a data loading process died, most often for lack of memory: lower training.workers (--workers) and go on "
            f"with: {remedy} ({' '.join(str(error).split())})"
        ) from error


def validation_sampler(
    samples: int, batch: int, rank: int, world: int, lengths: Int[Tensor, "samples"] | None = None
) -> list[list[tuple[int, int]]]:
    """This rank's validation batches: every sample once over all ranks, always at visit 0, sorted by length if any.

    No rank goes without a batch as long as there are as many samples as ranks.
    """
    batch = max(1, min(batch, samples // world))
    order = list(range(samples)) if lengths is None else lengths.argsort(stable=True).tolist()
    starts = range(0, samples, batch)
    return [[(i, 0) for i in order[at : at + batch]] for at in starts[rank::world]]


def data_digest(dataset: Any) -> str:
    """A short hash of the samples' ids, in order: it tells a resumed run that its data is not the same."""
    return hashlib.blake2b(dataset.ids.contiguous().numpy().tobytes(), digest_size=8).hexdigest()
