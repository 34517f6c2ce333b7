"""Online k-NN and linear probes of a run: what they measure, and that they change nothing that is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from faults import metrics
from toy import ToyMethod, ToySet, run_toy, toy_recipe

from unmask.core.errors import UnmaskError
from unmask.core.evaluation.online import keyed_choice
from unmask.core.training import probes
from unmask.core.training.checkpoint import newest
from unmask.core.training.launch import make_fabric
from unmask.core.training.probes import OnlineProbes


class Labelled(ToySet):
    """The toy's five groups, as classes."""

    def __init__(self, n: int, first: int = 100, broken: int | None = None) -> None:
        super().__init__(n, first, broken)
        self.labels: Any = self.ids % 5


def train(out: Path, val: ToySet | None = None, **training: Any) -> Path:
    recipe = toy_recipe(**{"epochs": 4, "probe_every_epochs": 2} | training)
    return run_toy(out, recipe, train=Labelled(28), val=Labelled(20, 900) if val is None else val)


def probed(run: Path, *names: str) -> dict[int, list[float]]:
    return {line["step"]: [line[n] for n in names] for line in metrics(run) if names[0] in line}


def test_probes_are_curves_in_the_lines_of_validation(tmp_path: Path) -> None:
    found = probed(train(tmp_path / "run"), "knn", "linear", "val_loss")
    assert list(found) == [6, 12], "every second epoch of three steps"
    assert all(knn > 0.35 and linear > 0.6 for knn, linear, _ in found.values()), f"of five groups: {found}"


def test_probes_between_validations_and_at_the_end_have_lines_of_their_own(tmp_path: Path) -> None:
    run = train(tmp_path / "run", probe_every_epochs=3, validate_every_epochs=2)
    assert [(line["step"], "val_loss" in line, "knn" in line) for line in metrics(run) if "loss" not in line] == [
        (6, True, False), (9, False, True), (12, True, True)
    ]  # fmt: skip


def test_losses_are_bit_for_bit_those_of_a_run_without_probes(tmp_path: Path) -> None:
    runs = [train(tmp_path / str(every), probe_every_epochs=every) for every in (1, None)]
    with_probes, without = (
        [{k: v for k, v in line.items() if k not in ("knn", "linear", "time")} for line in metrics(run)] for run in runs
    )
    assert with_probes == without
    one, two = (newest(run / "checkpoints") for run in runs)
    assert one is not None and two is not None
    assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in two.tensors), "generators, too"


def test_a_resumed_run_measures_the_same(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", checkpoint_every_steps=5)
    (tmp_path / "whole/checkpoints/step-00000012.safetensors").unlink(missing_ok=True)
    for path in sorted((tmp_path / "whole/checkpoints").glob("*"))[1:]:
        path.unlink()
    before = probed(whole, "knn", "linear")
    run_toy(whole, toy_recipe(epochs=4, probe_every_epochs=2), train=Labelled(28), val=Labelled(20, 900), resume=True)
    assert probed(whole, "knn", "linear") == before


def test_without_labels_the_error_says_what_helps_and_that_helps(tmp_path: Path) -> None:
    for val in (ToySet(10, 900), Labelled(0)):
        with pytest.raises(UnmaskError, match=r"no labels that .* share.*Leave out --probe-every \(training\.probe_ev"):
            train(tmp_path / "run", val)
    assert not (tmp_path / "run").exists(), "nothing is left in the way of the corrected command"
    train(tmp_path / "run", ToySet(10, 900), probe_every_epochs=None)
    train(tmp_path / "labelled")


def fabric() -> Any:
    return make_fabric(toy_recipe(), ".", accelerator="cpu")


def measured(train: Any, val: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, float], list[Any]]:
    """The numbers, and the features that were given to the probes."""
    given: list[Any] = []

    def look(train: Any, val: Any, seed: int) -> dict[str, float]:
        given.append((train, val))
        return {"knn": 0.5}

    from toy import collate

    monkeypatch.setattr(probes, "online_probes", look)
    tool = OnlineProbes(fabric(), ToyMethod(), train, val, seed=3)
    numbers = tool.measure(lambda data, index: iter([collate([data[int(i), 0] for i in index])]))
    return numbers, given


