"""The tasks of language, as `unmask evaluate` runs them, and what goes on from a run: report, export, embedding."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from unmask.core.errors import UnmaskError
from unmask.core.evaluation.embedding import embed
from unmask.core.evaluation.finetune import finetune, load_classifier
from unmask.core.evaluation.run import evaluate, table
from unmask.core.report.page import write_report
from unmask.core.training.loop import train
from unmask.core.training.recipe import load_recipe
from unmask.language import load
from unmask.language.interop.export import export

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of MEAP, of six steps on a small corpus."""
    folder = tmp_path_factory.mktemp("language")
    (folder / "texts").mkdir()
    for i in range(30):
        (folder / "texts" / f"{i:02d}.txt").write_text(" ".join(f"word{i * j % 31} and number {j}." for j in range(60)))
    overrides = {
        "data.source": str(folder / "texts"), "data.vocabulary_size": 320, "data.length": 32, "data.val_share": 0.1,
        "model.network.config": SHAPE, "training.batch_size": 8,
    }  # fmt: skip
    return train(load_recipe("language/meap", "tiny", overrides, steps=6), folder / "run", progress=False)


def test_perplexities(run: Path) -> None:
    result = evaluate(run, device="cpu")
    rows = {name: row["perplexity"]["test"] for name, row in result["rows"].items()}
    assert set(rows) == {"trained", "random", "unigram"}
    assert rows["unigram"] < rows["random"] < 1000 and rows["trained"] < rows["random"]
    assert math.isclose(math.log(rows["random"]), math.log(320), rel_tol=0.1), "near uniform at random weights"
    assert "perplexity, validation" in table(result) and "frequencies of tokens" in table(result)
    page = write_report(run).read_text(encoding="utf-8")
    assert "What was hidden" in page and "[MASK]" in page and "answered by" in page and "Test perplexity" in page
    assert '<div class="prose">' in page and "what the model saw, and answered</th>" in page, "texts break into lines"


def test_a_classifier_is_refused_with_another_way(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UnmaskError, match="train language/meap_sft --network model=DIR"):
        finetune(run, str(tmp_path), tmp_path / "out")
    with pytest.raises(UnmaskError, match="no classifier is put on a language model"):
        load_classifier(run)


def test_an_export_is_the_model_and_its_tokenizer(run: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = export(run, tmp_path / "model")
    theirs: Any = AutoModelForCausalLM.from_pretrained(out).eval()
    encoder = load(run)
    batch = encoder.preprocess(["word3 and number 2.", "word1"])
    tokens = AutoTokenizer.from_pretrained(out)("word3 and number 2.", add_special_tokens=False)["input_ids"]
    assert batch.tokens[0, 1 : 1 + len(tokens)].tolist() == tokens
    with torch.no_grad():
        states = theirs.base_model(input_ids=batch.tokens[:1]).last_hidden_state
        torch.testing.assert_close(encoder(batch).tokens[:1], states, rtol=1e-4, atol=1e-5)
    assert "AutoModelForCausalLM" in (out / "README.md").read_text(encoding="utf-8")
    again = load_recipe("language/meap", "tiny", {"networks.model": str(out), "data.length": 32}, steps=1)
    train(again, tmp_path / "again", progress=False)


def test_blocks_are_embedded(run: Path, tmp_path: Path) -> None:
    embed(run, str(run.parent / "texts"), tmp_path / "features.parquet", device="cpu")
    found = pq.read_table(tmp_path / "features.parquet")
    assert len(found) > 10 and "00.txt:1@0" in found["name"].to_pylist()


def test_preferences(tmp_path: Path) -> None:
    """The policy and its reference after one step of fine-tuning."""
    overrides = {
        "data.vocabulary_size": 320, "data.length": 64, "data.prompt_length": 24, "schedule.steps": 1,
        "model.network.config": {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 128},
    }  # fmt: skip
    recipe = replace(load_recipe("language/sparsepo", "tiny", overrides), stages=None)
    result = evaluate(train(recipe, tmp_path / "run", progress=False), device="cpu", quick=True)
    trained, reference = (result["rows"][name]["test"] for name in ("trained", "reference"))
    assert trained["kl"] >= 0 and 0 <= trained["preferred"] <= 1 and 0 <= trained["likelier"] <= 1
    assert abs(trained["likelier"] - reference["likelier"]) < 0.5 and set(reference) == {"likelier"}
    assert "chosen likelier" in table(result)
    assert write_report(tmp_path / "run").is_file(), "an evaluation of another task is no obstacle"
