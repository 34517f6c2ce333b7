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

_TAGS = ["unmask", "self-supervised-learning", "speech", "audio", "hubert"]


def model_card(run: LoadedRun, run_dir: Path, to: str) -> str:
    """A model card in the hub's format: YAML front matter, then Markdown.

    Args:
        run: the exported run.
        run_dir: its directory; versions and scores are read from the files there.
        to: ``transformers`` or ``torchaudio``.
    """
    card = registry.card(run.recipe.method)
    name = card.id.split("/")[1]
    tags = list(dict.fromkeys([*_TAGS, name]))
    front = {"library_name": to, "pipeline_tag": "feature-extraction", "tags": tags}
    sections = {
        "What this is": f"The encoder of a run of **{card.id}**: {card.title} ({card.paper}). Pre-trained without "
        "labels or transcripts by hiding spans of every recording and naming the cluster that each hidden frame "
        "belongs to. It takes mono audio at 16 kHz and gives one vector per 20 ms.",
        "Intended use": "Features for probes, and a start for fine-tuning (CTC for transcripts, classification), on "
        "recordings like those it was trained on. It has no output layer, transcribes nothing by itself, and has not "
        "been checked for bias between speakers, accents or languages; measure it on your own data before you rely on "
        "it.",
        "How to load it": _LOADING[to].format(factory=_factory(run), call=_CALLS[_factory(run)]),
        "Padding": _PADDING,
        "Data": _data(run.recipe.data),
        "Training": _training(run, run_dir),
        "Scores": _scores(run_dir / "evaluation.json"),
        "Licence": "Exporting sets no licence for these weights: choose one that the training data allows before you "
        "publish them. The code that trained them (unmask) is Apache-2.0."
        + (f" The method's reference code, {card.reference} ({card.reference_licence}), was not used." * _named(card)),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text)
    title = f"# {name} pre-trained with unmask, {run.step} steps"
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n{title}\n\n{body}\n"


def _named(card: Any) -> bool:
    return card.reference != "none"


def _factory(run: LoadedRun) -> str:
    method: Any = run.method
    return "hubert_pretrain_model" if len(method.classes) == 1 else "wav2vec2_model"


_CALLS = {"hubert_pretrain_model": "model.wav2vec2.extract_features", "wav2vec2_model": "model.extract_features"}
_LOADING = {
    "transformers": """With transformers (PATH is this directory):

```python
from transformers import AutoFeatureExtractor, HubertModel

encoder = HubertModel.from_pretrained("PATH").eval()
inputs = AutoFeatureExtractor.from_pretrained("PATH")(waveform, sampling_rate=16000, return_tensors="pt")
features = encoder(**inputs).last_hidden_state  # [1, frames, dim]
```

With unmask:

```python
import unmask.speech_audio

encoder = unmask.speech_audio.load("PATH")
features = encoder(encoder.preprocess(["recording.wav"])).pooled  # [1, dim]
```

To fine-tune on transcripts: `HubertForCTC.from_pretrained("PATH", vocab_size=..., ctc_loss_reduction="mean")`. To go on
pre-training: `unmask train METHOD --init PATH --out RUN`; the heads lie in `pretraining_heads.safetensors`.""",
    "torchaudio": """With torchaudio (PATH is this directory):

```python
import json
import torchaudio
from safetensors.torch import load_file

config = json.load(open("PATH/config.json"))
model = torchaudio.models.{factory}(**config["arguments"])
model.load_state_dict(load_file("PATH/model.safetensors"))
layers, _ = {call}(waveforms)  # [batch, samples] -> a list of [batch, frames, dim], one per layer
```

Call `model.eval()` first. With unmask: `unmask.speech_audio.load("PATH")`.""",
}
_PADDING = (
    "Features of a recording do not depend on padding in unmask. Where the first convolution is followed by GroupNorm "
    "(`extractor: group_norm` in the recipe), transformers and torchaudio count padding in that norm: for exactly "
    "these features there, encode recordings one at a time or in batches of equal length."
)


def _data(data: Any) -> str:
    facts = {
        "source": f"`{_public_name(data.source)}`",
        "audio": "16 kHz mono" + (", each clip to zero mean and unit variance" if data.normalise else ""),
        "clips": f"of at least {data.min_seconds:g} s, cropped to {data.max_seconds:g} s",
        "predicted": ", ".join(f"{t.name} ({t.classes} clusters)" for t in data.targets or ()),
    }
    return "\n".join(f"- {name}: {value}" for name, value in facts.items() if value)


def _training(run: LoadedRun, run_dir: Path) -> str:
    environment = _json(run_dir / "environment.json")
    versions = environment.get("versions", {})
    lines = [f"{run.step} optimizer steps of {run.recipe.training.batch_size} clips."]
    if "torch" in versions:
        lines.append(f"torch {versions['torch']}, Python {environment.get('python', 'unknown')}.")
    data = run.recipe.data
    hidden = {"source": _public_name(data.source), "label_sets": tuple(_public_name(s) for s in data.label_sets)}
    recipe = replace(run.recipe, data=replace(data, **hidden))
    return " ".join(lines) + f" The complete recipe:\n\n```yaml\n{to_yaml(recipe)}```"


def _public_name(source: str) -> str:
    """A folder's own name: where it lay on somebody's disk is nobody else's business."""
    return Path(source).name


def _scores(path: Path) -> str:
    values = {name: value for name, value in _json(path).items() if name != "run"}
    if "data" in values:
        values["data"] = _public_name(values["data"])
    return f"From the run's `evaluation.json`:\n\n```json\n{json.dumps(values, indent=2)}\n```" if values else ""


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
