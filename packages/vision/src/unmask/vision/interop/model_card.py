"""The README.md that goes with exported weights: what they are, how they came to be and how to load them."""

from __future__ import annotations

from typing import Any

from unmask.core.interop.export import Exported
from unmask.core.interop.model_card import lines, model_card, origin, public, with_unmask

_ENCODER_USE = (
    "Features for k-NN, linear probes and fine-tuning on images like those it was trained on. It has no classification "
    "head and has not been checked for bias; measure it on your own data before relying on it."
)
_CLASSIFIER_USE = (
    "Naming images like those it was fine-tuned on, as one of its classes. It has not been checked for bias; measure "
    "it on your own data before relying on it."
)


def image_card(exported: Exported, to: str) -> str:
    """The model card of an export to ``timm`` or ``transformers``."""
    run, classes = exported.run, exported.classes
    channels, (height, width) = run.recipe.data.channels, run.recipe.data.image_size
    what = "The encoder" if to == "timm" or classes else "The whole masked autoencoder (encoder and decoder)"
    about = f"{what} {origin(exported)} Pre-trained without labels by hiding part of every image and predicting it."
    loading = _LOADING[f"{to} classifier" if classes else to].format(channels=channels, height=height, width=width)
    if to == "transformers" and not classes:
        loading += "\n\n" + with_unmask(exported, "image.jpg") + _ENCODING
    sections = {
        "What this is": about + _masking_note(run.method, to),
        "Intended use": _CLASSIFIER_USE if classes else _ENCODER_USE,
        "How to load it": loading,
        "Classes": ", ".join(f"{name} ({i})" for i, name in enumerate(classes or ())),
        "Data": _data(run.recipe.data),
    }
    if classes:
        sections["What this is"] += " Then fine-tuned, with a linear layer on the mean of its tokens, on labels."
    task = "image-classification" if classes else "image-feature-extraction"
    return model_card(exported, to, sections, ["masked-image-modeling"], task)


_LOADING = {
    "timm": """With timm (1.0.31 or newer; PATH is this directory):

```python
import timm

encoder = timm.create_model("local-dir:PATH", pretrained=True).eval()
config = timm.data.resolve_model_data_config(encoder)
features = encoder(images)  # normalised images [batch, {channels}, {height}, {width}] -> [batch, dim]
```

Features are the mean over patch tokens after the final norm; `encoder.forward_features(images)` gives the tokens.""",
    "timm classifier": """With timm (1.0.31 or newer; PATH is this directory):

```python
import timm

model = timm.create_model("local-dir:PATH", pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
logits = model(images)  # normalised images [batch, {channels}, {height}, {width}] -> [batch, classes]
names = [model.pretrained_cfg["label_names"][i] for i in logits.argmax(1)]
```""",
    "transformers classifier": """With transformers (PATH is this directory):

```python
from transformers import AutoImageProcessor, AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("PATH").eval()
inputs = AutoImageProcessor.from_pretrained("PATH")(images, return_tensors="pt")
names = [model.config.id2label[int(i)] for i in model(**inputs).logits.argmax(1)]
```""",
    "transformers": """With transformers (PATH is this directory):

```python
from transformers import ViTMAEForPreTraining, ViTMAEModel

model = ViTMAEForPreTraining.from_pretrained("PATH")       # encoder and decoder
encoder = ViTMAEModel.from_pretrained("PATH", mask_ratio=0.0)  # hides nothing, but shuffles the tokens
```""",
}
_ENCODING = (
    " unmask never masks when it encodes and keeps the spatial order. In timm: export the same run with `--to timm`."
)


def _masking_note(method: Any, to: str) -> str:
    masking = getattr(method, "masking", None)
    if to != "transformers" or masking is None or type(masking).__name__ == "RandomMasking":
        return ""
    return (
        f" It was trained with {type(masking).__name__}; transformers masks uniformly, so its loss is that of another "
        "masking on the same weights."
    )


def _data(data: Any) -> str:
    height, width = data.image_size
    facts = {
        "source": f"`{public(data.source)}`",
        "images": f"{height} x {width} pixels, {data.channels} channel{'s' if data.channels > 1 else ''}",
        "mean": ", ".join(f"{value:.4g}" for value in data.mean or ()),
        "standard deviation": ", ".join(f"{value:.4g}" for value in data.std or ()),
    }
    return lines(facts)
