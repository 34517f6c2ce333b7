"""The page: facts, plots and pictures put into the template."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unmask.core import registry
from unmask.core.progress import duration
from unmask.core.report import plots
from unmask.core.report.gather import RunFacts, read_run
from unmask.core.report.pictures import Pictures, draw_pictures
from unmask.core.report.reference import FLOOR, WIDTH, Verdict, differences, find_reference, judge
from unmask.core.training.files import write_text
from unmask.core.training.recipe import flatten


@dataclass(frozen=True)
class Tile:
    """A headline number: what, how much, and beside what."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A plot with the sentence that says what it shows."""

    title: str
    svg: str
    alt: str
    note: str = ""


Rows = list[tuple[str, list[tuple[str, bool]]]]


@dataclass(frozen=True)
class Probes:
    """The evaluation as a table: cells are text, and whether they are the best of their column."""

    columns: list[str]
    rows: Rows
    summary: Verdict
    note: str
    figure: Figure | None = None
    corner: str = "features"


@dataclass(frozen=True)
class Section:
    """A domain's own part of the page: a table as in `Probes`, plots, and a sentence or two."""

    title: str
    note: str
    columns: list[str] = field(default_factory=list)
    rows: Rows = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)


def write_report(run_dir: str | Path) -> Path:
    """Write RUN/report.html, which needs no other file and no network. Works on a run that is still training, too.

    A domain whose module ``report`` has ``draw_pictures(run) -> Pictures``, ``probes(run) -> Probes | None`` and
    ``sections(run) -> list[Section]`` draws these parts itself; images are the default.

    Raises:
        UnmaskError: not a run directory.
    """
    run = read_run(run_dir)
    out = run.path / "report.html"
    part = registry.part(run.card.id, "report")
    pictures = part.draw_pictures(run) if part else draw_pictures(run)
    write_text(out, render(run, pictures))
    return out


def render(run: RunFacts, pictures: Pictures) -> str:
    """The page as HTML. Everything that comes from the run is escaped."""
    import jinja2
    from markupsafe import Markup

    part = registry.part(run.card.id, "report")
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["svg"] = Markup
    return environment.get_template("report.html.j2").render(
        run=run,
        card=run.card,
        status=_status(run),
        tiles=_tiles(run, pictures),
        loss=_loss_figure(run),
        loss_notes=_loss_notes(run),
        verdict=_verdict(run),
        pictures=pictures,
        probes=part.probes(run) if part else _probes(run),
        sections=part.sections(run) if part else [],
        validated=_validation_figures(run),
        speed=_speed_figure(run),
        rate=_rate_figure(run),
        settings=_settings(run),
        environment=_environment(run),
        commands=_commands(run, getattr(part, "COMMANDS", _COMMANDS)),
    )


def _status(run: RunFacts) -> str:
    total = run.environment.get("total_steps")
    if run.finished:
        return f"finished at step {run.step:,}"
    return f"at step {run.step:,} of {total:,}, still unfinished" if total else f"unfinished, at step {run.step:,}"


# ---- headline numbers ----------------------------------------------------------------------------------------------


def _tiles(run: RunFacts, pictures: Pictures) -> list[Tile]:
    tiles = _probe_tiles(run)
    val, loss = run.last("val_loss"), run.last("loss")
    if val is not None:
        tiles.append(Tile("validation loss", f"{val:.4f}", f"training {loss:.4f}" if loss is not None else ""))
    elif loss is not None:
        tiles.append(Tile("training loss", f"{loss:.4f}"))
    seen, hidden, speed = run.last("samples"), run.last("hidden_share"), run.series("samples_per_second")[1]
    if seen is not None:
        epochs = run.last("epoch") or 0.0
        tiles.append(Tile("samples seen", f"{seen:,.0f}", f"{epochs:.3g} epochs, {run.step:,} steps"))
    if hidden is not None:
        tiles.append(Tile("hidden", f"{hidden:.0%}", "of every sample's tokens"))
    if speed:
        took = duration(run.last("seconds") or 0.0)
        tiles.append(Tile("samples per second", f"{statistics.median(speed):,.0f}", f"median; {took} in all"))
    if pictures.parameters is not None:
        tiles.append(Tile("parameters", _count(pictures.parameters), "of the whole method"))
    return tiles


def _probe_tiles(run: RunFacts) -> list[Tile]:
    evaluation = run.evaluation or {}
    if not evaluation.get("labelled"):
        return []
    rows, names = evaluation["rows"], evaluation["names"]
    tiles = []
    for key, label in (("linear", "linear probe"), ("knn", "k-NN"), ("finetune", "fine-tuned")):
        others = [f"{names[n]} {100 * row[key]:.1f}" for n, row in rows.items() if n != "trained" and key in row]
        if key in rows["trained"]:
            tiles.append(Tile(label, f"{100 * rows['trained'][key]:.1f} %", ", ".join(others)))
    return tiles


