"""PROP: the authors' numbers, exact properties, and the checks of its kind."""

from __future__ import annotations

import json
import math
import random
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
from unmask.core.masking import choose_groups
from unmask.core.method import Clock
from unmask.core.networks import open_network
from unmask.core.randomness import Key
from unmask.core.training.groups import param_groups
from unmask.core.training.recipe import load_recipe
from unmask.language.data.document_pairs import PairBatch
from unmask.language.data.document_pairs import Settings as DataSettings
from unmask.language.data.vocabulary import Vocabulary
from unmask.language.encoders.language_model import ModelSettings
from unmask.language.interop.prop_weights import is_released, released_to_ours
from unmask.language.methods.prop import PROP, PairPlan, Settings, build, masked_pieces, pair_loss

FOLDER = Path(__file__).parents[2] / "golden"
GOLDEN = load_file(FOLDER / "prop.safetensors")
PIECES = json.loads((FOLDER / "prop.json").read_text(encoding="utf-8"))["vocabulary"]
VOCABULARY = Vocabulary(len(PIECES), 4, 2, 3, 0, 1, (0, 1, 2, 3, 4), "golden")
GOES_ON = torch.tensor([piece.startswith("##") for piece in PIECES])
RELEASED = {name.removeprefix("weights/"): tensor for name, tensor in GOLDEN.items() if name.startswith("weights/")}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def bert(**changes: Any) -> Any:
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = {"vocab_size": len(PIECES), "max_position_embeddings": 72, **SIZES, **none, **changes}
    return transformers.BertForMaskedLM(transformers.BertConfig(**config))


def make(**settings: Any) -> PROP:
    """The method with the weights of the record."""
    method = PROP(bert(), VOCABULARY, Settings(chunk=7, **settings))
    method.load_state_dict(released_to_ours(RELEASED))
    return method


def groups_of(ids: Tensor, types: Tensor) -> Tensor:
    """Words of the documents, by the rule for WordPiece."""
    inside = (types == 1) & (ids != 3) & (ids != 0)
    starts = inside & ~GOES_ON[ids]
    return torch.where(inside, starts.cumsum(1) - 1, -1)


def recorded() -> tuple[PairBatch, PairPlan]:
    """The recorded rows with their masks undone, and these masks as a plan."""
    inputs, types, labels = (GOLDEN[f"input/{name}"].long() for name in ("input_ids", "segment_ids", "mlm_labels"))
    asked = GOLDEN["plan/mask"]
    tokens = torch.where(asked, labels, inputs)
    valid = GOLDEN["input/attention_mask"].bool()
    paired = [part.view(6, 2, 72) for part in (tokens, types, valid, groups_of(tokens, types))]
    batch = PairBatch(*paired, torch.arange(6))
    hidden = (asked & (inputs != tokens)).view(6, 144)
    return batch, PairPlan(Mask.from_hidden(hidden, valid.view(6, 144)), asked.view(6, 144), inputs.view(6, 144))


def random_batch(rows: int = 4, width: int = 24, seed: int = 0, size: int = 40) -> PairBatch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, size, (rows, 2, width), generator=generator)
    types, groups = torch.zeros_like(tokens), torch.full_like(tokens, -1)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    tokens[..., 0] = 2
    for i in range(rows):
        for j in range(2):
            split, end = 3 + i % 3, width - 1 - (i + j) % 4
            tokens[i, j, split] = tokens[i, j, end - 1] = 3
            tokens[i, j, end:], valid[i, j, end:] = 0, False
            types[i, j, split + 1 : end] = 1
            steps = torch.rand(end - split - 2, generator=generator) < 0.6
            groups[i, j, split + 1 : end - 1] = steps.long().cumsum(0) - int(steps[0])
    return PairBatch(tokens, types, valid, groups, torch.arange(rows))


