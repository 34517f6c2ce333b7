"""A whole new domain of integer inputs and two data kinds, installed as pip would: little to write, and all works."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from outsider import FILES, Copy

# What a domain has to write beside its decoding, encoders, methods and tasks.
FRAME = (
    "__init__.py",
    "checks.py",
    "data/__init__.py",
    "data/lines.py",
)
CHECK = """
from unmask.core import registry
from unmask.core.training.launch import build
from unmask.core.training.recipe import load_recipe
recipe = load_recipe("letters/METHOD")
data = registry.data_kind("letters/METHOD")
split = data.open_split(recipe.data, "train")
batch = data.collate([split[i, 0] for i in range(4)])
registry.part("letters/METHOD", "checks").check_method(build(recipe), batch)
"""

LOAD = """
import unmask.letters
encoder = unmask.letters.load("long")
batch = encoder.preprocess(["ABC", "some longer line"])
assert encoder(batch).tokens.shape == (2, 16, 32) and not encoder.training
assert encoder(batch).pooled.equal(encoder.method.encode(batch).pooled) and not hasattr(encoder.method, "head")
tuned = unmask.letters.load("classifier/model.safetensors")
assert tuned.classes == ["loud", "quiet"] and tuned.logits(tuned.preprocess(["ABC"])).shape == (1, 2)
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Copy]:
    copy = Copy(tmp_path_factory.mktemp("letters"))
    copy.install("letters", FILES / "letters")
    yield copy
    copy.close()


def test_a_domain_is_170_lines_at_most() -> None:
    lines = {name: len((FILES / "letters" / name).read_text().splitlines()) for name in FRAME}
    assert sum(lines.values()) <= 170, lines


def test_it_keeps_its_contracts_and_is_listed(copy: Copy) -> None:
    copy.check("from unmask.core import domain, registry; domain.check_domain(registry.domain('letters'))")
    found = {card["id"]: card["package"] for card in json.loads(copy.ok("list", "--json"))}
    assert found["letters/siblings"] == "unmask-letters" and "vision/mae" in found
    assert "cifar10" in copy.ok("data", "list"), "a domain without sets by name is in nobody's way"


@pytest.mark.parametrize("method", ["masked_letters", "siblings"])
def test_token_ids_and_pairs(copy: Copy, method: str) -> None:
    """Both are trained and resumed to the same weights, validated, and pass the checks."""
    copy.trained_and_resumed(f"letters/{method}")
    copy.check(CHECK.replace("METHOD", method))
    said = json.loads(copy.ok("train", f"letters/{method}", "--dry-run", "--json", "--out", "none"))
    assert said["estimate"]["tokens"] == 16 and said["estimate"]["flops_per_sample"] > 0


def test_every_verb_works_or_says_why_not(copy: Copy) -> None:
    folder, run = copy.work / "poems", copy.work / "long"
    folder.mkdir()
    for name, letters in (("loud", "ABCDEFG"), ("quiet", "abcdefg")):
        lines = [letters[i % 7 :] + letters[: i % 5] for i in range(40)]
        (folder / f"{name}.txt").write_text("\n".join(lines))
    out = copy.ok("train", "letters/masked_letters", "--data", folder, "--epochs", 3, "--out", run, "--quiet")
    offered = [line.split()[1] for line in out.split("Next:\n")[1].splitlines()]
    assert offered == ["evaluate", "report", "embed"], out
    rows = json.loads(copy.ok("evaluate", run, "--json"))["rows"]
    assert set(rows) == {"trained", "random", "letters"} and rows["letters"]["knn"] == 1, "capitals tell them apart"
    assert "untrained encoder" in copy.ok("evaluate", run)
    copy.ok("report", run)
    assert "data:image/png" not in (run / "report.html").read_text(), "no report module, no pictures"
    copy.ok("embed", run, folder, "--out", "features.parquet")
    assert (copy.work / "features.parquet").stat().st_size > 1000
    assert "runs of letters are not exported" in copy.refused("export", run, "--out", "x")
    copy.ok("finetune", run, "--data", folder, "--out", "classifier", "--epochs", 1, "--quiet")
    copy.check(LOAD)
    copy.ok("predict", "classifier", folder, "--out", "predicted.parquet")
    assert "does not generate; methods that do: none is installed" in copy.refused("generate", run, "--out", "x")
    copy.ok("train", "letters/masked_letters", "--init", run, "--steps", 2, "--out", "warm", "--quiet")
    nowhere = ["letters/masked_letters", "--data", "nowhere", "--out", "x"]
    assert "expected a folder of .txt files" in copy.refused("train", *nowhere)
