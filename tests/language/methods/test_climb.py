"""CLIMB: the authors' numbers, exact properties of its curricula, and the checks of its kind."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from unmask.core import registry
from unmask.core.mask import Mask
from unmask.core.method import Clock
from unmask.core.randomness import Key
from unmask.core.training.launch import build, open_data
from unmask.core.training.pacing import Pacing
from unmask.core.training.recipe import load_recipe
from unmask.language.data.difficulty import easiest
from unmask.language.data.tagged_texts import TaggedBatch
from unmask.language.data.vocabulary import Vocabulary
from unmask.language.data.word_classes import UNKNOWN
from unmask.language.encoders.class_head import freeze_unused_bias, init_head
from unmask.language.methods.climb import (
    CLIMB,
    LISTED,
    Corruption,
    CurriculumPlan,
    Settings,
    active,
    check_intervals,
    class_labels,
)
from unmask.language.targets.known_words import VocabularyCurriculum

_FILE = Path(__file__).parents[2] / "golden" / "climb"
GOLDEN, NOTES = load_file(_FILE.with_suffix(".safetensors")), json.loads(_FILE.with_suffix(".json").read_text())
IDS = NOTES["special_ids"]
VOCABULARY = Vocabulary(64, IDS["mask"], IDS["bos"], IDS["eos"], IDS["pad"], IDS["unk"], (0, 1, 2, 3, 4), "golden")
RULES = {"token_ids": "token_ids", "pos_tags": "pos_tags", "pos_tags_and_token_ids": "both"}
BOTH = {"mlm": (0.125, 1.0), "pos_all": (0.0, 1.0)}


def roberta(**changes: Any) -> Any:
    config = transformers.RobertaPreLayerNormConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, type_vocab_size=2, layer_norm_eps=1e-5, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, tie_word_embeddings=False, pad_token_id=IDS["pad"], **changes,
    )  # fmt: skip
    model = transformers.RobertaPreLayerNormForMaskedLM(config)
    init_head(model)
    freeze_unused_bias(model)
    return model


def climb(**settings: Any) -> CLIMB:
    return CLIMB(roberta(), VOCABULARY, Settings(**settings), 20)


def long(name: str) -> Tensor:
    return GOLDEN[name].long()


def batch_of(tokens: Tensor, tags: Tensor) -> TaggedBatch:
    rows = torch.arange(len(tokens))
    return TaggedBatch(tokens, rows, torch.zeros_like(rows), tags)


def key(batch: Any, visit: int = 0) -> Key:
    return Key.of(0, batch.ids, visit).stream("plan")


def intervals(recorded: dict[str, list[float]]) -> dict[str, tuple[float, float]]:
    return {name: (float(begin), float(end)) for name, (begin, end) in recorded.items()}


def release_name(name: str) -> str:
    """The release's name of one of our parameters."""
    if name.startswith("heads."):
        return "head_" + name.removeprefix("heads.").replace("decoder.bias", "bias")
    head = name.removeprefix("model.lm_head.")
    return f"head_mlm/{head.replace('decoder.bias', 'bias')}" if head != name else name.split(".", 2)[2]


def recorded(name: str) -> str:
    return release_name(name).replace("head_pos_all.", "head_pos_all/")


