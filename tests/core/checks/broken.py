"""Sound methods, each with one fault that people make. `CAUGHT_BY` says which check names it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.core.checks.broken_teachers import TEACHERS
from tests.core.checks.sound import (
    DIM,
    TOKENS,
    WIDTH,
    Latent,
    Normalised,
    ScoresTheMask,
    Sound,
    SplitPlan,
    Tuned,
    WithoutTarget,
    Words,
    WordsWithoutTarget,
)
from unmask.core.losses import l2, mean_term
from unmask.core.mask import Indices, Mask, Split
from unmask.core.method import Clock, Features, Output, Plan
from unmask.core.randomness import Key

PLAN, FORWARD = "hidden_input_does_not_leak_through_the_plan", "hidden_input_does_not_leak_in_forward"
DRAW, ENCODE, RUNS = "draw_depends_on_key_alone", "encode_never_masks", "encode_runs_the_encoder"
SCORED = "loss_is_taken_where_it_says"
GRADIENT = "hidden_input_gets_no_gradient"


# --- hidden content in a plan ---


@dataclass(frozen=True)
class Hint(Plan):
    hint: Tensor


class PlanHoldsAMean(Sound):
    """The mean of all tokens, worked out in draw, is added to the answer."""

    def draw(self, batch: Any, clock: Clock, key: Key) -> Any:
        return Hint(super().draw(batch, clock, key).mask, batch.x.mean(1, keepdim=True))

    def predict(self, batch: Any, plan: Any) -> Tensor:
        return super().predict(batch, plan) + plan.hint


class TeacherFeaturesAsInput(Sound):
    """A frozen teacher's features of all tokens enter the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(WIDTH, DIM).requires_grad_(False)

    def draw(self, batch: Any, clock: Clock, key: Key) -> Any:
        return Hint(super().draw(batch, clock, key).mask, self.frozen(batch.x))

    def latent(self, batch: Any, plan: Any) -> Tensor:
        return super().latent(batch, plan) + plan.hint


class ScoredPlanLeaks(ScoresTheMask):
    """The mask follows from scores, which is fine; the scores of hidden tokens enter the answer, which is not."""

    def predict(self, batch: Any, plan: Any) -> Tensor:
        return super().predict(batch, plan) + plan.mask.hidden_indices.take(plan.scores)[..., None]


class DrawRemembers(Sound):
    """Draw leaves the mean of all tokens in the method, and nothing of it in the plan."""

    def draw(self, batch: Any, clock: Clock, key: Key) -> Any:
        self.mean = batch.x.mean(1, keepdim=True)
        return super().draw(batch, clock, key)

    def predict(self, batch: Any, plan: Any) -> Tensor:
        return super().predict(batch, plan) + self.mean


class PlanLeaksIntoForward(TeacherFeaturesAsInput):
    """The same, but predict is clean: only forward uses it."""

    def predict(self, batch: Any, plan: Any) -> Tensor:
        return Sound.predict(self, batch, replace(plan, hint=torch.zeros_like(plan.hint)))

    def forward(self, batch: Any, plan: Any) -> Output:
        return Output({"loss": mean_term(l2(Sound.predict(self, batch, plan), self.target(batch, plan)))})


# --- forward sees what predict does not ---


class ForwardLeaks(Sound):
    """Forward adds the mean of all tokens, detached, to the answer it scores."""

    def forward(self, batch: Any, plan: Any) -> Output:
        answer = self.predict(batch, plan) + batch.x.mean(1, keepdim=True).detach()
        return Output({"loss": mean_term(l2(answer, self.target(batch, plan)))})


class ForwardLeaksInTrainMode(ForwardLeaks):
    """The same in train mode only."""

    def forward(self, batch: Any, plan: Any) -> Output:
        return super().forward(batch, plan) if self.training else Sound.forward(self, batch, plan)


class ForwardLeaksWithoutTarget(WithoutTarget):
    """Forward decodes with the hidden tokens' mean, detached, and there is no target to hold fixed."""

    def latent(self, batch: Any, plan: Any) -> Tensor:
        return self.encoder(batch.x, plan.mask.hidden, self.token + batch.x.mean().detach() * self.peeks)

    peeks = 0.0

    def forward(self, batch: Any, plan: Any) -> Output:
        self.peeks = 1.0
        output = super().forward(batch, plan)
        self.peeks = 0.0
        return output


