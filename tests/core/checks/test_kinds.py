"""Generators, explainers and stop-gradients: sound ones pass, each fault is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.core.checks.sound import TOKENS, WIDTH, Latent, Tuned, network, vectors
from unmask.core.checks import assert_reaches, check_explainer, check_generator, check_method
from unmask.core.method import Clock
from unmask.core.randomness import Key

NET = nn.Linear(4, 5)
IMAGES = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def generate(count: int, seed: int) -> Tensor:
    """Each sample draws by its own number, so that it does not depend on how many there are."""
    return NET(Key.of(seed, torch.arange(count)).uniform(4)).detach()


def unseeded(count: int, seed: int) -> Tensor:
    return NET(torch.randn(count, 4)).detach()


def deaf(count: int, seed: int) -> Tensor:
    return generate(count, 0)


def one_for_all(count: int, seed: int) -> Tensor:
    return generate(1, seed).expand(count, -1)


def one_too_many(count: int, seed: int) -> Tensor:
    return generate(count + 1, seed)


def with_gradient(count: int, seed: int) -> Tensor:
    return NET(Key.of(seed, torch.arange(count)).uniform(4))


def changes_weights(count: int, seed: int) -> Tensor:
    NET.bias.data.add_(0.0 if count == 3 else 1e-3)
    return generate(count, seed)


def leaves_eval_mode(count: int, seed: int) -> Tensor:
    NET.eval()
    return generate(count, seed)


def test_a_sound_generator_passes() -> None:
    check_generator(generate, NET, (5,))
    with pytest.raises(AssertionError, match=r"samples are \(5,\), not \(4,\)"):
        check_generator(generate, NET, (4,))


GENERATORS = {
    unseeded: "two calls with the same seed give different samples",
    deaf: "another seed gives the same samples",
    one_for_all: "all samples of a call are the same",
    one_too_many: "is no row for each of 1",
    with_gradient: "is not finite or has a gradient",
    changes_weights: "generate changed bias",
    leaves_eval_mode: "generate changed mode, gradient or hooks of the network",
}


@pytest.mark.parametrize("broken", GENERATORS, ids=lambda f: f.__name__)
def test_a_broken_generator_is_caught(broken: Any) -> None:
    with pytest.raises(AssertionError, match=f"{broken.__name__} fails .*") as failure:
        check_generator(broken, NET)
    assert GENERATORS[broken] in str(failure.value)


class TrainedGenerator(Tuned):
    def generate(self, count: int, seed: int) -> Tensor:
        return self.network(
            Key.of(seed, torch.arange(count)).uniform(TOKENS * WIDTH).view(count, TOKENS, WIDTH)
        ).detach()


def test_a_trained_generator_is_held_to_both_suites() -> None:
    """Its dropout is on in train mode: a generator puts its networks to eval mode, or draws otherwise each time."""
    check_method(TrainedGenerator(), vectors(), kind="generate", skip={"compiles"})
    broken = TrainedGenerator()
    broken.generate = unseeded  # type: ignore[method-assign, assignment]
    with pytest.raises(AssertionError, match="- generates: two calls with the same seed"):
        check_method(broken, vectors(), kind="generate", skip={"compiles"})


def explain(net: nn.Module, images: Tensor) -> Tensor:
    """Gradient times input, summed over channels."""
    images = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(images).max(1).values.sum(), images)
    return (gradient * images).sum(1).detach()


def brightness(net: nn.Module, images: Tensor) -> Tensor:
    return images.sum(1)


def hooked(net: nn.Module, images: Tensor) -> Tensor:
    net[1].register_forward_hook(lambda *args: None)
    return explain(net, images)


def backward(net: nn.Module, images: Tensor) -> Tensor:
    net(images).sum().backward()
    return explain(net, images)


def by_channel(net: nn.Module, images: Tensor) -> Tensor:
    return explain(net, images)[:, None]


def noisy(net: nn.Module, images: Tensor) -> Tensor:
    return explain(net, images + 0.1 * torch.randn_like(images))


def constant(net: nn.Module, images: Tensor) -> Tensor:
    return net[1].weight.detach().sum().expand(len(images), 4, 4)


EXPLAINERS = {
    brightness: "maps do not change with the network's weights",
    hooked: "explain changed mode, gradient or hooks of 1",
    backward: "explain changed mode, gradient or hooks of 1",
    by_channel: r"maps are (3, 1, 4, 4), not (3, 4, 4)",
    noisy: "two calls give different maps",
    constant: "another input has the same map",
}


def test_a_sound_explainer_passes() -> None:
    net = network(IMAGES)
    before = {name: p.clone() for name, p in net.named_parameters()}
    check_explainer(explain, net, IMAGES)
    assert all(torch.equal(before[name], p) for name, p in net.named_parameters())


@pytest.mark.parametrize("broken", EXPLAINERS, ids=lambda f: f.__name__)
def test_a_broken_explainer_is_caught(broken: Any) -> None:
    with pytest.raises(AssertionError, match=f"{broken.__name__} fails .*") as failure:
        check_explainer(broken, network(IMAGES), IMAGES)
    assert EXPLAINERS[broken] in str(failure.value)


class TrainedExplainer(Tuned):
    """Its parameters are trained, and maps are of their gradient: one value per token."""

    def explain(self, batch: Any) -> Tensor:
        x = batch.x.clone().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self.head(self.network(x).mean(1)).max(1).values.sum(), x)
        return (gradient * x).sum(-1).detach()


BROKEN_MAPS = {
    "one for each of": lambda self, batch: self.head.weight.detach().sum()[None],
    "not finite or has a gradient": lambda self, batch: self.network(batch.x),
    "two calls give different maps": lambda self, batch: torch.randn(len(batch.ids), 8),
    "do not change with the network's weights": lambda self, batch: batch.x.sum(-1),
}


def test_a_trained_explainer_is_held_to_both_suites() -> None:
    check_method(TrainedExplainer(), vectors(), kind="explain", skip={"compiles"})
    broken = TrainedExplainer()
    broken.frozen = nn.Linear(2, 2)
    with pytest.raises(AssertionError, match="no gradient reaches frozen.weight"):
        check_method(broken, vectors(), kind="explain", skip={"compiles"})


@pytest.mark.parametrize("fault", BROKEN_MAPS)
def test_faults_of_a_trained_explainer_are_named(fault: str) -> None:
    broken = type("Broken", (TrainedExplainer,), {"explain": BROKEN_MAPS[fault]})()
    with pytest.raises(AssertionError, match=f"- explains: .*{fault}"):
        check_method(broken, vectors(), kind="explain", skip={"compiles"})


def test_assert_reaches() -> None:
    torch.manual_seed(0)
    method, batch = Latent(), vectors()
    term = method(batch, method.draw(batch, Clock(), Key.of(0, batch.ids))).terms["loss"]
    assert_reaches(term, yes=[method.encoder, method.decoder.weight], no=[method.teacher, batch.x])
    with pytest.raises(AssertionError, match=r"a gradient reaches tensor 0 \(8, 8\), Linear.bias$"):
        assert_reaches(term, no=[method.decoder.weight, method.decoder][:1] + [_only_bias(method.decoder)])
    with pytest.raises(AssertionError, match="no gradient reaches Linear.weight, Linear.bias$"):
        assert_reaches(term.total, yes=[nn.Linear(2, 2)])
    with pytest.raises(AssertionError, match="no gradient reaches tensor 0 .*; a gradient reaches tensor 0"):
        assert_reaches(term, yes=[batch.x], no=[method.token])
    zero = (method.token * 0).sum()
    assert_reaches(zero, no=[method.token])
    assert method.token.grad is None


def _only_bias(linear: nn.Linear) -> nn.Module:
    module = nn.Linear(1, 1)
    module.weight, module.bias = nn.Parameter(torch.zeros(1)), linear.bias
    return module
