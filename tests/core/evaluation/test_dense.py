"""Probes of single positions: scores against scikit-learn's, and what a fitted classifier can answer."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import accuracy_score, jaccard_score

from unmask.core.evaluation.dense import Positions, confusion_matrix, fit_classifier, scores
from unmask.core.evaluation.linear import LinearProbe


def test_scores_are_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    true = torch.randint(0, 4, (400,), generator=generator)
    answered = torch.where(torch.rand(400, generator=generator) < 0.6, true, torch.randint(0, 6, (400,)))
    found = scores(confusion_matrix(true, answered, 6), list("abcdef"))
    each = jaccard_score(true, answered, labels=[0, 1, 2, 3], average=None)
    assert list(found["iou"]) == list("abcd") and list(found["iou"].values()) == pytest.approx(each.tolist())
    assert found["mean_iou"] == pytest.approx(each.mean())
    assert found["accuracy"] == pytest.approx(accuracy_score(true, answered))


def test_classes_that_training_never_shows_are_never_answered() -> None:
    x, y = torch.randn(60, 3), torch.tensor([4, 9]).repeat(30)
    x[:, 0] = y
    fitted = fit_classifier(x, y, x, y, LinearProbe())
    assert fitted.weight.shape == (2, 4) and fitted(x).equal(y) and fitted.val_accuracy == 1


def test_the_smallest_ranks_of_each_class_are_kept_whatever_the_parts() -> None:
    y, rank = torch.randint(0, 3, (90,)), torch.randperm(90)
    whole = Positions(y, rank, {"a": rank[:, None].float()})
    parts = [Positions(y[i::4], rank[i::4], {"a": rank[i::4, None].float()}).smallest(5) for i in range(4)]
    kept, again = whole.smallest(5), (parts[3] + parts[1] + parts[0] + parts[2]).smallest(5)
    assert kept.y.tolist() == again.y.tolist() and kept.rank.tolist() == again.rank.tolist()
    for label in range(3):
        assert kept.rank[kept.y == label].tolist() == sorted(rank[y == label].tolist())[:5]
    assert torch.equal(kept.x["a"][:, 0], kept.rank.float())