def _count(n: int) -> str:
    return f"{n / 1e6:.3g} M" if n >= 1e6 else f"{n / 1e3:.3g} k"


# ---- curves --------------------------------------------------------------------------------------------------------


def _loss_figure(run: RunFacts) -> Figure | None:
    loss, val = run.series("loss"), run.series("val_loss")
    if not loss[0]:
        return None
    alt = (
        f"Training loss goes from {loss[1][0]:.3g} at step {loss[0][0]:,} to {loss[1][-1]:.4g} at step {loss[0][-1]:,}"
    )
    alt += f"; validation loss is {val[1][-1]:.4g} at the end." if val[0] else "."
    return Figure("Loss", plots.loss_plot(loss, val, find_reference(run.card.id)), alt)


def _loss_notes(run: RunFacts) -> list[str]:
    notes = ["The loss is a proxy: it says whether training works, not whether the features are good. Those are below."]
    reference = find_reference(run.card.id)
    if reference is not None:
        notes.append(
            f"The band is the mean over {reference.seeds} seeds of the tiny recipe, plus and minus {WIDTH:g} standard "
            f"deviations (at least {FLOOR:.0%})."
        )
    if run.series("val_loss")[0]:
        notes.append("Validation samples are not augmented, so their loss may well be the lower one.")
    return notes


def _verdict(run: RunFacts) -> Verdict:
    reference, loss = find_reference(run.card.id), run.series("loss")
    if not loss[0]:
        return Verdict("Nothing has been logged yet.", "plain")
    if reference is None:
        return Verdict(
            f"No reference curve ships with {run.card.id}, so there is nothing to hold this loss against.", "plain"
        )
    return judge(*loss, reference, differences(run))


def _validation_figures(run: RunFacts) -> list[Figure]:
    """What validation measured of the features: their ranks, and online probes."""
    ranks = {"rankme": "samples", "token_rankme": "tokens", "target_rank": "targets"}
    keys = {key for line in run.metrics if "loss" not in line for key in line}
    accuracies = {key: key.replace("_", " ") for key in sorted(keys) if key.split("_")[0] in ("knn", "linear")}
    spread = run.last("deviation")
    note = (
        "Ranks of features that are not centred may fall as a network learns; a fall to next to nothing is a collapse."
    )
    note += f" The deviation over samples is {spread:.3g} at the end, of 1." if spread is not None else ""
    probed = "On bounded subsets of the training and validation splits; the table above is of the test split."
    return [
        Figure(title, plots.validation_plot(name, curves, label), _ends(curves), text)
        for name, title, named, label, scale, text in (
            ("ranks", "Dimensions that features use (RankMe)", ranks, "effective rank", 1, note),
            ("online", "k-NN and linear probe while training", accuracies, "validation accuracy (%)", 100, probed),
        )
        if (curves := _curves(run, named, scale))
    ]


def _curves(run: RunFacts, named: Mapping[str, str], scale: float) -> dict[str, plots.Series]:
    found = {text: run.series(key) for key, text in named.items()}
    return {text: (steps, [scale * v for v in values]) for text, (steps, values) in found.items() if steps}


def _ends(curves: Mapping[str, plots.Series]) -> str:
    return "; ".join(f"{text}: {values[0]:.3g} to {values[-1]:.3g}" for text, (_, values) in curves.items()) + "."


def _speed_figure(run: RunFacts) -> Figure | None:
    speed = run.series("samples_per_second")
    if not speed[0]:
        return None
    median = statistics.median(speed[1])
    alt = f"Samples per second by step: median {median:,.0f}, from {min(speed[1]):,.0f} to {max(speed[1]):,.0f}."
    mfu = run.last("mfu")
    return Figure("Throughput", plots.speed_plot(speed), alt, f"Model FLOPs utilisation {mfu:.1%}." if mfu else "")


def _rate_figure(run: RunFacts) -> Figure | None:
    rate = run.series("lr")
    if not rate[0]:
        return None
    alt = f"Learning rate by step; the peak is {max(rate[1]):.3g}, the last value {rate[1][-1]:.3g}."
    return Figure("Learning rate", plots.rate_plot(rate), alt)


# ---- probes --------------------------------------------------------------------------------------------------------


def _probes(run: RunFacts) -> Probes | None:
    found = run.evaluation
    if found is None:
        return None
    rows, names = found["rows"], found["names"]
    columns = _probe_columns(rows)
    table = []
    for name, row in rows.items():
        cells = [(text(row), _is_best(get(row), [get(r) for r in rows.values()])) for _, get, text in columns]
        table.append((names.get(name, name), cells))
    titles = [title for title, _, _ in columns]
    if not found.get("labelled"):
        return Probes(titles, table, Verdict(found["note"], "plain"), "")
    curves = {names.get(n, n): row["few_label"] for n, row in rows.items()}
    alt = "; ".join(
        f"{n}: " + ", ".join(f"{100 * v:.1f} % with {s} %" for s, v in c.items()) for n, c in curves.items()
    )
    figure = Figure("Accuracy by labels used", plots.few_label_plot(curves), alt + ".")
    return Probes(titles, table, _compare(found), _probe_note(found), figure)


