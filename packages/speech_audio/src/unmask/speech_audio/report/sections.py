"""What a speech run's page shows: spectrograms with their masks and labels, the labels of every iteration, probes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from unmask.core.report.gather import RunFacts
from unmask.core.report.parts import Picture, Pictures, Probes, Rows, Section, Verdict, data_address
from unmask.core.report.pictures import Shown, draw_with
from unmask.speech_audio.data.frames import FRAME_RATE
from unmask.speech_audio.data.labels import LabelError, LabelSet
from unmask.speech_audio.evaluation.tables import Measure, measures

COMMANDS = (
    ("Measure the encoder on labelled recordings of yours", "unmask evaluate {run} --data LABELLED"),
    ("One vector per clip, as a parquet file", "unmask embed {run} FOLDER --out features.parquet"),
    ("Take it to transformers, for CTC fine-tuning", "unmask export {run} --to transformers --out encoder/"),
)
SAMPLES = 4
SHOWN_SECONDS = 4.0  # of a clip: labels of 20 ms cannot be told apart in a longer one
_NOTE = (
    "{count} validation clips at step {step:,}. Above: the log-mel spectrogram with hidden spans greyed out. Below, "
    "one colour per label: what was asked, and what the model answers where it saw nothing ({right:.0%} of these "
    "frames are right; answering the commonest label everywhere would be right at {floor:.0%})."
)
_OVER_TIME = " The last rows are the run's other labels, those of earlier iterations first, for the same clip."


def draw_pictures(run: RunFacts) -> Pictures:
    """Mask `SAMPLES` validation clips with the run's weights, and draw each."""
    return draw_with(run, SAMPLES, lambda shown: _draw(shown, _label_sets(run.path)))


def _draw(shown: Shown, sets: dict[str, LabelSet]) -> Pictures:
    batch, method = shown.batch, shown.run.method
    drawn = {name: tensor.numpy() for name, tensor in method.picture(batch, shown.plan).items()}  # type: ignore[operator]
    mask = getattr(shown.plan, "mask", None)
    if mask is None or not {"input", "labels", "predicted"} <= drawn.keys():
        return Pictures()
    hidden = mask.hidden.numpy()
    samples = []
    for i, name in enumerate(shown.names):
        frames = min(int(batch.frames[i]), round(SHOWN_SECONDS * FRAME_RATE))
        strips = {title: _labels_of(found, int(batch.ids[i]), frames) for title, found in sets.items()}
        image = _draw_clip({n: x[i, 0, :, :frames] for n, x in drawn.items()}, hidden[i, :frames], strips)
        samples.append(Picture(name, [("", image)]))
    right, floor = _accuracy(drawn, hidden, batch.frames.numpy())
    note = _NOTE.format(count=len(samples), step=shown.run.step, right=right, floor=floor)
    return Pictures(samples, note + (_OVER_TIME if len(sets) > 1 else ""), wide=True)


def _label_sets(run: Path) -> dict[str, LabelSet]:
    """The label sets of a run by stage name, in the order they were made; those that are damaged are left out."""
    found = {}
    for path in sorted((run / "stages").glob("labels-*/*/label_set.json"), key=lambda p: p.stat().st_mtime):
        folder = path.parent
        several = len(list(folder.parent.glob("*/label_set.json"))) > 1
        name = folder.parent.name.replace("labels-", "labels ") + (f", {folder.name}" if several else "")
        try:
            found[name] = LabelSet.open(folder)
        except LabelError:
            continue
    return found


def _labels_of(labels: LabelSet, sample_id: int, frames: int) -> Int[np.ndarray, "frames"] | None:
    """The first stream of a clip's labels on the frame grid, from the clip's start; None where it has none."""
    if sample_id not in labels:
        return None
    values = labels.get(sample_id)[:, 0]
    rows = (np.arange(frames) * labels.rate / FRAME_RATE).astype(int)
    return values[rows[rows < len(values)]]


def _accuracy(drawn: dict[str, np.ndarray], hidden: np.ndarray, frames: np.ndarray) -> tuple[float, float]:
    """The share of hidden frames answered rightly, and that of the commonest label among them."""
    valid = np.arange(hidden.shape[1]) < frames[:, None]
    where = hidden & valid
    asked, answered = drawn["labels"][:, 0, 0][where].astype(int), drawn["predicted"][:, 0, 0][where].astype(int)
    known = asked >= 0
    if not known.any():
        return float("nan"), float("nan")
    asked, answered = asked[known], answered[known]
    return float((asked == answered).mean()), float(np.bincount(asked).max() / len(asked))


