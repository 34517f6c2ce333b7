"""A training step of HuBERT against torchaudio's pre-training model: same weights, audio, labels and masks.

    python tools/compare_hubert.py                                 # CPU, fp32: a small model and BASE on short clips
    python tools/compare_hubert.py --device cuda --bf16 --compile  # GPU: BASE and LARGE at their published batch

A step is forward, loss, backward and AdamW (fused on both sides); ours contains `draw`. Masks are drawn beforehand with
our sampler and handed to both, and no side computes logits of visible frames. Dropouts are the published ones; at a
dropped layer torchaudio skips the work and we do not. The two sides take turns in one process; medians are reported.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from unmask.core.mask import Mask
from unmask.core.masking import SpanMasking
from unmask.core.method import Clock
from unmask.core.randomness import Key
from unmask.speech_audio.data.clips import AudioBatch
from unmask.speech_audio.data.frames import SAMPLE_RATE, num_frames
from unmask.speech_audio.data.labels import Target
from unmask.speech_audio.encoders.wav2vec2 import KERNELS, STRIDES, EncoderSettings
from unmask.speech_audio.interop.convert import from_torchaudio
from unmask.speech_audio.methods.hubert import HeadSettings, HuBERT, Settings

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOP/s, vendors' data sheets
Step = Callable[[int], Tensor]


@dataclass(frozen=True)
class Case:
    """One configuration, for both sides."""

    name: str
    batch: int
    seconds: float
    encoder: EncoderSettings
    head_dim: int = 256
    classes: int = 500


TINY = EncoderSettings(channels=96, dim=128, depth=4, heads=4, positional_kernel=32, positional_groups=8)
BASE = EncoderSettings()
LARGE = EncoderSettings(
    extractor="layer_norm", feature_grad=1.0, dim=1024, depth=24, heads=16, norm="pre", input_dropout=0.0, dropout=0.0,
    attention_dropout=0.0, layer_drop=0.0,
)  # fmt: skip
CASES = {
    "cpu": [
        Case("tiny, 8 x 3 s", 8, 3.0, TINY, head_dim=64, classes=100),
        Case("BASE, 1 x 4 s", 1, 4.0, BASE),
    ],
    "cuda": [
        Case("BASE, 7 x 12.5 s", 7, 12.5, BASE),
        Case("BASE, 28 x 12.5 s", 28, 12.5, BASE),
        Case("LARGE, 4 x 14 s", 4, 14.0, LARGE, head_dim=768),
    ],
}


class Given:
    """Masks drawn beforehand, one per step."""

    def __init__(self, masks: list[Mask]) -> None:
        self.masks = masks
        self.step = 0

    def __call__(self, key: Key, grid: tuple[int, ...], valid: Tensor | None = None) -> Mask:
        return self.masks[self.step % len(self.masks)]


def torchaudios(case: Case) -> Any:
    """Torchaudio's model at this configuration."""
    e = case.encoder
    return torchaudio.models.hubert_pretrain_model(
        extractor_mode=e.extractor,
        extractor_conv_layer_config=[(e.channels, k, s) for k, s in zip(KERNELS, STRIDES, strict=True)],
        extractor_conv_bias=False, encoder_embed_dim=e.dim, encoder_projection_dropout=e.input_dropout,
        encoder_pos_conv_kernel=e.positional_kernel, encoder_pos_conv_groups=e.positional_groups,
        encoder_num_layers=e.depth, encoder_num_heads=e.heads, encoder_attention_dropout=e.attention_dropout,
        encoder_ff_interm_features=int(e.dim * e.mlp_ratio), encoder_ff_interm_dropout=e.activation_dropout,
        encoder_dropout=e.dropout, encoder_layer_norm_first=e.norm == "pre", encoder_layer_drop=e.layer_drop,
        mask_prob=0.8, mask_selection="static", mask_other=0.0, mask_length=10, no_mask_overlap=False,
        mask_min_space=1, mask_channel_prob=0.0, mask_channel_selection="static", mask_channel_other=0.0,
        mask_channel_length=10, no_mask_channel_overlap=False, mask_channel_min_space=1, skip_masked=False,
        skip_nomask=True, num_classes=case.classes, final_dim=case.head_dim,
        feature_grad_mult=e.feature_grad if e.feature_grad < 1 else None,
    )  # fmt: skip


