"""`make demo`: pre-train a small masked autoencoder on real images, evaluate it, and write a report to look at.

Uses MAE's `tiny` recipe: 5,000 handwritten digits that install with pip, a ViT of four blocks, a few minutes on two
cores. Interrupt it and run it again: it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.console import Console

from unmask.core.evaluation.run import evaluate, table
from unmask.core.report import write_report
from unmask.core.training.loop import train
from unmask.core.training.recipe import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="run directory (default runs/demo)")
    parser.add_argument("--steps", type=int, help="train for this many steps instead of the recipe's")
    args = parser.parse_args()
    console, start = Console(), time.perf_counter()
    console.rule("1/3  pre-train: hide 75 % of every image, learn by filling it in")
    overrides = {} if args.steps is None else {"schedule.steps": args.steps}
    train(load_recipe("vision/mae", "tiny", overrides), args.out, resume=any(args.out.glob("checkpoints/*")))
    console.rule("2/3  evaluate: is the frozen encoder better than the pixels it read?")
    print(table(evaluate(args.out, quick=True)))  # wider than a narrow console would let it be
    console.rule("3/3  report")
    report = write_report(args.out)
    console.print(f"Done in {time.perf_counter() - start:.0f} s. Open [bold]{report}[/bold] in a browser.")
    console.print(f"Next: unmask-vision train mae --data FOLDER --out runs/mine, or unmask export {args.out} --to timm")


if __name__ == "__main__":
    main()
