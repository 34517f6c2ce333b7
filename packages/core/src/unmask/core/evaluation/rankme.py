"""How many dimensions features use: the diagnostics of collapse."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

RANKME_SAMPLES = 25_600  # what the paper estimates it on (section 3.1); more change little


def rankme(x: Float[Tensor, "n dim"], samples: int = RANKME_SAMPLES, eps: float = 1e-7) -> float:
    """The effective rank of features, in [1, min(n, dim)] (Garrido et al., ICML 2023, arXiv 2210.02885).

    The exponential of the entropy of the singular values' shares; features are not centred, as in the paper. Isotropic
    features give `dim`, features on one line give 1.

    Args:
        x: one vector per sample; more than `samples` are thinned evenly, since files often come class by class.
        samples: at most so many, which is also a row limit for speed.
        eps: added to every share.
    """
    x = x[torch.linspace(0, len(x) - 1, min(len(x), samples)).long()].double()
    gram = x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T  # the same non-zero singular values, from the smaller one
    return _effective_rank(gram, eps)


def _effective_rank(gram: Float[Tensor, "d d"], eps: float = 1e-7) -> float:
    """RankMe from the product of features with themselves; NaN where that is not finite."""
    if not bool(torch.isfinite(gram).all()):
        return float("nan")
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    share = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny) + eps
    return float((-(share * share.log()).sum()).exp())


def deviation(x: Float[Tensor, "n dim"]) -> float:
    """How far features spread over directions, about in [0, 1] (SimSiam: arXiv 2011.10566, section 4.1).

    sqrt(dim) times the mean standard deviation per dimension of features scaled to length 1: 0 when all samples have
    the same feature, 1 when features are isotropic.
    """
    unit = F.normalize(x.double(), dim=1)
    return float(unit.std(0, correction=0).mean() * x.shape[1] ** 0.5)


class Spread:
    """RankMe and deviation of features that come in parts, on one rank or on several: sums, of a fixed size.

    Args:
        dtype: of the sums; double wherever the device has it.
    """

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype
        self.sums: Tensor | None = None

    def add(self, x: Float[Tensor, "n dim"]) -> None:
        """Take in some features."""
        x = x.to(self.dtype)
        unit = F.normalize(x, dim=1)
        # One matrix, so that ranks exchange it at once: the products, then sum and squares of unit vectors, and n.
        extra = torch.stack([unit.sum(0), unit.square().sum(0), x.new_full((x.shape[1],), len(x))])
        part = torch.cat([x.T @ x, extra])
        self.sums = part if self.sums is None else self.sums + part

    def finish(self, fabric: Any) -> tuple[float, float, int]:
        """RankMe, deviation and dimensions of the features of all ranks. Every rank has added some."""
        assert self.sums is not None, "no features were added"
        sums = fabric.all_reduce(self.sums, reduce_op="sum").double().cpu()
        gram, (total, squares, count) = sums[:-3], sums[-3:]
        variance = squares / count - (total / count).square()
        return _effective_rank(gram), float(variance.clamp(min=0).sqrt().mean() * len(gram) ** 0.5), len(gram)
