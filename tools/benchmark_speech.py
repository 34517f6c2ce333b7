"""HuBERT's evidence: iterations, alpha, score against budget and the study of targets, over seeds; one JSON at the end.

    python tools/benchmark_speech.py --jobs 2 --threads 1 --out benchmarks/speech_audio/speech.json

Every run is a directory under --runs; a finished one is not run again, so an interrupted comparison goes on where it
stopped. The protocol is benchmarks/speech_audio/PROTOCOL.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmark import flatten, spread
from machine import about

DATA = "prompts+syllables"
STEPS = 1600  # of the second iteration; the first has 0.6 of them
BUDGETS = (240, 3840)  # of the first iteration alone, beside its 960
STUDY_STEPS = 400
ALPHAS = {"alpha-1": (1.0, 0.0), "alpha-0.5": (0.5, 0.5), "alpha-0": (0.0, 1.0)}


def run_one(job: str, seed: int, folder: Path) -> None:
    """One job of one seed, in this process: train, evaluate, and leave results.json."""
    import torch

    torch.set_num_threads(int(os.environ.get("UNMASK_THREADS", "2")))
    from unmask.core.training.loop import train
    from unmask.core.training.recipe import load_recipe
    from unmask.speech_audio.evaluation import evaluate

    def fit(method: str, out: Path, overrides: dict[str, Any]) -> None:
        recipe = load_recipe(method, "tiny", {"data.source": DATA, "seed": seed} | overrides)
        train(recipe, out, resume=(out / "recipe.yaml").exists(), progress=False)

    began, results = time.perf_counter(), {}
    hubert = folder.parent / f"hubert-{seed}" / "run"
    if job == "hubert":
        fit("speech_audio/hubert", folder / "run", {"schedule.steps": STEPS})
        results["iteration 1"] = evaluate(hubert / "stages" / "model-1", seed=seed)
        results["iteration 2"] = evaluate(hubert, seed=seed, references=False)
        for name in ("labels-1", "labels-2"):
            about_labels = json.loads((hubert / "stages" / name / "1" / "label_set.json").read_text())
            results[name] = about_labels["info"]["diagnostics"]
    elif job == "study":
        fit("speech_audio/prediction_targets", folder / "run", {"schedule.steps": STUDY_STEPS})
        results = json.loads((folder / "run" / "study.json").read_text())
    else:  # a first iteration on HuBERT's own first labels
        masked, unmasked = ALPHAS.get(job, (1.0, 0.0))
        steps = int(job.removeprefix("budget-")) if job.startswith("budget-") else round(0.6 * STEPS)
        settings = {"model.masked_weight": masked, "model.unmasked_weight": unmasked, "schedule.steps": steps}
        labels = [str((hubert / "stages" / "labels-1" / "1").resolve())]
        fit("speech_audio/hubert", folder / "run", settings | {"stages": None, "data.label_sets": labels})
        results[job] = evaluate(folder / "run", seed=seed, references=False)
    (folder / "results.json").write_text(json.dumps(results | {"seconds": time.perf_counter() - began}))


def launch(job: str, seed: int, runs: Path, threads: int) -> None:
    """One job in a process of its own; its output goes to a log beside its folder."""
    folder = runs / f"{job}-{seed}"
    if (folder / "results.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "UNMASK_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    with open(folder.with_suffix(f".{seed}.log"), "w") as log:
        command = [sys.executable, __file__, "--runs", str(runs), "--one", job, str(seed)]
        code = subprocess.run(command, stdout=log, stderr=log, env=environment).returncode
    print(f"{job} {seed}: {'failed' if code else 'done'}", flush=True)


def collect(runs: Path, jobs: list[str], seeds: list[int]) -> dict[str, Any]:
    """Every number of every model, as its spread over seeds."""
    numbers: dict[str, dict[str, list[float]]] = {}
    for job in jobs:
        for seed in seeds:
            path = runs / f"{job}-{seed}" / "results.json"
            if not path.is_file():
                continue
            for name, result in json.loads(path.read_text()).items():
                model = f"study: {name}" if job == "study" else name
                kept = result.get("rows", result) if isinstance(result, dict) else {"seconds": result}
                own = numbers.setdefault(f"{job}: seconds" if name == "seconds" else model, {})
                for key, value in flatten("", _listed(kept)).items():
                    own.setdefault(key.lstrip("."), []).append(value)
    return {name: {key: spread(values) for key, values in own.items()} for name, own in numbers.items()}


def _listed(value: Any) -> Any:
    """Lists as mappings by position, so that `flatten` sees into them."""
    if isinstance(value, dict):
        return {key: _listed(inner) for key, inner in value.items() if key not in ("weights", "layer_weights")}
    return {str(i): _listed(inner) for i, inner in enumerate(value)} if isinstance(value, list) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ["hubert", *ALPHAS, *(f"budget-{steps}" for steps in BUDGETS), "study"]
    usual = [job for job in known if job != "alpha-1"]  # it is HuBERT's own first iteration
    parser.add_argument("--what", nargs="+", default=usual, choices=known, help=f"jobs (default {' '.join(usual)})")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark-speech"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of a run")
    parser.add_argument("--out", type=Path, help="the JSON to write")
    parser.add_argument("--collect", action="store_true", help="run nothing; gather the runs that are there")
    parser.add_argument("--one", nargs=2, metavar=("JOB", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        job, seed = args.one[0], int(args.one[1])
        run_one(job, seed, args.runs / f"{job}-{seed}")
        return
    if not args.collect:
        first = [job for job in args.what if job == "hubert"]  # the others use its labels
        for part in (first, [job for job in args.what if job not in first]):
            pairs = [(job, seed) for job in part for seed in args.seeds]
            with ThreadPoolExecutor(args.jobs) as pool:
                list(pool.map(lambda pair: launch(pair[0], pair[1], args.runs, args.threads), pairs))
    if args.out:
        result = about() | {
            "threads": args.threads,
            "protocol": "benchmarks/speech_audio/PROTOCOL.md",
            "data": DATA,
            "models": collect(args.runs, known, args.seeds),
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
