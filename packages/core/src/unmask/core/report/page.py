"""The page: facts, plots and pictures put into the template."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unmask.core import registry
from unmask.core.domain import Report
from unmask.core.progress import duration
from unmask.core.report import plots, tuned
from unmask.core.report.gather import RunFacts, read_run
from unmask.core.report.parts import Figure, Pictures, Tile, Verdict
from unmask.core.report.probes import probes
from unmask.core.report.reference import FLOOR, WIDTH, Reference, differences, find_reference, judge
from unmask.core.training.files import write_text
from unmask.core.training.recipe import flatten

COMMANDS = (
    ("Measure the encoder on labelled data of yours", "unmask evaluate {run} --data LABELLED"),
    ("Train a classifier from it", "unmask finetune {run} --data LABELLED"),
    ("One vector per sample, as a parquet file", "unmask embed {run} FOLDER --out features.parquet"),
)


def write_report(run_dir: str | Path) -> Path:
    """Write RUN/report.html, which needs no other file and no network. Works on a run that is still training, too.

    A domain's report module (`unmask.core.domain.Report`) gives its own parts. Without one there are no pictures. A
    fine-tuning has the parts of a classifier instead.

    Raises:
        UnmaskError: not a run directory.
    """
    run = read_run(run_dir)
    out = run.path / "report.html"
    part: Any = tuned if run.is_fine_tuning else registry.part(run.card.id, "report")
    write_text(out, render(run, part))
    return out


def render(run: RunFacts, part: Report | None) -> str:
    """The page as HTML, with the parts of a domain's report module. Everything that comes from the run is escaped."""
    import jinja2
    from markupsafe import Markup

    pictures = part.draw_pictures(run) if part else Pictures()
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
        probes=part.probes(run) if part else probes(run),
        sections=part.sections(run) if part else [],
        validated=_validation_figures(run),
        speed=_speed_figure(run),
        rate=_rate_figure(run),
        settings=_settings(run),
        environment=_environment(run),
        commands=_commands(run, part.COMMANDS if part else COMMANDS),
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
        tiles.append(Tile("hidden", f"{100 * hidden:.0f} %", "of every sample's tokens"))
    if speed:
        took = duration(run.last("seconds") or 0.0)
        tiles.append(Tile("samples per second", f"{statistics.median(speed):,.0f}", f"median; {took} in all"))
    if pictures.parameters is not None:
        tiles.append(Tile("parameters", _count(pictures.parameters), "of the whole method"))
    return tiles


def _probe_tiles(run: RunFacts) -> list[Tile]:
    if run.tuned is not None:
        return [
            Tile(
                "test accuracy",
                f"{100 * run.tuned['accuracy']:.1f} %",
                f"validation {100 * run.tuned['val_accuracy']:.1f}",
            )
        ]
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
    return Figure("Loss", plots.loss_plot(loss, val, _reference(run)), alt)


def _reference(run: RunFacts) -> Reference | None:
    """The method's reference curve; a classifier has another loss."""
    return None if run.is_fine_tuning else find_reference(run.card.id)


def _loss_notes(run: RunFacts) -> list[str]:
    if run.is_fine_tuning:
        return ["The classifier's cross-entropy, labels smoothed."]
    notes = ["The loss is a proxy: it says whether training works, not whether the features are good. Those are below."]
    reference = _reference(run)
    if reference is not None:
        notes.append(
            f"The band is the mean over {reference.seeds} seeds of the tiny recipe, plus and minus {WIDTH:g} standard "
            f"deviations (at least {FLOOR:.0%})."
        )
    if run.series("val_loss")[0]:
        notes.append("Validation samples are not augmented, so their loss may well be the lower one.")
    return notes


def _verdict(run: RunFacts) -> Verdict:
    reference, loss = _reference(run), run.series("loss")
    if not loss[0]:
        return Verdict("Nothing has been logged yet.", "plain")
    if run.is_fine_tuning:
        return Verdict("A fine-tuning has no reference curve; its accuracy is below.", "plain")
    if reference is None:
        return Verdict(
            f"No reference curve ships with {run.card.id}, so there is nothing to hold this loss against.", "plain"
        )
    return judge(*loss, reference, differences(run))


def _validation_figures(run: RunFacts) -> list[Figure]:
    """What validation measured of the features: their ranks, and online probes."""
    ranks = {"rankme": "samples", "token_rankme": "tokens", "target_rank": "targets"}
    keys = {key for line in run.metrics if "loss" not in line for key in line}
    accuracies = {
        key: key.replace("_", " ").replace("knn", "k-NN")
        for key in sorted(keys)
        if key.split("_")[0] in ("knn", "linear")
    }
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


def _commands(run: RunFacts, known: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    path = shlex.quote(str(run.path))
    commands = []
    if not run.finished:
        verb = "finetune" if run.is_fine_tuning else "train"
        commands.append(("Go on training", f"unmask {verb} --resume {path}"))
    commands += [(what, command.format(run=path)) for what, command in known]
    if run.finished and not run.is_fine_tuning:
        schedule = run.recipe.get("schedule") or {}
        unit = "steps" if schedule.get("steps") else "epochs"
        longer = 2 * int(schedule.get(unit, 1))
        commands.append(("Train twice as long", f"unmask train --resume {path} --{unit} {longer} --extend"))
    return commands
