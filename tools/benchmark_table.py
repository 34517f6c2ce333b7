"""The results of tools/benchmark.py as Markdown: mean ± standard deviation over seeds.

python tools/benchmark_table.py benchmarks/vision/mnist5k.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

MEASURES = {
    "linear": "linear",
    "knn": "k-NN",
    "few_label.1": "1 % labels",
    "few_label.5": "5 %",
    "few_label.10": "10 %",
    "finetune": "fine-tuned",
    "dense.accuracy": "points",
    "dense.mean_iou": "mean IoU",
    "rankme": "RankMe",
}
REFERENCES = {"random": "untrained encoder", "pixels": "raw pixels", "coordinates": "statistics of coordinates"}


def cell(row: dict[str, Any], name: str) -> str:
    """One number of a row: accuracies in percent, others as they are."""
    found = row.get(name)
    if found is None:
        return "–"
    scale = 1 if "rankme" in name or "loss" in name else 100
    digits = 3 if "loss" in name else 1
    spread = "" if found["std"] is None else f" ± {scale * found['std']:.{digits}f}"
    few = "" if found["n"] >= 3 else f" (n={found['n']})"
    return f"{scale * found['mean']:.{digits}f}{spread}{few}"


def lines(result: dict[str, Any]) -> list[list[str]]:
    """The table's head and rows: every variant and budget, then the references of each family of encoder."""
    rows = sorted(result["rows"], key=lambda row: (-row["images"], row["variant"]))
    measures = [m for m in MEASURES if any(f"trained.{m}" in row for row in rows)]
    table = [["", "samples seen", "val. loss", *(MEASURES[m] for m in measures)]]
    table.append(["---"] * len(table[0]))
    for row in rows:
        found = [cell(row, f"trained.{m}") for m in measures]
        table.append([row["variant"], f"{row['images']:,}", cell(row, "val_loss"), *found])
    for variant in ("mae", "simmim", "geomae"):
        longest = next((row for row in rows if row["variant"] == variant), None)
        if longest is not None:
            found = [kind for kind in REFERENCES if f"{kind}.rankme" in longest]
            for kind in found:
                name = f"{REFERENCES[kind]} ({variant})"
                table.append([name, "0", "–", *(cell(longest, f"{kind}.{m}") for m in measures)])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON that tools/benchmark.py wrote")
    result = json.loads(parser.parse_args().results.read_text())
    print(f"`{result['data']}`, {result['hardware']}, {result['date']}, `{result['command']}`\n")
    for row in lines(result):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
