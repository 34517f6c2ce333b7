"""Masking by filtered noise: ColorMAE's four colours (Hinojosa et al., ECCV 2024, official code carlosh93/ColorMAE).

White noise is filtered once, on a torus much larger than a token grid; every sample then ranks its tokens by a window
of that noise and keeps the highest. One noise pixel is one token, so widths are in tokens whatever the image size.

The authors published the formulas only. The rest is ours:

* **Widths and passes.** We found them in neither poster, project page nor code (the supplement was not read), and the
  spectra on the poster are far narrower than one pass of the formulas gives. Repeating "filter, then equalise by rank"
  reproduces them; `COLOR_DEFAULTS` holds the values that do. ``n_pass=1`` is the literal formula.
* **The bank** is generated; the released one is a download of 3,072 slices, whose side of 256 is inferred from logged
  memory. There, image i of every batch reads slice i, and one offset and one pair of flips serve the whole batch. Here
  each sample draws its own slice, offset and flips by its key, so that its mask does not depend on its position in a
  batch; as 64 slices already hold 4 million windows (each in four mirror images), a larger bank would add memory (17 MB
  now) and start-up time, not variety.
* **Windows wrap around.** The noise is periodic, so every offset is as good as another.

Given the same window the mask is the released code's: the `int(tokens * (1 - ratio))` highest scores stay visible.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from unmask.core.mask import Mask
from unmask.core.masking.random import check_ratio, hidden_count
from unmask.core.randomness import Key

Color = Literal["red", "green", "blue", "purple"]

COLOR_DEFAULTS: dict[str, tuple[tuple[float, ...], int]] = {  # widths in tokens, passes: ours, fitted to the poster
    "red": ((3.0,), 3),
    "green": ((0.8, 1.6), 5),
    "blue": ((0.5,), 5),
    "purple": ((0.5, 3.0), 5),
}


@dataclass(frozen=True)
class NoiseMasking:
    """Keep the tokens where coloured noise is highest; hide an exact share.

    Args:
        color: ``red`` (low-pass: one large blob), ``green`` (band-pass: blobs of 2 to 3 tokens; the paper's best),
            ``blue`` (high-pass: evenly spread) or ``purple`` (band-stop).
        ratio: share of tokens to hide, in (0, 1); the count is ``floor_keep``, as in MAE.
        sigma: Gaussian widths in tokens: one for red and blue, two (narrow, wide) for green and purple. None takes
            `COLOR_DEFAULTS`.
        n_pass: rounds of filtering and equalising, at least 1. None takes `COLOR_DEFAULTS`.
        size: side of a slice, in tokens; no grid may be larger.
        slices: independent noise images.
        seed: what the bank is generated from. The bank is the same in every run that has the same settings.
    """

    color: Color = "green"
    ratio: float = 0.75
    sigma: tuple[float, ...] | None = None
    n_pass: int | None = None
    size: int = 256
    slices: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        if self.color not in COLOR_DEFAULTS:
            raise ValueError(f"noise color {self.color!r} is not one of {', '.join(COLOR_DEFAULTS)}")
        count = len(COLOR_DEFAULTS[self.color][0])
        if self.sigma is not None and not _ascending(self.sigma, count):
            raise ValueError(f"{self.color} noise takes {count} positive, ascending width(s); got sigma={self.sigma}")
        if self.n_pass is not None and self.n_pass < 1:
            raise ValueError(f"n_pass={self.n_pass}: the noise is filtered at least once")

    def bank(self, device: torch.device | str = "cpu") -> Float[Tensor, "slices size size"]:
        """The noise: every slice a permutation of the same uniform values in (0, 1). Built once per process (~1 s)."""
        sigma, n_pass = COLOR_DEFAULTS[self.color]
        sigma, n_pass = self.sigma or sigma, self.n_pass or n_pass
        return _bank(self.color, tuple(sigma), n_pass, self.size, self.slices, self.seed, torch.device(device))

    def scores(self, key: Key, grid: tuple[int, ...]) -> Float[Tensor, "batch tokens"]:
        """Every sample's window of noise, flattened row-major.

        Raises:
            ValueError: the grid is not two-dimensional, or larger than a slice.
        """
        if len(grid) != 2 or max(grid) > self.size:
            raise ValueError(
                f"noise masking needs a 2-d token grid of at most {self.size} x {self.size} (its slice size); "
                f"got {' x '.join(map(str, grid))}"
            )
        key = key.stream("noise window")
        index = key.stream("slice").integers(1, self.slices)  # into the flattened bank: [batch, positions so far]
        offsets, flips = key.stream("offset").integers(2, self.size), key.stream("flip").integers(2, 2)
        for axis, n in enumerate(grid):
            step = torch.arange(n, device=index.device)
            step = torch.where(flips[:, axis, None] == 1, n - 1 - step, step)
            line = (offsets[:, axis, None] + step) % self.size
            index = (index[:, :, None] * self.size + line[:, None, :]).flatten(1)
        return self.bank(index.device).view(-1)[index]

    def __call__(self, key: Key, grid: tuple[int, ...]) -> Mask:
        """Draw a mask; see `scores` for the errors."""
        tokens = math.prod(grid)
        return keep_highest(self.scores(key, grid), tokens - hidden_count(tokens, self.ratio, "floor_keep"))


def _ascending(sigma: tuple[float, ...], count: int) -> bool:
    return len(sigma) == count and all(a < b for a, b in zip((0.0, *sigma), sigma, strict=False))


def keep_highest(scores: Float[Tensor, "batch tokens"], num_visible: int) -> Mask:
    """The mask in which the `num_visible` highest scores of each sample stay visible."""
    return Mask.from_scores(-scores, num_visible)


def color_filter(color: Color, sigma: tuple[float, ...], size: int) -> Float[Tensor, "size half"]:
    """The frequency response of each colour, in the half plane of a real Fourier transform.

    With G the Gaussian blur of a width: red G, blue 1 - G, green G1 - G2 (narrow minus wide), purple 1 - (G1 - G2).
    The Gaussian is sampled at whole tokens and normalised, as image filters do; below a width of one token its response
    is flatter than the continuous one's.
    """
    distance = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)
    responses = []
    for width in sigma:
        kernel = torch.exp(-0.5 * (distance / width) ** 2)
        line = torch.fft.fft(kernel / kernel.sum()).real
        responses.append(line[:, None] * line[None, : size // 2 + 1])
    passed = responses[0] if len(responses) == 1 else responses[0] - responses[1]
    return 1 - passed if color in ("blue", "purple") else passed


def equalize(x: Float[Tensor, "*batch height width"]) -> Float[Tensor, "*batch height width"]:
    """Replace every value by its rank, scaled to (0, 1): a uniform histogram without ties.

    Values are compared to 2**-40, as integers: torch sorts those several times faster than floats.
    """
    flat = x.flatten(-2)
    ranks = (torch.arange(flat.shape[-1], dtype=x.dtype, device=x.device) + 0.5) / flat.shape[-1]
    order = (flat * 2.0**40).round().long().argsort(dim=-1, stable=True)
    return torch.empty_like(flat).scatter_(-1, order, ranks.expand_as(flat)).view_as(x)


@lru_cache(maxsize=8)
def _bank(
    color: Color, sigma: tuple[float, ...], n_pass: int, size: int, slices: int, seed: int, device: torch.device
) -> Tensor:
    """Built on the CPU in float64, slice by slice, so that ranks do not depend on a device's rounding."""
    response = color_filter(color, sigma, size)
    key = Key.of(seed, torch.arange(slices)).stream("noise bank")
    bank = torch.empty(slices, size, size)
    with _one_thread():
        for k, state in enumerate(key.state):
            x = Key(state[None]).uniform(size * size).double().view(size, size)
            for _ in range(n_pass):
                x = equalize(torch.fft.irfft2(torch.fft.rfft2(x) * response, s=(size, size)))
            bank[k] = x
    return bank.to(device)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The transforms and sorts here are small: on a busy machine, threads waiting for each other cost far more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