# ---- the authors' numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairwise", ["softmax_margin", "hinge"])
def test_the_authors_losses(pairwise: Any) -> None:
    method = make(pairwise=pairwise)
    batch, plan = recorded()
    assert torch.equal(method.inputs(batch, plan), GOLDEN["input/input_ids"].long())
    output = method(batch, plan)
    wanted = GOLDEN["output/loss_rop" if pairwise == "softmax_margin" else "output/loss_rop_hinge_on_scores"]
    torch.testing.assert_close(output.terms["words"].mean, wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(output.terms["masked"].mean, GOLDEN["output/loss_mlm"], rtol=1e-5, atol=0)
    if pairwise == "softmax_margin":
        torch.testing.assert_close(output.loss, GOLDEN["output/loss"], rtol=1e-5, atol=0)
    scores = GOLDEN["output/scores"].view(6, 2)
    assert float(output.metrics["ordered"].mean) == pytest.approx(float((scores[:, 0] > scores[:, 1]).float().mean()))


def test_the_authors_states() -> None:
    method = make()
    batch, plan = recorded()
    states = method._states(batch, method.inputs(batch, plan))
    close(states[0], GOLDEN["output/sequence_output_row0"])
    close(method.pooler(states), GOLDEN["output/pooled"])
    close(method.rank(states), GOLDEN["output/scores"])
    close(method.head.scores(method.model, states[0, :16]), GOLDEN["output/lm_logits_row0_first16"])
    close(method.rank(states).view(-1, 2).softmax(1), GOLDEN["output/pair_softmax"])


def test_the_authors_gradients() -> None:
    method = make(pairwise="softmax_margin")
    method(*recorded()).loss.backward()
    wanted = {name.removeprefix("grad/"): tensor for name, tensor in GOLDEN.items() if name.startswith("grad/")}
    ours = {name: parameter.grad for name, parameter in method.named_parameters()}
    compared = 0
    for name, gradient in released_to_ours(wanted).items():
        if name in ours and name != "score.bias":  # whose gradient is rounding
            assert ours[name] is not None, name
            if name.endswith("key.bias"):  # softmax does not change with it: both are rounding
                assert max(float(g.abs().max()) for g in (ours[name], gradient)) < 1e-6
            else:
                close(ours[name], gradient)
            compared += 1
    assert compared == len([name for name in ours if name != "score.bias"]) == 45
    assert float(wanted["cls.bias"].abs().max()) < 1e-6


def close(ours: Tensor | None, wanted: Tensor) -> None:
    assert ours is not None and ours.shape == wanted.shape
    assert (ours - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_the_authors_masks_keep_to_the_rule() -> None:
    """The recorded masks are whole words within the budget; ours are as many pieces wherever words have one piece."""
    batch, plan = recorded()
    groups, asked = batch.groups.flatten(0, 1), plan.asked.view(12, 72)
    for row, chosen in zip(groups, asked, strict=True):
        words = set(row[chosen].tolist())
        assert all(chosen[row == word].all() for word in words)
        assert -1 not in words
        assert chosen.sum() <= max(1, round(0.15 * (int(row.max()) + 1)))
    for words, wanted in GOLDEN["sampler/mlm_budget_table_groups_n"].tolist():
        ours = masked_pieces(torch.arange(words)[None], torch.arange(words)[None], 0.15, 60)
        assert int(ours.sum()) == wanted


def test_the_authors_shares_of_masks() -> None:
    """80 % [MASK], 10 % unchanged, 10 % others, as in 3,000 draws of theirs."""
    theirs = GOLDEN["sampler/mlm_kind_mask_same_other"].double()
    batch = random_batch(200, 48, size=len(PIECES))
    plan = make().draw(batch, Clock(), Key.of(0, batch.ids))
    changed = plan.replacement[plan.mask.hidden] != VOCABULARY.mask
    total = int(plan.asked.sum())
    kept = total - int(plan.mask.hidden.sum())
    ours = torch.tensor([int((~changed).sum()), kept, int(changed.sum())]).double()
    for counts in (ours, theirs):
        share = counts / counts.sum()
        spread = (torch.tensor([0.8 * 0.2, 0.1 * 0.9, 0.1 * 0.9]).double() / counts.sum()).sqrt()
        assert ((share - torch.tensor([0.8, 0.1, 0.1])).abs() < 4 * spread).all()
    assert plan.replacement[plan.mask.hidden].unique().numel() > 50


# ---- exact properties ----------------------------------------------------------------------------------------------


def brute_force(groups: list[int], order: list[int], budget: int) -> list[bool]:
    """BERT's loop, for one row."""
    words = sorted({g for g in groups if g >= 0}, key=lambda g: order[groups.index(g)])
    taken: set[int] = set()
    for word in words:
        held = sum(g in taken for g in groups)
        if held >= budget:
            break
        if held + groups.count(word) <= budget:
            taken.add(word)
    return [g in taken for g in groups]


def test_groups_are_chosen_as_by_the_loop() -> None:
    generator = random.Random(1)
    rows, orders, budgets = [], [], []
    for _ in range(300):
        row: list[int] = [-1] * generator.randint(0, 3)
        for word in range(generator.randint(0, 12)):
            row += [word] * generator.randint(1, 6)
        row = (row + [-1] * 40)[:40]
        rows.append(row)
        orders.append([generator.randint(-(2**62), 2**62) for _ in row])
        budgets.append(generator.randint(0, 14))
    ours = choose_groups(torch.tensor(rows), torch.tensor(orders), torch.tensor(budgets))
    for row, order, budget, chosen in zip(rows, orders, budgets, ours.tolist(), strict=True):
        assert chosen == brute_force(row, order, budget)


def test_masks_are_whole_words_of_documents_within_the_budget() -> None:
    method, batch = make(ratio=0.4), random_batch(30)
    plan = method.draw(batch, Clock(), Key.of(0, batch.ids))
    groups, asked = batch.groups.flatten(1), plan.asked
    assert not (asked & (groups < 0)).any()
    for i in range(30):
        for row, chosen in zip(batch.groups[i], asked[i].view(2, -1), strict=True):
            words = row[chosen].unique().tolist()
            assert all(chosen[row == word].all() for word in words)
            assert 0 < int(chosen.sum()) <= max(1, round(0.4 * (int(row.max()) + 1)))
    assert not torch.equal(asked.view(30, 2, -1)[:, 0], asked.view(30, 2, -1)[:, 1])
    capped = make(ratio=0.9, most=2).draw(batch, Clock(), Key.of(0, batch.ids))
    assert int(capped.asked.view(60, -1).sum(1).max()) == 2


def test_a_wider_batch_masks_the_same() -> None:
    method, batch = make(), random_batch(3, 24)
    pad = {"tokens": 0, "types": 0, "valid": False, "groups": -1}
    wide = {name: torch.nn.functional.pad(getattr(batch, name), (0, 9), value=pad[name]) for name in pad}
    plan, other = (method.draw(b, Clock(), Key.of(0, b.ids)) for b in (batch, replace(batch, **wide)))
    for name in ("asked", "replacement"):
        assert torch.equal(getattr(plan, name).view(3, 2, 24), getattr(other, name).view(3, 2, 33)[..., :24])


def test_losses_of_pairs() -> None:
    """Equal scores give 1 in both; 3 apart 0 and 0.0949; the softmax of a swapped pair gives 2 minus the loss."""
    d = torch.tensor([0.0, 3.0, -3.0, 0.4])
    assert pair_loss(d, "hinge").tolist() == pytest.approx([1, 0, 4, 0.6])
    soft = pair_loss(d, "softmax_margin")
    assert soft[:2].tolist() == pytest.approx([1, 0.0949], abs=1e-4)
    torch.testing.assert_close(soft + pair_loss(-d, "softmax_margin"), torch.full((4,), 2.0))
    assert soft[3].item() == pytest.approx(2 / (1 + math.exp(0.4)))
    assert pair_loss(d, "hinge", 2.0).tolist() == pytest.approx([2, 0, 5, 1.6])


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "electra", "modernbert"])
def test_the_masked_term_is_the_loss_of_transformers(architecture: str) -> None:
    """The mean over the pieces that are asked for equals the model's own loss on the same inputs."""
    settings = Settings(network=ModelSettings(architecture, config_of(architecture)), chunk=5)
    method = build(settings, DataSettings(length=32, vocabulary=VOCABULARY), {}).eval()
    batch = random_batch()
    plan = method.draw(batch, Clock(), Key.of(0, batch.ids))
    labels = torch.where(plan.asked, batch.tokens.flatten(1), -100).view(8, -1)
    more = {"token_type_ids": batch.types.flatten(0, 1)} if method._typed else {}
    own = method.model(
        input_ids=method.inputs(batch, plan), attention_mask=batch.valid.flatten(0, 1).long(), labels=labels, **more
    )
    output = method(batch, plan)
    torch.testing.assert_close(output.terms["masked"].mean, own.loss, rtol=1e-5, atol=1e-6)
    scores = own.logits.flatten(0, 1)[plan.asked.flatten()]
    torch.testing.assert_close(method.predict(batch, plan), scores.float(), rtol=1e-4, atol=1e-5)
    assert bool(output.loss.isfinite())


