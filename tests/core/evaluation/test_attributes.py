"""Labels of which any may be unknown: which become tasks, on which splits, and what a probe of layers finds."""

from __future__ import annotations

import pytest
import torch

from unmask.core.evaluation.attributes import Task, make_task, probe


def test_classes_that_a_split_lacks_are_left_out_and_named() -> None:
    y = torch.tensor([0, 1, 2, 0, 1, 0, 1, 2, -1])
    split = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 0])
    task = make_task(y, split, torch.arange(9), ["a", "b", "c"])
    assert isinstance(task, Task)
    assert task.left_out == ["c"] and task.classes == 2
    assert {name: rows.tolist() for name, rows in task.rows.items()} == {"train": [0, 1], "val": [3, 4], "test": [5, 6]}
    assert task.y["test"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("y", "reason"),
    [
        ([-1] * 6, "no sample has it"),
        ([2] * 6, "one class only"),
        ([0, 0, 1, 1, 2, 2], "fewer than two of its classes"),
    ],
)
def test_labels_that_cannot_be_probed_say_why(y: list[int], reason: str) -> None:
    split = torch.tensor([0, 0, 1, 1, 2, 2])
    found = make_task(torch.tensor(y), split, torch.arange(6), ["a", "b", "c"])
    assert isinstance(found, str) and reason in found


def test_classes_that_splits_keep_apart_get_splits_of_the_training_samples() -> None:
    y = torch.arange(60) % 3
    split = torch.where(torch.arange(60) < 40, 0, torch.where(torch.arange(60) < 50, 1, 2))
    y = torch.where(split == 1, 3, torch.where(split == 2, 4, y))
    ids, names = torch.arange(60) + 100, list("abcde")
    assert isinstance(make_task(y, split, ids, names), str)
    task = make_task(y, split, ids, names, own=True)
    assert isinstance(task, Task) and task.own_splits and task.left_out == ["d", "e"]
    everyone = torch.cat([task.rows[s] for s in ("train", "val", "test")])
    assert sorted(everyone.tolist()) == list(range(40))
    assert all(set(task.y[s].tolist()) == {0, 1, 2} for s in task.y)
    again = make_task(y, split, ids, names, own=True)
    assert isinstance(again, Task) and again.rows["test"].equal(task.rows["test"])


def test_a_probe_finds_the_layer_that_knows() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(150) % 3
    x = torch.randn(150, 2, 5, generator=generator)
    x[:, 0] = torch.eye(5)[y] + 0.2 * x[:, 0]
    split = torch.arange(150) // 3 % 3
    task = make_task(y, split, torch.arange(150), list("abc"))
    assert isinstance(task, Task)
    found = probe(x.flatten(1), 2, torch.arange(150), task)
    assert found["weighted"] > 0.95 and found["linear"] < 0.6
    assert found["layer_weights"][0] > 0.7
