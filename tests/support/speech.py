"""A tiny HuBERT run with random weights, and tar shards of tones with speakers and classes."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import soundfile
import torch
from clips import tone
from torch import Tensor

from unmask.core import registry
from unmask.core.training import checkpoint
from unmask.core.training.recipe import make_recipe, to_yaml

ENCODER: dict[str, Any] = {
    "channels": 16, "dim": 32, "depth": 2, "heads": 4, "mlp_ratio": 2.0, "positional_kernel": 16,
    "positional_groups": 4,
}  # fmt: skip
LARGE = {"extractor": "layer_norm", "norm": "pre", "feature_grad": 1.0}


def target(name: str = "mfcc", classes: int = 10, rate: float = 100.0) -> dict[str, Any]:
    return {"name": name, "classes": classes, "rate": rate, "digest": "0123456789abcdef"}


def fabricate(
    out: Path,
    source: str = "notes",
    *,
    encoder: dict[str, Any] | None = None,
    targets: list[dict[str, Any]] | None = None,
    head_dim: int = 8,
    **data: Any,
) -> Path:
    """A run directory as training leaves it, with random weights that are not those of initialisation."""
    settings = {"source": source, "targets": targets or [target()], **data}
    model = {"encoder": {**ENCODER, **(encoder or {})}, "head": {"dim": head_dim}}
    recipe = make_recipe({"method": "speech_audio/hubert", "model": model, "data": settings})
    torch.manual_seed(3)
    method = registry.load(recipe.method).build(recipe.model, recipe.data)
    generator = torch.Generator().manual_seed(0)
    for parameter in method.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    out.mkdir(parents=True)
    (out / "recipe.yaml").write_text(to_yaml(recipe))
    (out / "metrics.jsonl").write_text(json.dumps({"step": 7, "val_loss": 2.5}) + "\n")
    checkpoint.write(out / "model.safetensors", method.state_dict(), {"step": 7, "method": recipe.method})
    return out


def write_wav(path: Path, wave: Tensor, rate: int = 16_000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave.numpy(), rate, subtype="PCM_16")


def voices(index: int) -> tuple[Tensor, str, str]:
    """A tone with its speaker (low or high voice) and word (few or many harmonics, or noise)."""
    low, word = index % 2 == 0, index % 3
    hertz = (110 if low else 260) * (1 + 0.002 * (index % 7))
    wave = tone(hertz, 0.12 + 0.01 * (index % 9), (12, 1, 4)[word], (0.02, 0.02, 0.3)[word], seed=index)
    return wave, "low" if low else "high", ("rich", "poor", "noisy")[word]


def write_shards(folder: Path, sizes: dict[str, int]) -> Path:
    """One tar per split, whose clips have a speaker and a class."""
    folder.mkdir(parents=True)
    index = 0
    for split, size in sizes.items():
        with tarfile.open(folder / f"{split}.tar", "w") as tar:
            for _ in range(size):
                wave, speaker, word = voices(index)
                sound = io.BytesIO()
                soundfile.write(sound, wave.numpy(), 16_000, format="WAV", subtype="PCM_16")
                about = json.dumps({"speaker": speaker, "label": word}).encode()
                for name, content in ((f"{index:03}.wav", sound.getvalue()), (f"{index:03}.json", about)):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
                index += 1
    return folder
