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
from collections.abc import Iterator
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
    from unmask.core.evaluation.run import evaluate
    from unmask.core.training.loop import train
    from unmask.core.training.recipe import load_recipe

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


def collect(runs: Path, jobs: list[str], seeds: list[int]) -> list[dict[str, Any]]:
    """A row for every model, reference and label set: the spread of its numbers over seeds."""
    numbers: dict[str, dict[str, list[float]]] = {}
    for job in jobs:
        for seed in seeds:
            path = runs / f"{job}-{seed}" / "results.json"
            found = json.loads(path.read_text()) if path.is_file() else {}
            for name, result in found.items():
                for variant, values in _variants(job, name, result):
                    own = numbers.setdefault(variant, {})
                    for key, value in flatten("", values).items():
                        own.setdefault(key.lstrip("."), []).append(value)
    return [{"variant": name} | {key: spread(values) for key, values in own.items()} for name, own in numbers.items()]


def _variants(job: str, name: str, result: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The models, references and label sets of one result, each with its numbers."""
    method = "prediction_targets" if job == "study" else "hubert"
    if name == "seconds":
        yield f"{method}-{job}-seconds", {"seconds": result}
    elif name.startswith("labels"):
        yield f"{method}-{name}", {k: v for k, v in result["streams"][0].items() if k not in ("name", "classes")}
    else:
        for row, values in result["rows"].items():
            model = f"{method}-{name.replace(' ', '-')}" if row == "trained" else f"reference-{row}"
            if row == "trained" or job == "hubert":
                yield model, _kept(values) | ({"val_loss": result["val_loss"]} if row == "trained" else {})


def _kept(values: dict[str, Any]) -> dict[str, Any]:
    """Scores on the test split, without what was chosen on the way."""
    probes = {
        f"{label} {key}": value["mean"] if isinstance(value, dict) else value
        for label, found in values["probes"].items()
        for key, value in found.items()
        if key in ("weighted", "linear", "knn", "within_speaker")
    }
    detail = {f"detail {key}": values["detail"][key] for key in ("last", "best") if "detail" in values}
    return probes | detail | {"rankme": values["rankme"]}


COLUMNS = {
    "tone within_speaker": "tone*", "initial within_speaker": "initial*", "tone weighted": "tone",
    "initial weighted": "initial", "speaker weighted": "speaker", "language weighted": "language",
    "language knn": "language, k-NN", "detail best": "detail", "rankme": "RankMe", "val_loss": "val. loss",
}  # fmt: skip
LABEL_COLUMNS = {
    "information.initial": "initial", "information.tone": "tone", "information.speaker": "speaker",
    "information.language": "language", "f0_predictability": "F0", "explained_variance": "explained",
    "perplexity": "perplexity", "run_seconds": "mean run (s)",
}  # fmt: skip


def tables(rows: list[dict[str, Any]]) -> str:
    """Two Markdown tables: models and references, then label sets."""
    models = [row for row in rows if "rankme" in row]
    labels = [row for row in rows if "perplexity" in row]
    return _table(models, COLUMNS) + "\n\n" + _table(labels, LABEL_COLUMNS)


def _table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    lines = [["", *columns.values()], ["---"] * (len(columns) + 1)]
    lines += [[row["variant"], *(_cell(row.get(key), key) for key in columns)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(found: dict[str, Any] | None, key: str) -> str:
    if found is None:
        return "–"
    percent = key.endswith(("weighted", "within_speaker", "knn"))
    scale, digits = 100 if percent else 1, 1 if percent or key in ("rankme", "perplexity") else 3
    around = "" if found["std"] is None else f" ± {scale * found['std']:.{digits}f}"
    few = "" if found["n"] >= 3 else f" (n={found['n']})"
    return f"{scale * found['mean']:.{digits}f}{around}{few}"


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
            "rows": collect(args.runs, known, args.seeds),
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        print(tables(result["rows"]))


if __name__ == "__main__":
    main()
