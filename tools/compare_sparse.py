"""How long sparse convolutions take: plain torch beside spconv and beside a dense convolution of the same grid.

Cells are drawn as a lidar sees pillars: dense near the middle of the grid, sparse at its rim; `--visible` of them are
kept, as an encoder meets them under a mask. ``room`` is a cube of cells with three walls and a sphere. For every grid,
width and kind of convolution, each repetition times all contenders once, in a new random order, each after a call that
is not timed; the table shows medians of forward and backward together, then of the search for neighbours (ours;
spconv's), which is paid once per batch, and of a whole `SparseConvEncoder` with its search.

    python tools/compare_sparse.py [--sides 16 128] [--batch 32 4] [--visible 0.3 1] [--dims 64 128] [--repeats 11]
        [--threads 1] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import about, interleaved
from torch import Tensor

from unmask.pointcloud.encoders.sparse import (
    InverseConv,
    SparseConv,
    StridedConv,
    SubmanifoldConv,
    strided_rules,
    submanifold_rules,
)
from unmask.pointcloud.encoders.sparse_conv import ConvEncoderSettings, SparseConvEncoder
from unmask.pointcloud.geometry.pairwise import Backend

Runs = dict[str, Callable[[], object]]
BACKENDS: tuple[Backend, ...] = ("torch", "spconv")
ROOM = 40


def lidar(batch: int, side: int, visible: float) -> Tensor:
    """(sample, y, x) of occupied pillars: their share falls with the distance from the middle."""
    place = (torch.arange(side) - side / 2) / (side / 2)
    share = 1.2 * torch.exp(-2.5 * (place[:, None] ** 2 + place**2).sqrt())
    cells = (torch.rand(batch, side, side) < share).nonzero()
    return cells[torch.rand(len(cells)) < visible]


def room() -> Tensor:
    """(sample, z, y, x) of a cube's floor, two walls and a sphere in its middle."""
    place = torch.arange(ROOM)
    z, y, x = torch.meshgrid(place, place, place, indexing="ij")
    radius = ((z - ROOM / 2) ** 2 + (y - ROOM / 2) ** 2 + (x - ROOM / 2) ** 2).sqrt()
    occupied = (z == 0) | (y == 0) | (x == 0) | ((radius - ROOM / 4).abs() < 0.6)
    return occupied[None].nonzero()


def step(run: Callable[[], Tensor]) -> Callable[[], object]:
    """Forward and backward."""
    upstream = torch.randn_like(run())
    return lambda: run().backward(upstream)


def dense(conv: SparseConv, x: Tensor, cells: Tensor, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    """The same values by a dense convolution: rows into the grid, convolve, rows out of it."""
    samples, place = int(cells[:, 0].max()) + 1, tuple(cells.t())

    def run() -> Tensor:
        grid = x.new_zeros(samples, *shape, x.shape[1]).index_put(place, x).movedim(-1, 1)
        convolve = F.conv2d if len(shape) == 2 else F.conv3d
        return convolve(grid, conv.weight.movedim(-1, 1), conv.bias, padding=1).movedim(1, -1)[place]

    return run


def layers(cells: Tensor, shape: tuple[int, ...], dim: int) -> dict[str, Runs]:
    """Contenders for each kind of convolution."""
    _, _, down = strided_rules(cells, shape)
    table = {
        "submanifold": (SubmanifoldConv, submanifold_rules(cells, shape)),
        "strided": (StridedConv, down),
        "inverse": (InverseConv, down.inverse),
    }
    runs: dict[str, Runs] = {}
    for name, (kind, rules) in table.items():
        x = torch.randn(rules.rows_in, dim, requires_grad=True)
        for backend in BACKENDS:
            conv = kind(dim, dim, axes=len(shape), backend=backend)
            runs.setdefault(name, {})[backend] = step(partial(conv, x, rules))
        if kind is SubmanifoldConv:
            runs[name]["dense"] = step(dense(conv, x, cells, shape))
    return runs


def searches(cells: Tensor, shape: tuple[int, ...]) -> Runs:
    """The neighbours under kernel 3: ours, and spconv's own."""
    from spconv.core import ConvAlgo
    from spconv.pytorch.ops import get_indice_pairs

    indices, axes, samples = cells.int().contiguous(), len(shape), int(cells[:, 0].max()) + 1
    ones = [1] * axes
    return {
        "torch": lambda: submanifold_rules(cells, shape),
        "spconv": lambda: get_indice_pairs(
            indices, samples, list(shape), ConvAlgo.Native, [3] * axes, ones, ones, ones, [0] * axes, True
        ),
    }


def encoders(pillars: Tensor, shape: tuple[int, int], dim: int) -> Runs:
    """A whole encoder with its search, forward and backward."""
    runs: Runs = {}
    x = torch.randn(len(pillars), dim, requires_grad=True)
    for backend in BACKENDS:
        encoder = SparseConvEncoder(ConvEncoderSettings(dim=dim, backend=backend))
        runs[backend] = step(partial(_search_and_encode, encoder, x, pillars, shape))
    return runs


def _search_and_encode(encoder: SparseConvEncoder, x: Tensor, pillars: Tensor, shape: tuple[int, int]) -> Tensor:
    return encoder(x, encoder.partition(pillars, shape))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 4], help="samples, one number per side")
    parser.add_argument("--visible", type=float, nargs="+", default=[0.3, 1.0])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clouds: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        f"{batch} x {side}^2, {visible:g} visible": (lidar(batch, side, visible), (side, side))
        for side, batch in zip(args.sides, args.batch, strict=True)
        for visible in args.visible
    }
    clouds["room"] = room(), (ROOM,) * 3
    result: dict[str, Any] = {}
    for name, (cells, shape) in clouds.items():
        kinds = {"search": searches(cells, shape)}
        for dim in args.dims:
            kinds |= {f"{kind}, {dim}": runs for kind, runs in layers(cells, shape, dim).items()}
            if len(shape) == 2:
                kinds[f"encoder, {dim}"] = encoders(cells, (shape[0], shape[1]), dim)
        result[name] = {"cells": len(cells), "median_ms": {k: interleaved(r, args.repeats) for k, r in kinds.items()}}
        print(f"{name}: {len(cells)} cells, median ms, {args.threads} thread(s)")
        for kind, times in result[name]["median_ms"].items():
            print(f"  {kind:18s}" + "".join(f"  {who} {ms:8.2f}" for who, ms in times.items()), flush=True)
    if args.out:
        described = about(packages=("spconv-cu120",))
        settings = {k: v for k, v in vars(args).items() if k != "out"}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**described, "settings": settings, "clouds": result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
