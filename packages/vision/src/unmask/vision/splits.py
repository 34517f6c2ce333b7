"""Which images are for training, for choosing and for reporting: fixed by the data alone, before any run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int, Int8, UInt8
from torch import Tensor

from unmask.core.randomness import Key

TRAIN, VAL, TEST, DROPPED = 0, 1, 2, 3
SPLITS = {"train": TRAIN, "val": VAL, "test": TEST}
_NAMES = {"train": TRAIN, "val": VAL, "valid": VAL, "validation": VAL, "test": TEST}
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
) -> Int8[Tensor, "n"]:
    """Split codes: those that are given stay, and a missing val or test is taken out of train, class by class.

    Which samples are taken follows from their ids, so it is the same on every machine and for every run's seed. Of a
    class of n training samples, round(n * share) go to each missing split, and at least one stays.
    """
    codes = torch.tensor([TRAIN if code is None else code for code in given or [None] * len(ids)], dtype=torch.int8)
    missing = [s for s in ((TEST, test_share), (VAL, val_share)) if not (codes == s[0]).any()]
    rank = Key.of(_SPLIT_SEED, ids).stream("split").bits(1)[:, 0]
    groups = torch.zeros_like(ids) if labels is None else labels
    for group in groups.unique():
        members = ((groups == group) & (codes == TRAIN)).nonzero()[:, 0]
        members = members[rank[members].argsort()]
        start = 0
        for code, share in missing:
            stop = min(start + round(len(members) * share), max(len(members) - 1, 0))
            codes[members[start:stop]] = code
            start = stop
    return codes


def drop_duplicates(images: UInt8[np.ndarray, "n c h w"], codes: Int8[Tensor, "n"]) -> tuple[Int8[Tensor, "n"], int]:
    """Mark what would leak: training images equal to a val or test image, and val images equal to a test image.

    Returns:
        The new codes, and how many images were dropped. Duplicates within one split stay.
    """
    digests = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images]
    codes, dropped = codes.clone(), 0
    seen: set[bytes] = set()
    for code in (TEST, VAL, TRAIN):
        members = (codes == code).nonzero()[:, 0].tolist()
        leaks = [i for i in members if digests[i] in seen]
        seen.update(digests[i] for i in members)
        codes[leaks] = DROPPED
        dropped += len(leaks)
    return codes, dropped
