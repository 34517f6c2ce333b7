"""SparsePO: the authors' numbers, the two losses it generalises, exact properties, and the checks of its kind."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor

from unmask.core import registry
from unmask.core.errors import UnmaskError
from unmask.core.losses import dpo, sparse_preference, tdpo1
from unmask.core.method import Clock
from unmask.core.networks import Network
from unmask.core.randomness import Key
from unmask.core.training.groups import make_optimizer, set_rates
from unmask.core.training.recipe import NetworkSource, Optimizer, load_recipe
from unmask.language.data.preferences import PreferenceBatch
from unmask.language.data.preferences import Settings as DataSettings
from unmask.language.data.vocabulary import Vocabulary
from unmask.language.encoders.activations import TYPE_OF, chosen_roles, roles_of
from unmask.language.encoders.token_masks import LearnedMask, MaskSettings, activation_mask
from unmask.language.methods import sparsepo
from unmask.language.methods.sparsepo import Settings, SparsePO, SupervisedFineTuning

GOLDEN = load_file(Path(__file__).parents[2] / "golden" / "sparsepo.safetensors")
VOCABULARY = Vocabulary(48, 1, 3, 2, 0, None, (0, 1, 2, 3), "golden")
BETA = 0.8
# What the release sees of GPT-2, by our names.
RELEASED = (
    "query", "key", "value", "heads", "embedding", "attention_input", "after_attention", "mlp_input", "mlp_output",
    "layer_output", "final_norm", "logits",
)  # fmt: skip
HOOKS = {
    "embedding": "resid.post_emb", "attention_input": "resid.torso.input_ln_attn_", "query": "attn.q_",
    "key": "attn.k_", "value": "attn.v_", "heads": "attn.v_out_", "after_attention": "resid.torso.delta_attn_",
    "mlp_input": "resid.torso.post_ln_attn_", "mlp_output": "resid.torso.delta_mlp_",
    "layer_output": "resid.torso.post_mlp_", "final_norm": "resid.post_ln_f", "logits": "logits",
}  # fmt: skip
ONCE = ("embedding", "final_norm", "logits")


def gpt2(prefix: str = "", **changes: Any) -> Any:
    sizes = {"vocab_size": 48, "n_embd": 32, "n_inner": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **changes}))
    if prefix:
        held = {k.removeprefix(prefix): v for k, v in GOLDEN.items() if k.startswith(f"{prefix}transformer.")}
        model.load_state_dict(held, strict=False)
    return model


def close(found: Tensor | None, wanted: Tensor, what: str = "", by: float = 1e-5) -> None:
    assert found is not None and found.shape == wanted.shape, what
    assert (found.detach() - wanted).abs().max() <= by * wanted.abs().max(), what


@pytest.fixture
def batch() -> PreferenceBatch:
    """The recorded pairs, chosen and rejected side by side."""
    width = GOLDEN["input/rejected_input_ids"].shape[1]
    sides = [(GOLDEN[f"input/{side}_input_ids"], GOLDEN[f"input/{side}_labels"]) for side in ("chosen", "rejected")]
    tokens = torch.stack([F.pad(ids, (0, width - ids.shape[1])) for ids, _ in sides], 1)
    counted = torch.stack([F.pad(labels, (0, width - labels.shape[1]), value=-100) != -100 for _, labels in sides], 1)
    prompts = counted[:, 0].int().argmax(-1)
    batch = PreferenceBatch(tokens, prompts, prompts[:, None] + counted.sum(-1), torch.tensor([11, 22, 33]))
    assert torch.equal(batch.response, counted)
    return batch


def method_of(settings: Settings) -> SparsePO:
    return SparsePO(gpt2("weights/"), gpt2("weights/teacher/"), settings)


def learned(**changes: Any) -> SparsePO:
    """With the recorded mask."""
    method = method_of(Settings(beta=BETA, chunk=7, masks=MaskSettings(**changes)))
    put_mask(next(iter(method.masks.learned.values())))
    return method


@torch.no_grad()
def put_mask(mask: Any) -> None:
    mask.load_state_dict(recorded_mask("weights/common_mask."))


def recorded_mask(prefix: str) -> dict[str, Tensor]:
    rows = [GOLDEN[f"{prefix}w_per_layer.{i}.w.weight"][0] for i in range(3)]
    biases = [GOLDEN[f"{prefix}w_per_layer.{i}.w.bias"][0] for i in range(3)]
    shared = {name: GOLDEN[prefix + name] for name in ("layer_norm.weight", "layer_norm.bias", "mixer.weight")}
    return {"weight": torch.stack(rows), "bias": torch.stack(biases), **shared}


def paired(name: str) -> Tensor:
    """A recorded tensor, [2 pairs, ...] with all chosen first, as [pairs, 2, ...]."""
    return torch.stack(GOLDEN[name].chunk(2), 1)


def terms_of(method: SparsePO, batch: PreferenceBatch) -> dict[str, Tensor]:
    """Log-ratios, divergences and masks of every token, zeros outside the responses."""
    held: dict[str, Tensor] = {}

    def keep(*given: Any) -> Tensor:
        held.update(zip(("log_ratio", "kl", "reward", "divergence", "response"), given, strict=False))
        held["losses"] = sparse_preference(*given)
        return held["losses"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparsepo, "sparse_preference", keep)
        held["loss"] = method(batch, None).loss
    return held


# ---- the authors' numbers ------------------------------------------------------------------------------------------


def test_the_authors_learned_mask(batch: PreferenceBatch) -> None:
    """Token terms, masks, the loss of every pair, and every gradient."""
    method = learned(reward_l1=1e-3, divergence_l1=2e-3)
    found = terms_of(method, batch)
    response = found["response"]
    assert torch.equal(response, paired("output/loss_mask"))
    close(found["log_ratio"], paired("output/u_token") * response, "log-ratios")
    close(found["kl"], -paired("output/d_token") * response, "divergences")
    close(found["reward"], paired("output/spo/mask_u") * response, "mask")
    close(found["divergence"], paired("output/spo/mask_d") * response, "mask")
    close((found["reward"] * found["log_ratio"]).sum(-1), paired("output/spo/U"))
    close(found["losses"], GOLDEN["output/spo/loss_core_per_pair"], "losses")
    close(found["loss"], GOLDEN["output/spo/loss"], "loss")
    found["loss"].backward()
    for name, parameter in method.model.named_parameters():
        close(parameter.grad, GOLDEN[f"grad/{name}"], name)
    mask = method.masks.learned["common"]
    wanted = recorded_mask("grad/common_mask.")
    for name, parameter in mask.named_parameters():
        close(parameter.grad, wanted[name], name)
    assert all(p.grad is None for p in method.reference.parameters())


def test_the_authors_sparsity(batch: PreferenceBatch) -> None:
    """The released percentage is a mean over responses; ours is the share of all tokens."""
    method = learned()
    found = terms_of(method, batch)
    zeros = (found["reward"] == 0) & found["response"]
    shares = zeros.sum(-1) / found["response"].sum(-1)
    metrics = method(batch, None).metrics
    for side, name in enumerate(("chosen", "rejected")):
        wanted = GOLDEN[f"output/spo/metric/Weights.rw_{name}_sparsity"]
        torch.testing.assert_close(100 * shares[:, side].mean(), wanted)
        assert float(metrics[f"reward_zeros_{name}"].total) == float(zeros[:, side].sum())


def test_the_authors_activation_masks(batch: PreferenceBatch) -> None:
    """Every single activation's mask, those of the types, the final one; loss and gradients."""
    masks = MaskSettings(kind="activations", activations=RELEASED)
    method = method_of(Settings(beta=BETA, masks=masks, chunk=5))
    response = batch.response.flatten(0, 1)[:, 1:]
    where = response.flatten().nonzero()[:, 0]
    readings = method.masks.look(method.reference, batch.tokens.flatten(0, 1)[:, :-1], where).readings
    assert len(readings) == 3 * (len(RELEASED) - len(ONCE)) + len(ONCE)
    for (role, layer), reading in readings.items():
        name = f"output/mapo/mask_tensor/{HOOKS[role]}" + ("" if role in ONCE else str(layer))
        mask, constant = activation_mask(reading, response)
        assert not constant.any()
        close(torch.stack([mask[0::2], mask[1::2]], 1), paired(name), name)
    for kind in ("attn", "resid", "logits"):
        ours = {"attn": "attention", "resid": "residual"}.get(kind, kind)
        of_type = tuple(role for role in RELEASED if TYPE_OF[role] == ours)
        part = method_of(Settings(beta=BETA, masks=replace(masks, activations=of_type)))
        close(terms_of(part, batch)["reward"], paired(f"output/mapo/mask_type/{kind}"), kind)
    found = terms_of(method, batch)
    close(found["reward"], paired("output/mapo/mask_fp32stats"), "mask")
    assert torch.equal(found["reward"], found["divergence"])
    close(found["loss"], GOLDEN["output/mapo/loss_fp32stats"], "loss")
    found["loss"].backward()
    grads = dict(method.model.named_parameters())
    checked = [name for name in GOLDEN if name.startswith("grad_mapo/")]
    for name in checked:
        close(grads[name.removeprefix("grad_mapo/")].grad, GOLDEN[name], name)
    assert len(checked) == 9


