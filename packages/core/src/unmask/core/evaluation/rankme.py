"""How many dimensions features use: the diagnostics of collapse."""

from __future__ import annotations

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
