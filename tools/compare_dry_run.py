"""What `unmask train --dry-run` says beside what the training takes: seconds to answer, and memory.

    python tools/compare_dry_run.py

The recipes are the ones that a person's own data get (`small`), on images, clouds and recordings that are made here.
Only the first steps are trained: a process is then as large as it gets, but for what a longer run may leave in pieces.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from machine import about

OUT = Path(__file__).parent.parent / "benchmarks" / "speed" / "dry_run_cpu.json"
GIB = 2**30
STEPS = 3


def images(folder: Path) -> None:
    """300 colour JPEGs of 160 x 120 pixels."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(300):
        small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        small.resize((160, 120), Image.Resampling.BICUBIC).save(folder / f"{number:03}.jpg")


def clouds(folder: Path) -> None:
    """40 clouds of 4,000 points over 40 x 40 metres: ground with boxes on it."""
    rng = np.random.default_rng(0)
    for number in range(40):
        ground = np.c_[rng.uniform(-20, 20, (2000, 2)), rng.normal(0, 0.05, 2000)]
        boxes = rng.uniform(-15, 15, (8, 2))[rng.integers(0, 8, 2000)] + rng.uniform(-1, 1, (2000, 2))
        points = np.r_[ground, np.c_[boxes, rng.uniform(0, 4, 2000)]]
        np.save(folder / f"{number:02}.npy", points.astype(np.float32))


def recordings(folder: Path) -> None:
    """42 recordings of 1.5 to 6 seconds and 2 of five minutes: tones that come and go, in noise."""
    import soundfile

    rng = np.random.default_rng(0)
    for number, seconds in enumerate([*rng.uniform(1.5, 6, 42), 300, 300]):
        times = np.arange(int(16_000 * seconds)) / 16_000
        tone = 0.1 * np.sin(2 * np.pi * rng.uniform(100, 600) * times) * (np.sin(9 * times) > -0.3)
        soundfile.write(folder / f"{number:02}.wav", tone + rng.normal(0, 0.02, len(times)), 16_000)


DATA: dict[str, Callable[[Path], None]] = {
    "vision/mae": images,
    "pointcloud/geomae": clouds,
    "speech_audio/hubert": recordings,
}


def timed(*arguments: str) -> tuple[str, float, float]:
    """Output, seconds, and GiB of the largest process (not its data loading ones) of an unmask command.

    Raises:
        SystemExit: the command failed.
    """
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "unmask.core.cli", *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"unmask {' '.join(arguments)} failed: {output}")
    return output, time.perf_counter() - start, usage.ru_maxrss * 1024 / GIB


def compare(method: str, folder: Path) -> dict[str, Any]:
    """Dry run and first steps of a method on data of its kind."""
    data = folder / "data"
    data.mkdir(parents=True)
    DATA[method](data)
    base = ["train", method, "--data", str(data), "--out", str(folder / "run"), "--json"]
    output, seconds, dry = timed(*base, "--dry-run")
    said = json.loads(output)
    _, _, used = timed(*base, "--steps", str(STEPS), "--quiet")
    memory = said["estimate"]["memory_bytes"] / GIB
    found = {"seconds_to_answer": seconds, "dry_run_gib": dry, "said_gib": memory, "used_gib": used}
    return {name: round(value, 2) for name, value in (found | {"said_over_used": memory / used}).items()}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help="only these; all when not given")
    chosen = parser.parse_args().methods or list(DATA)
    results = json.loads(OUT.read_text(encoding="utf-8"))["results"] if OUT.is_file() else {}
    for method in chosen:
        with tempfile.TemporaryDirectory() as folder:
            results[method] = compare(method, Path(folder))
        print(method, results[method], flush=True)
        OUT.write_text(json.dumps(about() | {"steps": STEPS, "results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
