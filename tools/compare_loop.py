"""What the training loop costs beside a bare one: the same model, data, order, masks and optimizer.

    python tools/compare_loop.py --out benchmarks/speed/loop_cpu.json

The bare loop is what one would write by hand: a DataLoader, draw, forward, backward, AdamW, the learning rate. Ours
adds exact loss sums, the check for NaN, metrics.jsonl, checkpoints and signals. Each round times both at two lengths
and takes the difference, so that start-up and the final save do not count; medians over rounds are reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import about

from unmask.core.randomness import Key
from unmask.core.training.groups import make_optimizer
from unmask.core.training.launch import build, open_data
from unmask.core.training.loop import fit
from unmask.core.training.position import Position, batches
from unmask.core.training.recipe import Recipe, load_recipe
from unmask.core.training.schedules import learning_rate

SHORT, LONG = 10, 60


def bare(recipe: Recipe, train_set: Any, collate: Any, steps: int) -> float:
    """Seconds of a loop without any of our machinery."""
    method = build(recipe)
    optimizer = make_optimizer(method, recipe.optimizer)
    rate = learning_rate(recipe)
    size = recipe.training.batch_size
    position = Position(recipe.seed, len(train_set), size, size, steps)
    start = time.perf_counter()
    for step, batch in enumerate(batches(train_set, position, collate, workers=0, pin=False)):
        clock = position.clock(step)
        for group in optimizer.param_groups:
            group["lr"] = rate(clock)
        plan = method.draw(batch, clock, Key.of(recipe.seed, batch.ids, clock.epoch).stream("plan"))  # type: ignore[operator]
        optimizer.zero_grad(set_to_none=True)
        method(batch, plan).loss.backward()
        optimizer.step()
    return time.perf_counter() - start


def ours(recipe: Recipe, train_set: Any, collate: Any, steps: int) -> float:
    """Seconds of `fit` at its defaults: a metrics line every 10 steps, a checkpoint at the end."""
    method = build(recipe)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        fit(method, train_set, None, collate, recipe, Path(folder) / "run", progress=False)
        return time.perf_counter() - start


def per_step(run: Callable[..., float], steps_to_recipe: Callable[[int], Recipe], *data: Any) -> float:
    """Milliseconds per step between a short and a long run."""
    seconds = [run(steps_to_recipe(steps), *data, steps) for steps in (SHORT, LONG)]
    return 1e3 * (seconds[1] - seconds[0]) / (LONG - SHORT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    def recipe(steps: int) -> Recipe:
        return load_recipe("vision/mae", "tiny", {"data.source": "digits"}, steps=steps)

    _, train_set, _, collate = open_data(recipe(LONG))
    rounds = [(per_step(bare, recipe, train_set, collate), per_step(ours, recipe, train_set, collate))
              for _ in range(args.rounds)]  # fmt: skip
    bare_ms, ours_ms = (statistics.median(column) for column in zip(*rounds, strict=True))
    result = {
        **about(),
        "what": "MAE, tiny recipe, batch 64",
        "bare_ms_per_step": bare_ms,
        "unmask_ms_per_step": ours_ms,
        "overhead": ours_ms / bare_ms - 1,
        "overhead_of_rounds": [b / a - 1 for a, b in rounds],
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
