"""Log-likelihoods of sentences under causal and masked language models, and the perplexities that follow from them.

Sentences are lists of token ids. They are padded and batched here, right-padded with an attention mask, so a score
depends neither on the sentence's neighbours nor on their order beyond rounding. A model is any module that is called
with ``input_ids`` and ``attention_mask``, both [rows, length], and returns an object with ``logits`` [rows, length,
vocabulary], as transformers' causal and masked language models do. It runs where its parameters are, without gradients
and in eval mode; the mode of each of its parts is restored afterwards.

Logarithms are natural. Log-probabilities are computed in float32 and summed in float64.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from unmask.core.errors import UnmaskError

Sentence = Sequence[int]


class Scores(NamedTuple):
    """What a model makes of each sentence, on the CPU.

    Attributes:
        log_likelihood: sum of the log-probabilities of its scored tokens, in nats; 0 where none is scored.
        tokens: how many are scored.
    """

    log_likelihood: Float[Tensor, "sentences"]
    tokens: Int[Tensor, "sentences"]

    @property
    def perplexities(self) -> Float[Tensor, "sentences"]:
        """Each sentence's own perplexity; NaN where no token is scored."""
        return (-self.log_likelihood / self.tokens).exp()


def perplexity(scores: Scores) -> float:
    """The perplexity of all sentences together, exp(-sum of log-likelihoods / number of scored tokens).

    Every token weighs the same, so long sentences count more. With `causal_scores` this is the usual perplexity, with
    `masked_scores` the masked perplexity exp(mean of -log p(w_i | all others)) of CLIMB (arXiv 2311.08886), which is
    the pseudo-perplexity of Salazar et al. (ACL 2020).

    Raises:
        UnmaskError: if no token is scored.
    """
    tokens = int(scores.tokens.sum())
    if not tokens:
        raise UnmaskError("no token to score: perplexity needs a sentence with a token that is not special")
    return float((-scores.log_likelihood.sum() / tokens).exp())


def causal_scores(
    model: nn.Module,
    sentences: Sequence[Sentence],
    *,
    start: int | None = None,
    special: Collection[int] = (),
    rows: int = 32,
) -> Scores:
    """The log-likelihood of each sentence under a causal model: the sum over t of log p(w_t | w_<t).

    Args:
        model: a causal language model.
        sentences: token ids, of any lengths.
        start: the id that is put before every sentence (BOS; EOS for models like GPT-2 that have no other) so that its
            first token is scored too. None: the first token is only a condition, as in the library's own loss.
        special: ids that are conditions but never scored. `start` is one of them. The id for unknown words stands for
            a word, so it is usually not among them.
        rows: sentences in a forward pass; logits of rows * longest * vocabulary are in memory at once.
    """
    texts = [list(s) if start is None else [start, *s] for s in sentences]
    unscored = {*special} if start is None else {*special, start}
    total = torch.zeros(len(texts), dtype=torch.float64)
    count = torch.zeros(len(texts), dtype=torch.long)
    scorable = [i for i, text in enumerate(texts) if len(text) > 1]
    with _evaluating(model):
        for places in _chunks(scorable, [len(texts[i]) for i in scorable], rows):
            ids, valid = _pad([texts[i] for i in places], _device(model))  # [rows, length] both
            logits = model(input_ids=ids, attention_mask=valid.long()).logits  # [rows, length, vocabulary]
            targets = ids[:, 1:]  # [rows, length - 1]
            scored = (valid[:, 1:] & ~_among(targets, unscored)).cpu()  # [rows, length - 1]
            log_p = _log_probability(logits[:, :-1].flatten(0, 1), targets.flatten())  # [rows * (length - 1)]
            total[places] = log_p.view(scored.shape).where(scored, 0.0).sum(1)
            count[places] = scored.sum(1)
    return Scores(total, count)


def masked_scores(
    model: nn.Module,
    sentences: Sequence[Sentence],
    *,
    mask: int,
    special: Collection[int] = (),
    rows: int = 32,
) -> Scores:
    """The pseudo-log-likelihood of each sentence under a masked model: the sum over i of log p(w_i | all others).

    Salazar et al., ACL 2020. A sentence of T scored tokens becomes T copies; copy i has only token i replaced by the
    mask, so later pieces of the same word stay visible. Copies of all sentences are batched together.

    Args:
        model: a masked language model.
        sentences: token ids with whatever special tokens the model expects around them ([CLS] ... [SEP]).
        mask: the id of the mask token.
        special: ids that are neither masked nor scored, but stay visible. `mask` is one of them.
        rows: copies in a forward pass; logits of rows * longest * vocabulary are in memory at once.
    """
    unscored = {*special, mask}
    copies = [(s, i) for s, text in enumerate(sentences) for i, token in enumerate(text) if token not in unscored]
    total = torch.zeros(len(sentences), dtype=torch.float64)
    with _evaluating(model):
        for chunk in _chunks(copies, [len(sentences[s]) for s, _ in copies], rows):
            ids, valid = _pad([sentences[s] for s, _ in chunk], _device(model))  # [rows, length] both
            row = torch.arange(len(chunk), device=ids.device)
            position = torch.tensor([i for _, i in chunk], device=ids.device)  # [rows]
            hidden = ids[row, position]  # [rows]
            ids[row, position] = mask
            logits = model(input_ids=ids, attention_mask=valid.long()).logits  # [rows, length, vocabulary]
            log_p = _log_probability(logits[row, position], hidden)  # [rows]
            total.index_add_(0, torch.tensor([s for s, _ in chunk]), log_p)
    of_sentence = torch.tensor([s for s, _ in copies], dtype=torch.long)
    return Scores(total, of_sentence.bincount(minlength=len(sentences)))


# ---- parts ---------------------------------------------------------------------------------------------------------


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; parts that were in training mode are in it again afterwards, and no others."""
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _chunks(items: Sequence[Any], lengths: Sequence[int], size: int) -> Iterator[list[Any]]:
    """Lists of at most `size` items of similar length, so that little is padding; the longest first."""
    order = sorted(range(len(items)), key=lambda i: -lengths[i])
    for first in range(0, len(order), size):
        yield [items[i] for i in order[first : first + size]]


def _pad(
    sentences: Sequence[Sentence], device: torch.device
) -> tuple[Int[Tensor, "rows length"], Bool[Tensor, "rows length"]]:
    """Token ids, 0 behind the end, and which places hold a token."""
    longest = max(map(len, sentences))
    ids = torch.tensor([[*s, *[0] * (longest - len(s))] for s in sentences], device=device)
    ends = torch.tensor([len(s) for s in sentences], device=device)
    return ids, torch.arange(longest, device=device) < ends[:, None]


def _among(ids: Int[Tensor, "rows length"], wanted: Collection[int]) -> Bool[Tensor, "rows length"]:
    return torch.isin(ids, torch.tensor(sorted(wanted), dtype=ids.dtype, device=ids.device))


def _log_probability(logits: Float[Tensor, "n vocabulary"], targets: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    return -F.cross_entropy(logits.float(), targets, reduction="none").cpu().double()
