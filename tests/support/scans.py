"""Small labelled clouds as files, and run directories with random weights over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import laspy
import numpy as np
import torch

from unmask.core import registry
from unmask.core.training import checkpoint
from unmask.core.training.recipe import make_recipe, to_yaml

MODEL: dict[str, Any] = {
    "encoder": {"dim": 16, "depth": 1, "heads": 2, "window": 4},
    "decoder_depth": 1,
    "low": [4, 2, 2],
    "med": [2, 1, 1],
}
DATA: dict[str, Any] = {"normalize": "none", "range": [-2.0, -2.0, -1.0, 2.0, 2.0, 3.0], "pillar": [0.5, 0.5]}
GROUND, BUILDING = 2, 6  # of the LAS standard
KINDS = ("box", "pole", "slab")


def scan(kind: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Ground with one object on it: positions, and LAS classes. The last point of every scan is unclassified (1)."""
    rng = np.random.default_rng([KINDS.index(kind), index])
    ground = np.column_stack([rng.uniform(-1.9, 1.9, (120, 2)), rng.normal(0, 0.01, 120)])
    size = {"box": (0.8, 0.8, 0.8), "pole": (0.1, 0.1, 2.5), "slab": (1.6, 1.6, 0.4)}[kind]
    thing = rng.uniform(0, 1, (60, 3)) * size + [*rng.uniform(-1.5, 0.2, 2), 0.15]
    xyz = np.concatenate([ground, thing])
    labels = np.repeat([GROUND, BUILDING], [120, 60])
    labels[-1] = 1
    return xyz, labels


def write_las(path: Path, xyz: np.ndarray, labels: np.ndarray) -> None:
    """A LAS file with a class per point, in millimetres."""
    header = laspy.LasHeader(version="1.4", point_format=6)
    header.scales, header.offsets = np.full(3, 1e-3), np.zeros(3)
    file = laspy.LasData(header)
    file.x, file.y, file.z = xyz.T
    file.classification = labels.astype(np.uint8)
    file.intensity = np.arange(len(xyz), dtype=np.uint16)
    path.parent.mkdir(parents=True, exist_ok=True)
    file.write(str(path))


def write_scans(folder: Path, sizes: dict[str, int], *, las: bool = True, flat: bool = False) -> Path:
    """`scan`s of every kind in SPLIT/KIND/NUMBER.las, or .npy without classes of points.

    Args:
        folder: where to.
        sizes: scans of each kind, by split.
        las: or .npy.
        flat: SPLIT/KIND-NUMBER instead, which gives clouds no class.
    """
    index = 0
    for split, size in sizes.items():
        for _ in range(size):
            for kind in KINDS:
                xyz, labels = scan(kind, index)
                path = folder / split / (f"{kind}-{index:03}" if flat else f"{kind}/{index:03}")
                path.parent.mkdir(parents=True, exist_ok=True)
                if las:
                    write_las(path.with_suffix(".las"), xyz, labels)
                else:
                    np.save(path.with_suffix(".npy"), xyz)
            index += 1
    return folder


def fabricate(out: Path, source: str | Path, *, model: dict[str, Any] | None = None, **data: Any) -> Path:
    """A run directory as training leaves it, with random weights and statistics that are not those of initialisation.

    Args:
        out: the run.
        source: its data.
        model: changes to MODEL.
        data: changes to DATA.
    """
    raw = {
        "method": "pointcloud/geomae",
        "model": json.loads(json.dumps({**MODEL, **(model or {})})),
        "data": {**DATA, "source": str(source), **data},
        "training": {"batch_size": 8, "precision": "32-true"},
    }
    recipe = make_recipe(raw)
    torch.manual_seed(3)
    method = registry.load(recipe.method).build(recipe.model, recipe.data)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in method.state_dict().items():
        if tensor.is_floating_point():
            noise = 0.05 * torch.randn(tensor.shape, generator=generator)
            tensor += noise.abs() if name.endswith("running_var") else noise
        elif name.endswith("num_batches_tracked"):
            tensor += 12
    out.mkdir(parents=True)
    (out / "recipe.yaml").write_text(to_yaml(recipe))
    (out / "metrics.jsonl").write_text(json.dumps({"step": 7, "val_loss": 2.5}) + "\n")
    checkpoint.write(out / "model.safetensors", method.state_dict(), {"step": 7, "method": recipe.method})
    return out
