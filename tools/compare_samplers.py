"""How long it takes to draw a batch of masks: our samplers beside transformers' and beside loops over samples.

The loops are the published generators in our own words (SimMIM's and BEiT's run per image in NumPy, in a data worker,
in the released code; ColorMAE's rule applied per image). Every repetition times all contenders once, in turn, in one
process with one thread setting; the table shows medians.

    python tools/compare_samplers.py [--batch 256] [--grid 14] [--repeats 21] [--threads 2] [--device cpu]
        [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from machine import about
from transformers import ViTMAEConfig
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEEmbeddings

from unmask.core.masking import BlockMasking, NoiseMasking, RandomMasking
from unmask.core.randomness import Key

Draw = Callable[[], object]


def loop_random(rng: np.random.Generator, batch: int, side: int, ratio: float) -> torch.Tensor:
    """MAE's rule, image by image."""
    tokens = side * side
    keep = int(tokens * (1 - ratio))
    masks = []
    for _ in range(batch):
        order = np.argsort(rng.random(tokens))
        mask = np.ones(tokens, dtype=bool)
        mask[order[:keep]] = False
        masks.append(mask)
    return torch.from_numpy(np.stack(masks))


def loop_simmim(rng: np.random.Generator, batch: int, side: int, ratio: float, unit: int) -> torch.Tensor:
    """SimMIM's generator: choose units without replacement, enlarge them to tokens."""
    units = side // unit
    count = math.ceil(units**2 * ratio)
    masks = []
    for _ in range(batch):
        cells = np.zeros(units**2, dtype=int)
        cells[rng.permutation(units**2)[:count]] = 1
        masks.append(cells.reshape(units, units).repeat(unit, axis=0).repeat(unit, axis=1))
    return torch.from_numpy(np.stack(masks))


def loop_beit(rng: np.random.Generator, batch: int, side: int, target: int, smallest: int = 16) -> torch.Tensor:
    """BEiT's generator: rectangles until the target is reached or ten in a row do not fit."""
    return torch.from_numpy(np.stack([_beit_one(rng, side, target, smallest) for _ in range(batch)]))


def _beit_one(rng: np.random.Generator, side: int, target: int, smallest: int) -> np.ndarray:
    mask, count, low = np.zeros((side, side), dtype=int), 0, math.log(0.3)
    while count < target:
        limit, new = target - count, 0
        for _ in range(10):
            area = smallest + rng.random() * (limit - smallest)
            aspect = math.exp(low - 2 * low * rng.random())
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= side or width >= side:
                continue
            top, left = rng.integers(0, side - height + 1), rng.integers(0, side - width + 1)
            seen = mask[top : top + height, left : left + width].sum()
            if 0 < height * width - seen <= limit:
                for row in range(top, top + height):
                    for column in range(left, left + width):
                        if mask[row, column] == 0:
                            mask[row, column] = 1
                            new += 1
                break
        if new == 0:
            break
        count += new
    return mask


def loop_colormae(rng: np.random.Generator, bank: np.ndarray, batch: int, side: int, ratio: float) -> torch.Tensor:
    """ColorMAE's rule with a window of its own for every image."""
    keep, masks = int(side * side * (1 - ratio)), []
    for _ in range(batch):
        top, left = rng.integers(0, bank.shape[1] - side + 1, 2)
        window = bank[rng.integers(len(bank)), top : top + side, left : left + side]
        window = window[:: 1 - 2 * int(rng.integers(2)), :: 1 - 2 * int(rng.integers(2))]
        order = np.argsort(-window.reshape(-1))
        mask = np.ones(side * side, dtype=bool)
        mask[order[:keep]] = False
        masks.append(mask)
    return torch.from_numpy(np.stack(masks))


def contenders(batch: int, side: int, device: str) -> dict[str, dict[str, Draw]]:
    """What is timed, by masking: ours first."""
    grid, key, rng = (side, side), Key.of(0, torch.arange(batch, device=device)), np.random.default_rng(0)
    config = ViTMAEConfig(image_size=16 * side, hidden_size=8, num_attention_heads=1, num_hidden_layers=0)
    theirs, tokens = ViTMAEEmbeddings(config), torch.zeros(batch, side * side, 1, device=device)
    noise, target = NoiseMasking("green"), round(0.4 * side * side)
    bank = noise.bank().numpy()
    random, unit, block = RandomMasking(0.75), RandomMasking(0.6, "ceil_hide", 2), BlockMasking(0.4)
    exact = BlockMasking(0.4, exact=True)
    return {
        "random": {
            "unmask": lambda: random(key, grid),
            "transformers": lambda: theirs.random_masking(tokens),
            "loop": lambda: loop_random(rng, batch, side, 0.75).to(device),
        },
        "unit of 2 x 2": {
            "unmask": lambda: unit(key, grid),
            "loop": lambda: loop_simmim(rng, batch, side, 0.6, 2).to(device),
        },
        "block": {
            "unmask": lambda: block(key, grid),
            "unmask, exact": lambda: exact(key, grid),
            "loop": lambda: loop_beit(rng, batch, side, target).to(device),
        },
        "green noise": {
            "unmask": lambda: noise(key, grid),
            "loop": lambda: loop_colormae(rng, bank, batch, side, 0.75).to(device),
        },
    }


def measure(draws: dict[str, dict[str, Draw]], repeats: int) -> dict[str, dict[str, float]]:
    """Median milliseconds; every repetition runs all contenders once, after two unmeasured ones."""
    times: dict[tuple[str, str], list[float]] = {}
    for repeat in range(repeats + 2):
        for masking, rivals in draws.items():
            for name, draw in rivals.items():
                start = time.perf_counter()
                draw()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if repeat >= 2:
                    times.setdefault((masking, name), []).append(1e3 * (time.perf_counter() - start))
    return {m: {n: statistics.median(times[m, n]) for n in rivals} for m, rivals in draws.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--grid", type=int, default=14)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="where our samplers draw; the loops' masks are copied there")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = measure(contenders(args.batch, args.grid, args.device), args.repeats)
    where = f"on {args.device}, {args.threads} thread(s)"
    print(f"median ms for {args.batch} masks of {args.grid} x {args.grid} tokens {where}")
    for masking, times in result.items():
        for name, ms in times.items():
            ratio = "" if name == "unmask" else f"  {ms / times['unmask']:6.1f} x unmask"
            print(f"{masking:14s} {name:14s} {ms:9.2f}{ratio}")
    if args.out:
        settings = {k: v for k, v in vars(args).items() if k != "out"}
        found = {**about(args.device, ("transformers",)), "settings": settings, "median_ms": result}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
