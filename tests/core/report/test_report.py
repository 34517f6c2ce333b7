"""The report of runs that are finished, under way, hostile or bare; its verdicts; and that it stands alone."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from unmask.core.errors import UnmaskError
from unmask.core.report import Reference, make_reference, page, write_report
from unmask.core.report.gather import read_run
from unmask.core.report.plots import loss_plot
from unmask.core.report.probes import chance, few_label_figure, score_table
from unmask.core.report.reference import differences, judge

VOID = {"meta", "img", "br", "link", "input", "hr"}
RECIPE: dict[str, Any] = {
    "method": "vision/mae",
    "seed": 0,
    "init": None,
    "model": {
        "encoder": {"patch_size": 4, "dim": 32, "depth": 1, "heads": 2},
        "decoder": {"dim": 32, "depth": 1, "heads": 2},
    },
    "data": {"source": "digits", "image_size": [8, 8], "channels": 1, "mean": [0.3], "std": [0.3]},
    "schedule": {"epochs": 10, "steps": None},
    "training": {"batch_size": 32},
}
ROWS = {
    "trained": {"knn": 0.95, "linear": 0.97, "few_label": {"1": 0.5, "10": 0.8, "100": 0.97}, "rankme": 9.5, "dim": 32},
    "pixels": {"knn": 0.96, "linear": 0.9, "few_label": {"1": 0.4, "10": 0.7, "100": 0.9}, "rankme": 20.0, "dim": 64},
}
EVALUATION: dict[str, Any] = {
    "labelled": True,
    "data": "digits",
    "names": {"trained": "trained encoder", "pixels": "raw pixels"},
    "splits": {"train": 1258, "val": 180, "test": 359, "classes": 10},
    "rows": ROWS,
}


def make_run(path: Path, *, steps: int = 100, weights: bool = True, **files: Any) -> Path:
    """A run directory with a falling loss; `files` replace its parts."""
    path.mkdir(parents=True)
    recipe = files.get("recipe", RECIPE)
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    lines: list[dict[str, Any]] = []
    for step in range(10, steps + 1, 10):
        time = {"seconds": step * 0.1, "samples_per_second": 300.0 + step % 3}
        line = {"step": step, "epoch": step / 40, "samples": step * 32, "loss": 0.4 + 2.0 / step, "lr": 1e-3}
        lines.append(line | {"grad_norm": 1.0, "hidden_share": 0.75, "time": time})
    if lines:
        lines.append({"step": steps, "val_loss": 0.41, "time": {"seconds": 1.0}})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if "evaluation" in files:
        (path / "evaluation.json").write_text(json.dumps(files["evaluation"]))
    facts = {"python": "3.11", "versions": {"torch": "2"}, "command": ["unmask", "train"], "total_steps": 100}
    (path / "environment.json").write_text(json.dumps(facts | files.get("environment", {})))
    if weights:
        _write_weights(path, recipe)
    return path


def _write_weights(path: Path, recipe: dict[str, Any]) -> None:
    from unmask.core import registry
    from unmask.core.training import checkpoint
    from unmask.core.training.recipe import make_recipe

    made = make_recipe(json.loads(json.dumps(recipe)))
    method = registry.load(made.method).build(made.model, made.data)
    checkpoint.write(path / "model.safetensors", method.state_dict(), {"step": 100, "method": made.method})


class Page(HTMLParser):
    """What is in a page, and whether its elements close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.stack == [], f"left open: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack and self.stack[-1] == tag, f"</{tag}> closes {self.stack[-1:]}"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    run = make_run(tmp_path_factory.mktemp("report") / "run", evaluation=EVALUATION)
    text = write_report(run).read_text()
    return text, Page(text)


def test_ranks_and_online_probes_are_curves(finished: tuple[str, Page], tmp_path: Path) -> None:
    assert "How the features developed" not in finished[1].text, "nothing was measured"
    run = make_run(tmp_path / "run", weights=False)
    with (run / "metrics.jsonl").open("a") as file:
        for step, rank in ((90, 9.0), (100, 3.5)):
            numbers = {"rankme": rank, "deviation": 0.25, "token_rankme": 12.0, "target_rank": None}
            file.write(json.dumps({"step": step, **numbers, "knn_word": 0.5, "linear_word": rank / 10}) + "\n")
    written = Page(write_report(run).read_text())
    assert "How the features developed" in written.text and "The deviation over samples is 0.25" in written.text
    labels = [attrs.get("aria-label") for attrs in written.all("div")]
    assert "samples: 9 to 3.5; tokens: 12 to 12." in labels, "a target's rank that is null has no curve"
    assert "k-NN word: 50 to 50; linear word: 90 to 35." in labels


