"""HuBERT: closed forms of its loss, who gets a gradient, several targets, padding, and the checks of all methods."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.core.checks import CHECKS
from unmask.core.errors import UnmaskError
from unmask.core.mask import Mask
from unmask.core.masking import SpanMasking
from unmask.core.method import Clock
from unmask.core.randomness import Key
from unmask.speech_audio.checks import check_method, corrupt
from unmask.speech_audio.data.clips import AudioBatch
from unmask.speech_audio.data.clips import Settings as DataSettings
from unmask.speech_audio.data.frames import num_frames
from unmask.speech_audio.data.labels import Target
from unmask.speech_audio.encoders.wav2vec2 import EncoderSettings
from unmask.speech_audio.methods import prediction_targets
from unmask.speech_audio.methods.hubert import HeadSettings, HuBERT, HuBERTPlan, Settings, build

ENCODER = EncoderSettings(
    channels=16, dim=32, depth=2, heads=2, positional_kernel=8, positional_groups=4, input_dropout=0.0, dropout=0.0,
    attention_dropout=0.0, layer_drop=0.0,
)  # fmt: skip
LARGE = replace(ENCODER, extractor="layer_norm", norm="pre")


def targets(*classes: int) -> list[Target]:
    return [Target(f"layer {k}", count, 50.0, "") for k, count in enumerate(classes)]


def make(*classes: int, encoder: EncoderSettings = ENCODER, untied: bool = True, **options: Any) -> HuBERT:
    head = HeadSettings(8, untied, target_weights=options.pop("target_weights", None))
    return HuBERT(Settings(encoder, head, **options), targets(*classes))


def make_batch(*classes: int, lengths: tuple[int, ...] = (8000, 8000, 8000)) -> AudioBatch:
    count = torch.tensor(lengths)
    samples, frames = max(lengths), num_frames(count)
    audio = torch.randn(len(lengths), samples) * (torch.arange(samples) < count[:, None])
    labels = torch.stack([torch.randint(0, n, (len(lengths), num_frames(samples))) for n in classes], dim=2)
    labels[torch.arange(num_frames(samples)) >= frames[:, None]] = -1
    return AudioBatch(audio, count, frames, torch.arange(len(lengths)) * 7 + 3, labels)


def draw(model: HuBERT, batch: AudioBatch, seed: int = 0) -> HuBERTPlan:
    return model.draw(batch, Clock(), Key.of(seed, batch.ids))


# --- the head ---


def test_two_classes_in_two_dimensions() -> None:
    """o = (1, 0), e_0 = (1, 0), e_1 = (0, 1), temperature 0.1: logits 10 and 0."""
    model = HuBERT(Settings(ENCODER, HeadSettings(dim=2)), targets(2))
    with torch.no_grad():
        model.final_proj.weight.zero_()
        model.final_proj.bias.copy_(torch.tensor([1.0, 0.0]))
        model.label_embeddings.copy_(torch.eye(2))
    logits = model.logits(torch.randn(1, 32)).detach()
    losses = F.cross_entropy(logits.expand(2, 2), torch.tensor([0, 1]), reduction="none")
    assert abs(losses[0].item() - math.log1p(math.exp(-10))) < 1e-6 and abs(losses[0].item() - 4.54e-5) < 1e-6
    assert abs(losses[1].item() - 10.0000454) < 1e-5


def test_loss_does_not_depend_on_scale() -> None:
    model, batch = make(9).double(), make_batch(9)
    batch = replace(batch, audio=batch.audio.double())
    plan = draw(model, batch)
    before = model(batch, plan).terms["masked"].total
    with torch.no_grad():
        model.final_proj.weight.mul_(7.0), model.final_proj.bias.mul_(7.0), model.label_embeddings.mul_(0.01)
    torch.testing.assert_close(model(batch, plan).terms["masked"].total, before, rtol=1e-5, atol=0)


@pytest.mark.parametrize("classes", [100, 504])
def test_initial_loss_is_that_of_chance(classes: int) -> None:
    model = HuBERT(Settings(ENCODER, HeadSettings(dim=256)), targets(classes))
    batch = make_batch(classes, lengths=(32000,) * 4)
    assert abs(model(batch, draw(model, batch)).terms["masked"].mean.item() - math.log(classes)) < 0.1


@pytest.mark.parametrize("untied", [True, False])
def test_loss_is_plain_cross_entropy_over_cosines(untied: bool) -> None:
    """One target, bit for bit, by the formula; a head of its own or a shared one is then the same."""
    model, batch = make(9, untied=untied).eval(), make_batch(9)
    plan = draw(model, batch)
    features = model.encoder.waveform_features(batch.audio)
    x = model.encoder.contextualise(features, None, plan.mask.hidden, model.mask_embedding)[plan.mask.hidden]
    logits = F.normalize(model.final_proj(x), dim=1) @ F.normalize(model.label_embeddings, dim=1).T / 0.1
    labels = batch.labels[plan.mask.hidden][:, 0]
    output = model(batch, plan)
    assert torch.equal(output.terms["masked"].total, F.cross_entropy(logits, labels, reduction="sum"))
    assert torch.equal(model.predict(batch, plan), logits) and torch.equal(model.target(batch, plan)[:, 0], labels)
    torch.testing.assert_close(output.terms["feature_penalty"].mean, features.square().mean())
    assert output.terms["feature_penalty"].weight == 10.0
    assert float(output.metrics["masked_accuracy"].mean) == float((logits.argmax(1) == labels).float().mean())


# --- where the loss is taken ---


def test_labels_of_visible_frames_do_not_matter() -> None:
    model, batch = make(9), make_batch(9)
    plan = draw(model, batch)
    other = torch.where(plan.mask.hidden[..., None], batch.labels, torch.randint(0, 9, batch.labels.shape))
    first, second = model(batch, plan), model(replace(batch, labels=other), plan)
    assert all(torch.equal(term.total, second.terms[name].total) for name, term in first.terms.items())


def test_visible_frames_give_the_head_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make(9), make_batch(9)
    plan, outputs = draw(model, batch), []
    contextualise = model.encoder.contextualise

    def spy(*args: Any) -> Tensor:
        outputs.append(contextualise(*args))
        outputs[-1].retain_grad()
        return outputs[-1]

    monkeypatch.setattr(model.encoder, "contextualise", spy)
    model(batch, plan).loss.backward()
    assert torch.equal((outputs[0].grad != 0).any(2), plan.mask.hidden)


def test_penalty_reaches_only_the_waveform_encoder() -> None:
    model, batch = make(9), make_batch(9)
    model(batch, draw(model, batch)).terms["feature_penalty"].total.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {name for name, _ in model.named_parameters() if name.startswith("encoder.waveform.")}


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.7, 0.3), (0.0, 1.0)])
def test_both_losses_share_one_count(weights: tuple[float, float]) -> None:
    model = make(9, masked_weight=weights[0], unmasked_weight=weights[1])
    batch = make_batch(9, lengths=(8000, 6000, 8000))
    plan = draw(model, batch)
    output = model(batch, plan)
    hidden, visible = int(plan.mask.hidden.sum()), int(plan.mask.visible.sum())
    assert hidden + visible == int(batch.frames.sum())
    expected = hidden * (weights[0] > 0) + visible * (weights[1] > 0)
    penalty = output.terms.pop("feature_penalty")
    assert int(penalty.count) == int(batch.frames.sum())
    assert list(output.terms) == [n for n, w in zip(("masked", "unmasked"), weights, strict=True) if w]
    assert all(int(term.count) == expected for term in output.terms.values())


# --- several targets ---


def test_equal_targets_double_the_loss() -> None:
    batch = make_batch(6)
    one, two = make(6, untied=False), make(6, 6, untied=False)
    state = one.state_dict()
    two.load_state_dict(state | {"label_embeddings": state["label_embeddings"].repeat(2, 1)})
    plan = draw(one, batch)
    single = one(batch, plan).terms["masked"]
    double = two(replace(batch, labels=batch.labels.repeat(1, 1, 2)), plan).terms["masked"]
    torch.testing.assert_close(double.total, 2 * single.total)
    assert int(double.count) == int(single.count), "frames count once, whatever the number of targets"


def test_permuting_targets_permutes_the_heads_only() -> None:
    batch = make_batch(4, 6, 9)
    first, second = make(4, 6, 9), make(9, 4, 6)
    state, order = first.state_dict(), [2, 0, 1]

    def permute(name: str, sizes: list[int]) -> Tensor:
        parts = state[name].split(sizes)
        return torch.cat([parts[k] for k in order])

    permuted = {"label_embeddings": permute("label_embeddings", [4, 6, 9])}
    permuted |= {name: permute(name, [8, 8, 8]) for name in ("final_proj.weight", "final_proj.bias")}
    second.load_state_dict(state | permuted)
    plan = draw(first, batch)
    swapped = replace(batch, labels=batch.labels[..., order])
    one, two = first(batch, plan), second(swapped, plan)
    torch.testing.assert_close(one.loss, two.loss)
    parts = first.predict(batch, plan).split([4, 6, 9], dim=1)
    assert torch.equal(torch.cat([parts[k] for k in order], dim=1), second.predict(swapped, plan))
    one.loss.backward(), two.loss.backward()
    gradients = dict(second.named_parameters())
    for name, p in first.named_parameters():
        if name.startswith("encoder."):
            torch.testing.assert_close(p.grad, gradients[name].grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_target_of_weight_zero_does_not_train_its_head() -> None:
    model, batch = make(4, 6, target_weights=(1.0, 0.0)), make_batch(4, 6)
    model(batch, draw(model, batch)).loss.backward()
    assert model.final_proj.weight.grad[:8].any() and not model.final_proj.weight.grad[8:].any()
    assert model.label_embeddings.grad[:4].any() and not model.label_embeddings.grad[4:].any()
    alone = make(4)
    alone.load_state_dict({name: t[: {"f": 8, "l": 4}.get(name[0], len(t))] for name, t in model.state_dict().items()})
    first = replace(batch, labels=batch.labels[..., :1])
    torch.testing.assert_close(alone(first, draw(alone, first)).loss, model(batch, draw(model, batch)).loss)


def test_each_target_has_its_accuracy() -> None:
    model, batch = make(4, 6, unmasked_weight=0.1), make_batch(4, 6)
    metrics = model(batch, draw(model, batch)).metrics
    each = [f"{place}_accuracy" for place in ("masked", "unmasked")]
    names = [place + target for place in each for target in ("", "/1 layer 0", "/2 layer 1")]
    assert list(metrics) == names
    mean = (metrics[names[1]].mean + metrics[names[2]].mean) / 2
    torch.testing.assert_close(metrics["masked_accuracy"].mean, mean)


# --- padding and labels ---


@pytest.mark.parametrize("encoder", [ENCODER, LARGE], ids=["base", "large"])
def test_a_padded_batch_is_the_sum_of_its_clips(encoder: EncoderSettings) -> None:
    model = make(5, 7, encoder=encoder, unmasked_weight=0.2).eval()
    batch = make_batch(5, 7, lengths=(8000, 5300, 3000))
    plan = draw(model, batch)
    assert plan.padded
    together = model(batch, plan).terms
    sums = {name: [0.0, 0.0] for name in together}
    for i, samples in enumerate(batch.lengths.tolist()):
        rows, frames = slice(i, i + 1), num_frames(samples)
        alone = AudioBatch(
            batch.audio[rows, :samples], batch.lengths[rows], batch.frames[rows], batch.ids[rows],
            batch.labels[rows, :frames],
        )  # fmt: skip
        own = draw(model, alone)
        assert not own.padded and torch.equal(own.mask.hidden, plan.mask.hidden[rows, :frames])
        for name, term in model(alone, own).terms.items():
            sums[name][0] += float(term.total.detach())
            sums[name][1] += float(term.count)
    for name, term in together.items():
        assert float(term.count) == sums[name][1]
        assert math.isclose(term.total.item(), sums[name][0], rel_tol=1e-4)


def test_frames_without_labels_are_not_scored() -> None:
    """Labels that end a frame early: `frames` says so, and that frame is not even hidden."""
    model, batch = make(9, unmasked_weight=1.0), make_batch(9)
    batch = replace(batch, frames=batch.frames - torch.tensor([1, 0, 0]))
    batch.labels[0, -1], batch.labels[1, 3] = -1, -1
    plan = draw(model, batch)
    assert plan.padded and not plan.mask.hidden[0, -1]
    scored = torch.zeros(batch.labels.shape[:2], dtype=torch.bool)
    for packed in (plan.hidden, plan.visible):
        scored.flatten()[packed.index] = True
        assert int(packed.offsets[-1]) == len(packed.index)
    assert torch.equal(scored, batch.labels[..., 0] >= 0)
    assert model(batch, plan).loss.isfinite()


def test_missing_labels_are_named() -> None:
    model, batch = make(9), make_batch(9)
    with pytest.raises(UnmaskError, match=r"frame labels, and this batch has none; set data.label_sets"):
        draw(model, replace(batch, labels=None))
    with pytest.raises(ValueError, match="`unmask train` makes them"):
        build(Settings(encoder=ENCODER), DataSettings("folder"))


def test_build() -> None:
    data = DataSettings("folder", targets=tuple(targets(4, 6)))
    model = build(Settings(ENCODER, HeadSettings(8), SpanMasking(0.5, 5), 1.0, 0.5, 3.0), data)
    assert model.label_embeddings.shape == (10, 8) and model.final_proj.weight.shape == (16, 32)
    assert model.masking == SpanMasking(0.5, 5) and model.feature_penalty == 3.0
    with pytest.raises(ValueError, match="target_weights has 1 values for 2 targets"):
        build(Settings(ENCODER, HeadSettings(8, target_weights=(1.0,))), data)
    with pytest.raises(ValueError, match="one of the first two > 0"):
        build(Settings(ENCODER, masked_weight=0.0), data)


# --- what every method promises ---


def test_picture() -> None:
    model, batch = make(4, 6), make_batch(4, 6, lengths=(8000, 5300))
    plan = draw(model, batch)
    picture = model.picture(batch, plan)
    frames = num_frames(8000)
    assert picture["input"].shape == picture["masked"].shape == (2, 1, 80, frames)
    assert torch.equal(picture["masked"][:, 0].any(1), plan.mask.visible)
    assert picture["labels"].shape == picture["predicted"].shape == (2, 1, 2, frames)
    assert torch.equal(picture["predicted"][:, 0, 0] >= 0, plan.mask.hidden)
    assert torch.equal(picture["labels"][:, 0, 1], batch.labels[..., 1])


def test_corrupt_overwrites_what_no_visible_frame_sees() -> None:
    batch = make_batch(4, lengths=(8000, 8000, 5000))
    hidden = torch.zeros(3, 24, dtype=torch.bool)
    hidden[0, 5:8] = hidden[1, 23] = hidden[2, 0] = True
    plan = replace(draw(make(4), batch), mask=Mask.from_hidden(hidden, torch.arange(24) < batch.frames[:, None]))
    changed = corrupt(batch, plan, 99.0).audio == 99.0
    spans = [(row.nonzero().min(), row.nonzero().max() + 1) for row in changed]
    assert spans == [(1680, 2560), (7440, 7760), (0, 320)]
    assert changed.sum(1).tolist() == [880, 320, 320]


def test_passes_every_check_with_layer_norm() -> None:
    """No norm over time and no penalty on all features: nothing hidden reaches predictions or gradients."""
    model = make(5, 7, encoder=replace(LARGE, dropout=0.1, layer_drop=0.05), feature_penalty=0.0, unmasked_weight=0.2)
    check_method(model, make_batch(5, 7, lengths=(9000, 7000, 4000, 9000)), skip={"compiles"})


def test_prediction_targets_pass_every_check() -> None:
    """The same network with weights 1/K, as its recipe builds it."""
    settings = Settings(replace(LARGE, layer_drop=0.05), HeadSettings(8), feature_penalty=0.0)
    data = DataSettings("folder", targets=tuple(targets(5, 7, 4)))
    model = prediction_targets.build(settings, data)
    assert model.target_weights == (1 / 3,) * 3
    check_method(model, make_batch(5, 7, 4, lengths=(9000, 7000, 4000, 9000)), skip={"compiles"})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore")
def test_compiles() -> None:
    model = make(5, encoder=replace(ENCODER, layer_drop=0.05), unmasked_weight=0.2)
    only = {check.__name__ for check in CHECKS} - {"compiles"}
    check_method(model, make_batch(5, lengths=(9000, 7000, 4000, 9000)), skip=only)


def test_passes_every_check_with_group_norm() -> None:
    """GroupNorm's statistics are those of the whole clip, and so is the penalty: both are declared, none exempt."""
    model = make(5, encoder=replace(ENCODER, dropout=0.1, layer_drop=0.05))
    assert model.norms_over_all() == {"encoder.waveform.0.norm"} and model.loss_on["feature_penalty"] == "features"
    check_method(model, make_batch(5, lengths=(9000, 7000, 4000, 9000)), skip={"compiles"})


def test_it_learns() -> None:
    """Which of two noises a clip is, at frames that are hidden: learned within a few steps."""
    model = make(2)
    batch = make_batch(2, lengths=(16000,) * 4)
    dull = F.avg_pool1d(batch.audio, 9, 1, 4) * 3
    kind = torch.tensor([0, 1, 0, 1])
    audio = torch.where(kind[:, None] == 1, dull, batch.audio)
    batch = replace(batch, audio=audio, labels=kind[:, None, None].expand(batch.labels.shape).contiguous())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(35):
        output = model(batch, draw(model, batch, seed=step))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert float(output.metrics["masked_accuracy"].mean) > 0.95
