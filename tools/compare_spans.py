"""How long it takes to draw a batch of HuBERT's span masks: ours beside torchaudio's, transformers' and a NumPy loop.

All draw the same mask (0.8 of the frames in spans of 10, at least 2) for clips of full length. Torchaudio always thins
a batch to equal counts, so it stands beside ours with and without; transformers never does, and its rule for the
number of spans is its own. The loop is the published rule, clip by clip. "unmask, array" stops where the others do, at
a boolean array; "unmask" is the `Mask` that a method gets, with the order of its tokens; "+ key" adds deriving the key
from sample ids. Every repetition times all contenders once, in a new random order, each after a call that is not
timed (or who follows a slow one would find cold caches); the table shows medians.

    python tools/compare_spans.py [--batch 8 32 128] [--frames 781] [--repeats 21] [--threads 1] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from machine import about, interleaved
from torchaudio.models.wav2vec2.components import _compute_mask_indices as torchaudio_spans
from transformers.models.hubert.modeling_hubert import _compute_mask_indices as transformers_spans

from unmask.core.masking import SpanMasking
from unmask.core.randomness import Key

RATIO, LENGTH, LEAST = 0.8, 10, 2


def loop_spans(rng: np.random.Generator, batch: int, frames: int, equal: bool) -> np.ndarray:
    """The published rule, clip by clip."""
    sets = []
    for _ in range(batch):
        count = max(int(RATIO * frames / LENGTH + rng.random()), LEAST)
        shortest = LENGTH if frames - LENGTH > count else frames - count - 1
        starts = rng.choice(frames - shortest, count, replace=False)
        covered = np.unique(starts[:, None] + np.arange(LENGTH))
        sets.append(covered[covered < frames])
    smallest = min(len(s) for s in sets)
    hidden = np.zeros((batch, frames), dtype=bool)
    for row, covered in zip(hidden, sets, strict=True):
        row[rng.choice(covered, smallest, replace=False) if equal and len(covered) > smallest else covered] = True
    return hidden


def contenders(batch: int, frames: int) -> dict[str, Callable[[], object]]:
    """What is timed."""
    ids, rng = torch.arange(batch), np.random.default_rng(0)
    key, plain, equal = Key.of(0, ids), SpanMasking(), SpanMasking(equal_counts=True)
    return {
        "unmask": lambda: plain(key, (frames,)),
        "unmask, array": lambda: plain.hidden(key, frames),
        "unmask + key": lambda: plain(Key.of(0, ids), (frames,)),
        "transformers": lambda: transformers_spans((batch, frames), RATIO, LENGTH, None, LEAST),
        "loop": lambda: loop_spans(rng, batch, frames, equal=False),
        "unmask, equal counts": lambda: equal(key, (frames,)),
        "loop, equal counts": lambda: loop_spans(rng, batch, frames, equal=True),
        "torchaudio, equal counts": lambda: torchaudio_spans((batch, frames), None, RATIO, LENGTH, min_masks=LEAST),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--frames", type=int, default=781)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = {}
    for batch in args.batch:
        times = result[str(batch)] = interleaved(contenders(batch, args.frames), args.repeats)
        print(f"median ms for {batch} masks of {args.frames} frames, {args.threads} thread(s)")
        for name, ms in times.items():
            print(f"  {name:26s} {ms:9.3f}  {ms / times['unmask']:7.1f} x unmask")
    if args.out:
        described = about(packages=("numpy", "torchaudio", "transformers"))
        settings = {k: v for k, v in vars(args).items() if k != "out"}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**described, "settings": settings, "median_ms": result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
