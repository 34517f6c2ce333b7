"""What a person sees while a run goes on: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from unmask.core.progress import duration
from unmask.core.training.gradients import Call

# Peak dense bf16 FLOP/s by a part of the device's name, from the makers' data sheets; the first match counts. Fabric's
# `get_available_flops` knows neither an H200 by the name it gives itself nor a B200, and takes an L40S for an L4.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device: torch.device) -> float | None:
    """The device's peak bf16 FLOP/s, or None where it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def count_flops(fabric: Any, method: nn.Module, call: Call) -> int:
    """FLOPs of one micro-batch's forward and backward pass. Leaves gradients, generators and modes as they were."""
    training = [module for module in method.modules() if module.training]
    method.eval()  # no dropout and no running statistics; the same matrix products
    counter = FlopCounterMode(display=False)
    with counter, fabric.autocast():
        output = method(call.batch, call.plan)
        output.loss.backward()
    method.zero_grad(set_to_none=True)
    for module in training:
        module.training = True
    return counter.get_total_flops()


class Meter:
    """Samples per second since the last reading, and what share of the hardware's peak that is.

    Args:
        flops_per_sample: of a forward and backward pass; None where MFU is not asked for.
        peak: FLOP/s of all devices together.
    """

    def __init__(self, flops_per_sample: float | None = None, peak: float | None = None) -> None:
        from lightning_fabric.utilities.throughput import Throughput

        self.flops_per_sample = flops_per_sample or 0.0
        self.throughput = Throughput(peak, window_size=2)  # two readings; all devices count as one
        self.began = time.perf_counter()
        self.steps = self.samples = self.seen = 0
        self._update()

    def add(self, samples: int) -> None:
        """Count a step and the samples that it trained on."""
        self.steps += 1
        self.samples += samples

    def skip(self) -> None:
        """Leave the time since the last reading out: it went into a validation or a save."""
        self.throughput.reset()
        self._update()

    def _update(self) -> None:
        flops = int((self.samples - self.seen) * self.flops_per_sample)
        elapsed = time.perf_counter() - self.began
        self.throughput.update(time=elapsed, batches=self.steps, samples=self.samples, flops=flops)
        self.seen = self.samples

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return round(time.perf_counter() - self.began, 3)

    def read(self) -> dict[str, float]:
        """Seconds since the start, samples per second and MFU; begins a new interval. Call after a step."""
        self._update()
        found = self.throughput.compute()
        numbers = {"seconds": self.seconds, "samples_per_second": round(found["device/samples_per_sec"], 2)}
        if self.flops_per_sample and "device/mfu" in found:
            numbers["mfu"] = round(found["device/mfu"], 4)
        return numbers


class Display:
    """Progress on stderr. Make one on rank zero with `enabled`; elsewhere it stays silent.

    Args:
        total: steps of the run.
        enabled: show anything.
    """

    every_seconds = 10.0

    def __init__(self, total: int, enabled: bool) -> None:
        self.total = total
        self.enabled = enabled
        self.bar: Any = None
        self.task: Any = None
        self.began = self.last = time.perf_counter()
        self.first = 0

    def start(self, step: int) -> None:
        """Show the bar, at `step`."""
        self.first = step
        if not (self.enabled and sys.stderr.isatty()):
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
        self.bar = Progress("step", *columns, console=Console(stderr=True))
        self.task = self.bar.add_task("train", total=self.total, completed=step, text="")
        self.bar.start()

    def step(self, step: int) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(self.task, completed=step)

    def report(self, step: int, line: dict[str, Any]) -> None:
        """Show the numbers of a metrics line."""
        if not self.enabled:
            return
        if self.bar is not None:
            self.bar.update(self.task, completed=step, text=describe(line))
            return
        now = time.perf_counter()
        if step == self.total or now - self.last >= self.every_seconds or step == self.first + 1:
            self.last = now
            left = (now - self.began) / max(step - self.first, 1) * (self.total - step)
            self.say(f"step {step}/{self.total}  {describe(line)}  {duration(left)} left")

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if not self.enabled:
            return
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Take the bar away, leaving its last state."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def describe(line: dict[str, Any]) -> str:
    """The numbers of a metrics line that a person watches."""
    times = line.get("time", {})
    parts = [f"loss {line['loss']:.4f}", f"{times['samples_per_second']:.0f} samples/s"]
    if line.get("hidden_share") is not None:
        parts.append(f"{line['hidden_share']:.0%} masked")
    if "mfu" in times:
        parts.append(f"MFU {times['mfu']:.1%}")
    return "  ".join(parts)
