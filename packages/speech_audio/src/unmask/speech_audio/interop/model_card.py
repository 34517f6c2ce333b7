"""The README.md that goes with exported weights: what they are, how they came to be and how to load them."""

from __future__ import annotations

from typing import Any

from unmask.core.interop.export import Exported
from unmask.core.interop.model_card import lines, model_card, origin, public, with_unmask


def speech_card(exported: Exported, to: str) -> str:
    """The model card of an export to ``transformers`` or ``torchaudio``."""
    run, factory = exported.run, _factory(exported.method)
    loading = _LOADING[to].format(factory=factory, call=_CALLS[factory])
    sections = {
        "What this is": f"The encoder {origin(exported)} Pre-trained without labels or transcripts by hiding spans of "
        "every recording and naming the cluster that each hidden frame belongs to. It takes mono audio at 16 kHz and "
        "gives one vector per 20 ms.",
        "Intended use": "Features for probes, and a start for fine-tuning (CTC for transcripts, classification), on "
        "recordings like those it was trained on. It has no output layer, transcribes nothing by itself, and has not "
        "been checked for bias between speakers, accents or languages; measure it on your own data before you rely on "
        "it.",
        "How to load it": loading + "\n\n" + with_unmask(exported, "recording.wav"),
        "Padding": _PADDING,
        "Data": _data(run.recipe.data),
    }
    return model_card(exported, to, sections, ["speech", "audio", "hubert"], "feature-extraction")


def _factory(method: Any) -> str:
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

To fine-tune on transcripts: `HubertForCTC.from_pretrained("PATH", vocab_size=..., ctc_loss_reduction="mean")`.
The heads of pre-training are in `pretraining_heads.safetensors`.""",
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

Call `model.eval()` first.""",
}
_PADDING = (
    "Features of a recording do not depend on padding in unmask. Where the first convolution is followed by GroupNorm "
    "(`extractor: group_norm` in the recipe), transformers and torchaudio count padding in that norm: for exactly "
    "these features there, encode recordings one at a time or in batches of equal length."
)


def _data(data: Any) -> str:
    facts = {
        "source": f"`{public(data.source)}`",
        "audio": "16 kHz mono" + (", each clip to zero mean and unit variance" if data.normalise else ""),
        "clips": f"of at least {data.min_seconds:g} s, cropped to {data.max_seconds:g} s",
        "predicted": ", ".join(f"{t.name} ({t.classes} clusters)" for t in data.targets or ()),
    }
    return lines(facts)
