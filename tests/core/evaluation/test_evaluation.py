"""The measures against closed forms, against scikit-learn, and against cases whose answer is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unmask.core.errors import UnmaskError
from unmask.core.evaluation import (
    KNN,
    FeatureSplit,
    FewLabels,
    LinearProbe,
    Splits,
    deviation,
    extract,
    few_label_curve,
    keyed_subset,
    knn_accuracy,
    knn_predict,
    linear_probe,
    online_probes,
    rankme,
)
from unmask.core.evaluation.classifier import Classifier, layers_of
from unmask.core.evaluation.encoding import Encoding
from unmask.core.evaluation.features import pick_device
from unmask.core.evaluation.finetune import FineTuning, tuned_recipe
from unmask.core.evaluation.linear import fit_logistic, standardize
from unmask.core.method import Clock, Features
from unmask.core.nn.transformer import Block, DropPath
from unmask.core.training.groups import param_groups
from unmask.core.training.recipe import Tuning
from unmask.core.training.schedules import learning_rate


def clusters(per_class: int, classes: int = 3, dim: int = 8, noise: float = 0.1, first: int = 0) -> FeatureSplit:
    """Samples around orthogonal directions."""
    generator = torch.Generator().manual_seed(first)
    y = torch.arange(classes).repeat(per_class)
    x = torch.eye(dim)[y] + noise * torch.randn(len(y), dim, generator=generator)
    return FeatureSplit(x, torch.arange(first, first + len(y)), y)


def three_splits(noise: float) -> Splits:
    return Splits(
        clusters(40, noise=noise), clusters(20, noise=noise, first=10_000), clusters(20, noise=noise, first=20_000)
    )


# ---- RankMe and deviation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 7, 32])
def test_rankme_of_isotropic_features_is_the_dimension(dim: int) -> None:
    assert rankme(torch.eye(dim)) == pytest.approx(dim, rel=1e-4)
    assert rankme(torch.eye(dim).repeat(5, 1)) == pytest.approx(dim, rel=1e-4)


def test_rankme_of_features_on_a_line_is_one() -> None:
    x = torch.randn(50, 1) * torch.randn(1, 6)
    assert rankme(x) == pytest.approx(1.0, abs=1e-4)


def test_rankme_of_two_unequal_directions_is_the_exponential_of_the_entropy() -> None:
    x = torch.diag(torch.tensor([3.0, 1.0]))
    expected = torch.tensor([0.75, 0.25])
    assert rankme(x) == pytest.approx(float((-(expected * expected.log()).sum()).exp()), rel=1e-5)


def test_rankme_thins_samples_evenly_and_works_with_fewer_samples_than_dimensions() -> None:
    x = torch.eye(4).repeat_interleave(100, dim=0)  # class by class, as files come
    assert rankme(x, samples=4) == pytest.approx(4.0, rel=1e-4)
    assert rankme(torch.eye(3, 50)) == pytest.approx(3.0, rel=1e-4)


def test_what_is_constant_in_training_does_not_move_a_probe() -> None:
    x = torch.randn(60, 3)
    dead = torch.full((60, 1), 0.3)
    part = [FeatureSplit(torch.cat([x, dead], 1), torch.arange(60), torch.arange(60) % 2) for _ in range(3)]
    other = FeatureSplit(torch.cat([x, dead + 5], 1), torch.arange(60), torch.arange(60) % 2)
    usual, moved = (standardize(Splits(part[0], part[1], test))[2] for test in (part[2], other))
    assert torch.equal(usual, moved) and usual[:, 3].eq(0).all()


def test_deviation_is_one_for_isotropic_and_zero_for_collapsed_features() -> None:
    assert deviation(torch.cat([torch.eye(16), -torch.eye(16)])) == pytest.approx(1.0, abs=1e-6)
    assert deviation(torch.ones(10, 16)) == pytest.approx(0.0, abs=1e-6)


# ---- k-NN ----------------------------------------------------------------------------------------------------------


def test_knn_is_right_on_separable_clusters_at_any_length_of_the_vectors() -> None:
    train, test = clusters(30, noise=0.05), clusters(10, noise=0.05, first=9)
    scale = torch.linspace(0.1, 10, len(test))[:, None]
    assert knn_accuracy(train.x, train.labels, test.x * scale, test.labels) == 1.0


def test_knn_votes_weigh_by_similarity_and_not_by_count() -> None:
    """One neighbour at similarity 1 outweighs two at 0.8 at a low temperature, and not at a high one."""
    train = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]])
    labels, query = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]])
    assert (
        knn_predict(train, labels, query, KNN(k=3, temperature=0.07)).item() == 0
    )  # 1 against 2 exp(-0.2/0.07) = 0.11
    assert knn_predict(train, labels, query, KNN(k=3, temperature=10.0)).item() == 1
    assert knn_predict(train, labels, query, KNN(k=1, temperature=10.0)).item() == 0


def test_knn_does_not_depend_on_the_chunk_or_overflow() -> None:
    train, test = clusters(20, noise=1.0), clusters(20, noise=1.0, first=5)
    whole = knn_predict(train.x, train.labels, test.x, KNN(k=500, temperature=1e-4))
    assert whole.equal(knn_predict(train.x, train.labels, test.x, KNN(k=500, temperature=1e-4), chunk=7))


# ---- linear probe --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_logistic_regression_is_scikit_learns(strength: float) -> None:
    from sklearn.linear_model import LogisticRegression

    train = clusters(30, noise=0.7)
    theirs = LogisticRegression(C=strength, tol=1e-8, max_iter=2000).fit(train.x.numpy(), train.labels.numpy())
    start = torch.zeros(3, train.x.shape[1] + 1)
    ours = fit_logistic(train.x, train.labels, start, strength, LinearProbe(tolerance=1e-7))
    torch.testing.assert_close(ours[:, :-1], torch.tensor(theirs.coef_, dtype=torch.float32), atol=2e-3, rtol=2e-3)


def test_the_probe_is_right_on_separable_clusters_whatever_the_scale_of_the_features() -> None:
    splits = three_splits(noise=0.05)
    stretch = torch.logspace(-3, 3, splits.train.x.shape[1])
    scaled = Splits(*(FeatureSplit(s.x * stretch + 5, s.ids, s.y) for s in (splits.train, splits.val, splits.test)))
    assert linear_probe(splits).accuracy == 1.0
    assert linear_probe(scaled).accuracy == 1.0


def test_strength_is_chosen_on_validation_and_test_is_not_looked_at() -> None:
    splits = three_splits(noise=0.5)
    wrong = FeatureSplit(splits.test.x, splits.test.ids, (splits.test.labels + 1) % 3)
    honest, spoiled = linear_probe(splits), linear_probe(Splits(splits.train, splits.val, wrong))
    assert honest.strength == spoiled.strength
    assert honest.val_accuracy == spoiled.val_accuracy
    assert spoiled.accuracy < 0.5 < honest.accuracy
    single = [linear_probe(splits, LinearProbe(strengths=(c,))).val_accuracy for c in LinearProbe().strengths]
    assert honest.val_accuracy == pytest.approx(max(single), abs=0.02)  # warm starts stop a little elsewhere


def test_probes_of_random_features_are_at_chance() -> None:
    x = torch.randn(3000, 6)
    y = torch.arange(3000) % 2
    parts = [FeatureSplit(x[a:b], torch.arange(a, b), y[a:b]) for a, b in ((0, 1000), (1000, 2000), (2000, 3000))]
    assert linear_probe(Splits(*parts)).accuracy == pytest.approx(0.5, abs=0.06)


def test_few_labels_are_stratified_nested_and_keyed() -> None:
    ids, labels = torch.arange(1000) * 7, torch.tensor([0] * 700 + [1] * 290 + [2] * 10)
    small, large = (keyed_subset(ids, labels, share, seed=0) for share in (0.05, 0.1))
    assert labels[small].bincount().tolist() == [35, 14, 1]  # round(14.5) is 14, and at least one of each class
    assert set(small.tolist()) < set(large.tolist())
    order = torch.randperm(1000)
    shuffled = keyed_subset(ids[order], labels[order], 0.05, seed=0)
    assert set(ids[order][shuffled].tolist()) == set(ids[small].tolist())
    assert not small.equal(keyed_subset(ids, labels, 0.05, seed=1))


def test_the_curve_ends_in_the_full_probe() -> None:
    splits = three_splits(noise=0.8)
    curve = few_label_curve(splits, seed=0, few=FewLabels((0.05, 1.0)))
    assert {share: probed.labels for share, probed in curve.items()} == {0.05: 6, 1.0: 120}
    assert curve[1.0] == linear_probe(splits)


# ---- fine-tuning ---------------------------------------------------------------------------------------------------


class TinyEncoder(nn.Module):
    """Three blocks on vectors cut into four tokens."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.dim = 8
        self.patch_embed = nn.Sequential(nn.Linear(2, 8))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.randn(1, 4, 8), requires_grad=False)
        self.blocks = nn.ModuleList(Block(8, 2) for _ in range(depth))
        self.norm = nn.LayerNorm(8)

    def layers_by_depth(self) -> list[list[nn.Module | nn.Parameter]]:
        return [[self.patch_embed, self.cls_token, self.pos_embed], *([block] for block in self.blocks)]

    def forward(self, x: Tensor) -> Features:
        x = self.patch_embed(x.view(len(x), 4, 2)) + self.pos_embed + self.cls_token
        for block in self.blocks:
            x = block(x)
        return Features(self.norm(x), (4,))