@pytest.mark.parametrize("name", ["dpo", "tdpo1"])
def test_the_baselines_own_repositories(name: str, batch: PreferenceBatch) -> None:
    method = method_of(Settings(beta=BETA, loss=name))  # type: ignore[arg-type]
    output = method(batch, None)
    close(output.loss, GOLDEN[f"output/baseline/{name}"], name)
    output.loss.backward()
    grads = dict(method.model.named_parameters())
    for key in [k for k in GOLDEN if k.startswith(f"grad_{name}/")]:
        close(grads[key.removeprefix(f"grad_{name}/")].grad, GOLDEN[key], key)


def test_the_authors_step_and_decay(batch: PreferenceBatch) -> None:
    """One AdamW step: only the masks' matrices decay, by 0.01."""
    method = learned(reward_l1=1e-3, divergence_l1=2e-3)
    optimizer = make_optimizer(method, Optimizer(betas=(0.9, 0.999), weight_decay=0.0))
    set_rates(optimizer, 1e-3, 0.0)
    decaying = {n for g in optimizer.param_groups if g["weight_decay"] for n in g["param_names"]}
    assert decaying == {"masks.learned.common.weight", "masks.learned.common.mixer.weight"}
    method(batch, None).loss.backward()
    optimizer.step()
    prefix = "after/student/common_mask."
    mask = method.masks.learned["common"]
    close(mask.weight[:1], GOLDEN[f"{prefix}w_per_layer.0.w.weight"])
    close(mask.bias[:1], GOLDEN[f"{prefix}w_per_layer.0.w.bias"])
    close(mask.mixer.weight, GOLDEN[f"{prefix}mixer.weight"])


