"""Losses: plain functions that give one value per token, and explicit reductions."""

from unmask.core.losses.regression import l1, l2, mean_term, regression, smooth_l1

__all__ = ["l1", "l2", "mean_term", "regression", "smooth_l1"]
