"""Which samples are for training, for choosing and for reporting: fixed by the data alone, before any run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Int, Int8
from torch import Tensor

from unmask.core.randomness import Key

TRAIN, VAL, TEST, DROPPED = 0, 1, 2, 3
SPLITS = {"train": TRAIN, "val": VAL, "test": TEST}
_NAMES = {"train": TRAIN, "val": VAL, "valid": VAL, "validation": VAL, "dev": VAL, "test": TEST}
_SPLIT_SEED = 20_260_101  # ours, and never a run's seed: every run sees the same splits


def split_of(name: str) -> int | None:
    """The split that a folder or file name such as ``train`` or ``validation`` means, if any."""
    return _NAMES.get(name.lower())


def assign(
    ids: Int[Tensor, "n"],
    labels: Int[Tensor, "n"] | None,
    given: Sequence[int | None] | None,
    val_share: float,
    test_share: float,
    groups: Int[Tensor, "n"] | None = None,
) -> Int8[Tensor, "n"]:
    """Split codes: those that are given stay, and a missing val or test is taken out of train, class by class.

    Which samples are taken follows from their ids, so it is the same on every machine and for every run's seed. Of a
    class of n training samples, round(n * share) go to each missing split, and at least one stays.

    With `groups` (the stable id of each sample's speaker, for example) whole groups are moved, not single samples, and
    `labels` are not looked at: in an order that follows from the groups' ids, each group that still fits into the
    share; where none fits, the smallest. One group at least stays for training.
    """
    codes = torch.tensor([TRAIN if code is None else code for code in given or [None] * len(ids)], dtype=torch.int8)
    missing = [s for s in ((TEST, test_share), (VAL, val_share)) if not (codes == s[0]).any()]
    if groups is not None:
        return _assign_groups(codes, groups, missing)
    # Sorted by class and, within it, by rank; a class's first samples are taken. All classes at once: there may be
    # thousands.
    members = (codes == TRAIN).nonzero()[:, 0]
    members = members[_rank(ids)[members].argsort(stable=True)]
    strata = torch.zeros_like(members) if labels is None else labels[members]
    order = strata.argsort(stable=True)
    members, sizes = members[order], strata[order].unique_consecutive(return_counts=True)[1]
    place = torch.arange(len(members)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    start = torch.zeros_like(sizes)
    for code, share in missing:
        stop = torch.minimum(start + (sizes.double() * share).round().long(), sizes - 1)
        taken = (place >= start.repeat_interleave(sizes)) & (place < stop.repeat_interleave(sizes))
        codes[members[taken]] = code
        start = stop
    return codes


def _rank(ids: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
    return Key.of(_SPLIT_SEED, ids).stream("split").bits(1)[:, 0]


def _assign_groups(
    codes: Int8[Tensor, "n"], groups: Int[Tensor, "n"], missing: list[tuple[int, float]]
) -> Int8[Tensor, "n"]:
    free, sizes = groups[codes == TRAIN].unique(return_counts=True)
    order = _rank(free).argsort()
    left = dict(zip(free[order].tolist(), sizes[order].tolist(), strict=True))
    total = sum(left.values())
    for code, share in missing:
        if share == 0:
            continue
        taken: set[int] = set()
        room = round(total * share)
        for group, size in left.items():
            if size <= room and len(taken) < len(left) - 1:
                taken.add(group)
                room -= size
        if not taken and len(left) > 1:
            taken = {min(left, key=lambda group: left[group])}
        codes[torch.isin(groups, torch.tensor(list(taken), dtype=groups.dtype)) & (codes == TRAIN)] = code
        left = {group: size for group, size in left.items() if group not in taken}
    return codes


def drop_duplicates(items: Iterable[np.ndarray], codes: Int8[Tensor, "n"]) -> tuple[Int8[Tensor, "n"], int]:
    """Mark what would leak: training samples equal to a val or test sample, and val samples equal to a test sample.

    Args:
        items: one array per sample.
        codes: their splits.

    Returns:
        The new codes, and how many samples were dropped. Duplicates within one split stay.
    """
    digests = [hashlib.blake2b(item.tobytes(), digest_size=16).digest() for item in items]
    codes, dropped = codes.clone(), 0
    seen: set[bytes] = set()
    for code in (TEST, VAL, TRAIN):
        members = (codes == code).nonzero()[:, 0].tolist()
        leaks = [i for i in members if digests[i] in seen]
        seen.update(digests[i] for i in members)
        codes[leaks] = DROPPED
        dropped += len(leaks)
    return codes, dropped
