"""`check_method` passes a sound method and names what is wrong with broken ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.core.checks.broken import CAUGHT_BY
from unmask.core import checks
from unmask.core.checks import CHECKS
from unmask.core.checks.encoding import _feature_of
from unmask.core.mask import Mask
from unmask.core.masking import BernoulliMasking, NoiseMasking, RandomMasking
from unmask.core.method import Clock, Features, Output, Plan
from unmask.core.randomness import Key
from unmask.core.targets import patchify
from unmask.vision.checks import check_method
from unmask.vision.data.images import ImageBatch
from unmask.vision.encoders.vit import VisionTransformer, ViTSettings
from unmask.vision.methods.mae import MAE, DecoderSettings

BATCH = ImageBatch(torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 7, 11, 2]))
QUICK = {"skip": {"compiles"}}  # every registered method is compiled in tests/vision/test_methods.py


def make(kind: type[MAE] = MAE, **options: Any) -> MAE:
    encoder = VisionTransformer(ViTSettings(patch_size=4, dim=32, depth=2, heads=2), (16, 16), 3)
    return kind(encoder, DecoderSettings(32, 1, 2), **options)


MASKINGS = [RandomMasking(0.75), BernoulliMasking(0.5), NoiseMasking(slices=2, size=32)]


@pytest.mark.parametrize("masking", MASKINGS, ids=str)
def test_mae_passes(masking: Any) -> None:
    model = make(masking=masking).train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    check_method(model, BATCH, **QUICK)
    assert model.training and all(torch.equal(before[name], p) for name, p in model.state_dict().items())


class SeesHiddenMean(MAE):
    """Leaks the mean of the whole image into its answer."""

    def predict(self, batch: ImageBatch, plan: Plan) -> Tensor:
        return super().predict(batch, plan) + batch.images.mean()


class WrongPolarity(MAE):
    """Takes True for visible."""

    def predict(self, batch: ImageBatch, plan: Plan) -> Tensor:
        return super().predict(batch, Plan(Mask.from_hidden(~plan.mask.hidden)))

    def target(self, batch: ImageBatch, plan: Plan) -> Tensor:
        return super().target(batch, Plan(Mask.from_hidden(~plan.mask.hidden)))


class MasksWhenEncoding(MAE):
    """Drops tokens at random in encode."""

    def encode(self, batch: ImageBatch) -> Features:
        features = super().encode(batch)
        keep = torch.rand(features.tokens.shape[:2]) > 0.5
        return replace(features, tokens=features.tokens * keep[..., None])


class MasksWhenTraining(MAE):
    """Zeroes half of the tokens in train mode only."""

    def encode(self, batch: ImageBatch) -> Features:
        features = super().encode(batch)
        return replace(features, tokens=features.tokens * (0 if self.training else 1))


class ShuffledEncode(MAE):
    """Gives tokens in another order."""

    def encode(self, batch: ImageBatch) -> Features:
        features = super().encode(batch)
        return replace(features, tokens=features.tokens.flip(1))


class DrawsByBatch(MAE):
    """Draws by the position in the batch instead of the sample."""

    def draw(self, batch: ImageBatch, clock: Clock, key: Key) -> Plan:
        return super().draw(batch, clock, Key.of(int(key.state[0]) % 1000, torch.arange(len(batch.ids))))


class DrawsFromTorch(MAE):
    """Draws from the global generator."""

    def draw(self, batch: ImageBatch, clock: Clock, key: Key) -> Plan:
        return Plan(Mask.from_scores(torch.rand(len(batch.ids), 16), 4))


class UnusedParameter(MAE):
    """Has a trainable parameter that nothing uses."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.forgotten = nn.Parameter(torch.ones(3))


class TargetWithGradient(MAE):
    """Forgets to stop the target's gradient."""

    def target(self, batch: ImageBatch, plan: Plan) -> Tensor:
        return plan.mask.hidden_indices.take(patchify(batch.images, 4)) * self.mask_token.sum()


class CountsByWeights(MAE):
    """Counts only tokens it gets wrong by much."""

    def forward(self, batch: ImageBatch, plan: Plan) -> Output:
        output = super().forward(batch, plan)
        term = output.terms["reconstruction"]
        return Output({"reconstruction": replace(term, count=term.count + self.mask_token.detach().sum())})


class NoisyForward(MAE):
    """Draws inside forward."""

    def predict(self, batch: ImageBatch, plan: Plan) -> Tensor:
        answer = super().predict(batch, plan)
        return answer + torch.randn_like(answer)


