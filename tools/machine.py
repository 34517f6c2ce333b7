"""What the comparisons share: what a result file says of the run that made it, and timing in turns."""

from __future__ import annotations

import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any


def hardware(device: str = "cpu") -> str:
    """The GPU's name, or the CPU's and its cores."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def about(device: str = "cpu", packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """The head of a result file; `packages` are named with their versions beside Python and torch."""
    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "versions": versions | {name: metadata.version(name) for name in packages},
    }


def interleaved(contenders: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each contender.

    Every repetition runs all of them once, in a new random order, each after a call that is not timed: who follows a
    slow one would find cold caches.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = random.Random(0)
    for _ in range(repeats):
        for name in order.sample(list(contenders), len(contenders)):
            contenders[name]()
            start = time.perf_counter()
            contenders[name]()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(ms) for name, ms in times.items()}