def config_of(architecture: str) -> dict[str, Any]:
    if architecture == "distilbert":
        return {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 80}
    return {**SIZES, "max_position_embeddings": 80}


def test_an_architecture_without_such_a_head_is_an_error() -> None:
    settings = Settings(network=ModelSettings("albert", {**SIZES, "embedding_size": 16}))
    with pytest.raises(ValueError, match=r"head of AlbertForMaskedLM is none of those known here \(BERT"):
        build(settings, DataSettings(length=32, vocabulary=VOCABULARY), {})


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match=r"model\.margin: with pairwise=softmax_margin"):
        build(Settings(pairwise="softmax_margin", margin=2.0), DataSettings(vocabulary=VOCABULARY), {})


def test_initial_weights() -> None:
    method = build(
        Settings(network=ModelSettings("bert", {**SIZES, "hidden_size": 128, "num_hidden_layers": 1})),
        DataSettings(length=32, vocabulary=VOCABULARY),
        {},
    )
    assert method.pooler.dense.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert method.score.weight.std().item() == pytest.approx(0.02, rel=0.25)
    assert not method.pooler.dense.bias.any() and not method.score.bias.any()
    assert not method.score.bias.requires_grad


def test_biases_and_norms_do_not_decay() -> None:
    """As in the release: everything but biases and LayerNorm."""
    method = make()
    decay = {name: group["weight_decay"] for group in param_groups(method, 0.01) for name, _ in group["params"]}
    assert set(decay) == {name for name, _ in method.named_parameters()} - {"score.bias"}
    for name, value in decay.items():
        assert value == (0 if name.endswith("bias") or "LayerNorm" in name else 0.01), name


