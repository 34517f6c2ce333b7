"""The README.md that goes with exported weights: what they are, how they came to be and how to load them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from unmask.core import registry
from unmask.core.interop.export import Exported
from unmask.core.training.recipe import to_yaml

_UNSAID = ("run", "note", "out")  # of a result: they name folders


def model_card(
    exported: Exported, library: str, sections: Mapping[str, str], tags: Sequence[str], pipeline: str
) -> str:
    """A model card in the hub's format: YAML front matter, the domain's sections, then training, scores and licence.

    Args:
        exported: the run, or the classifier made of one.
        library: that loads the export.
        sections: the domain's own, by title; empty ones are left out.
        tags: of the hub, beside ``unmask``, ``self-supervised-learning`` and the method's name.
        pipeline: the hub's name for what the model does.
    """
    run = exported.run
    name = run.recipe.method.split("/")[1]
    tags = ["unmask", "self-supervised-learning", *tags, name]
    front = {"library_name": library, "pipeline_tag": pipeline, "tags": list(dict.fromkeys(tags))}
    sections = dict(sections) | {
        "Training": _training(exported),
        "Scores": _scores(exported),
        "Licence": _licence(registry.card(run.recipe.method)),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text)
    how = "and fine-tuned" if exported.classes else f"{run.step} steps"
    title = f"# {name} pre-trained with unmask, {how}"
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n{title}\n\n{body}\n"


def origin(exported: Exported) -> str:
    """``of a run of **vision/mae**: Masked ... (He et al., ...).``, behind what the weights are."""
    card = registry.card(exported.run.recipe.method)
    return f"of a run of **{card.id}**: {card.title} ({card.paper})."


def with_unmask(exported: Exported, sample: str) -> str:
    """How to load an export, and to go on from it, with this library; `sample` is a file's name."""
    module = registry.domains()[registry.domain(exported.run.recipe.method).name]
    return f"""With unmask (PATH is this directory):

```python
import {module}

encoder = {module}.load("PATH")
features = encoder(encoder.preprocess(["{sample}"]))
features.pooled  # [1, dim]
```

To go on pre-training: `unmask train METHOD --init PATH --out RUN`."""


def lines(facts: Mapping[str, str]) -> str:
    """A list of facts; those without a value are left out."""
    return "\n".join(f"- {name}: {value}" for name, value in facts.items() if value)


def _training(exported: Exported) -> str:
    run = exported.run
    samples = registry.domain(run.recipe.method).samples
    text = f"{run.step} optimizer steps of {run.recipe.training.batch_size} {samples}."
    if exported.classes:
        text = f"Pre-trained, then fine-tuned on labels of {len(exported.classes)} classes: {text}"
    environment = _json(exported.path / "environment.json")
    versions = environment.get("versions", {})
    if "torch" in versions:
        text += f" torch {versions['torch']}, Python {environment.get('python', 'unknown')}."
    return f"{text} The complete recipe:\n\n```yaml\n{to_yaml(public(run.recipe))}```"


def public(value: Any) -> Any:
    """A recipe, or a part of one, where of every path only the last name is left.

    Where a folder lay on somebody's disk is nobody else's business. A method's id stays whole.
    """
    if isinstance(value, str):
        return Path(value).name if "/" in value else value
    if isinstance(value, tuple | list):
        return type(value)(map(public, value))
    if isinstance(value, Mapping):
        return {key: public(inner) for key, inner in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        kept = {field.name: getattr(value, field.name) for field in fields(value) if field.name != "method"}
        return replace(value, **{name: public(inner) for name, inner in kept.items()})
    return value


def _scores(exported: Exported) -> str:
    """What was measured of the run, or of the classifier."""
    name = "finetune.json" if exported.classes else "evaluation.json"
    values = {key: value for key, value in _json(exported.path / name).items() if key not in _UNSAID}
    if "data" in values:
        values["data"] = public(values["data"])
    return f"From the run's `{name}`:\n\n```json\n{json.dumps(values, indent=2)}\n```" if values else ""


def _licence(card: registry.Card) -> str:
    text = (
        "Exporting sets no licence for these weights: choose one that the training data allows before you publish "
        "them. The code that trained them (unmask) is Apache-2.0."
    )
    if card.reference == "none":
        return text
    return f"{text} The method's reference code, {card.reference} ({card.reference_licence}), was not used."


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