def test_the_authors_step() -> None:
    """Inputs and labels under the vocabulary curriculum, hidden states, losses, and every gradient of a step."""
    method = climb(objectives=BOTH, vocabulary=VocabularyCurriculum("token_ids", Pacing("linear")))
    state = {n: GOLDEN[f"weights/{recorded(n)}"] for n, p in method.named_parameters() if p.requires_grad}
    method.load_state_dict(state, strict=False)
    batch = batch_of(long("input/batch/input_ids"), long("input/batch/pos_tags"))
    clock = Clock(int(GOLDEN["plan/step"]), NOTES["settings"]["T_run"])
    drawn = method.draw(batch, clock, key(batch))
    assert set(drawn.copies) == {"mlm", "pos_all"}
    copies = {}
    for name in drawn.copies:
        given = long(f"plan/{name}/input_ids_before_vocabulary")
        fill = torch.where(given != batch.tokens, given, -1)
        copies[name] = Corruption(GOLDEN[f"plan/{name}/mask"], fill)
    plan = CurriculumPlan(Mask.from_hidden(copies["mlm"].fill >= 0), copies, drawn.limit)
    for name in copies:
        assert torch.equal(method.inputs(batch, plan, name), long(f"input/batch/input_ids_{name}"))
        assert torch.equal(method.target(batch, plan)[name], long(f"input/batch/labels_{name}"))
    assert torch.equal(method.known(batch.tokens, batch, plan), long("input/batch/masked_input_ids"))
    torch.testing.assert_close(method.predict(batch, plan), GOLDEN["output/logits_mlm"], rtol=1e-5, atol=1e-6)
    output = method(batch, plan)
    for name, term in output.terms.items():
        torch.testing.assert_close(term.mean, GOLDEN[f"output/loss_{name}"], rtol=1e-5, atol=0)
    torch.testing.assert_close(output.loss, GOLDEN["output/loss"], rtol=1e-5, atol=0)
    output.loss.backward()
    compared = {n: p for n, p in method.named_parameters() if p.requires_grad}
    assert {recorded(n) for n in compared} == {k.removeprefix("grad/") for k in GOLDEN if k.startswith("grad/")}
    for name, parameter in compared.items():
        wanted = GOLDEN[f"grad/{recorded(name)}"]
        assert parameter.grad is not None
        # The key's bias has no gradient in exact arithmetic: what is recorded is rounding.
        close = 1e-5 * wanted.abs().max() + (1e-7 if name.endswith("key.bias") else 0.0)
        assert (parameter.grad - wanted).abs().max() <= close, name


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", ["linear", "log"])
def test_the_authors_map_of_the_vocabulary(rule: str, shape: str) -> None:
    """Ids and labels at 18 steps; labels of word classes are mapped there, too, as if they were ids."""
    curriculum = VocabularyCurriculum(RULES[rule], Pacing(shape))  # type: ignore[arg-type]
    total = NOTES["settings"]["T_run"]
    for number, step in enumerate(GOLDEN["sampler/grid_steps"].tolist()):
        for size, folder, keys in ((64, "vocab", ("input_ids", "labels_mlm", "labels_pos")), (8192, "vocab8192", ())):
            vocabulary = replace(VOCABULARY, size=size)
            tags = long(f"input/{folder}/pos_tags")
            limit = torch.full((len(tags), 1), curriculum.limit(step / total, size))
            for name in keys or ("input_ids",):
                found = curriculum.apply(long(f"input/{folder}/{name}"), tags, limit, vocabulary)
                at = f"sampler/vocab_map/{rule}/{shape}/{name}" if keys else f"sampler/vocab_map8192/{rule}/{shape}"
                assert torch.equal(found, long(at)[number]), (step, at)


@pytest.mark.parametrize("rule", RULES)
def test_the_whole_vocabulary_at_the_end(rule: str) -> None:
    ids, tags = long("input/vocab/input_ids"), long("input/vocab/pos_tags")
    curriculum = VocabularyCurriculum(RULES[rule])  # type: ignore[arg-type]
    limit = torch.full((len(ids), 1), curriculum.limit(1.0, 64))
    found = curriculum.apply(ids, tags, limit, VOCABULARY)
    assert torch.equal(found, long(f"sampler/vocab_map_at_f1/{rule}"))
    left = (found != ids) & (tags != UNKNOWN)
    assert not left.any(), "only words of the class X stay unknown, and those by ids within classes alone"
    assert torch.equal(found, ids) == (rule != "pos_tags_and_token_ids")


@pytest.mark.parametrize("at", ["released_400000", "small"])
def test_the_authors_objectives(at: str) -> None:
    total = 400000 if at == "released_400000" else NOTES["settings"]["Tsmall"]
    for name, recorded in NOTES["objective_configs"].items():
        objectives = intervals(recorded)
        check_intervals(objectives)
        for step, row in zip(
            GOLDEN[f"sampler/objectives/{at}/steps"].tolist(), GOLDEN[f"sampler/objectives/{at}/{name}"], strict=True
        ):
            wanted = {n for n, on in zip(NOTES["objective_columns"], row.tolist(), strict=True) if on}
            assert set(active(objectives, Clock(step, total).progress)) == wanted, (name, step)


