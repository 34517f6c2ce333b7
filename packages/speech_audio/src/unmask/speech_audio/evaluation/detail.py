"""How much acoustic detail frames keep: ridge regression from an encoder's frames to their own log-mel spectrum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Detail:
    """The probe: frame t (25 ms, every 20 ms) of a layer against the log-mel spectrum of the same 400 samples.

    Features are standardised by the training frames. Strength and best layer are chosen on validation frames; the score
    is R^2 on test frames, one per mel bin, averaged. It stands for the separation and enhancement tasks of SUPERB-SG,
    which need data that are not free; a linear map shows whether the detail is there at all.

    Args:
        bins: of the mel spectrum (Kaldi's fbank).
        frames: at most about so many of a split, equally many of every clip, chosen by (seed, clip id).
        strengths: the grid of penalties, on standardised features and per frame.
    """

    bins: int = 80
    frames: int = 20_000
    strengths: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


class Moments:
    """Sums over frames that ridge regression and its R^2 need, in fp64: memory does not grow with the frames.

    Args:
        layers: feature sets measured side by side.
        dim: their width.
        bins: width of the targets.
        device: where to sum.
    """

    def __init__(self, layers: int, dim: int, bins: int, device: torch.device | str = "cpu") -> None:
        new = torch.zeros(0, dtype=torch.float64, device=device).new_zeros
        self.count = 0
        self.x, self.xx, self.xy = new(layers, dim), new(layers, dim, dim), new(layers, dim, bins)
        self.y, self.yy = new(bins), new(bins)

    def add(self, x: Float[Tensor, "layers frames dim"], y: Float[Tensor, "frames bins"]) -> None:
        """Count frames in."""
        x, y = x.to(self.xx), y.to(self.yy)
        self.count += len(y)
        self.x += x.sum(1)
        self.xx += x.transpose(1, 2) @ x
        self.xy += x.transpose(1, 2) @ y
        self.y += y.sum(0)
        self.yy += y.square().sum(0)


def score(train: Moments, val: Moments, test: Moments, protocol: Detail | None = None) -> dict[str, Any]:
    """Fit every layer with every penalty, choose on validation, score the last layer and the best one on test.

    Returns:
        ``last``: R^2 of the last layer on the test frames (1 is perfect, 0 is what the mean spectrum gets);
        ``best``: of the layer that is best on validation; ``best_layer``: which that is (0 is the Transformer's
        input); ``test_frames``: how many there are.
    """
    protocol = protocol or Detail()
    layers = range(len(train.x))
    chosen = [_best_fit(train, val, layer, protocol) for layer in layers]
    best = max(layers, key=lambda layer: chosen[layer][0])
    last, top = (_r2(chosen[layer][1], test, layer) for layer in (layers[-1], best))
    return {"last": last, "best": top, "best_layer": best, "test_frames": test.count}


Fit = tuple[Float[Tensor, "dim bins"], Float[Tensor, "bins"]]


def _best_fit(train: Moments, val: Moments, layer: int, protocol: Detail) -> tuple[float, Fit]:
    """R^2 on validation, and the map: weights and offset on raw features."""
    n = train.count
    mean, target = train.x[layer] / n, train.y / n
    covariance = train.xx[layer] / n - torch.outer(mean, mean)
    variance = covariance.diagonal()
    # A dimension that is constant but for rounding is left out.
    scale = torch.where(variance > 1e-10 * train.xx[layer].diagonal() / n, variance.clamp(min=1e-30).rsqrt(), 0.0)
    values, vectors = torch.linalg.eigh(covariance * torch.outer(scale, scale))
    right = vectors.T @ (scale[:, None] * (train.xy[layer] / n - torch.outer(mean, target)))
    fits = []
    for strength in protocol.strengths:
        weight = scale[:, None] * (vectors @ (right / (values.clamp(min=0) + strength)[:, None]))
        fit = weight, target - mean @ weight
        fits.append((_r2(fit, val, layer), fit))
    return max(fits, key=lambda pair: pair[0])


def _r2(fit: Fit, data: Moments, layer: int) -> float:
    """1 - squared error / squared deviation from the data's own mean, averaged over bins."""
    weight, offset = fit
    error = data.yy - 2 * offset * data.y + data.count * offset.square()
    error = error - 2 * (weight * data.xy[layer]).sum(0) + 2 * offset * (data.x[layer] @ weight)
    error = error + (weight * (data.xx[layer] @ weight)).sum(0)
    total = (data.yy - data.y.square() / max(data.count, 1)).clamp(min=1e-12)
    return float((1 - error / total).mean())
