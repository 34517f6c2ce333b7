"""How the samples of a domain become one vector each, and the encoder at random weights that a trained one is held to.

A domain that differs from the defaults has a module with ``ENCODING = Encoding(...)``, which its `Domain` names.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from unmask.core import registry
from unmask.core.method import Features, to_device
from unmask.core.progress import Advance
from unmask.core.randomness import Key
from unmask.core.training.build import make_method
from unmask.core.training.checkpoint import LoadedRun
from unmask.core.training.initial import say_on_stderr
from unmask.core.training.position import batches
from unmask.core.training.recipe import Recipe, micro_batch

SETTLED = 256  # training samples that give BatchNorm its statistics
_OTHER_SEED = 1_000_003  # added to the run's seed for the reference's random weights: never those training began from
_SHOWN = 3  # samples named that were left out

Named = tuple[list[int], list[str], Float[Tensor, "n dim"]]  # ids, names and vectors of samples
Encode = Callable[[Any], Float[Tensor, "batch dim"]]


def at_source(settings: Any, source: str | None) -> Any:
    """A run's data settings, pointing at other data; all else stays as the encoder was trained with."""
    return settings if source is None else replace(settings, source=source)


def no_notes(dataset: Any) -> Sequence[str]:
    """Nothing to say."""
    return ()


@dataclass(frozen=True)
class Encoding:
    """What core has to know to encode, embed and classify a domain's samples. The defaults suit most.

    Args:
        settings: (the run's data settings, a source or None) to the settings of the data to encode.
        vectors: features of a batch to one vector per sample; by default the mean of the tokens.
        at_once: samples per forward pass, from the run's recipe.
        notes: what to say of data that are not the run's own, before they are encoded.
        rows: how samples of a split become rows of an embedding, where it is not one row for each sample of the
            dataset: (run, dataset, device, advance) to batches of ids, names and vectors, on the CPU.
        embedded: settings of the data to embed, from those to encode.
    """

    settings: Callable[[Any, str | None], Any] = at_source
    vectors: Callable[[Any], Float[Tensor, "batch dim"]] = lambda features: features.pooled
    at_once: Callable[[Recipe], int] = lambda recipe: 256
    notes: Callable[[Any], Sequence[str]] = no_notes
    rows: Callable[[LoadedRun, Any, torch.device, Advance], Iterator[Named]] | None = None
    embedded: Callable[[Any], Any] = lambda settings: settings


def encoding_of(method: str) -> Encoding:
    """The `Encoding` of a method's domain."""
    part = registry.part(method, "encoding")
    return Encoding() if part is None else part.ENCODING


def say_notes(dataset: Any, source: str, run: LoadedRun) -> None:
    """Say what there is to say of the data at `source`, where that is not the run's own."""
    if source != run.recipe.data.source:
        for note in encoding_of(run.recipe.method).notes(dataset):
            say_on_stderr(note)


def encoder_of_samples(method: Any, encoding: Encoding) -> Encode:
    """A method as a function of a batch to one vector per sample. Nothing is masked."""

    def encode(batch: Any) -> Float[Tensor, "batch dim"]:
        features: Features = method.encode(batch)
        return encoding.vectors(features)

    return encode


def untrained(run: LoadedRun, seed: int) -> nn.Module:
    """The run's method at random weights that are not those it started from, in eval mode on the CPU."""
    with torch.random.fork_rng([]):
        torch.manual_seed(run.recipe.seed + seed + _OTHER_SEED)
        return make_method(run.recipe).eval()


def settle_on(method: nn.Module, run: LoadedRun, train: Any, device: torch.device, seed: int) -> None:
    """`settle` a method on up to `SETTLED` training samples, chosen by seed and sample id, without augmentation."""
    if not _norms(method):
        return
    index = Key.of(seed, train.ids).stream("batch statistics").bits(1)[:, 0].argsort()[:SETTLED]
    chunks = [[(i, 0) for i in chunk.tolist()] for chunk in index.split(micro_batch(run.recipe, 1))]
    collate = registry.data_kind(run.recipe.method).collate
    loader = batches(train, chunks, collate, run.recipe.training.workers, pin=False)
    settle(method, (to_device(batch, device) for batch in loader))


@torch.no_grad()
def settle(method: Any, loaded: Iterable[Any]) -> None:
    """Give every BatchNorm of a method the statistics that it sees on these batches, averaged over batches.

    Known as precise BatchNorm (arXiv 2105.07576, section 3). An encoder that was never trained has no statistics: its
    running means are 0 and its variances 1, whatever the data, and in eval mode it would not compute what it does in
    training. At a momentum of 0.01 a fifth of that is left after 156 steps. All other layers stay as they are.
    """
    norms = _norms(method)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
        norm.train()
    for batch in loaded:
        method.encode(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def _norms(method: nn.Module) -> list[_BatchNorm]:
    return [module for module in method.modules() if isinstance(module, _BatchNorm)]


def name_left_out(problems: Sequence[Any], method: str) -> None:
    """Count samples that were not used, and name the first, on stderr."""
    if problems:
        names = "; ".join(f"{name} ({reason})" for name, reason in problems[:_SHOWN])
        more = " ..." if len(problems) > _SHOWN else ""
        print(f"{len(problems)} {registry.domain(method).samples} are left out: {names}{more}", file=sys.stderr)