def _draw_clip(
    panels: dict[str, np.ndarray], hidden: np.ndarray, strips: dict[str, Int[np.ndarray, "frames"] | None]
) -> str:
    """A clip's panels on one time axis, as a PNG data address."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = {"asked": panels["labels"][0], "answered": np.where(hidden, panels["predicted"][0], -1)}
    earlier = list(strips.items())[:-1]  # the last labels are those that are asked for
    rows |= {name: strip for name, strip in earlier if strip is not None}
    figure = Figure(figsize=(11, 2.2 + 0.32 * len(rows)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1 + len(rows), 1, sharex=True, height_ratios=[6] + [1] * len(rows))
    end = len(hidden) / FRAME_RATE
    axes[0].imshow(
        panels["input"], origin="lower", aspect="auto", cmap="magma", extent=(0, end, 0, len(panels["input"]))
    )
    for start, stop in _spans(hidden):
        axes[0].axvspan(start / FRAME_RATE, stop / FRAME_RATE, color="#9aa1ab", alpha=0.82, linewidth=0)
    axes[0].set_ylabel("mel")
    axes[0].set_yticks([])
    for axis, (name, labels) in zip(axes[1:], rows.items(), strict=True):
        _strip(axis, np.asarray(labels, dtype=float), len(hidden))
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    axes[-1].set_xlabel("seconds")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return data_address(buffer.getvalue())


def _strip(axis: Any, labels: np.ndarray, frames: int) -> None:
    """Labels as a row of colours; neighbouring numbers get colours far apart, -1 none."""
    padded = np.full(frames, -1.0)
    padded[: len(labels)] = labels[:frames]
    colours = np.where(padded < 0, np.nan, (padded * 0.6180339887) % 1.0)  # golden ratio: no two near numbers alike
    axis.imshow(colours[None], aspect="auto", cmap="turbo", vmin=0, vmax=1, extent=(0, frames / FRAME_RATE, 0, 1))
    axis.set_yticks([])
    axis.set_facecolor("#eceef1")


def _spans(hidden: np.ndarray) -> list[tuple[int, int]]:
    """Start and end of every run of hidden frames."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], hidden.astype(int), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


# ---- probes --------------------------------------------------------------------------------------------------------


def probes(run: RunFacts) -> Probes | None:
    """The evaluation with one line per measure: there are more of them than features."""
    found = run.evaluation
    if found is None:
        return None
    lines = measures(found)
    rows: Rows = [(line.title, [(line.text(name), line.best(name)) for name in found["rows"]]) for line in lines]
    columns = [found["names"][name] for name in found["rows"]]
    note = (
        f"Measured on {found['data']}: fitted on {found['splits']['train']:,} clips, chosen on "
        f"{found['splits']['val']:,}, reported once on {found['splits']['test']:,}. Accuracies in percent; the best of "
        "a line is bold. The untrained encoder has the same architecture at random weights. “Within speakers” is "
        "fitted and tested for each speaker alone. Acoustic detail is how much of the log-mel spectrum's variance a "
        "linear map finds in a frame's features. RankMe counts the dimensions that are used; it is not a score."
    )
    return Probes(columns, rows, _verdict(found, lines), note, corner="measure")


def _verdict(found: dict[str, Any], lines: list[Measure]) -> Verdict:
    """On how many measures the trained encoder leads, in a sentence."""
    if not found["labelled"]:
        return Verdict(found["note"], "plain")
    ranked = [line for line in lines if line.ranked and "trained" in line.values]
    above = sum(line.values["trained"] > line.values.get("random", float("-inf")) for line in ranked)
    level = sum(line.values["trained"] == line.values.get("random") for line in ranked)
    first = sum(line.best("trained") for line in ranked)
    text = (
        f"The trained encoder is above the same encoder untrained on {above} of {len(ranked)} measures"
        f"{f', level with it on {level}' if level else ''}, and the best of all four on {first}. Small test splits "
        "move by a point or two by chance."
    )
    if above == first == len(ranked):
        return Verdict(text, "good")
    return Verdict(text, "plain" if above + level == len(ranked) else "warn")


# ---- labels --------------------------------------------------------------------------------------------------------


def sections(run: RunFacts) -> list[Section]:
    """The page's part about labels: one row per stream of every iteration's label sets."""
    streams = []
    for name, found in _label_sets(run.path).items():
        diagnostics = found.info.get("diagnostics") or {}
        streams += [(f"{name}: {stream['name']}", stream) for stream in diagnostics.get("streams", [])]
    if not streams:
        return []
    known = list(dict.fromkeys(what for _, stream in streams for what in stream["information"]))
    columns = ["labels", "clusters", "empty", "perplexity", "mean run"]
    columns += [f"knows {what}" for what in known] + ["F0 by label", "explained variance"]
    best = {what: max((s["information"].get(what) or 0.0 for _, s in streams), default=0.0) for what in known}
    rows: Rows = []
    for name, stream in streams:
        cells = [
            (str(stream["classes"]), False),
            (str(stream["empty"]), False),
            (_number(stream["perplexity"], "{:.1f}"), False),
            (f"{1000 * stream['run_seconds']:.0f} ms", False),
        ]
        for what in known:
            share = stream["information"].get(what)
            cells.append((_number(share, "{:.3f}"), len(streams) > 1 and share is not None and share == best[what]))
        cells += [(_number(stream[k], "{:.3f}"), False) for k in ("f0_predictability", "explained_variance")]
        rows.append((name, cells))
    return [Section("What the labels say", _LABELS_NOTE, columns, rows)]


_LABELS_NOTE = (
    "Before a model is trained, its labels are looked at, on the training clips. “Knows” is the share of the "
    "uncertainty about a clip's class that a frame's label removes (mutual information over entropy, 0 to 1; it grows "
    "with the number of clusters); for speakers it is taken over whole clips. “F0 by label” is the share of "
    "the variance of log-F0 that lies between labels. Empty clusters and a perplexity far below the number of clusters "
    "mean a codebook that is not used; a mean run of one frame (10 or 20 ms) means labels that flicker."
)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
