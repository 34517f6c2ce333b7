"""A training step of MAE and SimMIM against transformers' models at the same configuration, in the same process.

    python tools/compare_step.py                          # CPU, fp32: small models
    python tools/compare_step.py --device cuda --compile  # GPU, bf16 autocast: ViT-B and ViT-L

A step is: draw the mask, forward, backward, AdamW (fused on both sides). Both sides get the same images, dtype, threads
and torch's fused attention; the two are interleaved and medians are reported. Transformers draws its own mask (MAE) or
is handed ours (SimMIM, whose model takes one).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from machine import about
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForMaskedImageModeling, ViTMAEConfig, ViTMAEForPreTraining

from unmask.core.masking import RandomMasking
from unmask.core.method import Clock
from unmask.core.randomness import Key
from unmask.vision.data.images import ImageBatch
from unmask.vision.encoders.vit import VisionTransformer, ViTSettings
from unmask.vision.methods.mae import MAE, DecoderSettings
from unmask.vision.methods.simmim import SimMIM

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOP/s, vendors' data sheets


@dataclass(frozen=True)
class Case:
    """One configuration, for both sides."""

    name: str
    method: str
    image: int
    batch: int
    encoder: ViTSettings
    decoder: DecoderSettings | None = None


TINY = ViTSettings(patch_size=4, dim=192, depth=12, heads=3)
SMALL = ViTSettings(patch_size=16, dim=384, depth=12, heads=6)
BASE = ViTSettings(patch_size=16, dim=768, depth=12, heads=12)
LARGE = ViTSettings(patch_size=16, dim=1024, depth=24, heads=16)
CASES = {
    "cpu": [
        Case("MAE ViT-Ti/4, 32 px", "mae", 32, 64, TINY, DecoderSettings(128, 2, 4)),
        Case("MAE ViT-Ti/4, 32 px, decoder 512 x 8", "mae", 32, 32, TINY, DecoderSettings(512, 8, 16)),
        Case("MAE ViT-S/16, 224 px", "mae", 224, 8, SMALL, DecoderSettings(512, 8, 16)),
        Case("SimMIM ViT-Ti/4, 32 px", "simmim", 32, 64, TINY),
        Case("SimMIM ViT-S/16, 224 px", "simmim", 224, 8, SMALL),
    ],
    "cuda": [
        Case("MAE ViT-B/16, 224 px", "mae", 224, 256, BASE, DecoderSettings()),
        Case("MAE ViT-L/16, 224 px", "mae", 224, 256, LARGE, DecoderSettings()),
        Case("SimMIM ViT-B/16, 224 px", "simmim", 224, 256, BASE),
        Case("SimMIM ViT-L/16, 224 px", "simmim", 224, 128, LARGE),
    ],
}


def ours(case: Case, device: str, compiled: bool) -> tuple[nn.Module, Callable[[torch.Tensor, int], torch.Tensor]]:
    """Our model and a function (images, step) -> loss."""
    size = (case.image, case.image)
    if case.method == "mae":
        model: Any = MAE(VisionTransformer(case.encoder, size), case.decoder)
    else:  # the backbone that transformers has: learned positions, no relative bias, no layer scale
        encoder = VisionTransformer(replace(case.encoder, positions="learned"), size)
        unit = 2 * case.encoder.patch_size
        model = SimMIM(encoder, masking=RandomMasking(0.6, "ceil_hide", unit // case.encoder.patch_size))
    model = model.to(device).train()
    forward = torch.compile(model) if compiled else model
    ids = torch.arange(case.batch, device=device)

    def loss(images: torch.Tensor, step: int) -> torch.Tensor:
        batch = ImageBatch(images, ids)
        return forward(batch, model.draw(batch, Clock(step), Key.of(0, ids, step))).loss

    return model, loss


def theirs(case: Case, device: str, compiled: bool) -> tuple[nn.Module, Callable[[torch.Tensor, int], torch.Tensor]]:
    """Transformers' model and a function (images, step) -> loss."""
    e = case.encoder
    shape = dict(
        image_size=case.image, patch_size=e.patch_size, hidden_size=e.dim, num_hidden_layers=e.depth,
        num_attention_heads=e.heads, intermediate_size=4 * e.dim, attn_implementation="sdpa",
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    if case.method == "mae":
        d = case.decoder or DecoderSettings()
        config = ViTMAEConfig(
            **shape, mask_ratio=0.75, norm_pix_loss=True, decoder_hidden_size=d.dim, decoder_num_hidden_layers=d.depth,
            decoder_num_attention_heads=d.heads, decoder_intermediate_size=4 * d.dim,
        )  # fmt: skip
        model: nn.Module = ViTMAEForPreTraining(config)
    else:
        model = ViTForMaskedImageModeling(ViTConfig(**shape, encoder_stride=e.patch_size))
    model = model.to(device).train()
    forward = torch.compile(model) if compiled else model
    masking = RandomMasking(0.6, "ceil_hide", 2)
    grid = (case.image // e.patch_size,) * 2
    ids = torch.arange(case.batch, device=device)

    def loss(images: torch.Tensor, step: int) -> torch.Tensor:
        if case.method == "mae":
            return forward(pixel_values=images).loss
        return forward(pixel_values=images, bool_masked_pos=masking(Key.of(0, ids, step), grid).hidden).loss

    return model, loss


def measure(case: Case, device: str, compiled: bool, rounds: int) -> dict[str, object]:
    """Median seconds per step of both sides, interleaved, with FLOPs, MFU and peak memory where there is a GPU."""
    torch.manual_seed(0)
    images = torch.randn(case.batch, 3, case.image, case.image, device=device)
    sides = {"unmask": ours(case, device, compiled), "transformers": theirs(case, device, compiled)}
    steppers = {name: _stepper(model, loss, images, device) for name, (model, loss) in sides.items()}
    row: dict[str, object] = {"case": case.name, "batch": case.batch}
    for name, step in steppers.items():
        for warm in range(3):
            step(warm)
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step(3)
            row[f"{name}_activation_GiB"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for i in range(rounds):
        for name, step in steppers.items():
            start = time.perf_counter()
            step(4 + i)
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    for name, values in times.items():
        seconds = statistics.median(values)
        row[f"{name}_ms"] = 1e3 * seconds
        row[f"{name}_samples_per_s"] = case.batch / seconds
    row["speedup"] = statistics.median(times["transformers"]) / statistics.median(times["unmask"])
    if device == "cuda":
        # Both are charged with the same work, ours: fewer FLOPs for the same loss is part of being fast.
        flops = _flops(case, images[:8], device) * case.batch / 8
        peak = next((p for n, p in PEAK.items() if n in torch.cuda.get_device_name()), None)
        for name in steppers:
            row[f"{name}_mfu"] = flops / (row[f"{name}_ms"] / 1e3) / peak if peak else None  # type: ignore[operator]
    return row


def _stepper(model: nn.Module, loss: Callable, images: torch.Tensor, device: str) -> Callable[[int], None]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.05, fused=True)

    def step(i: int) -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            value = loss(images, i)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _flops(case: Case, images: torch.Tensor, device: str) -> float:
    model, loss = ours(replace(case, batch=len(images)), device, compiled=False)
    with FlopCounterMode(display=False) as counter:
        loss(images, 0).backward()
    return float(counter.get_total_flops())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--compile", action="store_true", help="torch.compile on both sides")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps per side (default 15)")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for case in CASES[args.device]:
        if args.only in case.name:
            rows.append(measure(case, args.device, args.compile, args.rounds))
            torch._dynamo.reset()
            figures = {k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}
            print(figures, flush=True)
    if args.out:
        result = {
            **about(args.device, ("transformers",)),
            "compile": args.compile,
            "dtype": "bf16 autocast" if args.device == "cuda" else "fp32",
            "rows": rows,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