def _probe_columns(rows: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Title, value (None: not to be ranked) and text of each column that some row has."""

    def accuracy(title: str, key: str) -> tuple[str, Any, Any]:
        return title, lambda r: r.get(key), lambda r: f"{100 * r[key]:.1f}" if key in r else "–"

    def few(share: str) -> tuple[str, Any, Any]:
        return f"{share} % labels", lambda r: r["few_label"][share], lambda r: f"{100 * r['few_label'][share]:.1f}"

    first = next(iter(rows.values()))
    columns = [accuracy("k-NN", "knn"), accuracy("linear", "linear")] if "linear" in first else []
    columns += [few(share) for share in first.get("few_label", {}) if share != "100"]
    if any("finetune" in row for row in rows.values()):
        columns.append(accuracy("fine-tuned", "finetune"))
    columns.append(("RankMe", lambda r: None, lambda r: f"{r['rankme']:.1f} of {r['dim']}"))
    return columns


def _is_best(value: float | None, column: list[float | None]) -> bool:
    return value is not None and value == max(v for v in column if v is not None)


def _compare(found: dict[str, Any]) -> Verdict:
    """The linear probe in a sentence, with what chance alone allows."""
    rows, n = found["rows"], found["splits"]["test"]
    best, name = max((row["linear"], name) for name, row in rows.items() if name != "trained")
    own = rows["trained"]["linear"]
    gap, noise = 100 * (own - best), 196 * math.sqrt((own * (1 - own) + best * (1 - best)) / n)
    where = f"the best reference ({found['names'][name]}, {100 * best:.1f} %)"
    chance = f"With {n:,} test samples, differences under about {noise:.1f} points may be chance."
    if abs(gap) < noise:
        return Verdict(f"Linear probe {100 * own:.1f} %: within chance of {where}. {chance}", "plain")
    if gap > 0:
        return Verdict(f"Linear probe {100 * own:.1f} %: {gap:.1f} points above {where}. {chance}", "good")
    return Verdict(
        f"Linear probe {100 * own:.1f} %: {-gap:.1f} points below {where}. {chance} Longer training, more data or "
        "fine-tuning is where to look.",
        "warn",
    )


def _probe_note(found: dict[str, Any]) -> str:
    sizes = found["splits"]
    text = (
        f"Test accuracy in percent on {found['data']} ({sizes['classes']} classes): fitted on {sizes['train']:,} "
        f"samples, chosen on {sizes['val']:,}, reported once on {sizes['test']:,}. Features are means over tokens. The "
        "untrained encoder has the same architecture at random weights; every row gets the same probes and tuning. The "
        "best of a column is bold."
    )
    if "finetune" in found["rows"]["trained"]:
        text += " Fine-tuning the untrained encoder means training from scratch."
    return (
        text + " RankMe counts the dimensions that features use; it says whether they collapsed, not how good they are."
    )


# ---- the rest ------------------------------------------------------------------------------------------------------


def _settings(run: RunFacts) -> dict[str, dict[str, str]]:
    groups: dict[str, dict[str, str]] = {"run": {}}
    for key, value in run.recipe.items():
        if isinstance(value, Mapping):
            groups[key] = {k: _text(v) for k, v in flatten(value).items()}
        else:
            groups["run"][key] = _text(value)
    return groups


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return "–" if value is None else str(value)


def _environment(run: RunFacts) -> dict[str, str]:
    found = dict(run.environment)
    versions = found.pop("versions", {})
    found["command"] = shlex.join(map(str, found.get("command", [])))
    found["resumed"] = ", ".join(f"at step {r['step']}" for r in found.get("resumed", [])) or None
    flat = {k.replace("_", " "): _text(v) for k, v in found.items() if v not in (None, [], "")}
    return flat | {name: str(version) for name, version in versions.items()}


_COMMANDS = (
    ("Measure the encoder on labelled data of yours", "unmask evaluate {run} --data LABELLED"),
    ("Train a classifier from it", "unmask finetune {run} --data LABELLED"),
    ("One vector per sample, as a parquet file", "unmask embed {run} FOLDER --out features.parquet"),
    ("Take the encoder to timm", "unmask export {run} --to timm --out encoder/"),
)


def _commands(run: RunFacts, known: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    path = shlex.quote(str(run.path))
    commands = []
    if not run.finished:
        commands.append(("Go on training", f"unmask train --resume {path}"))
    commands += [(what, command.format(run=path)) for what, command in known]
    if run.finished:
        schedule = run.recipe.get("schedule") or {}
        unit = "steps" if schedule.get("steps") else "epochs"
        longer = 2 * int(schedule.get(unit, 1))
        commands.append(("Train twice as long", f"unmask train --resume {path} --{unit} {longer} --extend"))
    return commands
