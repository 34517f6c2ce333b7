"""The evaluation of frozen features as a table, a curve and a sentence; domains add columns and words of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unmask.core.report import plots
from unmask.core.report.gather import RunFacts
from unmask.core.report.parts import Figure, Probes, Rows, Tone, Verdict

Row = Mapping[str, Any]
Path = tuple[str, ...]  # keys that lead to a measure in a row


@dataclass(frozen=True)
class Wording:
    """What a domain says of its evaluation beside what is measured everywhere.

    Args:
        features: what the features of a sample are.
        more: title and path of further measures in [0, 1].
        judged: title and path of what the verdict compares with the best reference.
        remarks: from an evaluation to what is said after its note.
    """

    features: str = "means over tokens"
    more: Sequence[tuple[str, Path]] = ()
    judged: Sequence[tuple[str, Path]] = (("Linear probe", ("linear",)),)
    remarks: Callable[[Mapping[str, Any]], Sequence[str]] = lambda found: ()


def probes(run: RunFacts, wording: Wording | None = None) -> Probes | None:
    """The evaluation with one row per encoder; None before there is one, and for tasks with other measures."""
    found, wording = run.evaluation, wording or Wording()
    if found is None or "rows" not in found:
        return None
    titles, rows = score_table(found, wording.more)
    trained = found["rows"].get("trained", {})
    verdicts = [_compare(found, title, path) for title, path in wording.judged if value(trained, path) is not None]
    if not verdicts:
        return Probes(titles, rows, Verdict(found.get("note", ""), "plain"), " ".join(wording.remarks(found)))
    tones = {verdict.tone for verdict in verdicts}
    tone: Tone = "warn" if "warn" in tones else "good" if tones == {"good"} else "plain"
    summary = Verdict(" ".join(verdict.text for verdict in verdicts), tone)
    return Probes(titles, rows, summary, _note(found, wording), few_label_figure(found))


def score_table(found: dict[str, Any], more: Sequence[tuple[str, Path]] = ()) -> tuple[list[str], Rows]:
    """Titles and rows of what was measured, in percent, RankMe last.

    Args:
        found: an evaluation.
        more: title and path of further measures in [0, 1].
    """
    rows, names = found["rows"], found.get("names", {})
    columns = score_columns(rows, more)
    best = {title: max(v for row in rows.values() if (v := value(row, path)) is not None) for title, path in columns}
    ranked = any("rankme" in row for row in rows.values())
    table: Rows = []
    for name, row in rows.items():
        values = [(title, value(row, path)) for title, path in columns]
        cells = [("–" if v is None else f"{100 * v:.1f}", v is not None and v == best[title]) for title, v in values]
        table.append((names.get(name, name), [*cells, *[(_rank(row), False)] * ranked]))
    return [*(title for title, _ in columns), *["RankMe"] * ranked], table


def _rank(row: Row) -> str:
    return f"{row['rankme']:.1f} of {row['dim']}" if "rankme" in row else "–"


def score_columns(rows: Mapping[str, Row], more: Sequence[tuple[str, Path]] = ()) -> list[tuple[str, Path]]:
    """Title and path of every measure that some row has."""
    shares = [share for share in next(iter(rows.values())).get("few_label", {}) if share != "100"]
    known: list[tuple[str, Path]] = [("k-NN", ("knn",)), ("linear", ("linear",))]
    known += [(f"{share} % labels", ("few_label", share)) for share in shares]
    known += [("fine-tuned", ("finetune",)), *more]
    return [(title, path) for title, path in known if any(value(row, path) is not None for row in rows.values())]


def value(row: Row, path: Path) -> float | None:
    """A measure of a row; None where it was not taken."""
    inner: Any = row
    for key in path:
        inner = inner.get(key) if isinstance(inner, Mapping) else None
    return inner


def few_label_figure(found: dict[str, Any]) -> Figure | None:
    """Accuracy by the share of labels, a line per row that has one."""
    names = found.get("names", {})
    curves = {names.get(name, name): row["few_label"] for name, row in found["rows"].items() if "few_label" in row}
    if not curves:
        return None
    lines = (f"{n}: " + ", ".join(f"{100 * v:.1f} % with {s} %" for s, v in c.items()) for n, c in curves.items())
    return Figure("Accuracy by labels used", plots.few_label_plot(curves), "; ".join(lines) + ".")


def best_reference(found: dict[str, Any], path: Path) -> tuple[float, str]:
    """The highest value of a measure among the rows beside the trained encoder, and that row's title."""
    others = [(value(row, path) or 0.0, name) for name, row in found["rows"].items() if name != "trained"]
    best, name = max(others)
    return best, found.get("names", {}).get(name, name)


def chance(own: float, best: float, samples: int) -> float:
    """Points by which two accuracies on as many test samples differ by chance alone, in one case of twenty.

    One right and one wrong answer are added to each (Agresti and Caffo, 2000): a few samples that are all right are no
    certainty.
    """
    own, best = ((share * samples + 1) / (samples + 2) for share in (own, best))
    return 196 * math.sqrt((own * (1 - own) + best * (1 - best)) / (samples + 2))


def _compare(found: dict[str, Any], title: str, path: Path) -> Verdict:
    """A measure in a sentence; of an accuracy of samples also what chance alone allows."""
    own = value(found["rows"]["trained"], path) or 0.0
    if len(found["rows"]) == 1:
        return Verdict(f"{title} {100 * own:.1f} %, measured without references.", "plain")
    best, name = best_reference(found, path)
    gap, noise, text = 100 * (own - best), 0.0, ""
    if path == ("linear",):
        samples = found["splits"]["test"]
        noise = chance(own, best, samples)
        text = f" With {samples:,} test samples, differences under about {noise:.1f} points may be chance."
    where = f"the best reference ({name}, {100 * best:.1f} %)"
    if abs(gap) < noise or gap == 0:
        return Verdict(f"{title} {100 * own:.1f} %: within chance of {where}.{text}", "plain")
    if gap > 0:
        return Verdict(f"{title} {100 * own:.1f} %: {gap:.1f} points above {where}.{text}", "good")
    return Verdict(
        f"{title} {100 * own:.1f} %: {-gap:.1f} points below {where}.{text} Longer training, more data or "
        "fine-tuning is where to look.",
        "warn",
    )


def _note(found: dict[str, Any], wording: Wording) -> str:
    sizes = found["splits"]
    classes = f" ({sizes['classes']} classes)" if "classes" in sizes else ""
    text = (
        f"Test scores in percent on {found['data']}{classes}: fitted on {sizes['train']:,} samples, chosen on "
        f"{sizes['val']:,}, reported once on {sizes['test']:,}. Features are {wording.features}. The untrained encoder "
        "has the same architecture at random weights; every row gets the same probes and tuning. The best of a column "
        "is bold."
    )
    if "finetune" in found["rows"]["trained"]:
        text += " Fine-tuning the untrained encoder means training from scratch."
    rank = "RankMe counts the dimensions that features use; it says whether they collapsed, not how good they are."
    return " ".join([text, *wording.remarks(found), rank])
