"""The checks that everybody's methods pass, one suite per kind.

`check_method` runs what fits a trained method on one small batch and reports every failure at once::

    from unmask.core.checks import check_method, hidden_tokens

    def corrupt(batch, plan, value):  # the same batch with `value` wherever `plan` hides the input
        hidden = hidden_tokens(plan, batch.x.shape[1])
        return replace(batch, x=batch.x.masked_fill(hidden[..., None], value))

    check_method(my_method, batch, corrupt)

`TRAINED` is for methods with a loss, `MASKED` for those whose plan holds a `Mask` or a `Split`, `ENCODER` for those
with `encode`. Plain functions have their own: `check_generator` (`GENERATOR`) and `check_explainer` (`EXPLAINER`).
`assert_reaches` tests a stop-gradient. Domains define the `corrupt` of their inputs in their ``checks`` module. Run the
suites at a tiny size: they take seconds.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from torch import nn

from unmask.core.checks import drawing, encoding, leaks, scoring, teachers, trained
from unmask.core.checks.case import Case, Corrupt
from unmask.core.checks.explaining import EXPLAINER, check_explainer, explains
from unmask.core.checks.generating import GENERATOR, check_generator, generates
from unmask.core.checks.plans import hidden_tokens, mask_of
from unmask.core.checks.reach import assert_reaches
from unmask.core.checks.running import Check, run_checks
from unmask.core.method import Clock, encoder_of
from unmask.core.registry import KINDS

__all__ = [
    "CHECKS", "ENCODER", "EXPLAINER", "GENERATOR", "MASKED", "TRAINED", "Case", "Corrupt", "assert_reaches",
    "check_explainer", "check_generator", "check_method", "encoder_of", "hidden_tokens", "suite_of",
]  # fmt: skip

TRAINED: tuple[Check, ...] = (
    drawing.draw_depends_on_key_alone,
    drawing.draw_ignores_the_rest_of_the_batch,
    trained.forward_is_pure,
    trained.output_is_well_formed,
    trained.counts_depend_on_the_plan_alone,
    trained.bf16_is_close,
    trained.compiles,
    trained.every_trainable_parameter_learns,
    teachers.teachers_are_what_they_say,
    teachers.after_step_moves_teachers_as_declared,
    trained.state_survives_a_round_trip,
)
MASKED: tuple[Check, ...] = (
    drawing.masks_are_consistent,
    leaks.hidden_input_gets_no_gradient,
    leaks.hidden_input_does_not_leak,
    leaks.hidden_input_does_not_leak_in_forward,
    leaks.hidden_input_does_not_leak_through_the_plan,
    leaks.predict_uses_visible_input,
    leaks.pictures_are_images,
    scoring.loss_is_taken_where_it_says,
)
ENCODER: tuple[Check, ...] = (
    encoding.encode_never_masks,
    encoding.encode_runs_the_encoder,
    encoding.encode_keeps_spatial_order,
)
CHECKS: tuple[Check, ...] = (*TRAINED, *MASKED, *ENCODER)


def check_method(
    method: nn.Module,
    batch: Any,
    corrupt: Corrupt | None = None,
    *,
    kind: str = "pretrain",
    clock: Clock | None = None,
    seed: int = 0,
    skip: Collection[str] = (),
) -> None:
    """Check a method against the contract in `unmask.core.method`. The method itself is not changed.

    Args:
        method: the method, on any device.
        batch: at least three samples with different ids, on the same device. Tensors have a row per sample; a ragged
            batch, and the plans drawn for it, have ``take(rows)`` instead. Nothing but ``ids`` is required.
        corrupt: ``corrupt(batch, plan, value)`` gives the batch with `value` (NaN included) at every input value that
            belongs to a token that `hidden_tokens` says `plan` hides. Where the input is integers, `value` is 1, 2 or
            3: three ids to put there. Needed where the plan hides tokens.
        kind: the kind on the method's card. It decides, with the contents of the plan, which suites run: `suite_of`.
        clock: the time of the draws; None is the middle of a run.
        seed: of the draws.
        skip: names of checks that are left out, for example "compiles" where time is short.

    Raises:
        AssertionError: lists every check that failed, and how.
        ValueError: an unknown kind or an unknown name in `skip`, fewer than three samples, no `corrupt` for a method
            that hides tokens, or a plain function in place of a method.
    """
    if not isinstance(method, nn.Module):
        raise ValueError(
            f"{getattr(method, '__name__', method)} is no module, so it is not trained; plain functions have "
            "`check_explainer` and `check_generator`"
        )
    known = [check.__name__ for check in CHECKS]
    if unknown := set(skip) - set(known):
        raise ValueError(f"no check named {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if len(batch.ids) < 3:
        raise ValueError(f"check_method needs at least 3 samples to tell them apart; got {len(batch.ids)}")
    clock = clock or Clock(step=50, total_steps=100, epoch=1)
    case = Case(method, copy.deepcopy(method).eval(), batch, corrupt, clock, seed)
    checks = suite_of(case.method, case.draw(), kind)
    if corrupt is None and leaks.hidden_input_gets_no_gradient in checks:
        raise ValueError(
            f"{type(method).__name__} hides tokens: give `corrupt`, which overwrites their input; unmask.core.checks "
            "shows one, and domains bring theirs"
        )
    run_checks(checks, case.fresh, type(method).__name__, skip)


def suite_of(method: Any, plan: Any, kind: str) -> tuple[Check, ...]:
    """The checks for a method of this kind with such plans.

    All trained methods get `TRAINED`. `MASKED` is added where the plan holds a mask or a split, and `ENCODER` where
    such a method encodes; a pre-training method gets both in any case, and fails without a mask, `predict` or `encode`.
    Other kinds may hide tokens without `predict`: only their loss is then checked for leaks. A trained generator's own
    `generate(count, seed)` is checked with `GENERATOR`, a trained explainer's own `explain(batch)` with `EXPLAINER`.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}: check_method takes {', '.join(KINDS)}")
    masked, checks = mask_of(plan) is not None, TRAINED
    if masked:
        predicts = kind == "pretrain" or hasattr(method, "predict")
        checks += tuple(check for check in MASKED if predicts or check is not leaks.hidden_input_does_not_leak)
    elif kind == "pretrain":
        checks += (drawing.masks_are_consistent,)
    if kind == "pretrain" or (masked and hasattr(method, "encode")):
        checks += ENCODER if masked else ENCODER[:-1]
    own = {"generate": generates, "explain": explains}
    return (*checks, own[kind]) if kind in own and hasattr(method, kind) else checks