def test_intervals_that_do_not_cover_the_run() -> None:
    for recorded, verdict in NOTES["validity"]:
        objectives = intervals(recorded)
        # The release's check rejects an interval that ends inside another, though nothing is missing.
        covered = verdict == "True" or recorded == {"mlm": [0, 0.9], "pos_all": [0, 0.1], "pos_noun_verb": [0.5, 1]}
        if covered:
            check_intervals(objectives)
        else:
            with pytest.raises(ValueError, match="objectives"):
                check_intervals(objectives)
    with pytest.raises(ValueError, match="ends before it begins"):
        check_intervals({"mlm": (1.0, 0.0)})


def test_both_objectives_at_the_step_where_they_meet() -> None:
    objectives = {"pos_all": (0.0, 0.125), "mlm": (0.125, 1.0)}
    assert [active(objectives, step / 16) for step in (1, 2, 3)] == [["pos_all"], ["pos_all", "mlm"], ["mlm"]]


def draws(method: CLIMB, batch: TaggedBatch, name: str, times: int = 400) -> tuple[Tensor, Tensor]:
    """What an objective chooses and fills in, [times, batch, length] each."""
    many = batch_of(batch.tokens.repeat(times, 1), batch.tags.repeat(times, 1))
    copy = method.draw(many, Clock(), key(many)).copies[name]
    return copy.chosen.view(times, *batch.tokens.shape), copy.fill.view(times, *batch.tokens.shape)


@pytest.mark.parametrize("name", ["mlm", "pos_all", "pos_noun_verb"])
def test_rates(name: str) -> None:
    """0.15 of the tokens (0.4 of listed classes), 90/10/0 or 80/10/10 of them, no special token: as recorded."""
    tokens, tags = long("sampler/corrupt/input_ids"), long("sampler/corrupt/pos_tags")
    method = climb(objectives={name: (0.0, 1.0), "mlm": (0.0, 1.0)})
    chosen, fill = draws(method, batch_of(tokens, tags), name)
    special = GOLDEN["sampler/corrupt/special"]
    assert not chosen[:, special].any() and (fill[~chosen] == -1).all()
    listed = torch.isin(tags, torch.tensor(LISTED.get(name, ()))) & ~special
    recorded = long(f"sampler/corrupt/{name}/selected_count_of_draws") / int(GOLDEN["sampler/corrupt/draws"])
    for where, ratio in ((listed, 0.4), (~listed & ~special, 0.15)):
        if where.any():
            n = int(where.sum()) * len(chosen)
            assert abs(chosen[:, where].float().mean() - ratio) < 4 * math.sqrt(ratio * (1 - ratio) / n)
            assert abs(recorded[where].mean() - ratio) < 4 * math.sqrt(ratio * (1 - ratio) / n), "the release's own"
    kinds = fill[chosen]
    keep, n = (0.0 if name == "mlm" else 0.1), len(kinds)
    masked = (kinds == VOCABULARY.mask).float().mean() - 0.1 / 64  # one random word in 64 is the mask token
    for share, wanted in ((masked, 0.9 - keep), ((kinds == -1).float().mean(), keep)):
        assert abs(share - wanted) < 4 * math.sqrt(0.1 * 0.9 / n)
    words = kinds[(kinds != -1) & (kinds != VOCABULARY.mask)]
    assert set(words.tolist()) == set(range(64)) - {VOCABULARY.mask}, "random words are of the whole vocabulary"


@pytest.mark.parametrize("name", ["pos_all", "pos_noun_verb"])
def test_labels_of_word_classes(name: str) -> None:
    """The labels of the release's own first draw, and the table."""
    tags, labels = long("sampler/corrupt/pos_tags"), long(f"sampler/corrupt/{name}/first_draw_labels")
    asked = labels != -100
    assert torch.equal(class_labels(tags, name)[asked], labels[asked])
    table = class_labels(torch.arange(12)[None], name)[0].tolist()
    assert table == ([*range(1, 12), 0] if name == "pos_all" else [1, 2, *[0] * 10])


@pytest.mark.parametrize("name", ["data_split_spoken_uniform", "data_split_grammatical_uniform", "ngram1_uniform"])
def test_the_authors_pools(name: str) -> None:
    """Which blocks may be drawn at 18 steps."""
    scores = {
        "data_split_spoken_uniform": "data_split_spoken",
        "data_split_grammatical_uniform": "data_split_grammatical",
        "ngram1_uniform": "ngram1_perplexity",
    }[name]
    difficulty = GOLDEN[f"sampler/difficulty/{scores}"].float()
    pacing = Pacing(NOTES["settings"]["dpace"])
    for number, step in enumerate(GOLDEN["sampler/grid_steps"].tolist()):
        found = easiest(difficulty, pacing(step / NOTES["settings"]["T_run"]))
        assert torch.equal(found, GOLDEN[f"sampler/pool/{name}"][number]), step


