"""Memory and time of MEAP's training step against the same step with the scores of all tokens at once.

    python tools/compare_language.py           # CPU, fp32, one thread
    python tools/compare_language.py --json    # one JSON value

A Llama of two layers of width 256, a vocabulary of 50,000, one row of 2,048 tokens; a step is forward and backward.
Every case runs in a process of its own, in turns; memory is the peak of the process above what it held before the
first step.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

CASES = {"all at once": 0, "chunks of 1,024": 1024, "chunks of 256": 256}
VOCABULARY, LENGTH, STEPS = 50_000, 2048, 4


def main() -> None:
    """Print the peak and the median step of every case, and what both are beside the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON value")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case is not None:
        print(json.dumps(measure(int(given.case))))
        return
    runs: dict[str, list[Any]] = {name: [] for name in CASES}
    for _ in range(given.rounds):
        for name, chunk in CASES.items():
            done = subprocess.run([sys.executable, __file__, "--case", str(chunk)], capture_output=True, check=True)
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    found = {
        name: {key: round(statistics.median(run[key] for run in many), 3) for key in ("peak_mib", "seconds", "loss")}
        for name, many in runs.items()
    }
    naive = found["all at once"]
    for row in found.values():
        row |= {f"{key}_ratio": round(row[key] / naive[key], 2) for key in ("peak_mib", "seconds")}
    if given.json:
        import torch
        from machine import about

        torch.set_num_threads(1)
        print(json.dumps(about("cpu", ("transformers",)) | {"cases": found}, indent=1))
        return
    for name, row in found.items():
        print(f"{name:18}{row['peak_mib']:8.0f} MiB ({row['peak_mib_ratio']:.2f})  {row['seconds']:.2f} s a step")


def measure(chunk: int) -> dict[str, float]:
    """Peak memory and the median step; 0 tokens at a time is the model's own loss."""
    import torch
    import transformers

    from unmask.language.encoders.language_model import last_hidden
    from unmask.language.encoders.output_layer import OutputLayer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **shape)
    model: Any = transformers.LlamaForCausalLM(config)
    tokens = torch.randint(0, VOCABULARY, (1, LENGTH + 1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
    before, seconds, loss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, [], torch.zeros(())
    for _ in range(STEPS):
        model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        if chunk:
            loss = OutputLayer(chunk=chunk).loss(model, last_hidden(model, inputs), targets) / LENGTH
        else:
            loss = model(input_ids=inputs, labels=targets, shift_labels=targets).loss
        loss.backward()
        seconds.append(time.perf_counter() - start)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"peak_mib": peak, "seconds": statistics.median(seconds), "loss": float(loss.detach())}


if __name__ == "__main__":
    main()
