"""The checks that every trained method passes, ours or anybody's.

`check_method` runs all of them on one method and one small batch and reports every failure at once::

    from unmask.core.checks import check_method

    def corrupt(batch, plan, value):  # the same batch with `value` wherever `plan.mask` hides the input
        ...

    check_method(my_method, batch, corrupt)

Domains bring the `corrupt` of their inputs (``unmask.vision.checks``). Run it at a tiny size: it takes seconds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from unmask.core.mask import Mask, Packed
from unmask.core.method import Clock, Output, map_tensors
from unmask.core.randomness import Key

Corrupt = Callable[[Any, Any, float], Any]


@dataclass(frozen=True)
class Case:
    """One method on trial: a private copy of it, a batch, and how to overwrite hidden input."""

    method: Any
    batch: Any
    corrupt: Corrupt
    clock: Clock
    seed: int

    def key(self, batch: Any = None, visit: int = 0) -> Key:
        return Key.of(self.seed, (self.batch if batch is None else batch).ids, visit)

    def draw(self, batch: Any = None, visit: int = 0) -> Any:
        batch = self.batch if batch is None else batch
        return self.method.draw(batch, self.clock, self.key(batch, visit))

    def fresh(self) -> Case:
        """The same case on another copy of the method, for checks that change it."""
        return replace(self, method=copy.deepcopy(self.method))


def check_method(
    method: nn.Module,
    batch: Any,
    corrupt: Corrupt,
    *,
    clock: Clock | None = None,
    seed: int = 0,
    skip: Collection[str] = (),
) -> None:
    """Hold a method to what `unmask.core.method` promises of methods. The method itself is not changed.

    Args:
        method: the method, on any device.
        batch: at least three samples with different ids, on the same device. Tensors have a row per sample; a ragged
            batch, and the plans drawn for it, have ``take(rows)`` instead.
        corrupt: ``corrupt(batch, plan, value)`` gives the batch with `value` (NaN included) at every input value that
            belongs to a token hidden by ``plan.mask``.
        clock: when the draws are made; None is the middle of a run.
        seed: of the draws.
        skip: names of `CHECKS` that this method is exempt from; say why where you exempt it.

    Raises:
        AssertionError: lists every check that failed, and how.
        ValueError: an unknown name in `skip`, or fewer than three samples.
    """
    known = [check.__name__ for check in CHECKS]
    if unknown := set(skip) - set(known):
        raise ValueError(f"no check named {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if len(batch.ids) < 3:
        raise ValueError(f"check_method needs at least 3 samples to tell them apart; got {len(batch.ids)}")
    clock = clock or Clock(step=50, total_steps=100, epoch=1, total_epochs=2)
    case = Case(copy.deepcopy(method).eval(), batch, corrupt, clock, seed)
    chosen = [check for check in CHECKS if check.__name__ not in skip]
    failures = [failure for check in chosen if (failure := _failure(check, case.fresh()))]
    if failures:
        head = f"{type(method).__name__} fails {len(failures)} of {len(chosen)} checks:"
        raise AssertionError("\n  - ".join([head, *failures]))


def _failure(check: Callable[[Case], None], case: Case) -> str | None:
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            check(case)
    except AssertionError as error:
        return f"{check.__name__}: {error}"
    except Exception as error:  # whatever a broken method raises is a finding, and the other checks still run
        return f"{check.__name__}: raised {type(error).__name__}: {error}"
    return None


# --- draw ---


def draw_depends_on_key_alone(case: Case) -> None:
    """Equal keys give equal plans, other visits other plans, and torch's global generator is neither read nor moved."""
    plan, state = case.draw(), torch.get_rng_state()
    torch.manual_seed(1)
    moved = torch.get_rng_state()
    again = case.draw()
    assert _equal(plan, again), "two draws with the same key differ; draw from `key`, not from torch's generator"
    assert torch.equal(moved, torch.get_rng_state()), "draw consumed torch's global generator"
    torch.set_rng_state(state)
    assert not _equal(plan, case.draw(visit=1)), "the plan is the same at another visit; does draw use its key?"