def sides(case: Case, device: str, compiled: bool) -> dict[str, tuple[nn.Module, Step]]:
    """Both models at the same weights, and for each a function step -> loss."""
    torch.manual_seed(0)
    samples = int(case.seconds * SAMPLE_RATE)
    frames, ids = num_frames(samples), torch.arange(case.batch, device=device)
    masks = [SpanMasking()(Key.of(0, ids, visit), (frames,)) for visit in range(16)]
    given = Given([replace(mask, valid=torch.ones_like(mask.hidden)) for mask in masks])
    batch = AudioBatch(
        0.1 * torch.randn(case.batch, samples, device=device),
        torch.full((case.batch,), samples, device=device), torch.full((case.batch,), frames, device=device), ids,
        torch.randint(0, case.classes, (case.batch, frames, 1), device=device),
    )  # fmt: skip

    theirs = torchaudios(case).to(device).train()
    settings = Settings(case.encoder, HeadSettings(case.head_dim))
    ours = HuBERT(settings, [Target("labels", case.classes, 50.0, "")], given).to(device).train()
    ours.load_state_dict(from_torchaudio(theirs.state_dict()))

    def inject(x: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        hidden = given(Key.of(0, ids), (frames,)).hidden
        x[hidden] = theirs.mask_generator.mask_embedding.to(x.dtype)
        return x, hidden

    theirs.mask_generator.forward = inject
    forward_ours, forward_theirs = (torch.compile(m) if compiled else m for m in (ours, theirs))
    key = Key.of(0, ids)

    def our_loss(step: int) -> Tensor:
        given.step = step
        return forward_ours(batch, ours.draw(batch, Clock(step), key)).loss

    def their_loss(step: int) -> Tensor:
        given.step = step
        logits, _, penalty = forward_theirs(batch.audio, batch.labels[..., 0])  # type: ignore[index]
        first = torch.zeros(len(logits), dtype=torch.int64, device=device)
        return F.cross_entropy(logits.float(), first) + 10.0 * penalty

    return {"unmask": (ours, our_loss), "torchaudio": (theirs, their_loss)}


def measure(case: Case, device: str, bf16: bool, compiled: bool, rounds: int) -> dict[str, object]:
    """Median seconds per step of both sides, interleaved, with FLOPs, MFU and peak memory where there is a GPU."""
    both = sides(case, device, compiled)
    row: dict[str, object] = {"case": case.name, "batch": case.batch, "loss_difference": _difference(both)}
    if device == "cuda":
        flops = _flops(*both["unmask"], bf16)
    steppers = {name: _stepper(model, loss, device, bf16) for name, (model, loss) in both.items()}
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
        row[f"{name}_audio_seconds_per_s"] = case.batch * case.seconds / seconds
        if device == "cuda":  # both are charged with the same work, ours
            peak = next((p for n, p in PEAK.items() if n in torch.cuda.get_device_name()), None)
            row[f"{name}_mfu"] = flops / seconds / peak if peak and bf16 else None
    row["speedup"] = statistics.median(times["torchaudio"]) / statistics.median(times["unmask"])
    return row


def _difference(both: dict[str, tuple[nn.Module, Step]]) -> float:
    """Relative difference of the two losses without dropout and autocast: the sides do compute the same."""
    values = []
    with torch.no_grad():
        for model, loss in both.values():
            model.eval()
            values.append(float(loss(0)))
            model.train()
    return abs(values[0] - values[1]) / abs(values[1])


def _stepper(model: nn.Module, loss: Step, device: str, bf16: bool) -> Callable[[int], None]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, fused=True)

    def step(i: int) -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            value = loss(i)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _flops(model: nn.Module, loss: Step, bf16: bool) -> float:
    """Floating-point operations of our forward and backward pass."""
    with FlopCounterMode(display=False) as counter, torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        loss(0).backward()
    model.zero_grad(set_to_none=True)
    return float(counter.get_total_flops())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast on both sides")
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
            rows.append(measure(case, args.device, args.bf16, args.compile, args.rounds))
            torch._dynamo.reset()
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    if args.out:
        result = {
            "command": "python " + " ".join(sys.argv),
            "date": time.strftime("%Y-%m-%d"),
            "hardware": torch.cuda.get_device_name() if args.device == "cuda" else _cpu(),
            "threads": torch.get_num_threads(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torchaudio": torchaudio.__version__,
            },
            "compile": args.compile,
            "dtype": "bf16 autocast" if args.bf16 else "fp32",
            "rows": rows,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
