"""What a language run's page shows: texts, what was hidden of them, and what the model answered."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from unmask.core.errors import UnmaskError
from unmask.core.report.gather import RunFacts
from unmask.core.report.parts import Pictures, Probes, Rows, Section, Verdict
from unmask.core.report.pictures import Shown, show
from unmask.language.data.vocabulary import Tokenizer, open_tokenizer

COMMANDS = (
    ("Measure it beside an untrained model", "unmask evaluate {run}"),
    ("One vector per block of text, as a parquet file", "unmask embed {run} FOLDER --out features.parquet"),
    ("Take the language model to transformers", "unmask export {run} --to transformers --out model/"),
)
_SAMPLES, _TOKENS, _ASKED = 4, 60, 8  # texts shown, tokens of each, hidden tokens of each


def draw_pictures(run: RunFacts) -> Pictures:
    """None: texts are shown as text, in a section."""
    return Pictures()


def probes(run: RunFacts) -> Probes | None:
    """Perplexities, once there is an evaluation of the task ``language``."""
    found = run.evaluation
    if found is None or "perplexity" not in found["rows"]["trained"]:  # other tasks have only their table, as text
        return None
    splits = {"val": "perplexity, validation", "test": "test"}
    values = {name: row["perplexity"] for name, row in found["rows"].items()}
    best = {split: min(row[split] for row in values.values()) for split in splits}
    rows: Rows = [
        (found["names"][name], [(f"{row[s]:,.1f}", row[s] == best[s]) for s in splits]) for name, row in values.items()
    ]
    return Probes(list(splits.values()), rows, _verdict(values), "Lower is better; nothing is hidden.", corner="model")


def _verdict(values: dict[str, dict[str, float]]) -> Verdict:
    trained, others = values["trained"]["test"], {n: row["test"] for n, row in values.items() if n != "trained"}
    if not others:
        return Verdict(f"Test perplexity {trained:,.1f}.", "plain")
    best = min(others.values())
    text = f"Test perplexity {trained:,.1f}, beside {best:,.1f} of the best reference."
    return Verdict(text, "good" if trained < best else "warn")


def sections(run: RunFacts) -> list[Section]:
    """Validation texts with their masks, and what the model answers at hidden tokens."""
    try:
        shown = show(run.path, _SAMPLES)
    except UnmaskError:
        return []
    source = shown.run.recipe.data.tokenizer
    if source is None or not hasattr(shown.run.method, "inputs"):
        return []
    with torch.no_grad():
        rows = _answers(shown, open_tokenizer(source))
    note = "A text as the model sees it; below it hidden tokens with their true text and the model's most likely one."
    title, columns = "What was hidden, and what the model answered", ["text", "what the model saw, and answered"]
    return [Section(title, note, columns, rows, prose=True)] if rows else []


def _answers(shown: Shown, tokenizer: Tokenizer) -> Rows:
    method, batch, plan = shown.run.method, shown.batch, shown.plan
    inputs, hidden = method.inputs(batch, plan)[-len(batch.ids) :], plan.mask.hidden  # type: ignore[operator]
    guesses = method.predict(batch, plan).argmax(-1)  # type: ignore[operator]  # [batch, length]: of the next token
    rows: Rows = []
    for i, name in enumerate(shown.names):
        rows.append((name, [(tokenizer.decode(inputs[i, :_TOKENS].tolist()), False)]))
        asked = [p for p in hidden[i].nonzero()[:, 0].tolist() if 0 < p < _TOKENS][:_ASKED]
        rows += [_answer(tokenizer, p, int(batch.tokens[i, p]), int(guesses[i, p - 1])) for p in asked]
    return rows


def _answer(tokenizer: Tokenizer, position: int, true: int, guess: int) -> tuple[str, list[tuple[str, bool]]]:
    words: Sequence[str] = [repr(tokenizer.decode([token])) for token in (true, guess)]
    return f"token {position}", [(f"{words[0]} answered by {words[1]}", true == guess)]
