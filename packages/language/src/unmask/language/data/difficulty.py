"""How hard a block of text is, for curricula over the data: by its source, or by a unigram model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmask.core.data.kinds import SourceError

# The sources of BabyLM (2023) from easy to hard, as CLIMB orders them (arXiv 2311.08886).
SPOKEN_FIRST = {
    "aochildes": 1, "bnc_spoken": 2, "switchboard": 2, "open_subtitles": 3, "qed": 3, "cbt": 4, "children_stories": 4,
    "simple_wikipedia": 5, "wikipedia": 6, "gutenberg": 6,
}  # fmt: skip
GRAMMATICAL_FIRST = {
    "cbt": 1, "children_stories": 1, "simple_wikipedia": 2, "wikipedia": 3, "gutenberg": 3, "open_subtitles": 4,
    "bnc_spoken": 5, "switchboard": 5, "qed": 6, "aochildes": 6,
}  # fmt: skip
ORDERS: dict[str, Mapping[str, float | int]] = {"spoken_first": SPOKEN_FIRST, "grammatical_first": GRAMMATICAL_FIRST}


def source_scores(
    sources: Int[Tensor, "blocks"], names: Sequence[str], levels: Mapping[str, float | int]
) -> Float[Tensor, "blocks"]:
    """The level of the file that each block begins in.

    Args:
        sources: the file of each block, as an index of `names`.
        names: file names without suffix.
        levels: of each file; higher is harder.

    Raises:
        SourceError: a file has no level.
    """
    missing = sorted({names[i] for i in sources.unique().tolist()} - set(levels))
    if missing:
        raise SourceError(
            f"data.curriculum.scores: no level for {', '.join(missing[:5])}. Give one for every file, by its name "
            "without suffix (scores: {novel: 2, dialogue: 1}), or take scores: unigram"
        )
    of_file = torch.tensor([float(levels.get(name, 0.0)) for name in names])
    return of_file[sources]


def unigram_perplexities(blocks: Sequence[np.ndarray], size: int) -> Float[Tensor, "blocks"]:
    """exp of the mean of -log p over each block's tokens, p the tokens' frequencies in all blocks together.

    Args:
        blocks: ids, any sequence of arrays: it is gone through twice.
        size: of the vocabulary.
    """
    counts = np.zeros(size, np.int64)
    for block in blocks:
        counts += np.bincount(block, minlength=size)
    logs = np.log(np.maximum(counts, 1) / counts.sum())
    return torch.tensor([np.exp(-logs[block].mean()) for block in blocks], dtype=torch.float32)


def easiest(scores: Float[Tensor, "samples"], share: float) -> Bool[Tensor, "samples"]:
    """True for the samples whose score is not above the `share` quantile (linear interpolation; ties are in)."""
    return scores <= cut(scores, share)


def cut(scores: Float[Tensor, "samples"], share: float) -> float:
    """The `share` quantile of the scores, with linear interpolation, in double precision."""
    return float(np.quantile(scores.double().numpy(), share))