def test_the_page_has_its_parts(finished: tuple[str, Page]) -> None:
    text = finished[1].text
    for part in (
        "Masked Autoencoders Are Scalable Vision Learners",
        "arXiv 2111.06377",
        "pretrain",
        "finished at step 100",
        "Is the loss normal?",
        "Linear probe 97.0 %: 7.0 points above the best reference (raw pixels, 90.0 %)",
        "samples per second",
        "unmask finetune",
        "unmask train --resume",
        "encoder.patch_size",
        "torch",
    ):
        assert part in text, part


def test_the_page_asks_for_nothing_from_anywhere(finished: tuple[str, Page]) -> None:
    text, parsed = finished
    assert parsed.all("script") == parsed.all("link") == []
    assert "@import" not in text and "url(http" not in text
    for _, attrs in parsed.tags:
        for name in ("src", "href", "xlink:href", "srcset"):
            value = attrs.get(name)
            assert value is None or value.startswith(("#", "data:")), value


def test_eight_samples_are_shown_in_three_images_with_text_for_who_cannot_see_them(finished: tuple[str, Page]) -> None:
    images = finished[1].all("img")
    assert len(images) == 24
    assert all(image["alt"] for image in images)
    assert sum("reconstruction of digits:" in str(image["alt"]) for image in images) == 8
    plots = [attrs for attrs in finished[1].all("div") if attrs.get("role") == "img"]
    assert len(plots) == len(finished[1].all("svg")) == 4
    assert all(attrs["aria-label"] for attrs in plots)


def test_ids_are_unique_and_references_in_plots_lead_somewhere(finished: tuple[str, Page]) -> None:
    text, parsed = finished
    ids = [attrs["id"] for _, attrs in parsed.tags if attrs.get("id")]
    assert len(ids) == len(set(ids))
    for target in re.findall(r'(?:url\(|href=")#([^)"]+)', text):
        assert target in ids, target


def test_plots_take_their_colours_from_the_page(finished: tuple[str, Page]) -> None:
    for svg in re.findall(r"<svg.*?</svg>", finished[0], flags=re.S):
        assert "#0102" not in svg
        assert "var(--main)" in svg
    assert "prefers-color-scheme: dark" in finished[0]


@pytest.mark.parametrize(("page_color", "names"), [(":root {", ("ink", "muted", "main", "second", "third"))])
def test_text_stands_out_from_its_ground(finished: tuple[str, Page], page_color: str, names: tuple[str, ...]) -> None:
    """WCAG AA: at least 4.5 to 1 against cards, in light and in dark."""
    blocks = re.findall(r":root \{(.*?)\}", finished[0], flags=re.S)
    assert len(blocks) == 2
    for block in blocks:
        colors = dict(re.findall(r"--([\w-]+): (#\w{6})", block))
        for name in names:
            assert contrast(colors[name], colors["card"]) >= 4.5, name
        for name in ("good", "warn"):
            assert contrast(colors["ink"], colors[f"{name}-bg"]) >= 4.5, name


