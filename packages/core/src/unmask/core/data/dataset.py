"""One split of a source as a data set: damaged samples are skipped and named."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from unmask.core.data.kinds import CorruptSampleError, Kind, SourceError
from unmask.core.data.sources import Source, left_note
from unmask.core.errors import Problem, UnmaskError

Sample = TypeVar("Sample")
T = TypeVar("T")


class SplitDataset(Dataset[Sample], Generic[Sample]):
    """The base of every domain's data set, which adds ``__getitem__((index, visit))``.

    It reads samples with `first_good`: one that turns out to be damaged is replaced by the next good one of the split,
    the same in every worker and run, and then shows in `problems`.

    Args:
        source: where the samples are.
        members: which of them belong to the split.
        settings: the domain's; ``source`` and ``corrupt`` are used here.
        seed: of the augmentation.
        augment: whether random choices are made.
    """

    kind: ClassVar[Kind]
    settings: Any
    labels: Any  # class indices of the samples, or None; a domain with several kinds of labels has its own
    classes: Any

    def __init__(
        self, source: Source, members: Int[Tensor, "n"], settings: Any, *, seed: int = 0, augment: bool = False
    ) -> None:
        self.settings, self.seed, self.augment = settings, seed, augment
        self._source, self._members = source, members
        self.ids: Int[Tensor, "n"] = source.ids[members]
        self.labels = None if source.labels is None else source.labels[members]
        self.classes = source.classes
        # Shared memory, so that the main process learns what its workers found.
        self._damaged = torch.zeros(len(members), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self._members)

    def view(self, rows: Int[Tensor, "m"] | slice = slice(None), *, seed: int = 0, augment: bool = False) -> Any:
        """Some samples of this split, with or without augmentation; the source is not opened again."""
        return type(self)(self._source, self._members[rows], self.settings, seed=seed, augment=augment)

    def read_plain(self, index: int) -> Any:
        """The sample at `index` without any random choice; a domain that refuses more than its reader overrides this.

        Raises:
            CorruptSampleError: it cannot be used.
        """
        return self._source.read(int(self._members[index]))

    def first_good(self, index: int, read: Callable[[int], T]) -> T:
        """What `read` makes of the sample at `index`, or of the next one that it can be made of.

        Args:
            index: the wanted sample.
            read: given an index; raises `CorruptSampleError` where that sample cannot be used.

        Raises:
            UnmaskError: it cannot, and ``data.corrupt`` is ``fatal``.
            SourceError: none of the split can.
        """
        for step in range(len(self)):
            at = (index + step) % len(self)
            if self._damaged[at] and self._always_damaged(at):
                continue
            try:
                return read(at)
            except CorruptSampleError as error:
                if self.settings.corrupt == "fatal":
                    raise UnmaskError(
                        f"{self._name(at)}: {error.reason}. Remove or replace it, or set data.corrupt=skip."
                    ) from error
                self._damaged[at] = True
        first = f"{self._name(0)}: {self._reason(0)}"
        raise SourceError(
            f"{self.settings.source}: none of the {len(self)} {self.kind.plural} of this split can be used ({first})"
        )

    def _always_damaged(self, index: int) -> bool:
        """Whether a sample that was damaged once always is: not where each visit reads another part of it."""
        return True

    @property
    def problems(self) -> list[Problem]:
        """Samples that are left out: found on opening the source (any split), or when reading (this split)."""
        damaged = self._damaged.nonzero()[:, 0].tolist()
        return [*self._source.problems, *(Problem(self._name(at), self._reason(at)) for at in damaged)]

    def _reason(self, index: int) -> str:
        """What is wrong with a damaged sample: a worker can only pass on that something is."""
        try:
            self.read_plain(index)
        except CorruptSampleError as error:
            return error.reason
        return "could not be read at first"

    def notes(self, batch_size: int) -> list[str]:
        """What to say before training on this split."""
        return left_note(self._source, self.kind)

    def name_of(self, sample_id: int) -> str:
        """The name of a sample of this split: its path, shard key, or ``set:name``."""
        return self._names[sample_id]

    def _name(self, index: int) -> str:
        return self._source.names[int(self._members[index])]

    @cached_property
    def _names(self) -> dict[int, str]:
        return {sample_id: self._name(index) for index, sample_id in enumerate(self.ids.tolist())}
