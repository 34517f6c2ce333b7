"""Preference losses against closed forms, and token terms in chunks against whole scores."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from unmask.core.losses import Scores, dpo, response_sums, sparse_preference, tdpo1, token_terms

PAIRS = torch.randn(2, 2, 5)
RESPONSE = torch.tensor([[[0, 1, 1, 1, 0], [0, 1, 1, 0, 0]], [[0, 0, 1, 1, 1], [0, 0, 1, 1, 1]]]) > 0


def test_by_hand() -> None:
    log_ratio = torch.tensor([[[9.0, 1.0, 2.0], [9.0, 0.5, 9.0]]])
    kl = torch.tensor([[[9.0, 0.1, 0.2], [9.0, 0.4, 9.0]]])
    response = torch.tensor([[[False, True, True], [False, True, False]]])
    assert response_sums(log_ratio, response).tolist() == [[3.0, 0.5]]
    token_level = tdpo1(log_ratio, kl, response, 0.3)
    for loss, margin in ((dpo(log_ratio, response, 0.3), 2.5), (token_level, 2.5 - (0.4 - 0.3))):
        assert float(loss) == pytest.approx(math.log(1 + math.exp(-0.3 * margin)), rel=1e-6)
    mask = torch.tensor([[[5.0, 0.0, 0.5], [5.0, 2.0, 5.0]]])
    loss = sparse_preference(log_ratio, kl, mask, mask, response, 1.0)
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-((1.0 - 1.0) + (0.1 - 0.8)))), rel=1e-6)


def test_what_is_no_response_counts_for_nothing() -> None:
    for loss in (lambda x: dpo(x, RESPONSE, 1.0), lambda x: tdpo1(PAIRS, x, RESPONSE, 1.0)):
        values = PAIRS.masked_fill(~RESPONSE, torch.nan).requires_grad_()
        loss(values).sum().backward()
        assert torch.equal(values.grad != 0, RESPONSE)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_of_token_terms(chunk: int, softcap: float | None) -> None:
    """Values and every gradient are those of whole scores, and none reaches the reference."""
    ours, theirs = ([torch.randn(7, 4), torch.randn(9, 4), torch.randn(9)] for _ in range(2))
    targets = torch.randint(9, (7,))
    policy, reference = ([t.clone().requires_grad_() for t in tensors] for tensors in (ours, theirs))
    made = [Scores(*tensors, scale=0.7, softcap=softcap) for tensors in (policy, reference)]
    found = token_terms(*made, targets, chunk=chunk)
    whole = [t.clone().requires_grad_() for t in ours]
    wanted = whole_terms(whole, theirs, targets, softcap)
    weights = torch.randn(2, 7)
    for terms, leaves in ((found, policy), (wanted, whole)):
        (weights[0] * terms[0] + weights[1] * terms[1]).sum().backward()
        assert all(leaf.grad is not None for leaf in leaves)
    for one, two in zip([*found, *(p.grad for p in policy)], [*wanted, *(p.grad for p in whole)], strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
    assert all(tensor.grad is None for tensor in reference)
    assert (found.kl >= 0).all()


def whole_terms(ours: list[Tensor], theirs: list[Tensor], targets: Tensor, softcap: float | None) -> list[Tensor]:
    scores = [0.7 * (hidden @ weight.T + bias) for hidden, weight, bias in (ours, theirs)]
    if softcap is not None:
        scores = [softcap * torch.tanh(s / softcap) for s in scores]
    policy, reference = (torch.distributions.Categorical(logits=s) for s in scores)
    ratio = policy.log_prob(targets) - reference.log_prob(targets)
    return [ratio, torch.distributions.kl_divergence(reference, policy)]


def test_divergences_that_nobody_asked_for_and_no_tokens() -> None:
    policy, reference = (Scores(torch.randn(3, 4), torch.randn(5, 4)) for _ in range(2))
    terms = token_terms(policy, reference, torch.tensor([0, 1, 2]), divergence=False)
    assert not terms.kl.any() and terms.log_ratio.any()
    empty = Scores(torch.zeros(0, 4), torch.randn(5, 4))
    assert token_terms(empty, empty, torch.zeros(0, dtype=torch.long)).kl.shape == (0,)
