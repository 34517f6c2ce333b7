"""The README.md that goes with exported weights: what they are, how they came to be, how to load and name them."""

from __future__ import annotations

import re
from typing import Any

from unmask.core.interop.export import Exported
from unmask.core.interop.model_card import lines, model_card, origin, public, with_unmask
from unmask.core.interop.weights import State, shape
from unmask.core.training.checkpoint import LoadedRun
from unmask.pointcloud.data.readers import WIDTHS

_NORMALISED = {
    "none": "as they are, in the sensor's or the file's own frame",
    "center": "moved so that the middle of the cloud's bounding box in x and y, and its least z, are at 0",
    "sphere": "moved so that the centroid is at 0, and scaled so that the farthest point is at distance 1",
}
_CHANNELS = {
    "intensity": "intensity (integers of 8 or 16 bits as 0..1, floating point as it is)",
    "time": "seconds before the key frame (0 for single sweeps)",
    "color": "red, green, blue in 0..1",
    "normal": "the unit normal's x, y, z",
}


def cloud_card(exported: Exported, to: str, state: State) -> str:
    """The model card of an export to ``unmask`` or ``sst``; documents every name of the weights `state`."""
    what = "The whole model (encoder, decoders and heads)" if to == "unmask" else "The encoder, for SST's detectors,"
    sections = {
        "What this is": f"{what} {origin(exported)} Pre-trained without labels by hiding pillars of every cloud and "
        "predicting their geometry. It gives one vector for every pillar that holds points.",
        "Intended use": "Features for probes of clouds and points, and a start for fine-tuning, on clouds like those "
        "that it was trained on: of the same sensor, or the same kind of scan. It classifies and detects nothing by "
        "itself. Measure it on your own data before you rely on it.",
        "How to load it": with_unmask(exported, "scan.ply") + _LOADING[to],
        "Input": _input(exported.run),
        "Keys": _KEYS[to] + "\n\n" + _keys(state),
    }
    return model_card(exported, to, sections, ["point-cloud", "lidar"], "feature-extraction")


_LOADING = {
    "unmask": """ Decoders and heads are there.

`rows, vectors = features.per_point()` gives the vector of its pillar for every point inside the range.""",
    "sst": """ Decoders and heads are not.

In a detector on the SST code base (github.com/tusen-ai/SST), build voxel encoder and backbone from
`detector` in `config.json`, then (PATH is this directory):

```python
from safetensors.torch import load_file

missing, unexpected = detector.load_state_dict(load_file("PATH/model.safetensors"), strict=False)
assert not unexpected  # and of `missing` only the neck, the heads and layers between backbone and neck
```

The names of keys and settings are SST's as we know them; they were not checked against the code. The check above finds
a difference in names. unmask gives the same features as of the run.""",
}
_KEYS = {
    "unmask": "Names in `model.safetensors`. Layers `encoder.layers.{i}` alternate between windows aligned to the grid "
    "(even i) and windows shifted by half their side (odd i).",
    "sst": "Names in `model.safetensors`. Blocks have two layers: j = 0 with windows aligned to the grid, j = 1 with "
    "windows shifted by half their side. Rows of `in_proj` are queries, keys, values, in this order. "
    "`vfe_layers.0.linear` takes, in this order: the channels under Input, the point's x, y, z minus the mean of its "
    "pillar's points, and its x, y, z minus the pillar's centre.",
}


def _input(run: LoadedRun) -> str:
    """Range, pillars, channels and preparation."""
    method: Any = run.method
    data, grid = run.recipe.data, method.grid
    low, high = grid.bounds[:3], grid.bounds[3:]
    axes = ", ".join(f"{axis} in [{a:g}, {b:g})" for axis, a, b in zip("xyz", low, high, strict=True))
    channels = [*"xyz"]
    for feature in data.features:
        channels += [_CHANNELS[feature]] if WIDTHS[feature] == 1 else [f"{_CHANNELS[feature]} (3 channels)"]
    limit = f"; at most {data.max_points:,} points of a cloud, chosen at random" if data.max_points else ""
    facts = {
        "channels of a point, in this order": ", ".join(channels) + f" ({data.channels} in all, float32)",
        "positions": f"metres, {_NORMALISED[data.normalize or 'none']}",
        "range": f"{axes}, after that; points outside are left out{limit}",
        "pillars": f"{grid.pillar[0]:g} x {grid.pillar[1]:g} m (x, y) and as high as the range; "
        f"{grid.shape[1]} along x, {grid.shape[0]} along y",
        "cells inside a pillar": f"{_cells(grid.low)} finest and {_cells(grid.med)} middle ones along z, y, x",
        "trained on": f"`{public(data.source)}`" + (f", {data.sweeps} sweeps together" * (data.sweeps > 1)),
    }
    return lines(facts)


def _cells(counts: tuple[int, int, int]) -> str:
    return " x ".join(map(str, counts))


def _keys(state: State) -> str:
    """A table of every name, with numbers as {i}, {j} and the values that they take."""
    found: dict[tuple[str, str], list[tuple[str, ...]]] = {}
    for name, tensor in state.items():
        numbers = re.findall(r"\.(\d+)(?=\.)", name)
        letters = iter("ijk")
        pattern = re.sub(r"\.\d+(?=\.)", lambda _: f".{{{next(letters)}}}", name)  # noqa: B023 (used at once)
        found.setdefault((pattern, shape(tensor)), []).append(tuple(numbers))
    rows = ["| key | numbers | shape |", "|---|---|---|"]
    rows += [f"| `{pattern}` | {_numbers(values)} | {size} |" for (pattern, size), values in found.items()]
    return "\n".join(rows)


def _numbers(values: list[tuple[str, ...]]) -> str:
    """``i = 0..5, j = 0, 1``: the values at each place."""
    texts = []
    for letter, column in zip("ijk", zip(*values, strict=True), strict=False):
        taken = sorted({int(value) for value in column})
        whole = len(taken) > 2 and taken == list(range(taken[0], taken[-1] + 1))
        texts.append(f"{letter} = " + (f"{taken[0]}..{taken[-1]}" if whole else ", ".join(map(str, taken))))
    return "; ".join(texts)