class ForwardLeaksWords(Words):
    """Forward encodes the sentence unmasked."""

    def forward(self, batch: Any, plan: Any) -> Output:
        seen = self.decoder(plan.mask.hidden_indices.take(self.encoder(batch.words))).flatten(0, 1)
        output, asked = super().forward(batch, plan), self.target(batch, plan).flatten()
        term = output.terms["loss"]
        return Output({"loss": replace(term, total=term.total + F.cross_entropy(seen, asked, reduction="sum"))})


class ForwardLeaksWordsWithoutTarget(WordsWithoutTarget):
    """Forward adds the mean embedding of the whole sentence before it decodes."""

    def forward(self, batch: Any, plan: Any) -> Output:
        extra = self.encoder.embed(batch.words).mean(1, keepdim=True)
        answer = self.decoder(plan.mask.hidden_indices.take(self.latent(batch, plan)) + extra).flatten(0, 1)
        asked, term = plan.mask.hidden_indices.take(batch.words).flatten(), super().forward(batch, plan).terms["loss"]
        return Output({"loss": replace(term, total=F.cross_entropy(answer, asked, reduction="sum"))})


class NormalisesUnsaid(Normalised):
    """BatchNorm over all tokens, undeclared."""

    norms_over_all = property()  # type: ignore[assignment]


# --- draw ---


class DrawsFromTorchInTrainMode(Sound):
    """Random in train mode only."""

    def draw(self, batch: Any, clock: Clock, key: Key) -> Any:
        if self.training:
            return Plan(Mask.from_scores(torch.rand(len(batch.ids), TOKENS), 3))
        return super().draw(batch, clock, key)


class HidesMoreInTrainMode(Sound):
    """Another ratio in train mode, keyed as it should be."""

    def draw(self, batch: Any, clock: Clock, key: Key) -> Any:
        return Plan(Mask.from_scores(key.stream("mask").uniform(TOKENS), 2 if self.training else 3))


class DropoutInDraw(ScoresTheMask):
    """The scorer has dropout, which is on in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.scorer = nn.Sequential(nn.Dropout(0.5), nn.Linear(WIDTH, 1)).requires_grad_(False)


class SplitOverlaps(Latent):
    """The first target set reaches into the context."""

    def draw(self, batch: Any, clock: Clock, key: Key) -> Any:
        order = key.permutation(TOKENS)
        return SplitPlan(Split(Indices(order[:, :4]), (Indices(order[:, 3:6]), Indices(order[:, 5:7]))))


# --- masking in encode ---


class DropTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape[:2]) > 0.5)[..., None] if self.training else x


class DropoutOfTokens(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return x * super().forward(torch.ones(*x.shape[:2], 1))


class DropoutOfTheMask(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * F.dropout(torch.ones(x.shape[:2]), 0.5, self.training)[..., None]


class Prunes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :5], x[:, :3]], dim=1) if self.training else x


def _masks_with(module: type[nn.Module], *args: Any) -> type[Sound]:
    class MasksInEncode(Sound):
        def __init__(self) -> None:
            super().__init__()
            self.encoder.embed = nn.Sequential(nn.Linear(WIDTH, DIM), module(*args))

    MasksInEncode.__name__ = f"MasksWith{module.__name__}"
    return MasksInEncode


# --- where the loss is taken ---


class AllTokens(Sound):
    """Asks for all tokens, and does not say so."""

    def forward(self, batch: Any, plan: Any) -> Output:
        return Output({"loss": mean_term(l2(self.decoder(self.latent(batch, plan)), batch.x.detach()))})


class VisibleToo(Sound):
    """A second part over visible tokens, counted with the hidden ones."""

    def forward(self, batch: Any, plan: Any) -> Output:
        output, visible = super().forward(batch, plan), plan.mask.visible_indices
        extra = l2(self.decoder(visible.take(self.latent(batch, plan))), visible.take(batch.x).detach()).sum()
        term = output.terms["loss"]
        return Output({"loss": replace(term, total=term.total + extra)})


class VisibleThroughTarget(Sound):
    """Half of the tokens are hidden, and forward asks `target` for the others."""

    def draw(self, batch: Any, clock: Clock, key: Key) -> Any:
        return Plan(Mask.from_scores(key.stream("mask").uniform(TOKENS), TOKENS // 2))

    def forward(self, batch: Any, plan: Any) -> Output:
        other = Plan(Mask.from_hidden(plan.mask.visible, num_visible=TOKENS // 2))
        answer = self.decoder(plan.mask.visible_indices.take(self.latent(batch, plan)))
        return Output({"loss": mean_term(l2(answer, self.target(batch, other)))})


class WordsEverywhere(Words):
    """Cross entropy over all words."""

    def forward(self, batch: Any, plan: Any) -> Output:
        total = F.cross_entropy(
            self.decoder(self.latent(batch, plan)).flatten(0, 1), batch.words.flatten(), reduction="sum"
        )
        return Output(
            {"loss": replace(super().forward(batch, plan).terms["loss"], total=total, count=float(batch.words.numel()))}
        )


# --- what transfers ---


class EncodesWithACopy(Sound):
    """Trains one network and encodes with another."""

    def __init__(self) -> None:
        super().__init__()
        self.other = copy.deepcopy(self.encoder).requires_grad_(False)

    def encode(self, batch: Any) -> Features:
        return Features(self.other(batch.x), (TOKENS,))


class EncodesWithTheDecoder(Sound):
    """What it gives has gone through a layer that does not transfer."""

    def encode(self, batch: Any) -> Features:
        return Features(self.decoder(self.encoder(batch.x)), (TOKENS,))


class LeavesALayerOut(Sound):
    """The encoder's last norm is no part of what encode runs."""

    def encode(self, batch: Any) -> Features:
        x = self.encoder.embed(batch.x) * self.encoder.scale + self.encoder.positions
        return Features(x + self.encoder.own(x) + self.encoder.mix(x).mean(1, keepdim=True), (TOKENS,))