def test_initial_weights() -> None:
    """The heads are torch's own initialisation with eps 1e-12, not the encoder's; only an unused bias is frozen."""
    torch.manual_seed(0)
    method: Any = climb(objectives=BOTH)
    for head in (method.model.lm_head, method.heads["pos_all"]):
        assert head.layer_norm.eps == 1e-12 and method.model.config.layer_norm_eps == 1e-5
        for layer in (head.dense, head.decoder):
            assert layer.weight.std().item() == pytest.approx(1 / math.sqrt(3 * 32), rel=0.1)
        assert not head.decoder.bias.any() and head.dense.bias.any()
    embeddings = method.model.get_input_embeddings().weight
    assert (
        embeddings.std().item() == pytest.approx(0.02, rel=0.1)
        and embeddings is not method.model.lm_head.decoder.weight
    )
    assert [n for n, p in method.named_parameters() if not p.requires_grad] == ["model.lm_head.bias"]
    assert not any("pooler" in name for name, _ in method.named_parameters())


def test_an_idle_head_has_a_gradient_of_zero() -> None:
    method: Any = climb(objectives={"mlm": (0.5, 1.0), "pos_all": (0.0, 0.5)})
    batch = batch_of(long("input/batch/input_ids"), long("input/batch/pos_tags"))
    for step, idle, busy in (
        (0, method.model.lm_head, method.heads["pos_all"]),
        (9, method.heads["pos_all"], method.model.lm_head),
    ):
        method.zero_grad()
        plan = method.draw(batch, Clock(step, 10), key(batch))
        output = method(batch, plan)
        output.loss.backward()
        assert list(output.terms) == list(method.counts(batch, plan))
        assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
        assert not any(p.grad.any() for p in idle.parameters() if p.requires_grad)
        assert busy.decoder.weight.grad.any()


def test_a_vocabulary_curriculum_hides_nothing_special_and_needs_an_unknown_token() -> None:
    """Special tokens stay wherever their ids lie: here the mask token has the highest."""
    vocabulary = replace(VOCABULARY, mask=63, special=(0, 1, 3, 4, 63))
    ids = torch.tensor([[3, 10, 60, 63, -100]])
    found = VocabularyCurriculum().apply(ids, torch.full_like(ids, UNKNOWN), torch.tensor([[20]]), vocabulary)
    assert found.tolist() == [[3, 10, 0, 63, -100]]
    recipe, *_ = open_data(load_recipe("language/climb", "tiny"), lambda text: None)
    vocabulary = replace(recipe.data.vocabulary, unknown=None)
    with pytest.raises(ValueError, match="no unknown token"):
        registry.load("language/climb").build(recipe.model, replace(recipe.data, vocabulary=vocabulary), {})


@pytest.mark.parametrize("others", [{}, {"pos_all": [0, 1]}])
def test_the_suite(others: dict[str, Any]) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    network = {"architecture": "roberta-prelayernorm", "config": {**shape, "max_position_embeddings": 160}}
    overrides = {"model.objectives": {"mlm": [0, 1], **others}, "model.network": network}
    recipe, train, _, collate = open_data(load_recipe("language/climb", "tiny", overrides), lambda text: None)
    batch = collate([train[i, 0] for i in range(3)])
    method = build(recipe)
    assert method.loss_on == ("all" if others else "hidden")
    registry.part("language/climb", "checks").check_method(method, batch)  # type: ignore[union-attr]


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert"])
def test_other_architectures(architecture: str) -> None:
    shape = {"distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}}.get(architecture) or {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    }  # fmt: skip
    overrides = {"model.network": {"architecture": architecture, "config": shape}}
    recipe, train, _, collate = open_data(load_recipe("language/climb", "tiny", overrides), lambda text: None)
    method: Any = build(recipe)
    batch = collate([train[i, 0] for i in range(2)])
    method(batch, method.draw(batch, Clock(), key(batch))).loss.backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
