"""Run a comparison of methods: every method, budget and seed, each trained and evaluated, one JSON at the end.

    python tools/benchmark.py --jobs 2 --threads 1 --out benchmarks/vision/mnist5k.json
    python tools/benchmark.py --data ldraw --variants geomae geomae-occupancy geomae-centroid geomae-normal --out ...
    python tools/benchmark.py --data fmnist --budgets 80000 320000 1280000 --device cuda --jobs 8 --out ...

Every run is a directory under --runs; a finished one is not run again, so an interrupted comparison goes on where it
stopped. The protocols are benchmarks/vision/PROTOCOL.md and benchmarks/pointcloud/PROTOCOL.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from machine import about

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mae": ("vision/mae", {}),
    "simmim": ("vision/simmim", {}),
    **{f"colormae-{c}": ("vision/colormae", {"model.color": c}) for c in ("red", "green", "blue", "purple")},
    "geomae": ("pointcloud/geomae", {}),
}


def without(*terms: str) -> tuple[str, dict[str, Any]]:
    """GeoMAE with fewer targets."""
    return "pointcloud/geomae", {f"model.weights.{term}": 0.0 for term in terms}


CENTROIDS = ("low", "med", "top")
VARIANTS |= {
    "geomae-occupancy": without(*CENTROIDS, "normal", "curvature"),
    "geomae-centroid": without("normal", "curvature"),
    "geomae-normal": without("curvature"),
}
VISION = [name for name, (method, _) in VARIANTS.items() if method.startswith("vision/")]


def run_one(
    variant: str, recipe: str, data: str, images: int, seed: int, folder: Path, device: str, epochs: int
) -> None:
    """Train on so many images and evaluate, in this process."""
    import torch

    torch.set_num_threads(int(os.environ.get("UNMASK_THREADS", "2")))
    from unmask.core.evaluation.run import evaluate
    from unmask.core.training.loop import train
    from unmask.core.training.recipe import load_recipe

    method, settings = VARIANTS[variant]
    overrides = {**settings, "seed": seed, "data.source": data}
    overrides["schedule.steps"] = images // load_recipe(method, recipe).training.batch_size
    start = time.perf_counter()
    train(load_recipe(method, recipe, overrides), folder, resume=any(folder.glob("checkpoints/*")), progress=False)
    trained = time.perf_counter()
    evaluate(folder, device=device, quick=epochs == 0, seed=seed, epochs=epochs or None)
    seconds = {"train_seconds": trained - start, "evaluate_seconds": time.perf_counter() - trained}
    (folder / "done.json").write_text(json.dumps(seconds))


def launch(arguments: list[str], folder: Path, threads: int) -> bool:
    """One run in a process of its own; its output goes to the run's log."""
    if (folder / "done.json").exists():
        return True
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "UNMASK_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    with open(folder.with_suffix(".log"), "w") as log:
        command = [sys.executable, __file__, *arguments]
        code = subprocess.run(command, stdout=log, stderr=log, env=environment).returncode
    if code:
        print(f"FAILED {folder} (see {folder.with_suffix('.log')})", flush=True)
    return code == 0


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, standard deviation over seeds (n - 1) and the values themselves."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "n": len(values),
        "values": values,
    }


def flatten(prefix: str, value: Any) -> dict[str, float]:
    """Numbers of nested mappings by dotted name."""
    if isinstance(value, dict):
        return {k: v for name, inner in value.items() for k, v in flatten(f"{prefix}.{name}", inner).items()}
    return {prefix: float(value)} if isinstance(value, int | float) and not isinstance(value, bool) else {}