def test_the_authors_initialisation() -> None:
    """Shares of dead masks and of zeros, and the mean, of many draws on the recorded hidden states."""
    response = GOLDEN["output/loss_mask"]
    hidden = torch.stack([GOLDEN[f"output/spo/ref_hidden/{i}"][:, :-1][response] for i in (1, 2, 3)])
    mask, made = LearnedMask(3, 32), []
    with torch.no_grad():
        for _ in range(1500):
            mask.draw_again()
            made.append(mask(hidden))
    masks = torch.stack(made)
    dead = float((masks == 0).all(1).float().mean())
    assert dead == pytest.approx(int(GOLDEN["sampler/init_dead_count_of_2000"]) / 2000, abs=0.04)
    assert float((masks == 0).float().mean()) == pytest.approx(float(GOLDEN["sampler/init_zero_share_mean"]), abs=0.05)
    assert float(masks.mean()) == pytest.approx(float(GOLDEN["sampler/init_mask_mean"]), rel=0.15)


# ---- the two losses it generalises ---------------------------------------------------------------------------------


def closed_form(policy: Tensor, ref: Tensor, targets: Tensor, response: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """DPO and TDPO1 of whole scores, [pairs, 2, tokens, vocabulary], by torch.distributions."""
    ours, theirs = (torch.distributions.Categorical(logits=scores) for scores in (policy, ref))
    ratio = ((ours.log_prob(targets) - theirs.log_prob(targets)) * response).sum(-1)
    kl = (torch.distributions.kl_divergence(theirs, ours) * response).sum(-1)
    margin = ratio[:, 0] - ratio[:, 1]
    plain = -torch.log(torch.sigmoid(beta * margin))
    return plain, -torch.log(torch.sigmoid(beta * (margin - (kl[:, 1] - kl[:, 0]))))


def scores_of(model: Any, batch: PreferenceBatch) -> Tensor:
    return model(batch.tokens.flatten(0, 1)).logits[:, :-1].unflatten(0, (-1, 2))


def test_masks_of_one_are_the_baselines(batch: PreferenceBatch) -> None:
    method = method_of(Settings(beta=BETA, masks=MaskSettings(kind="none"), chunk=9))
    policy, ref = (scores_of(m, batch).double() for m in (method.model, method.reference.module))
    response = batch.response[:, :, 1:]
    wanted_dpo, wanted_tdpo = closed_form(policy, ref, batch.tokens[:, :, 1:], response, BETA)
    found = terms_of(method, batch)
    torch.testing.assert_close(found["losses"].double(), wanted_tdpo, atol=1e-6, rtol=0)
    ones, zeros = response.float(), torch.zeros_like(found["kl"])
    given = found["log_ratio"], found["kl"]
    torch.testing.assert_close(
        sparse_preference(*given, ones, zeros, response, BETA).double(), wanted_dpo, atol=1e-6, rtol=0
    )
    torch.testing.assert_close(dpo(given[0], response, BETA).double(), wanted_dpo, atol=1e-6, rtol=0)
    half = sparse_preference(*given, ones / 2, ones / 2, response, BETA)
    torch.testing.assert_close(half, tdpo1(*given, response, BETA / 2))


def test_a_policy_that_is_its_reference(batch: PreferenceBatch) -> None:
    """ln 2, and the penalties, whatever the masks."""
    model = gpt2("weights/")
    method = SparsePO(model, copy.deepcopy(model), Settings(masks=MaskSettings(reward_l1=0.1, divergence_l1=0.2)))
    put_mask(method.masks.learned["common"])
    output = method(batch, None)
    assert float(output.terms["preference"].mean.detach()) == pytest.approx(math.log(2), abs=1e-6)
    reward, divergence = (output.terms[name].total.detach() for name in ("reward_l1", "divergence_l1"))
    assert reward == divergence > 0


# ---- exact properties ----------------------------------------------------------------------------------------------


def test_only_masked_tokens_move_their_scores(batch: PreferenceBatch) -> None:
    """No gradient at scores of prompts, of padding, and of tokens whose mask is 0."""
    method = learned()
    held: list[Tensor] = []

    def hold(_: Any, given: Any, output: Any) -> Any:
        output.last_hidden_state.retain_grad()
        held.append(output.last_hidden_state)

    method.model.base_model.register_forward_hook(hold)
    terms_of(method, batch)["loss"].backward()
    weights = terms_of(method, batch)["reward"].flatten(0, 1)
    assert held[0].grad is not None
    moved = held[0].grad.abs().sum(-1) > 0
    assert torch.equal(moved, weights > 0)
    assert (weights == 0)[batch.response.flatten(0, 1)[:, 1:]].any()


def test_no_gradient_of_the_penalty_through_a_closed_relu(batch: PreferenceBatch) -> None:
    mask = LearnedMask(1, 4)
    with torch.no_grad():
        mask.weight.copy_(torch.tensor([[1.0, 0, 0, 0]]))
        mask.mixer.weight.fill_(1.0)
    hidden = torch.tensor([[[3.0, 1, 0, 0], [-3.0, 1, 0, 0]]])
    made = mask(hidden)
    assert made[0] > 0 and made[1] == 0
    (gradient,) = torch.autograd.grad(made[1], mask.weight)
    assert not gradient.any()


def reading_of(values: Tensor) -> Any:
    from unmask.language.encoders.activations import Reading

    return Reading.of(values)


def test_an_activations_mask() -> None:
    """In [0, 1], least 0 and greatest 1; the same after scaling and shifting; by the response alone."""
    values, response = torch.randn(2, 6, 8), torch.tensor([[0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]) > 0
    mask, constant = activation_mask(reading_of(values), response)
    assert not constant.any() and not mask[~response].any()
    inside = mask.masked_fill(~response, 0.5)
    assert inside.amax(1).tolist() == [1, 1] and inside.amin(1).tolist() == [0, 0]
    torch.testing.assert_close(activation_mask(reading_of(3 * values + 2), response)[0], mask, atol=1e-5, rtol=0)
    changed = values.masked_fill(~response[..., None], 100.0)
    assert torch.equal(activation_mask(reading_of(changed), response)[0], mask)


def test_a_constant_response_has_the_mask_one() -> None:
    values, response = torch.randn(3, 4, 8), torch.tensor([[0, 0, 1, 0], [0, 1, 1, 1], [0, 1, 1, 0]]) > 0
    values[1] = values[1, :1] * 1e3
    mask, constant = activation_mask(reading_of(values), response)
    assert constant.tolist() == [True, True, False]
    assert torch.equal(mask[:2], response[:2].float())
    assert sorted(mask[2][response[2]].tolist()) == [0.0, 1.0]
    normalised = F.layer_norm(torch.randn(3, 4, 64), (64,))  # means are rounding, and nothing else
    assert activation_mask(reading_of(normalised), response)[1].all()


def test_one_token_responses_count(batch: PreferenceBatch) -> None:
    short = replace(batch, lengths=batch.prompts[:, None] + torch.ones(1, 2, dtype=torch.long))
    method = method_of(Settings(masks=MaskSettings(kind="activations")))
    output = method(short, None)
    assert float(output.metrics["constant"].mean) == 1.0
    assert torch.isfinite(output.loss)


def test_dead_masks_are_drawn_again() -> None:
    mask = LearnedMask(2, 8)
    hidden = torch.randn(2, 20, 8)
    with torch.no_grad():
        mask.mixer.weight.copy_(-mask.mixer.weight.abs())
    assert not mask(hidden).any()
    assert mask.come_alive(hidden) >= 1
    share = float((mask(hidden) == 0).float().mean())
    assert 0 < share < 1
    with pytest.raises(UnmaskError, match="are the hidden states of the reference finite"):
        mask.come_alive(torch.full((2, 3, 8), torch.nan))


def test_independent_masks_and_one_alone(batch: PreferenceBatch) -> None:
    both = method_of(Settings(masks=MaskSettings(common=False)))
    assert sorted(both.masks.learned) == ["divergence", "reward"]
    alone = learned(common=False, on=("reward",))
    found = terms_of(alone, batch)
    assert torch.equal(found["divergence"], batch.response[:, :, 1:].float())
    close(found["reward"], paired("output/spo/mask_u") * found["response"])


def test_chunks_change_nothing(batch: PreferenceBatch) -> None:
    losses = []
    for chunk in (1, 4, 512):
        method = method_of(Settings(chunk=chunk, masks=MaskSettings(kind="none")))
        loss = method(batch, None).loss
        loss.backward()
        losses.append((loss.detach(), method.model.transformer.wte.weight.grad))
    for loss, gradient in losses[1:]:
        torch.testing.assert_close(loss, losses[0][0])
        torch.testing.assert_close(gradient, losses[0][1], atol=1e-6, rtol=1e-5)


def test_no_dropout(batch: PreferenceBatch) -> None:
    method = SparsePO(gpt2(resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5), gpt2(), Settings()).train()
    assert torch.equal(method(batch, None).loss, method(batch, None).loss)


# ---- settings and networks -----------------------------------------------------------------------------------------


SMALL = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


def neox(**changes: Any) -> Any:
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**{**SMALL, **changes}))


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2))