def draw_ignores_the_rest_of_the_batch(case: Case) -> None:
    """A sample gets the same plan alone, in the batch, and in the batch turned round."""
    whole, n = case.draw(), len(case.batch.ids)
    backwards = range(n - 1, -1, -1)
    if name := _differing(whole, backwards, case.draw(_take(case.batch, backwards)), n):
        raise AssertionError(f"{name} depends on a sample's place in the batch")
    for i in range(n):
        if name := _differing(whole, [i], case.draw(_take(case.batch, [i])), n):
            raise AssertionError(f"{name} of sample {i} differs when it is drawn alone")


def masks_are_consistent(case: Case) -> None:
    """Something is hidden, something is visible, and the index sets partition the tokens."""
    mask = case.draw().mask
    places = torch.arange(mask.hidden.shape[1], device=mask.hidden.device).expand_as(mask.order)
    assert torch.equal(mask.order.sort(1).values, places), "order is not a permutation of the tokens"
    assert mask.hidden.any() and mask.visible.any(), "the mask hides everything or nothing"
    for name, members, indices in (
        ("visible", mask.visible, mask.visible_indices),
        ("hidden", mask.hidden, mask.hidden_indices),
    ):
        assert torch.equal(indices.lengths, members.sum(1)), f"the {name} indices do not count the {name} tokens"
        marks = torch.ones_like(indices.index) if indices.valid is None else indices.valid.long()
        counted = torch.zeros_like(mask.order).scatter_add_(1, indices.index, marks)
        assert torch.equal(counted, members.long()), f"the {name} indices are not the {name} tokens, each once"
    if mask.num_visible is not None:
        assert (mask.visible.sum(1) == mask.num_visible).all(), "num_visible is not the number of visible tokens"


# --- forward ---


def forward_is_pure(case: Case) -> None:
    """In eval mode the same batch and plan give the same bits twice, and nothing in the method changes."""
    plan, before = case.draw(), _snapshot(case.method)
    with torch.no_grad():
        first, second = case.method(case.batch, plan), case.method(case.batch, plan)
    for name, term in first.terms.items():
        assert torch.equal(term.total, second.terms[name].total), f"term {name!r} differs between two calls"
    _assert_same_state(before, case.method, "forward in eval mode changed")


def output_is_well_formed(case: Case) -> None:
    """Terms are finite scalars with positive counts; metrics carry no gradient."""
    output = case.method(case.batch, case.draw())
    assert output.terms, "no loss terms"
    for name, term in output.terms.items():
        assert term.total.dim() == 0, f"term {name!r}: total has shape {tuple(term.total.shape)}, not a scalar"
        assert torch.isfinite(term.total), f"term {name!r}: total is {float(term.total)}"
        assert float(term.count) > 0, f"term {name!r}: count is {float(term.count)}"
    for name, metric in output.metrics.items():
        scalar = metric.total.dim() == 0 and not metric.total.requires_grad
        assert scalar, f"metric {name!r}: total is no scalar without gradient"


def counts_depend_on_the_plan_alone(case: Case) -> None:
    """Counts stay when weights change: otherwise means over micro-batches and ranks would not be exact."""
    plan = case.draw()
    before = _counts(case.method(case.batch, plan))
    _jolt(case.method)
    assert before == _counts(case.method(case.batch, plan)), "a term's count changed with the weights"
    if hasattr(case.method, "counts"):
        told = {name: float(count) for name, count in case.method.counts(case.batch, plan).items()}
        assert list(told.items()) == list(before.items()), f"counts says {told}, and the terms have {before}"


def bf16_is_close(case: Case) -> None:
    """Under bfloat16 autocast the loss is finite and within 5 % of float32's."""
    plan, device = case.draw(), case.batch.ids.device.type
    with torch.no_grad():
        exact = float(case.method(case.batch, plan).loss)
        with torch.autocast(device, torch.bfloat16):
            loss = float(case.method(case.batch, plan).loss)
    assert math.isfinite(loss), f"the loss is {loss} in bfloat16"
    assert abs(loss - exact) <= 0.05 * abs(exact), f"the loss is {loss:.4g} in bfloat16 and {exact:.4g} in float32"


