"""The documents, the code in them, and the small runs that this code takes for granted."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

import torch
from PIL import Image

from unmask.core import registry
from unmask.core.training import checkpoint
from unmask.core.training.recipe import make_recipe, to_yaml

ROOT = Path(__file__).parents[2]
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path
    for pattern in ("*.md", "docs/*.md", "docs/tutorials/*.md", "docs/guides/*.md", "packages/*/*.md")
    for path in sorted(ROOT.glob(pattern))
}
_FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks(path: Path, *languages: str) -> list[str]:
    """The fenced code blocks in one of the languages ("" is plain), those in lists included."""
    found = _FENCED.findall(path.read_text(encoding="utf-8"))
    return [textwrap.dedent(block) for _, language, block in found if language in languages]


def write_photographs(folder: Path, *names: str) -> None:
    """Small colour images."""
    generator = torch.Generator().manual_seed(0)
    for name in names:
        pixels = torch.randint(0, 256, (40, 48, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / name)


def fabricate_mae(out: Path) -> Path:
    """A run of MAE on colour images as training leaves it, with random weights."""
    shape = {"dim": 32, "depth": 1, "heads": 2}
    model = {"encoder": {"patch_size": 8, **shape}, "decoder": shape}
    data = {"source": "photographs", "image_size": 32, "mean": [0.5] * 3, "std": [0.3] * 3}
    recipe = make_recipe({"method": "vision/mae", "model": model, "data": data})
    method = registry.load(recipe.method).build(recipe.model, recipe.data)
    out.mkdir(parents=True)
    (out / "recipe.yaml").write_text(to_yaml(recipe))
    (out / "metrics.jsonl").write_text(json.dumps({"step": 7, "val_loss": 0.5}) + "\n")
    checkpoint.write(out / "model.safetensors", method.state_dict(), {"step": 7, "method": recipe.method})
    return out