def gptj() -> Any:
    return transformers.GPTJForCausalLM(
        transformers.GPTJConfig(vocab_size=48, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64)
    )


def bigcode() -> Any:
    return transformers.GPTBigCodeForCausalLM(
        transformers.GPTBigCodeConfig(vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    )


@pytest.mark.parametrize("make", [gpt2, neox, lambda: neox(use_parallel_residual=False), llama, gptj, bigcode])
def test_every_role_that_an_architecture_has_is_seen(make: Any, batch: PreferenceBatch) -> None:
    model = make()
    method = SparsePO(model, copy.deepcopy(model), Settings(masks=MaskSettings(kind="activations")))
    where = batch.response.flatten(0, 1)[:, 1:].flatten().nonzero()[:, 0]
    readings = method.masks.look(method.reference, batch.tokens.flatten(0, 1)[:, :-1], where).readings
    layers = model.config.num_hidden_layers
    seen = {role: [layer for found, layer in readings if found == role] for role in roles_of(model)}
    for role, at in seen.items():
        assert at == ([0] if role in ONCE else list(range(layers))), role
    assert {TYPE_OF[role] for role in seen} == {"mlp", "attention", "residual", "logits"}
    assert not method.reference.module._forward_hooks
    method(batch, None).loss.backward()


def test_activations_of_a_neox_are_what_they_are_called(batch: PreferenceBatch) -> None:
    """The first layer, done by hand."""
    model = neox()
    method = SparsePO(model, copy.deepcopy(model), Settings(masks=MaskSettings(kind="activations")))
    tokens = batch.tokens.flatten(0, 1)[:, :-1]
    readings = method.masks.look(method.reference, tokens, torch.arange(3)).readings
    base, layer = model.gpt_neox, model.gpt_neox.layers[0]
    with torch.no_grad():
        stream = base.embed_in(tokens)
        normed = layer.input_layernorm(stream)
        fused = layer.attention.query_key_value(normed).unflatten(-1, (4, 3, 8))
        hidden = layer.mlp.act(layer.mlp.dense_h_to_4h(layer.post_attention_layernorm(stream)))
        output = base(tokens, output_hidden_states=True).hidden_states[1]
    for role, wanted in {
        "embedding": stream, "attention_input": normed, "key": fused[..., 1, :].flatten(-2), "mlp_activation": hidden,
        "mlp_output": layer.mlp.dense_4h_to_h(hidden), "layer_output": output,
    }.items():  # fmt: skip
        torch.testing.assert_close(readings[role, 0].mean, wanted.mean(-1), atol=1e-6, rtol=1e-4)
    for role in ("query", "key"):  # turning keeps length, not the mean; the first position is not turned
        torch.testing.assert_close(readings[f"rotated_{role}", 0].mean[:, 0], readings[role, 0].mean[:, 0])
        assert not torch.allclose(readings[f"rotated_{role}", 0].mean, readings[role, 0].mean)


def test_roles_that_are_not_there_are_refused() -> None:
    with pytest.raises(UnmaskError, match="gpt2 has no rotated_key; it has mlp_activation, query"):
        chosen_roles(gpt2(), ["rotated_key"])
    with pytest.raises(UnmaskError, match="no 'hooks'; types are mlp, attention"):
        chosen_roles(gpt2(), ["hooks"])
    sizes = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 1, "ffn_dim": 32, "num_attention_heads": 2}
    opt = transformers.OPTForCausalLM(transformers.OPTConfig(**sizes, word_embed_proj_dim=32))
    with pytest.raises(UnmaskError, match="not of opt; learn the masks instead"):
        chosen_roles(opt, ["mlp"])


