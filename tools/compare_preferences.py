"""A training step of SparsePO, its masks in turn, against DPO on the same models and pairs, in the same process.

    python tools/compare_preferences.py                # CPU, fp32: a small GPT-2
    python tools/compare_preferences.py --device cuda  # GPU, bf16 autocast: a GPT-2 of 774 million parameters

A step is: reference, policy, loss, backward, AdamW. Weights and tokens are random, responses are the second half of
every row. The losses are interleaved and medians are reported.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from typing import Any

import torch
import transformers
from machine import about, interleaved

from unmask.core.training.groups import make_optimizer, set_rates
from unmask.core.training.recipe import Optimizer
from unmask.language.data.preferences import PreferenceBatch
from unmask.language.encoders.token_masks import MaskSettings
from unmask.language.methods.sparsepo import Settings, SparsePO

CASES = {
    "dpo": Settings(loss="dpo"),
    "masks off": Settings(masks=MaskSettings(kind="none")),
    "activations": Settings(masks=MaskSettings(kind="activations")),
    "learned": Settings(masks=MaskSettings()),
}
# Width, layers, heads, vocabulary, pairs, tokens of a row.
SIZES = {"cpu": (192, 4, 4, 8192, 4, 96), "cuda": (1280, 36, 20, 50257, 8, 512)}


def main() -> None:
    """Print the median time of every case, and what it is beside DPO's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SIZES, default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="print one JSON value")
    given = parser.parse_args()
    model, batch = setting(given.device)
    steps = {name: step_of(SparsePO(model, copy.deepcopy(model), s), batch) for name, s in CASES.items()}
    medians = interleaved(steps, given.rounds)
    ratios = {name: median / medians["dpo"] for name, median in medians.items()}
    head = about(given.device, ("transformers",))
    if given.json:
        print(json.dumps(head | {"milliseconds": medians, "beside_dpo": ratios}))
        return
    print(head)
    for name, median in medians.items():
        print(f"{name:14}{median:10.1f} ms{ratios[name]:8.2f} x DPO")


def setting(device: str) -> tuple[Any, PreferenceBatch]:
    """One model, which all cases train in turn, and the pairs."""
    torch.manual_seed(0)
    width, layers, heads, vocabulary, pairs, length = SIZES[device]
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=heads, n_positions=length,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).to(device)
    tokens = torch.randint(vocabulary, (pairs, 2, length), device=device)
    tokens[:, 1, : length // 2] = tokens[:, 0, : length // 2]
    prompts = torch.full((pairs,), length // 2, device=device)
    return model, PreferenceBatch(tokens, prompts, torch.full_like(tokens[:, :, 0], length), torch.arange(pairs))


def step_of(method: SparsePO, batch: PreferenceBatch) -> Callable[[], object]:
    """One step of a method."""
    device = batch.tokens.device.type
    method.to(device)
    optimizer = make_optimizer(method, Optimizer())
    set_rates(optimizer, 1e-6, 0.0)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = method(batch, None).loss
        loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


if __name__ == "__main__":
    main()