def collect(runs: Path, variants: list[str], budgets: list[int], seeds: list[int]) -> list[dict[str, Any]]:
    """One row per variant and budget: the spread of every number in the runs' evaluation.json, and the losses."""
    rows = []
    for variant, images in product(variants, budgets):
        numbers: dict[str, list[float]] = {}
        for seed in seeds:
            folder = runs / f"{variant}-{images}-{seed}"
            if not (folder / "done.json").exists():
                continue
            evaluation = json.loads((folder / "evaluation.json").read_text())
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            flat = flatten("", evaluation["rows"]) | {
                ".loss": next(line["loss"] for line in reversed(lines) if "loss" in line),
                ".val_loss": next((line["val_loss"] for line in reversed(lines) if "val_loss" in line), float("nan")),
            }
            for name, value in (flat | json.loads((folder / "done.json").read_text())).items():
                numbers.setdefault(name.lstrip("."), []).append(value)
        if not numbers:
            continue
        rows.append({"variant": variant, "images": images, **{k: spread(v) for k, v in numbers.items()}})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist5k", help="a carrier's name or a folder (default mnist5k)")
    parser.add_argument(
        "--recipe", default="tiny", help="the recipe of every method, but for its length (default tiny)"
    )
    parser.add_argument(
        "--variants", nargs="+", default=VISION, choices=list(VARIANTS), metavar="VARIANT", help=", ".join(VARIANTS)
    )
    parser.add_argument("--budgets", nargs="+", type=int, default=[5_000, 20_000, 80_000], help="samples seen")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"), help="where the run directories go")
    parser.add_argument("--out", type=Path, help="the JSON to write; its rows of other variants and budgets stay")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of a run")
    parser.add_argument("--finetune-epochs", type=int, default=5, help="0 for none (default 5, at the largest budget)")
    parser.add_argument("--finetuned", nargs="*", default=["mae", "simmim"], help="which variants are fine-tuned")
    parser.add_argument("--curve", nargs="*", default=["mae"], help="which variants are run at all budgets")
    parser.add_argument("--collect", action="store_true", help="run nothing; gather the runs that are there")
    parser.add_argument("--one", nargs=3, metavar=("VARIANT", "IMAGES", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    runs = args.runs / Path(args.data).name
    if args.one:
        variant, images, seed = args.one
        folder = runs / f"{variant}-{images}-{seed}"
        tune = variant in args.finetuned and int(images) == max(args.budgets)
        run_one(
            variant, args.recipe, args.data, int(images), int(seed), folder, args.device, args.finetune_epochs * tune
        )
        return
    # Longest first, so that no long run is left alone at the end.
    jobs = [
        (images, seed, variant)
        for images, seed, variant in product(sorted(args.budgets, reverse=True), args.seeds, args.variants)
        if images == max(args.budgets) or variant in args.curve
    ]
    jobs.sort(key=lambda job: (job[2] not in args.finetuned, -job[0]))
    common = ["--data", args.data, "--recipe", args.recipe, "--runs", str(args.runs), "--device", args.device]
    common += ["--finetune-epochs", str(args.finetune_epochs), "--finetuned", *args.finetuned]
    common += ["--budgets", *map(str, args.budgets)]
    start = time.perf_counter()
    jobs = [] if args.collect else jobs
    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = [
            pool.submit(launch, [*common, "--one", variant, str(images), str(seed)],
                        runs / f"{variant}-{images}-{seed}", args.threads)
            for images, seed, variant in jobs
        ]  # fmt: skip
        for i, job in enumerate(waiting, start=1):
            job.result()
            print(f"{i}/{len(jobs)} after {time.perf_counter() - start:.0f} s", flush=True)
    rows = collect(runs, args.variants, args.budgets, args.seeds)
    if args.out and args.out.is_file():  # what is not run again stays
        new = {(row["variant"], row["images"]) for row in rows}
        earlier = json.loads(args.out.read_text())["rows"]
        rows += [row for row in earlier if (row["variant"], row["images"]) not in new]
    result = {
        **about(args.device),
        "threads": args.threads,
        "protocol": f"benchmarks/{VARIANTS[args.variants[0]][0].split('/')[0]}/PROTOCOL.md",
        "data": args.data,
        "recipe": args.recipe,
        "rows": rows,
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