def test_several_labels_have_curves_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speakers that validation does not share, a label that is always the same, and unknown ones are left out."""
    train, val = Labelled(28), Labelled(20, 900)
    alike = torch.zeros(28, dtype=torch.int64)
    train.labels = {"word": train.ids % 5, "speaker": train.ids, "corpus": alike, "mood": train.ids % 3 - 1}
    val.labels = {"word": val.ids % 5, "speaker": val.ids, "corpus": alike[:20], "mood": val.ids % 3 - 1}
    numbers, given = measured(train, val, monkeypatch)
    assert numbers == {"knn_word": 0.5, "knn_mood": 0.5}
    (words, _), (moods, val_moods) = given
    assert len(words) == 28 and torch.equal(words.labels, words.ids % 5)
    assert len(moods) == int((train.ids % 3 > 0).sum()) and set(val_moods.labels.tolist()) == {0, 1}


def test_subsets_are_bounded_and_a_stand_in_keeps_its_own_label(monkeypatch: pytest.MonkeyPatch) -> None:
    class Standing(Labelled):
        """Every third sample cannot be read, and the one before it stands in."""

        def __getitem__(self, item: tuple[int, int]) -> tuple[torch.Tensor, int]:
            return super().__getitem__((item[0] - (item[0] % 3 == 2), item[1]))

    monkeypatch.setattr(probes, "TRAIN", 12)
    monkeypatch.setattr(probes, "VAL", 7)
    _, ((train, val),) = measured(Standing(28), Standing(20, 900), monkeypatch)
    assert (len(train), len(val)) == (12, 7)
    for part in (train, val):
        assert torch.equal(part.labels, part.ids % 5)
    assert len(train.ids.unique()) < 12, "some stood in for others"


def test_who_is_chosen_depends_on_seed_and_ids_alone() -> None:
    ids = torch.arange(1000) * 7
    chosen = keyed_choice(ids, 100, seed=3)
    assert torch.equal(ids.flip(0)[keyed_choice(ids.flip(0), 100, seed=3)], ids[chosen])
    assert len(set(chosen.tolist()) & set(keyed_choice(ids, 100, seed=4).tolist())) < 30
    assert torch.equal(keyed_choice(ids, 10, seed=3), chosen[:10]) and len(keyed_choice(ids, 5000, seed=3)) == 1000


def test_rows_of_ranks_with_different_numbers_are_gathered_in_order() -> None:
    """Two ranks as threads of one: each sees what both gave."""
    ranks = [torch.arange(6.0).reshape(3, 2), torch.arange(6.0, 8.0).reshape(1, 2)]
    for mine in ranks:
        padded = [torch.cat([rows, torch.zeros(3 - len(rows), 2)]) for rows in ranks]

        def all_gather(x: torch.Tensor, mine: torch.Tensor = mine, padded: Any = padded) -> torch.Tensor:
            if x.dim() == 0:
                assert int(x) == len(mine)
                return torch.tensor([3, 1])
            assert torch.equal(x, torch.cat([mine, torch.zeros(3 - len(mine), 2)]))
            return torch.stack(padded)

        both = SimpleNamespace(world_size=2, all_gather=all_gather)
        assert torch.equal(probes.gathered(both, mine), torch.arange(8.0).reshape(4, 2))


def test_the_recipe_may_change_both_on_a_resume(tmp_path: Path) -> None:
    run = train(tmp_path / "run", epochs=2, probe_every_epochs=None)
    recipe = toy_recipe(epochs=3, probe_every_epochs=1, monitor=True)
    longer = replace(recipe, schedule=replace(recipe.schedule, epochs=3))
    run_toy(run, longer, train=Labelled(28), val=Labelled(20, 900), resume=True, extend=True)
    assert list(probed(run, "knn", "rankme")) == [9]
