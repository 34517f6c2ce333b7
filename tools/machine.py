"""What a result file says of the run that made it: command, date, hardware, threads, versions."""

from __future__ import annotations

import os
import platform
import sys
import time
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