def network(model: Any) -> Network:
    return Network("DIR", Path(), "transformers", model.requires_grad_(False).eval(), "hash")


def data(**changes: Any) -> DataSettings:
    return DataSettings(length=32, prompt_length=16, vocabulary=replace(VOCABULARY, **changes))


def test_a_given_network_is_the_reference_and_stays(batch: PreferenceBatch) -> None:
    given = network(gpt2())
    method = sparsepo.build(Settings(), data(), {"model": given})
    assert isinstance(method, SparsePO)
    assert method.reference.module is given.module and not any(p.requires_grad for p in given.module.parameters())
    assert all(p.requires_grad for p in method.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(method.model.parameters(), given.module.parameters(), strict=True))
    extra = sparsepo.build(Settings(), data(size=49, mask=48), {"model": given})  # a mask token, which no pair has
    assert extra.model.config.vocab_size == 48
    with pytest.raises(UnmaskError, match="has 48 ids, and the tokenizer 60"):
        sparsepo.build(Settings(), data(size=60), {"model": given})
    with pytest.raises(UnmaskError, match="scores 50 ids, and the model 48"):
        sparsepo.build(Settings(), data(), {"model": given, "reference": network(gpt2(vocab_size=50))})


def test_fine_tuning_on_the_chosen(batch: PreferenceBatch) -> None:
    method = SupervisedFineTuning(gpt2("weights/"), 7).eval()
    logits = scores_of(method.model, batch)[:, 0]
    targets = batch.tokens[:, 0, 1:].masked_fill(~batch.response[:, 0, 1:], -100)
    torch.testing.assert_close(method(batch, None).loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))


