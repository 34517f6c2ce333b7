"""Hand a trained language model to transformers: a directory that ``from_pretrained`` opens, tokenizer included."""

from __future__ import annotations

from pathlib import Path

from unmask.core.errors import UnmaskError
from unmask.core.interop.export import Exported, Exporter
from unmask.core.interop.model_card import model_card, origin
from unmask.language.data.vocabulary import open_tokenizer

_LOADING = """```python
from transformers import AutoTokenizer, {auto}

tokenizer, model = AutoTokenizer.from_pretrained("PATH"), {auto}.from_pretrained("PATH")
```

Nothing is masked when the model is used. To go on training: `unmask train METHOD --network model=PATH --out RUN`."""


def _write(exported: Exported, out: Path) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, tokenizer = exported.method.model, exported.run.recipe.data.tokenizer
    if tokenizer is None:
        raise UnmaskError(f"{exported.path}: the run has no tokenizer beside it ({exported.path}/tokenizer is missing)")
    model.save_pretrained(out)
    open_tokenizer(tokenizer).save(out)


def _card(exported: Exported, to: str) -> str:
    kind = type(exported.method.model).__name__
    auto = "AutoModelForCausalLM" if kind.endswith(("CausalLM", "LMHeadModel")) else "AutoModelForMaskedLM"
    sections = {
        "What this is": f"A language model ({kind}) {origin(exported)}",
        "Intended use": "A start for fine-tuning, and for research. It has the biases of its training text, and it was "
        "not aligned to anybody's wishes. Measure it on your own data before you rely on it.",
        "How to load it": _LOADING.format(auto=auto),
    }
    task = "text-generation" if auto.endswith("CausalLM") else "fill-mask"
    return model_card(exported, "transformers", sections, ["language-model"], task)


export = Exporter({"transformers": _write}, _card)
