"""What evaluating and using a run have in common: its settings for other data, and the encoder it is held against."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from unmask.core.method import to_device
from unmask.core.randomness import Key
from unmask.core.training.build import make_method
from unmask.core.training.checkpoint import LoadedRun
from unmask.core.training.position import batches
from unmask.core.training.recipe import micro_batch
from unmask.pointcloud.data.batches import PointBatch
from unmask.pointcloud.data.clouds import PointClouds, Settings, collate

SETTLED = 256  # training clouds that give BatchNorm its statistics
_OTHER_SEED = 1_000_003  # added to the run's seed for the reference's random weights: never those training began from
_SHOWN = 3  # unreadable clouds named


def data_settings(run: LoadedRun, data: str | None) -> Settings:
    """The run's data settings, pointing at `data`; range, pillars, features and normalisation stay the run's."""
    settings: Settings = run.recipe.data
    return settings if data is None else replace(settings, source=data)


def clouds_at_once(run: LoadedRun) -> int:
    """Clouds per forward pass: as many as fitted into memory in training."""
    return micro_batch(run.recipe, 1)


def random_method(run: LoadedRun, train: PointClouds, device: torch.device, seed: int) -> nn.Module:
    """The run's method at random weights that are not those it started from, settled on training clouds.

    Args:
        run: the trained one.
        train: where up to `SETTLED` clouds are taken from, keyed by sample id, as they are without augmentation.
        device: where to put it.
        seed: of the weights and the choice.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(run.recipe.seed + seed + _OTHER_SEED)
        method = make_method(run.recipe).to(device).eval()
    settle_on(method, run, train, device, seed)
    return method


def settle_on(method: nn.Module, run: LoadedRun, train: PointClouds, device: torch.device, seed: int) -> None:
    """`settle` a method on up to `SETTLED` training clouds, chosen by seed and sample id, without augmentation."""
    index = Key.of(seed, train.ids).stream("settling clouds").bits(1)[:, 0].argsort()[:SETTLED]
    chunks = [[(i, 0) for i in chunk.tolist()] for chunk in index.split(clouds_at_once(run))]
    loader = batches(train, chunks, collate, run.recipe.training.workers, pin=False)
    settle(method, (to_device(batch, device) for batch in loader))


@torch.no_grad()
def settle(method: Any, clouds: Iterable[PointBatch]) -> None:
    """Give every BatchNorm of a method's encoder the statistics that it sees on these batches, averaged over batches.

    Known as precise BatchNorm (arXiv 2105.07576, section 3). An encoder that was never trained has no statistics: its
    running means are 0 and its variances 1, whatever the data, and in eval mode it would not compute what it does in
    training. At GeoMAE's momentum of 0.01 a fifth of that is left after 156 steps. All other layers stay as they are.
    """
    norms = [module for module in method.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
        norm.train()
    for batch in clouds:
        method.encode(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def name_left_out(problems: Sequence[Any]) -> None:
    """Say on stderr which clouds could not be read."""
    if problems:
        names = "; ".join(f"{p.name} ({p.reason})" for p in problems[:_SHOWN])
        more = " ..." if len(problems) > _SHOWN else ""
        print(f"{len(problems)} clouds could not be read and are left out: {names}{more}", file=sys.stderr)