class LosesState(MAE):
    """Keeps a weight out of the state dict."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.hidden_scale = [torch.ones(())]

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        self.hidden_scale = [torch.full((), 2.0)]
        return super().load_state_dict(*args, **options)

    def predict(self, batch: ImageBatch, plan: Plan) -> Tensor:
        return super().predict(batch, plan) * self.hidden_scale[0]


class ShowsHidden(MAE):
    """The masked picture is not masked."""

    def picture(self, batch: ImageBatch, plan: Plan) -> dict[str, Tensor]:
        return {**super().picture(batch, plan), "masked": batch.images}


FORWARD = "hidden_input_does_not_leak_in_forward"
BROKEN = {
    SeesHiddenMean: ["hidden_input_does_not_leak", "hidden_input_gets_no_gradient", FORWARD],
    WrongPolarity: ["hidden_input_does_not_leak", "predict_uses_visible_input", FORWARD],
    MasksWhenEncoding: ["encode_never_masks"],
    MasksWhenTraining: ["encode_never_masks"],
    ShuffledEncode: ["encode_keeps_spatial_order"],
    DrawsByBatch: ["draw_ignores_the_rest_of_the_batch"],
    DrawsFromTorch: ["draw_depends_on_key_alone", "draw_ignores_the_rest_of_the_batch"],
    UnusedParameter: ["every_trainable_parameter_learns"],
    TargetWithGradient: ["hidden_input_gets_no_gradient"],
    CountsByWeights: ["counts_depend_on_the_plan_alone"],
    NoisyForward: ["forward_is_pure"],
    LosesState: ["state_survives_a_round_trip"],
    ShowsHidden: ["pictures_are_images"],
}


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_broken_method_fails(kind: type[MAE]) -> None:
    with pytest.raises(AssertionError) as failure:
        check_method(make(kind), BATCH, **QUICK)
    message = str(failure.value)
    assert message.startswith(f"{kind.__name__} fails ")
    for name in BROKEN[kind]:
        assert f"- {name}: " in message
    blamed = {check.__name__ for check in CHECKS if f"- {check.__name__}: " in message}
    assert len(blamed) <= 6, f"blames too much: {message}"


def test_every_check_but_two_has_a_method_that_fails_it() -> None:
    """What no broken method covers: compiling, and bfloat16 (which would need a numerically fragile network)."""
    covered = {name for names in BROKEN.values() for name in names} | set(CAUGHT_BY.values())
    rest = {check.__name__ for check in CHECKS} - covered
    assert rest == {"compiles", "bf16_is_close", "output_is_well_formed"}


def test_an_inconsistent_mask_and_an_infinite_loss_fail() -> None:
    class Broken(MAE):
        def draw(self, batch: ImageBatch, clock: Clock, key: Key) -> Plan:
            mask = super().draw(batch, clock, key).mask
            return Plan(replace(mask, hidden=mask.hidden.roll(1, 1), drawn_order=mask.order))

        def forward(self, batch: ImageBatch, plan: Plan) -> Output:
            output = super().forward(batch, plan)
            return Output({"x": replace(output.terms["reconstruction"], total=torch.tensor(float("inf")))})

    with pytest.raises(AssertionError) as failure:
        check_method(make(Broken), BATCH, **QUICK)
    for name in ("masks_are_consistent", "output_is_well_formed", "bf16_is_close"):
        assert f"- {name}: " in str(failure.value)


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="no check named compile; there are"):
        check_method(make(), BATCH, skip={"compile"})
    with pytest.raises(ValueError, match="at least 3 samples"):
        check_method(make(), ImageBatch(BATCH.images[:2], BATCH.ids[:2]))
    with pytest.raises(ValueError, match="give `corrupt`, which overwrites their input"):
        checks.check_method(make(), BATCH)
    with pytest.raises(ValueError, match=r"make is no module, so it is not trained; .* `check_explainer`"):
        checks.check_method(make, BATCH, kind="explain")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kind 'explian': check_method takes pretrain, .*explain"):
        check_method(make(), BATCH, kind="explian")


def test_coarser_features_stand_for_their_tokens() -> None:
    """A 4 x 6 grid of tokens on a 2 x 3 grid of features."""
    expected = [(i // 6 // 2) * 3 + (i % 6) // 2 for i in range(24)]
    assert [_feature_of(i, 24, (2, 3)) for i in range(24)] == expected
    assert [_feature_of(i, 24, (4, 6)) for i in range(24)] == list(range(24))