def contrast(a: str, b: str) -> float:
    def luminance(color: str) -> float:
        values = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_what_comes_from_a_run_is_escaped(tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script>'
    names = {"trained": evil, "pixels": "<b>pixels</b>"}
    run = make_run(
        tmp_path / "a <b> & c",
        weights=False,
        evaluation=EVALUATION | {"data": evil, "names": names},
        environment={"command": [evil], "platform": evil},
        recipe=RECIPE | {"data": RECIPE["data"] | {"source": evil}},
    )
    parsed = Page(write_report(run).read_text())
    assert parsed.all("script") == []
    assert evil in parsed.text
    assert "'" + str(run) + "'" in parsed.text, "a path with spaces is quoted in commands"


def test_a_run_under_way_without_weights_or_evaluation_has_a_page(tmp_path: Path) -> None:
    text = Page(write_report(make_run(tmp_path / "run", steps=20, weights=False)).read_text()).text
    assert "at step 20 of 100, still unfinished" in text
    assert "has no weights yet" in text
    assert "Go on training" in text
    assert "Not measured yet" in text


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    text = Page(write_report(make_run(tmp_path / "run", steps=0, weights=False)).read_text()).text
    assert "Nothing has been logged yet." in text


def test_unlabelled_data_and_worse_features_are_said_plainly(tmp_path: Path) -> None:
    rows = {name: {"rankme": 3.0, "dim": 8} for name in ROWS}
    bare = EVALUATION | {"labelled": False, "note": "photos has no labels", "rows": rows, "splits": {"train": 9}}
    run = make_run(tmp_path / "unlabelled", weights=False, evaluation=bare)
    assert "photos has no labels" in Page(write_report(run).read_text()).text
    rows = {"trained": ROWS["pixels"], "pixels": ROWS["trained"]}
    run = make_run(tmp_path / "worse", weights=False, evaluation=EVALUATION | {"rows": rows})
    assert "7.0 points below the best reference" in Page(write_report(run).read_text()).text


def test_no_run_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UnmaskError, match="is not a run: it has no recipe.yaml"):
        write_report(tmp_path)


# ---- is my loss normal? --------------------------------------------------------------------------------------------

STEPS = list(range(10, 101, 10))
REFERENCE = Reference(STEPS, [1.0] * 10, [0.05] * 10, seeds=3)


@pytest.mark.parametrize(
    ("loss", "tone", "start"),
    [(1.05, "good", "Normal: within"), (1.2, "warn", "Above the reference band"), (0.8, "warn", "Below the reference")],
)
def test_verdicts(loss: float, tone: str, start: str) -> None:
    found = judge(STEPS, [loss] * 10, REFERENCE)
    assert found.tone == tone
    assert found.text.startswith(start)
    assert "at step 100" in found.text


def test_a_verdict_is_on_the_last_steps_the_reference_covers() -> None:
    steps, loss = [50, 100, 150], [1.0, 1.0, 9.0]
    assert judge(steps, loss, REFERENCE).tone == "good"
    assert judge([200], [1.0], REFERENCE).tone == "plain"


def test_another_recipe_is_not_held_against_the_reference() -> None:
    found = judge(STEPS, [5.0] * 10, REFERENCE, ["data.source", "model.mask_ratio"])
    assert found.tone == "plain"
    assert "changes data.source, model.mask_ratio" in found.text


def test_the_band_is_never_narrower_than_two_percent() -> None:
    low, high = Reference([1, 2], [1.0, 3.0], [0.0, 0.5]).band([1, 2])
    assert low.tolist() == pytest.approx([0.98, 2.0])
    assert high.tolist() == pytest.approx([1.02, 4.0])


def test_a_reference_is_the_mean_and_deviation_over_seeds(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(seed), steps=30, weights=False) for seed in (0, 1, 2)]
    for seed, run in enumerate(runs):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        lines = [line | ({"loss": line["loss"] + seed} if "loss" in line else {}) for line in lines]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = make_reference(runs, tmp_path / "reference.json")
    assert found.step == [10, 20, 30]
    assert found.loss == pytest.approx([1.6, 1.5, 1.4 + 1 / 15], abs=1e-5)
    assert found.spread == pytest.approx([1.0] * 3)
    assert json.loads((tmp_path / "reference.json").read_text())["seeds"] == 3
    with pytest.raises(UnmaskError, match="only seeds may differ"):
        make_reference([runs[0], make_run(tmp_path / "longer", steps=50, weights=False)])


def test_differences_name_what_the_run_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tmp_path / "mae.tiny.yaml"
    model = {"encoder": {"patch_size": 4}, "mask_ratio": 0.75}
    shipped.write_text(yaml.safe_dump({"model": model, "data": {"source": "digits", "image_size": 8, "channels": 1}}))
    monkeypatch.setattr("unmask.core.registry.recipe_path", lambda method, recipe: shipped)
    same = RECIPE | {"model": {**RECIPE["model"], "mask_ratio": 0.75}, "training": {}}
    assert differences(read_run(make_run(tmp_path / "same", weights=False, recipe=same))) == []
    other = same | {"schedule": {"steps": 7}, "model": {**RECIPE["model"], "mask_ratio": 0.5}}
    found = differences(read_run(make_run(tmp_path / "other", weights=False, recipe=other)))
    assert found == ["model.mask_ratio", "schedule.steps"]