class Vectors:
    """A labelled data set of vectors."""

    def __init__(self, split: FeatureSplit) -> None:
        self.split, self.ids = split, split.ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, item: tuple[int, int]) -> int:
        return item[0]

    def collate(self, indices: list[int]) -> Any:
        rows = torch.tensor(indices)
        return Rows(self.split.x[rows], self.ids[rows], self.split.labels[rows])


class Rows(SimpleNamespace):
    """A batch that `to_device` leaves alone."""

    def __init__(self, x: Tensor, ids: Tensor, labels: Tensor) -> None:
        super().__init__(x=x, ids=ids, labels=labels)


class TinyMethod(nn.Module):
    """The encoder with a decoder that does not transfer."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = TinyEncoder()
        self.decoder = nn.Linear(8, 2)
        self.mask_token = nn.Parameter(torch.zeros(8))

    def encode(self, batch: Any) -> Features:
        return self.encoder(batch.x)


def classifier(**tuning: Any) -> Classifier:
    return Classifier(TinyMethod(), Encoding(), 8, Tuning(tuple("abcde"), **tuning))


def test_every_parameter_learns_at_the_rate_of_its_layer_and_decays_as_published() -> None:
    model = classifier(layer_decay=0.65)
    scale = {name: group["lr_scale"] for group in model.param_groups() for name, _ in group["params"]}
    assert sorted(scale) == sorted(name for name, _ in model.named_parameters())
    lowest = {scale[name] for name in scale if any(part in name for part in ("patch_embed", "pos_embed", "cls_token"))}
    assert lowest == {0.65**4}
    for i in range(3):
        found = {scale[name] for name in scale if name.startswith(f"method.encoder.blocks.{i}.")}
        assert found == {0.65 ** (3 - i)}
    assert {scale[name] for name in scale if name.startswith(("norm.", "head."))} == {1.0}
    groups = param_groups(model, 0.05)
    assert sum(len(group["params"]) for group in groups) == len(scale)
    for group in groups:
        for name, parameter in group["params"]:
            plain = parameter.ndim == 1 or name.endswith(("pos_embed", "cls_token"))
            assert group["weight_decay"] == (0.0 if plain else 0.05)


def test_layers_of_swin_count_through_the_stages() -> None:
    from unmask.vision.encoders.timm import SwinSettings, swin

    encoder: Any = swin(SwinSettings(patch_size=2, dim=8, depths=(2, 1), heads=(2, 2), window=2), (16, 16))
    first, second = encoder.layers
    assert layers_of(encoder) == [
        [encoder.patch_embed, first.downsample], [first.blocks[0]], [first.blocks[1], second.downsample],
        [second.blocks[0]],
    ]  # fmt: skip


def test_the_classifier_starts_near_zero_replaces_the_norm_and_trains_positions() -> None:
    method = TinyMethod()
    model = Classifier(method, Encoding(), 8, Tuning(tuple("abcde"), drop_path=0.3))
    assert 0 < model.head.weight.abs().max() < 1e-3
    batch = Rows(torch.randn(2, 8), torch.arange(2), torch.tensor([0, 4]))
    assert model.eval().predict(batch).abs().max() < 1e-3
    encoder = model.method.encoder
    assert isinstance(encoder.norm, nn.Identity)
    assert isinstance(method.encoder.norm, nn.LayerNorm), "the method that was given must stay as it was"
    assert encoder.pos_embed.requires_grad and not method.encoder.pos_embed.requires_grad
    assert not hasattr(model.method, "decoder") and not hasattr(model.method, "mask_token")
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.0, 0.15, 0.3])
    with torch.no_grad():
        output = model(batch, None)
    assert float(output.loss) == pytest.approx(float(torch.tensor(5.0).log()), abs=1e-3)
    assert output.metrics["accuracy"].count == 2


def test_the_schedule_warms_up_to_the_scaled_rate_and_ends_at_the_least() -> None:
    from unmask.core.training.recipe import load_recipe

    run: Any = SimpleNamespace(recipe=load_recipe("vision/mae", "tiny"))
    protocol = FineTuning(epochs=10, warmup_share=0.1, batch_size=512)
    rate = learning_rate(tuned_recipe(run, run.recipe.data, protocol, ["a", "b"], samples=5120))
    assert rate(Clock(0, 100)) == 0.0
    assert rate(Clock(10, 100)) == pytest.approx(1e-3)
    assert rate(Clock(100, 100)) == pytest.approx(1e-6)


# ---- features ------------------------------------------------------------------------------------------------------


def test_features_come_in_order_and_leave_out_stand_ins_for_unreadable_samples() -> None:
    split = clusters(5)
    data = Vectors(split)

    def collate(indices: list[int]) -> Any:
        return data.collate([3 if i == 4 else i for i in indices])  # sample 4 cannot be read, 3 stands in for it

    done: list[int] = []
    found = extract(lambda b: b.x, data, collate, batch_size=4, advance=done.append)
    keep = torch.tensor([i for i in range(15) if i != 4])
    assert found.ids.equal(split.ids[keep])
    assert found.x.equal(split.x[keep])
    assert found.labels.equal(split.labels[keep])
    assert sum(done) == 15


def test_an_unusable_device_is_one_clear_line() -> None:
    with pytest.raises(UnmaskError, match="--device nonsense cannot be used here .*; choose cpu or auto"):
        pick_device("nonsense")
    assert pick_device("cpu").type == "cpu"


# ---- online probes -------------------------------------------------------------------------------------------------


def test_online_probes_know_classes_that_lie_apart_and_not_those_that_do_not() -> None:
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 8, generator=g) * 4

    def split(n: int, first: int, apart: bool) -> FeatureSplit:
        y = torch.arange(n) % 4
        x = torch.randn(n, 8, generator=g) + (centres[y] if apart else 0.0)
        return FeatureSplit(x, torch.arange(first, first + n), y)

    right = online_probes(split(200, 0, True), split(100, 1000, True), seed=0)
    wrong = online_probes(split(200, 0, False), split(100, 1000, False), seed=0)
    assert right["knn"] > 0.97 and right["linear"] > 0.97
    assert wrong["knn"] < 0.5 and wrong["linear"] < 0.5


def test_online_strength_is_not_chosen_on_what_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Splits] = []

    def look(splits: Splits, protocol: LinearProbe | None = None) -> Any:
        seen.append(splits)
        return linear_probe(splits, protocol)

    monkeypatch.setattr("unmask.core.evaluation.online.linear_probe", look)
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    train, val = (FeatureSplit(x, torch.arange(50) + 50 * i, torch.arange(50) % 2) for i in range(2))
    online_probes(train, val, seed=0)
    (splits,) = seen
    assert (len(splits.train), len(splits.val)) == (40, 10) and splits.test is val
    assert set(splits.train.ids.tolist()) | set(splits.val.ids.tolist()) == set(range(50))