def compiles(case: Case) -> None:
    """torch.compile traces the method, forward and backward (aot_eager), and the loss stays."""
    plan = case.draw()
    eager = case.method(case.batch, plan).loss
    torch._dynamo.reset()
    compiled = torch.compile(case.method, backend="aot_eager")(case.batch, plan).loss
    compiled.backward()
    torch._dynamo.reset()
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


# --- learning ---


def every_trainable_parameter_learns(case: Case) -> None:
    """Two AdamW steps without decay: finite gradients, every trainable parameter moves, no frozen one does."""
    method = case.method.train()
    before = _snapshot(method)
    trainable = {name: p for name, p in method.named_parameters() if p.requires_grad}
    assert trainable, "nothing is trainable"
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-3, weight_decay=0.0)
    for visit in range(2):
        optimizer.zero_grad()
        method(case.batch, case.draw(visit=visit)).loss.backward()
        if visit == 0:
            unused = [name for name, p in trainable.items() if p.grad is None]
            assert not unused, f"no gradient reaches {', '.join(unused)}"
        wild = [name for name, p in trainable.items() if p.grad is not None and not p.grad.isfinite().all()]
        assert not wild, f"the gradient of {', '.join(wild)} is not finite"
        optimizer.step()
    parameters = dict(method.named_parameters())
    still = [name for name in trainable if torch.equal(before[name], parameters[name])]
    assert not still, f"two steps do not move {', '.join(still)}"
    moved = [name for name in parameters if name not in trainable and not torch.equal(before[name], parameters[name])]
    assert not moved, f"training changed {', '.join(moved)}, which is frozen"


def hidden_input_gets_no_gradient(case: Case) -> None:
    """No gradient of the loss reaches hidden input: not through the network, not through a target."""
    plan = case.draw()
    batch = map_tensors(case.batch, lambda t: t.clone().requires_grad_() if t.is_floating_point() else t)
    case.method(batch, plan).loss.backward()
    reached = 0
    for name, tensor in _tensors(batch).items():
        if tensor.grad is not None:
            where = _hidden_entries(case, plan, name)
            reached += int((tensor.grad != 0).any())
            assert not tensor.grad[where].any(), f"the loss has a gradient with respect to hidden entries of {name}"
    assert reached, "the loss has no gradient with respect to visible input"
    if hasattr(case.method, "target"):
        targets = _tensors(case.method.target(case.batch, plan))
        assert not any(t.requires_grad for t in targets.values()), "the target carries a gradient"


# --- leaks ---


def hidden_input_does_not_leak(case: Case) -> None:
    """`predict` gives the same bits whatever the hidden input is, NaN included, in eval and in train mode."""
    plan = case.draw()
    assert any(where.any() for where in _hidden_everywhere(case, plan)), "corrupt changed nothing: this check is blind"
    for training in (False, True):
        case.method.train(training)
        expected = _seeded_predict(case, case.batch, plan)
        for value in (3.0, -1e4, float("nan")):
            got = _seeded_predict(case, case.corrupt(case.batch, plan, value), plan)
            mode = "train" if training else "eval"
            assert torch.equal(expected, got), f"predict changes when hidden input becomes {value} ({mode} mode)"


def predict_uses_visible_input(case: Case) -> None:
    """`predict` changes when what is visible changes (a mask of the wrong polarity is caught here and above)."""
    plan = case.draw()
    inverted = replace(plan, mask=Mask.from_hidden(plan.mask.visible, plan.mask.valid))
    expected = _seeded_predict(case, case.batch, plan)
    got = _seeded_predict(case, case.corrupt(case.batch, inverted, 3.0), plan)
    assert not torch.equal(expected, got), "predict does not change when all visible input changes"


