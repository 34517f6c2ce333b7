"""A curriculum of the vocabulary: what is too hard yet reads as the unknown token (CLIMB, arXiv 2311.08886)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from unmask.core.training.pacing import Pacing
from unmask.language.data.vocabulary import Vocabulary
from unmask.language.data.word_classes import UNKNOWN

Rule = Literal["token_ids", "pos_tags", "both"]


@dataclass(frozen=True)
class VocabularyCurriculum:
    """Which tokens are still the unknown one, in inputs and labels; f is the open share.

    Args:
        rule: ids above f times the vocabulary (``token_ids``; a low id is a frequent token), word classes above f times
            11 (``pos_tags``), or ids within word classes (``both``).
        pacing: f.
    """

    rule: Rule = "token_ids"
    pacing: Pacing = Pacing()

    def limit(self, progress: float, size: int) -> int:
        """What is harder than this is unknown while this share of the run is done.

        Args:
            progress: share of the run that is done, in [0, 1].
            size: of the vocabulary.
        """
        whole = {"token_ids": size, "pos_tags": UNKNOWN, "both": UNKNOWN * size}[self.rule]
        return int(self.pacing(progress) * whole)

    def apply(
        self,
        ids: Int[Tensor, "batch length"],
        tags: Int[Tensor, "batch length"],
        limit: Int[Tensor, "batch 1"],
        vocabulary: Vocabulary,
    ) -> Int[Tensor, "batch length"]:
        """Ids with the unknown one in the place of those that are harder than `limit`.

        Args:
            ids: special and negative ones stay.
            tags: the word class of each (`unmask.language.data.word_classes.CLASSES`).
            limit: from `limit`.
            vocabulary: with an unknown token.
        """
        hard = {"token_ids": ids, "pos_tags": tags, "both": ids + tags * vocabulary.size}[self.rule] > limit
        hard &= (ids >= 0) & ~torch.isin(ids, torch.tensor(vocabulary.special, device=ids.device))
        assert vocabulary.unknown is not None
        return torch.where(hard, vocabulary.unknown, ids)
