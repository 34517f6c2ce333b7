"""What GeoMAE's encoder costs: against the number of visible pillars, and beside windows padded to their full size.

The pillars are those of a synthetic sweep as of nuScenes (see compare_geometry.py), a random share of them visible.
Both sides do the same arithmetic on the same weights; the padded one puts every window's tokens into 144 slots with a
mask, as the released code does at its last level. Then one training step of the paper's size on the whole cloud: its
parts, and the largest memory of the process.

    python tools/compare_windows.py [--points 300000] [--repeats 3] [--threads 2] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from compare_geometry import GRID, make_cloud
from machine import about, interleaved
from torch import Tensor

from unmask.core.method import Clock
from unmask.core.randomness import Key
from unmask.pointcloud.data.batches import PointBatch
from unmask.pointcloud.encoders.window import WindowSettings, WindowTransformer
from unmask.pointcloud.geometry.voxels import voxelise
from unmask.pointcloud.methods.geomae import GeoMAE, Settings

SHARES = (0.1, 0.2, 0.3, 0.5, 1.0)


class Padded:
    """The same encoder with every window padded to window x window slots."""

    def __init__(self, encoder: WindowTransformer, pillars: Tensor) -> None:
        self.encoder = encoder
        self.parts = [self._slots(pillars, shift) for shift in (0, encoder.window // 2)]

    def _slots(self, pillars: Tensor, shift: int) -> tuple[Tensor, Tensor, Tensor]:
        """For every token its window and slot, and which slots are real."""
        window = self.encoder.window
        place = pillars[:, 1:] + (window - shift if shift else 0)
        number = torch.cat([pillars[:, :1], place // window], dim=1)
        _, dense = number.unique(dim=0, return_inverse=True)
        slot = place[:, 0] % window * window + place[:, 1] % window
        real = torch.zeros(int(dense.max()) + 1, window**2, dtype=torch.bool)
        real[dense, slot] = True
        return dense, slot, real

    def __call__(self, x: Tensor) -> Tensor:
        layer: Any
        for i, layer in enumerate(self.encoder.layers):
            dense, slot, real = self.parts[i % 2]
            tokens = x.new_zeros(*real.shape, x.shape[1]).index_put((dense, slot), x)
            position = self.encoder.table[None]
            q, k, v = layer.attn._with_position(tokens, position.expand_as(tokens))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None])
            attended = layer.attn.proj(out.transpose(1, 2).flatten(2))[dense, slot]
            x = layer.norm1(x + attended)
            x = layer.norm2(x + layer.mlp(x))
        return x


def step(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """Forward and backward."""

    def run() -> None:
        leaf = x.detach().requires_grad_()
        function(leaf).square().sum().backward()

    return run


def encoder_times(pillars: Tensor, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds by share of visible pillars."""
    encoder, found = WindowTransformer(WindowSettings()), {}
    for share in SHARES:
        chosen = pillars[torch.randperm(len(pillars))[: int(share * len(pillars))].sort().values]
        x = torch.randn(len(chosen), encoder.dim)
        structure, padded = encoder.partition(chosen, GRID.shape), Padded(encoder, chosen)
        with torch.no_grad():
            torch.testing.assert_close(encoder(x, structure), padded(x), rtol=1e-3, atol=1e-4)
        sides: dict[str, Callable[[], object]] = {
            "unmask": step(partial(encoder, structure=structure), x),
            "padded": step(padded, x),
            "partition": partial(encoder.partition, chosen, GRID.shape),
        }
        times = interleaved(sides, repeats)
        found[str(len(chosen))] = times
        print(
            f"{len(chosen):6d} visible: {times['unmask']:8.1f} ms, {1e3 * times['unmask'] / len(chosen):5.1f} us each; "
            f"padded {times['padded']:8.1f} ms, {times['padded'] / times['unmask']:.2f}x; "
            f"partition {times['partition']:.1f} ms",
            flush=True,
        )
    return found


def training_step(points: Tensor) -> dict[str, float]:
    """Seconds of the parts of one step of the paper's size, and the process's largest memory so far."""
    method = GeoMAE(Settings(), GRID, points.shape[1])
    batch = PointBatch(points, torch.tensor([0, len(points)]), torch.tensor([1]))
    found = {}
    for _ in range(2):  # the first warms up
        start = time.perf_counter()
        plan = method.draw(batch, Clock(), Key.of(0, batch.ids))
        drawn = time.perf_counter()
        loss = method(batch, plan).loss
        forward = time.perf_counter()
        loss.backward()
        found = {"draw": drawn - start, "forward": forward - drawn, "backward": time.perf_counter() - forward}
    found["pillars"], found["hidden"] = float(len(plan.voxels.pillars)), float(len(plan.hidden))
    found["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print("one training step: " + ", ".join(f"{name} {value:.2f}" for name, value in found.items()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=300_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    points = make_cloud(args.points)
    offsets = torch.tensor([0, len(points)])
    # First, so that the peak is the step's own.
    result: dict[str, Any] = {"training_step": training_step(points)}
    result["encoder_ms"] = encoder_times(voxelise(points, offsets, GRID).pillars, args.repeats)
    if args.out:
        settings = {k: v for k, v in vars(args).items() if k != "out"}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**about(), "settings": settings, **result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