@pytest.mark.parametrize("recipe", ["tiny", "small", "paper"])
def test_recipes(recipe: str) -> None:
    found = load_recipe("language/sparsepo", recipe)
    assert found.model.loss == "sparsepo"
    if found.stages is not None:
        with pytest.raises(ValueError, match="remove one of them"):
            registry.load("language/sparsepo").planned(replace(found, networks={"model": NetworkSource("DIR")}))


# ---- the checks of its kind ----------------------------------------------------------------------------------------


MASKS = {
    "common": MaskSettings(reward_l1=1e-3),
    "independent": MaskSettings(common=False, divergence_l1=1e-3),
    "activations": MaskSettings(kind="activations"),
    "none": MaskSettings(kind="none"),
}


def check(masks: MaskSettings, batch: PreferenceBatch, *skip: str) -> None:
    method = sparsepo.build(Settings(masks=masks), data(), {"model": network(gpt2())})
    assert isinstance(method, SparsePO)
    for mask in method.masks.learned.values():  # far enough from the dead ends of a tiny mask
        put_mask(mask)
    registry.part("language/sparsepo", "checks").check_method(method, batch, kind="finetune", skip=skip)


@pytest.mark.parametrize("masks", MASKS)
def test_checks(masks: str, batch: PreferenceBatch) -> None:
    check(MASKS[masks], batch, "compiles")


@pytest.mark.slow
@pytest.mark.parametrize("masks", MASKS)
def test_checks_compiled(masks: str, batch: PreferenceBatch, unchecked: None) -> None:
    check(MASKS[masks], batch)


def test_checks_of_fine_tuning(batch: PreferenceBatch) -> None:
    method = sparsepo.build(Settings(loss="sft"), data(), {"model": network(gpt2(attn_pdrop=0.0))})
    registry.part("language/sparsepo", "checks").check_method(method, batch, kind="finetune", skip=("compiles",))


def test_draw_is_nothing(batch: PreferenceBatch) -> None:
    assert learned().draw(batch, Clock(), Key.of(0, batch.ids)) is None


def test_masks_of_a_network_for_short_texts() -> None:
    """Dead initial masks are looked for on no more tokens than it sees."""
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    method = SparsePO(model, copy.deepcopy(model), Settings())
    method.masks.come_alive(method.reference)


def test_masks_of_no_activations_are_refused() -> None:
    overrides = {"model.masks.kind": "activations", "model.masks.activations": []}
    with pytest.raises(UnmaskError, match="model.masks.activations"):
        load_recipe("language/sparsepo", "tiny", overrides)
