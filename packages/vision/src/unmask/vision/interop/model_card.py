"""The README.md that goes with exported weights: what they are, how they came to be and how to load them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from unmask.core import registry
from unmask.core.training.checkpoint import LoadedRun
from unmask.core.training.recipe import to_yaml

_TAGS = ["unmask", "self-supervised-learning", "masked-image-modeling"]


def model_card(run: LoadedRun, run_dir: Path, to: str) -> str:
    """A model card in the hub's format: YAML front matter, then Markdown.

    Args:
        run: the exported run.
        run_dir: its directory; versions and scores are read from the files there.
        to: ``timm`` or ``transformers``.
    """
    card = registry.card(run.recipe.method)
    name = card.id.split("/")[1]
    front = {"library_name": to, "pipeline_tag": "image-feature-extraction", "tags": [*_TAGS, name]}
    what = "The encoder" if to == "timm" else "The whole masked autoencoder (encoder and decoder)"
    sections = {
        "What this is": f"{what} of a run of **{card.id}**: {card.title} ({card.paper}). Pre-trained without labels by "
        f"hiding part of every image and predicting it.{_masking_note(run, to)}",
        "Intended use": "Features for k-NN, linear probes and fine-tuning on images like those it was trained on. "
        "It has no classification head and has not been checked for bias; measure it on your own data before relying "
        "on it.",
        "How to load it": _LOADING[to].format(**_sizes(run)),
        "Data": _data(run.recipe.data),
        "Training": _training(run, run_dir),
        "Scores": _scores(run_dir / "evaluation.json"),
        "Licence": "Exporting sets no licence for these weights: choose one that the training data allows before you "
        f"publish them. The code that trained them (unmask) is Apache-2.0. The method's reference code, "
        f"{card.reference} ({card.reference_licence}), was not used.",
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text)
    title = f"# {name} pre-trained with unmask, {run.step} steps"
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n{title}\n\n{body}\n"


_LOADING = {
    "timm": """With timm (1.0.31 or newer; PATH is this directory):

```python
import timm

encoder = timm.create_model("local-dir:PATH", pretrained=True).eval()
config = timm.data.resolve_model_data_config(encoder)
features = encoder(images)  # normalised images [batch, {channels}, {height}, {width}] -> [batch, dim]
```

Features are the mean over patch tokens after the final norm; `encoder.forward_features(images)` gives the tokens.""",
    "transformers": """With transformers (PATH is this directory):

```python
from transformers import ViTMAEForPreTraining, ViTMAEModel

model = ViTMAEForPreTraining.from_pretrained("PATH")       # encoder and decoder
encoder = ViTMAEModel.from_pretrained("PATH", mask_ratio=0.0)  # hides nothing, but shuffles the tokens
```

With unmask, which never masks when it encodes and keeps the spatial order:

```python
import unmask.vision

encoder = unmask.vision.load("PATH")
features = encoder(encoder.preprocess(["image.jpg"])).pooled  # [1, dim]
```

To go on pre-training from it: `unmask train METHOD --init PATH --out RUN`. In timm: export the same run with
`--to timm`.""",
}


def _sizes(run: LoadedRun) -> dict[str, int]:
    height, width = run.recipe.data.image_size
    return {"channels": run.recipe.data.channels, "height": height, "width": width}


def _masking_note(run: LoadedRun, to: str) -> str:
    masking = getattr(run.method, "masking", None)
    if to != "transformers" or masking is None or type(masking).__name__ == "RandomMasking":
        return ""
    return (
        f" It was trained with {type(masking).__name__}; transformers masks uniformly, so its loss is that of another "
        "masking on the same weights."
    )


def _data(data: Any) -> str:
    height, width = data.image_size
    facts = {
        "source": f"`{_public_name(data.source)}`",
        "images": f"{height} x {width} pixels, {data.channels} channel{'s' if data.channels > 1 else ''}",
        "mean": ", ".join(f"{value:.4g}" for value in data.mean or ()),
        "standard deviation": ", ".join(f"{value:.4g}" for value in data.std or ()),
    }
    return "\n".join(f"- {name}: {value}" for name, value in facts.items() if value)


def _training(run: LoadedRun, run_dir: Path) -> str:
    environment = _json(run_dir / "environment.json")
    versions = environment.get("versions", {})
    lines = [f"{run.step} optimizer steps of {run.recipe.training.batch_size} images."]
    if "torch" in versions:
        lines.append(f"torch {versions['torch']}, Python {environment.get('python', 'unknown')}.")
    recipe = replace(run.recipe, data=replace(run.recipe.data, source=_public_name(run.recipe.data.source)))
    return " ".join(lines) + f" The complete recipe:\n\n```yaml\n{to_yaml(recipe)}```"


def _public_name(source: str) -> str:
    """A folder's own name: where it lay on somebody's disk is nobody else's business."""
    return Path(source).name


def _scores(path: Path) -> str:
    values = _json(path)
    return f"From the run's `evaluation.json`:\n\n```json\n{json.dumps(values, indent=2)}\n```" if values else ""


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
