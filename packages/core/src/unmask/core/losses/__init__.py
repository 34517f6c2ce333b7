"""Losses: plain functions that give one value per token, and explicit reductions."""

from unmask.core.losses.preference import Scores, TokenTerms, dpo, response_sums, sparse_preference, tdpo1, token_terms
from unmask.core.losses.regression import l1, l2, mean_term, regression, smooth_l1
from unmask.core.losses.vocabulary import linear_cross_entropy

__all__ = [
    "Scores", "TokenTerms", "dpo", "l1", "l2", "linear_cross_entropy", "mean_term", "regression", "response_sums",
    "smooth_l1", "sparse_preference", "tdpo1", "token_terms",
]  # fmt: skip
