"""Losses: plain functions that give one value per token, and explicit reductions."""

from unmask.core.losses.regression import l1, l2, mean_term, regression, smooth_l1
from unmask.core.losses.vocabulary import linear_cross_entropy

__all__ = ["l1", "l2", "linear_cross_entropy", "mean_term", "regression", "smooth_l1"]