def pictures_are_images(case: Case) -> None:
    """`picture` gives the input and the masked input, in one shape: finite, nothing hidden shown.

    A reconstruction has that shape too; other pictures have any size. Where the input is images, they keep their shape.
    """
    plan = case.draw()
    images = case.method.picture(case.batch, plan)
    missing = {"input", "masked"} - set(images)
    assert not missing, f"picture has no {', '.join(sorted(missing))}"
    for name, image in images.items():
        shape = tuple(image.shape)
        assert len(shape) == 4 and len(image) == len(case.batch.ids), f"picture {name!r} has shape {shape}"
        if name in ("masked", "reconstruction"):
            assert image.shape == images["input"].shape, f"picture {name!r} has shape {shape}, not the input's"
        assert image.isfinite().all() and not image.requires_grad, f"picture {name!r} is not finite or has a gradient"
    shapes = {tuple(t.shape) for t in _tensors(case.batch).values() if t.dim() == 4}
    assert not shapes or tuple(images["input"].shape) in shapes, "the pictures' shape is not the input's"
    other = case.method.picture(case.corrupt(case.batch, plan, 3.0), plan)
    assert torch.equal(images["masked"], other["masked"]), "the masked picture shows what is hidden"


# --- encode ---


@torch.no_grad()
def encode_never_masks(case: Case) -> None:
    """`encode` gives every token, the same in eval and train mode (dropout apart), and the same for a sample alone."""
    features = case.method.encode(case.batch)
    tokens = features.tokens
    assert tokens.shape[:2] == (len(case.batch.ids), math.prod(features.grid)), (
        f"encode gives tokens of shape {tuple(tokens.shape)} for a grid of {features.grid}"
    )
    assert torch.equal(tokens, case.method.encode(case.batch).tokens), "encode differs between two calls"
    with _train_without_dropout(case.method):
        trained = case.method.encode(case.batch).tokens
    assert torch.equal(tokens, trained), "encode differs between eval and train mode"
    alone = case.method.encode(_take(case.batch, [0])).tokens
    assert torch.allclose(tokens[:1, : alone.shape[1]], alone, rtol=1e-3, atol=1e-4), (
        "a sample's features depend on the rest of the batch"
    )


@torch.no_grad()
def encode_keeps_spatial_order(case: Case) -> None:
    """Overwriting the input of one token changes the features most at that token: all are seen, and in their places."""
    plan = case.draw(_take(case.batch, [0]))
    count = plan.mask.hidden.shape[1]
    real = (plan.mask.hidden | plan.mask.visible)[0].nonzero()[:, 0]  # padding has no input to overwrite
    picked = real[torch.linspace(0, len(real) - 1, min(len(real), 16)).round().long().to(real.device)]
    batch = _take(case.batch, [0] * len(picked))
    only = torch.zeros(len(picked), count, dtype=torch.bool, device=picked.device).scatter_(1, picked[:, None], True)
    changed = case.corrupt(batch, replace(plan, mask=Mask.from_hidden(only)), 3.0)
    before, after = case.method.encode(batch), case.method.encode(changed)
    most = (after.tokens - before.tokens).norm(dim=2).argmax(1)
    home = torch.tensor([_feature_of(int(i), count, before.grid) for i in picked], device=picked.device)
    wrong = picked[most != home].tolist()
    assert not wrong, f"changing the input of token(s) {wrong} does not change the features most at those places"


def _feature_of(token: int, tokens: int, grid: tuple[int, ...]) -> int:
    """The feature that stands for a token, where an encoder's grid is coarser than the mask's by a whole factor."""
    factor = round((tokens / math.prod(grid)) ** (1 / len(grid)))
    place = 0
    for axis, n in enumerate(grid):
        below = math.prod(grid[axis + 1 :]) * factor ** (len(grid) - axis - 1)
        place = place * n + token // below % (n * factor) // factor
    return place


# --- state ---


def state_survives_a_round_trip(case: Case) -> None:
    """state_dict through safetensors into a method with other weights gives the same loss, bit for bit."""
    plan = case.draw()
    with torch.no_grad():
        expected = case.method(case.batch, plan).loss
        stored = save_tensors({name: t.contiguous() for name, t in case.method.state_dict().items()})
        other = copy.deepcopy(case.method)
        _jolt(other)
        other.load_state_dict(load_tensors(stored))
        assert torch.equal(expected, other(case.batch, plan).loss), "the loss differs after save and load"