@pytest.mark.parametrize("kind", ["BertForPreTraining", "BertForMaskedLM"])
def test_a_given_model_brings_its_pooler(tmp_path: Path, kind: str) -> None:
    config = transformers.BertConfig(vocab_size=len(PIECES), max_position_embeddings=72, **SIZES)
    model = getattr(transformers, kind)(config)
    model.save_pretrained(tmp_path)
    network = open_network(tmp_path)
    method = build(Settings(), DataSettings(length=32, vocabulary=VOCABULARY), {"model": network})
    if kind == "BertForPreTraining":
        assert torch.equal(method.pooler.dense.weight, model.bert.pooler.dense.weight)
    batch = random_batch()
    method(batch, method.draw(batch, Clock(), Key.of(0, batch.ids))).loss.backward()
    still = [n for n, p in method.named_parameters() if p.grad is None and p.requires_grad]
    assert not still


# ---- weights of the release ----------------------------------------------------------------------------------------


def test_released_names() -> None:
    assert is_released(RELEASED) and not is_released({"bert.x": torch.zeros(1)})
    old = {f"module.{name}": tensor for name, tensor in RELEASED.items()}
    for name in [n for n in old if "LayerNorm" in n]:
        old[name.replace(".weight", ".gamma").replace(".bias", ".beta")] = old.pop(name)
    ours = released_to_ours(old)
    assert set(ours) == set(make().state_dict())
    assert torch.equal(ours["score.weight"], RELEASED["cls.weight"])


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_init_reads_released_weights(tmp_path: Path, name: str) -> None:
    from safetensors.torch import save_file

    from unmask.language.interop.pretrained import load_initial_weights

    if name.endswith("bin"):
        torch.save(RELEASED, tmp_path / name)
    else:
        save_file({k: v.clone() for k, v in RELEASED.items()}, tmp_path / name)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    for place in (tmp_path, tmp_path / name):
        method = PROP(bert(), VOCABULARY, Settings())
        load_initial_weights(method, place)
        assert all(torch.equal(a, b) for a, b in zip(method.parameters(), make().parameters(), strict=True))
    with pytest.raises(ValueError, match="holds another model than this recipe builds"):
        load_initial_weights(PROP(bert(num_hidden_layers=1), VOCABULARY, Settings()), tmp_path)
    save_file({"other": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="only in the file: other"):
        load_initial_weights(method, tmp_path / "other.safetensors")


# ---- the checks ----------------------------------------------------------------------------------------------------


def test_checks(unchecked: None) -> None:
    network = ModelSettings("bert", {**SIZES, "num_hidden_layers": 1, "max_position_embeddings": 32})
    method = build(Settings(network=network, ratio=0.3), DataSettings(length=32, vocabulary=VOCABULARY), {})
    registry.part("language/prop", "checks").check_method(method.eval(), random_batch(4, 16))  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["tiny", "small", "paper"])
def test_recipes(name: str) -> None:
    recipe = load_recipe("language/prop", name)
    assert recipe.method == "language/prop"
    assert recipe.model.pairwise == "hinge"
