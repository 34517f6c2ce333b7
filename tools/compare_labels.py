"""K-means labels per second beside scikit-learn and faiss, and the memory of making labels as the corpus grows.

Every repetition times all contenders once, in turn, on the same frames and the same codebook, in one process; the table
shows medians of wall time and of processor time, which other work on the machine disturbs less. Set the threads of
torch, NumPy and scikit-learn alike with OMP_NUM_THREADS. faiss is timed where it can be imported. Memory is the peak
resident set of a fresh process that runs `make_labels` on synthetic clips made as they are read.

    OMP_NUM_THREADS=1 python tools/compare_labels.py [--repeats 11] [--device cpu] [--clips 60]
        [--out benchmarks/speed/labels_cpu.json]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from machine import about
from sklearn.cluster import MiniBatchKMeans

from unmask.speech_audio.targets.clustering import KMeans, KMeansSettings
from unmask.speech_audio.targets.make import TargetSettings, make_labels

SIZES = {"MFCC, 39-d, 100 clusters": (39, 100, 200_000), "layer, 768-d, 500 clusters": (768, 500, 20_000)}
SECONDS = 10.0  # of a synthetic clip


def contenders(dim: int, classes: int, frames: int, device: str) -> dict[str, Callable[[], Any]]:
    """What is timed: each labels the same frames with the same centroids."""
    generator = torch.Generator().manual_seed(0)
    x, centroids = torch.randn(frames, dim, generator=generator), torch.randn(classes, dim, generator=generator)
    theirs = MiniBatchKMeans(classes, n_init=1, max_iter=1, random_state=0).fit(x[: 10 * classes].numpy())
    theirs.cluster_centers_ = centroids.numpy().copy()
    book, placed, array = KMeans(centroids.to(device)), x.to(device), x.numpy()
    assert (book.assign(placed).cpu().numpy() == theirs.predict(array)).mean() > 0.9999
    draws: dict[str, Callable[[], Any]] = {
        "unmask": lambda: book.assign(placed).cpu(),
        "scikit-learn": lambda: theirs.predict(array),
    }
    if importlib.util.find_spec("faiss"):
        index = importlib.import_module("faiss").IndexFlatL2(dim)
        index.add(centroids.numpy())
        draws["faiss"] = lambda: index.search(array, 1)
    return draws


def labels_per_second(repeats: int, device: str) -> dict[str, dict[str, dict[str, int]]]:
    """Median labels per second of wall time and of processor time, after two unmeasured repetitions."""
    result = {}
    for name, (dim, classes, frames) in SIZES.items():
        rivals = contenders(dim, classes, frames, device)
        times: dict[str, list[tuple[float, float]]] = {rival: [] for rival in rivals}
        for repeat in range(repeats + 2):
            for rival, draw in rivals.items():
                start = time.perf_counter(), time.process_time()
                draw()
                if repeat >= 2:
                    times[rival].append((time.perf_counter() - start[0], time.process_time() - start[1]))
        result[name] = {
            rival: {
                clock: round(frames / statistics.median(column))
                for clock, column in zip(("wall", "processor"), zip(*taken, strict=True), strict=True)
            }
            for rival, taken in times.items()
        }
    return result


class SyntheticClips:
    """Noise with a keyed colour, made when it is read: a corpus of any size that takes no memory."""

    labels: dict[str, torch.Tensor] = {}
    classes: dict[str, list[str]] = {}
    settings = SimpleNamespace(corrupt="skip")

    def __init__(self, count: int, first: int = 0) -> None:
        self.ids = torch.arange(first, first + count)
        self.lengths = torch.full((count,), round(16_000 * SECONDS))

    def waveform(self, index: int) -> torch.Tensor:
        """The clip at `index`."""
        generator = torch.Generator().manual_seed(int(self.ids[index]))
        return 0.1 * torch.randn(int(self.lengths[index]), generator=generator).cumsum(0).sin()


def label_corpus(clips: int) -> dict[str, float]:
    """Make MFCC labels of a corpus in this process: its size, time and peak memory."""
    target = TargetSettings("mfcc", 100, max_frames=50_000, kmeans=KMeansSettings(n_init=1, max_iter=3))
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        made = make_labels(target, SyntheticClips(clips), [], Path(folder) / "set")
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        hours = clips * SECONDS / 3600
        return {"clips": clips, "hours": hours, "labels": len(made.labels), "seconds": seconds, "peak_mib": peak}


def measure_memory(clips: int) -> list[dict[str, float]]:
    """Peak memory for 1 and 4 times the clips, each in a process of its own."""
    command = [sys.executable, __file__, "--label-corpus"]
    runs = [subprocess.run([*command, str(n)], check=True, capture_output=True) for n in (clips, 4 * clips)]
    return [json.loads(run.stdout) for run in runs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--device", default="cpu", help="where our frames and centroids are")
    parser.add_argument("--clips", type=int, default=60, help="of 10 s, of the smaller corpus")
    parser.add_argument("--label-corpus", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.label_corpus:
        print(json.dumps(label_corpus(args.label_corpus)))
        return
    speed = labels_per_second(args.repeats, args.device)
    memory = measure_memory(args.clips)
    for name, rivals in speed.items():
        for rival, rates in rivals.items():
            ratios = ", ".join(f"{rivals['unmask'][clock] / rate:.2f} x by {clock}" for clock, rate in rates.items())
            ratio = "" if rival == "unmask" else f"  unmask is {ratios}"
            print(f"{name:28s} {rival:14s} {rates['wall']:12,} labels/s{ratio}")
    for run in memory:
        print(f"make_labels, {run['hours']:6.2f} h of audio: {run['seconds']:6.1f} s, peak {run['peak_mib']:.0f} MiB")
    if args.out:
        settings = {k: v for k, v in vars(args).items() if k not in ("out", "label_corpus")}
        found = about(args.device, ("scikit-learn", "numpy"))
        result = {**found, "settings": settings, "labels_per_second": speed, "make_labels": memory}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
