"""Preference optimisation: what a pair of responses costs, from token terms of a policy and a fixed reference.

Per token y_t of a response, with the distributions after the same history::

    log_ratio = log policy(y_t) - log reference(y_t)
    kl        = KL(reference || policy) = sum_v reference(v) (log reference(v) - log policy(v)) >= 0

The losses are minus the log-sigmoid of ``beta * margin``, one value per pair:

* `dpo` (Rafailov et al., NeurIPS 2023, arXiv 2305.18290): the difference of the summed log-ratios;
* `tdpo1` (Zeng et al., ICML 2024, arXiv 2404.11999): this, less the difference of the summed divergences, rejected
  minus chosen;
* `sparse_preference` (Christopoulou et al., arXiv 2410.05102): `tdpo1` with a weight for every log-ratio and one for
  every divergence.

Chosen and rejected are indices 0 and 1 of the second axis; what is not a token of the response counts for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Tokens = Float[Tensor, "pairs 2 tokens"]


def dpo(log_ratio: Tokens, response: Bool[Tensor, "pairs 2 tokens"], beta: float) -> Float[Tensor, "pairs"]:
    """Direct preference optimisation.

    Args:
        log_ratio: see the module.
        response: True = a token of the response.
        beta: how much a margin counts; > 0.
    """
    return -F.logsigmoid(beta * _advantage(log_ratio, response))


def tdpo1(
    log_ratio: Tokens, kl: Tokens, response: Bool[Tensor, "pairs 2 tokens"], beta: float
) -> Float[Tensor, "pairs"]:
    """Token-level direct preference optimisation, its first form: no gradient is stopped.

    Args:
        log_ratio: see the module.
        kl: see the module.
        response: True = a token of the response.
        beta: how much a margin counts; > 0.
    """
    return -F.logsigmoid(beta * (_advantage(log_ratio, response) + _advantage(kl, response)))


def sparse_preference(
    log_ratio: Tokens,
    kl: Tokens,
    reward_mask: Tokens,
    divergence_mask: Tokens,
    response: Bool[Tensor, "pairs 2 tokens"],
    beta: float,
) -> Float[Tensor, "pairs"]:
    """Preference optimisation with token masks: ones are `tdpo1`, ones and zeros `dpo`.

    Args:
        log_ratio: see the module.
        kl: see the module.
        reward_mask: weights of the log-ratios, >= 0.
        divergence_mask: weights of the divergences, >= 0.
        response: True = a token of the response.
        beta: how much a margin counts; > 0.
    """
    return tdpo1(reward_mask * log_ratio, divergence_mask * kl, response, beta)


def response_sums(values: Tokens, response: Bool[Tensor, "pairs 2 tokens"]) -> Float[Tensor, "pairs 2"]:
    """Sums over the tokens of each response."""
    return values.masked_fill(~response, 0.0).sum(-1)


def _advantage(values: Tokens, response: Bool[Tensor, "pairs 2 tokens"]) -> Float[Tensor, "pairs"]:
    """What the chosen response has more than the rejected one."""
    sums = response_sums(values, response)
    return sums[:, 0] - sums[:, 1]


@dataclass(frozen=True)
class Scores:
    """What scores over a vocabulary are made of, before they are.

    Args:
        hidden: what the output layer gets.
        weight: of the output layer.
        bias: of the output layer.
        scale: multiplies the scores.
        softcap: bounds them by ``softcap * tanh(scores / softcap)``, after `scale`.
    """

    hidden: Float[Tensor, "tokens dim"]
    weight: Float[Tensor, "vocabulary dim"]
    bias: Float[Tensor, "vocabulary"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    def log_probs(self, hidden: Float[Tensor, "chunk dim"]) -> Float[Tensor, "chunk vocabulary"]:
        """Log-probabilities after some of the hidden states, in float32."""
        scores = F.linear(hidden, self.weight, self.bias).float() * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        return scores.log_softmax(-1)


class TokenTerms(NamedTuple):
    """The two terms of every token; see the module.

    Attributes:
        log_ratio: of the token that is there.
        kl: over the whole vocabulary; zeros where it was not asked for.
    """

    log_ratio: Float[Tensor, "tokens"]
    kl: Float[Tensor, "tokens"]


def token_terms(
    policy: Scores, reference: Scores, targets: Int[Tensor, "tokens"], *, chunk: int = 512, divergence: bool = True
) -> TokenTerms:
    """Log-ratios and divergences without the scores of a whole batch: those of `chunk` tokens exist at a time.

    Scores are made again in the backward pass, so that memory does not grow with the number of tokens times the
    vocabulary. No gradient reaches the reference.

    Args:
        policy: gets the gradient, in its hidden states and output layer.
        reference: of the same tokens and vocabulary.
        targets: the ids that follow.
        chunk: tokens scored at a time.
        divergence: whether `TokenTerms.kl` is wanted.
    """
    parts = []
    for start in range(0, len(targets), chunk):
        rows = slice(start, start + chunk)
        given = policy, reference, policy.hidden[rows], reference.hidden[rows], targets[rows], divergence
        again = torch.is_grad_enabled()
        parts.append(
            checkpoint(_terms, *given, use_reentrant=False, preserve_rng_state=False) if again else _terms(*given)
        )
    empty = policy.hidden.new_zeros(0, dtype=torch.float32)
    ratios, divergences = zip(*parts, strict=True) if parts else ((empty,), (empty,))
    return TokenTerms(torch.cat(ratios), torch.cat(divergences))


def _terms(
    policy: Scores, reference: Scores, hidden: Tensor, reference_hidden: Tensor, targets: Tensor, divergence: bool
) -> tuple[Tensor, Tensor]:
    """Both terms of one chunk."""
    ours = policy.log_probs(hidden)
    with torch.no_grad():
        theirs = reference.log_probs(reference_hidden)
    index = targets[:, None]
    ratio = (ours.gather(1, index) - theirs.gather(1, index))[:, 0]
    if not divergence:
        return ratio, torch.zeros_like(ratio)
    return ratio, (theirs.exp() * (theirs - ours)).sum(-1)