CHECKS: tuple[Callable[[Case], None], ...] = (
    draw_depends_on_key_alone,
    draw_ignores_the_rest_of_the_batch,
    masks_are_consistent,
    forward_is_pure,
    output_is_well_formed,
    counts_depend_on_the_plan_alone,
    bf16_is_close,
    compiles,
    every_trainable_parameter_learns,
    hidden_input_gets_no_gradient,
    hidden_input_does_not_leak,
    predict_uses_visible_input,
    pictures_are_images,
    encode_never_masks,
    encode_keeps_spatial_order,
    state_survives_a_round_trip,
)


# --- helpers ---


def _tensors(value: Any) -> dict[str, Tensor]:
    """Every tensor in a nested value, numbered in the order of its fields."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(value, note)
    return {f"{type(value).__name__} tensor {i} {tuple(t.shape)[1:]}": t for i, t in enumerate(found)}


def _equal(a: Any, b: Any) -> bool:
    left, right = _tensors(a), _tensors(b)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def _by_sample(plan: Any) -> dict[str, Tensor]:
    """The plan's tensors, every packed set spread out to one row of flags per sample."""
    values = {f.name: getattr(plan, f.name) for f in fields(plan)}
    empty = torch.zeros_like(plan.mask.hidden)
    packed = {name: value.index for name, value in values.items() if isinstance(value, Packed)}
    values |= {name: empty.flatten().scatter(0, i, True).view_as(empty) for name, i in packed.items()}
    return {f"{name}: {part}": tensor for name, value in values.items() for part, tensor in _tensors(value).items()}


def _per_sample(tensor: Tensor, n: int) -> bool:
    return tensor.dim() > 0 and len(tensor) == n


def _take(value: Any, rows: Sequence[int]) -> Any:
    """A batch or plan of these samples only; ragged ones know how themselves."""
    if hasattr(value, "take"):
        return value.take(rows)
    return map_tensors(value, lambda t: t[torch.as_tensor(rows, device=t.device)])


def _differing(plan: Any, rows: Sequence[int], other: Any, n: int) -> str | None:
    """What differs between these samples' part of a plan and another plan; None where nothing does."""
    if hasattr(plan, "take"):
        plan = plan.take(rows)
        pairs = ((f.name, getattr(plan, f.name), getattr(other, f.name)) for f in fields(plan))
        return next((name for name, one, two in pairs if not _equal(one, two)), None)
    whole, part = _by_sample(plan), _by_sample(other)
    chosen = {name: t[list(rows)] if _per_sample(t, n) else t for name, t in whole.items()}
    return next((name for name, t in chosen.items() if not torch.equal(t, part[name])), None)


def _hidden_entries(case: Case, plan: Any, name: str) -> Tensor:
    """Which entries of one of the batch's tensors belong to hidden tokens."""
    one, two = (_tensors(case.corrupt(case.batch, plan, value))[name] for value in (1.0, 2.0))
    return one != two


def _hidden_everywhere(case: Case, plan: Any) -> Iterator[Tensor]:
    return (_hidden_entries(case, plan, name) for name in _tensors(case.batch))


@torch.no_grad()
def _seeded_predict(case: Case, batch: Any, plan: Any) -> Tensor:
    """`predict` with the same dropout each time."""
    torch.manual_seed(0)
    return case.method.predict(batch, plan)


def _snapshot(method: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in (*method.named_parameters(), *method.named_buffers())}


def _assert_same_state(before: dict[str, Tensor], method: nn.Module, what: str) -> None:
    changed = [name for name, tensor in _snapshot(method).items() if not torch.equal(before[name], tensor)]
    assert not changed, f"{what} {', '.join(changed)}"


def _counts(output: Output) -> dict[str, float]:
    return {name: float(term.count) for name, term in output.terms.items()}


@torch.no_grad()
def _jolt(method: nn.Module) -> None:
    """Change every floating-point weight a little."""
    for parameter in method.parameters():
        if parameter.is_floating_point():
            parameter.add_(0.05 * torch.randn_like(parameter))


@contextmanager
def _train_without_dropout(method: nn.Module) -> Iterator[None]:
    """Train mode for everything but dropout, drop path and batch statistics."""
    method.train()
    for module in method.modules():
        if "drop" in type(module).__name__.lower() or isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    yield
    method.eval()