def test_the_page_shows_the_reference_and_the_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = Reference(STEPS, [0.42] * 10, [0.005] * 10, seeds=5)
    monkeypatch.setattr(page, "find_reference", lambda method: reference)
    monkeypatch.setattr(page, "differences", lambda run: [])
    text = Page(write_report(make_run(tmp_path / "run", weights=False)).read_text()).text
    assert "Normal: within the reference band at step 100" in text
    assert "mean over 5 seeds" in text
    assert "reference band" in text


# ---- other methods, domains and tasks --------------------------------------------------------------------------------


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text())


def test_a_domain_without_a_report_gets_what_is_every_domains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unmask.core.registry.part", lambda method, name: None)
    parsed = page_of(make_run(tmp_path / "run", evaluation=EVALUATION))
    assert parsed.all("img") == []
    assert "What it hides" not in parsed.text and "unmask export" not in parsed.text
    for part in ("Linear probe 97.0 %", "unmask embed", "Is the loss normal?"):
        assert part in parsed.text


@pytest.mark.parametrize("face", ["draw", "picture"])
def test_a_method_that_shows_nothing_has_a_page_without_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, face: str
) -> None:
    from unmask.vision.methods.mae import MAE

    run = make_run(tmp_path / "run")
    monkeypatch.delattr(MAE, face)
    parsed = page_of(run)
    assert parsed.all("img") == [] and "What it hides" not in parsed.text
    assert "of the whole method" in parsed.text, "its parameters are counted all the same"


def test_a_run_without_data_or_with_measures_of_its_own_has_a_page(tmp_path: Path) -> None:
    recipe = {name: value for name, value in RECIPE.items() if name != "data"}
    text = page_of(make_run(tmp_path / "run", weights=False, recipe=recipe, evaluation={"fid": 3.0})).text
    assert "on data" not in text
    assert "Not measured yet" in text


def test_a_table_has_the_measures_that_were_taken() -> None:
    rows = {
        "trained": {
            "knn": 0.25,
            "few_label": {"1": 0.5, "100": 0.75},
            "parts": {"iou": 0.125},
            "rankme": 3.0,
            "dim": 8,
        },
        "random": {"knn": 0.5},
    }
    titles, table = score_table(
        {"rows": rows, "names": {"trained": "ours"}}, [("IoU", ("parts", "iou")), ("x", ("x",))]
    )
    assert titles == ["k-NN", "1 % labels", "IoU", "RankMe"]
    assert table == [
        ("ours", [("25.0", False), ("50.0", True), ("12.5", True), ("3.0 of 8", False)]),
        ("random", [("50.0", True), ("–", False), ("–", False), ("–", False)]),
    ]
    assert score_table({"rows": {"trained": {}}}) == ([], [("trained", [])])
    assert few_label_figure({"rows": {"trained": {}}}) is None


def test_chance_is_two_deviations_of_a_difference() -> None:
    generator = np.random.default_rng(0)
    a, b = (generator.binomial(400, 0.5, 20_000) / 400 for _ in range(2))
    assert np.mean(100 * np.abs(a - b) > chance(0.5, 0.5, 400)) == pytest.approx(0.05, abs=0.01)
    assert chance(0.5, 0.5, 4) > 40 and chance(1.0, 1.0, 4) > 40  # four right answers are no certainty


def test_a_short_run_is_not_a_speck_beside_its_reference() -> None:
    """The reference's 2,500 steps give way where the run has 6; a run of its length is drawn beside all of it."""
    reference = Reference([1, 6, 2500], [60.0, 40.0, 4.0], [1.0, 1.0, 0.1], 3)
    short = loss_plot(([1, 6], [60.0, 40.0]), ([6], [41.0]), reference)
    assert ">2500<" not in short and ">12<" in short and "−20" not in short
    assert ">2500<" in loss_plot(([1, 2500], [60.0, 4.0]), ([], []), reference)