class Nameless(Sound):
    """Nobody can tell which network transfers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.net = None, self.encoder

    def latent(self, batch: Any, plan: Any) -> Tensor:
        return self.net(batch.x, plan.mask.hidden, self.token)

    def encode(self, batch: Any) -> Features:
        return Features(self.net(batch.x), (TOKENS,))


# --- no mask ---


class TunesNothing(Tuned):
    """The head is never used."""

    def forward(self, batch: Any, plan: Any) -> Output:
        return Output({"class": mean_term(self.network(batch.x).square().mean((1, 2)))})


class TunesAtRandom(Tuned):
    """Adds noise in train mode."""

    def forward(self, batch: Any, plan: Any) -> Output:
        x = batch.x + torch.randn_like(batch.x) if self.training else batch.x
        return super().forward(replace(batch, x=x), plan)


CAUGHT_BY: dict[type[nn.Module], str] = {
    PlanHoldsAMean: PLAN,
    TeacherFeaturesAsInput: PLAN,
    ScoredPlanLeaks: PLAN,
    DrawRemembers: PLAN,
    PlanLeaksIntoForward: PLAN,
    ForwardLeaks: FORWARD,
    ForwardLeaksInTrainMode: FORWARD,
    ForwardLeaksWithoutTarget: FORWARD,
    ForwardLeaksWords: FORWARD,
    ForwardLeaksWordsWithoutTarget: FORWARD,
    NormalisesUnsaid: FORWARD,
    DrawsFromTorchInTrainMode: DRAW,
    HidesMoreInTrainMode: DRAW,
    DropoutInDraw: DRAW,
    SplitOverlaps: "masks_are_consistent",
    _masks_with(DropTokens): ENCODE,
    _masks_with(DropoutOfTokens): ENCODE,
    _masks_with(DropoutOfTheMask): ENCODE,
    _masks_with(nn.Dropout1d): ENCODE,
    _masks_with(Prunes): ENCODE,
    **TEACHERS,
    AllTokens: SCORED,
    VisibleToo: SCORED,
    VisibleThroughTarget: SCORED,
    WordsEverywhere: SCORED,
    EncodesWithACopy: RUNS,
    EncodesWithTheDecoder: RUNS,
    LeavesALayerOut: RUNS,
    Nameless: RUNS,
    TunesNothing: "every_trainable_parameter_learns",
    TunesAtRandom: "forward_is_pure",
}
