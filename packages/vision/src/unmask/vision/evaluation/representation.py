"""Judge and use a trained image encoder: `evaluate`, `finetune`, `embed`.

`evaluate` measures three things in the same way: the trained encoder, the same encoder at random initialisation, and
the raw pixels. The measures and their fixed protocols are core's (`unmask.core.evaluation`).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from unmask.core.data.carriers import say
from unmask.core.errors import UnmaskError
from unmask.core.evaluation.features import (
    FeatureSplit,
    Splits,
    epoch_batches,
    extract,
    keyed_subset,
    pick_device,
    stand_ins,
)
from unmask.core.evaluation.finetune import Classifier, FineTuned, FineTuning, fine_tune
from unmask.core.evaluation.knn import KNN, knn_accuracy
from unmask.core.evaluation.linear import FewLabels, LinearProbe, few_label_curve
from unmask.core.evaluation.rankme import deviation, rankme
from unmask.core.method import to_device
from unmask.core.progress import progress_bar
from unmask.core.training import checkpoint
from unmask.core.training.build import make_method
from unmask.core.training.checkpoint import LoadedRun, load_run
from unmask.core.training.files import write_atomically, write_json, write_text
from unmask.core.training.recipe import make_recipe, read_yaml, to_yaml
from unmask.core.training.rundir import check_writable, metrics_until
from unmask.vision.data.images import ImageBatch, Images, Settings, collate, open_split
from unmask.vision.data.statistics import transfer_notes

ROWS = {"trained": "trained encoder", "random": "untrained encoder", "pixels": "raw pixels"}
PIXELS_SIDE = 32  # larger images are averaged down to this before their pixels are probed
_OTHER_SEED = 1_000_003  # added to the run's seed for the reference's random weights: never those training began from

Encode = Callable[[ImageBatch], Float[Tensor, "batch dim"]]


@dataclass(frozen=True)
class _Labelled:
    """The three splits of labelled data; `train` and the rest without augmentation."""

    settings: Settings
    train: Images
    val: Images
    test: Images
    classes: list[str]

    @property
    def sizes(self) -> dict[str, int]:
        return {"train": len(self.train), "val": len(self.val), "test": len(self.test), "classes": len(self.classes)}


def evaluate(
    run_dir: str | Path,
    *,
    data: str | None = None,
    device: str = "auto",
    quick: bool = False,
    seed: int = 0,
    epochs: int | None = None,
) -> dict[str, Any]:
    """Measure a run's encoder beside the same encoder at random initialisation and raw pixels.

    Probes are fitted on the data's train split, chosen on validation, and the test split is scored once. Data without
    labels give RankMe and the validation loss only, and the result says so. Writes RUN/evaluation.json.

    Args:
        run_dir: a run directory; one that is still training is measured as far as it is.
        data: a labelled folder or embedded set; the run's own data when not given.
        device: ``auto``, ``cpu`` or ``cuda``.
        quick: leave fine-tuning out, which takes longer than all the rest.
        seed: of the few-label subsets, of fine-tuning, and of the reference's random weights.
        epochs: passes of fine-tuning; None for the protocol's.

    Returns:
        What was written: ``rows`` (``trained``, ``random``, ``pixels``; accuracies in [0, 1]), ``protocol``, ``splits``
        and so on. `table` makes text of it.

    Raises:
        UnmaskError: no run, no data, or no such device.
    """
    began, place = time.perf_counter(), pick_device(device)
    run = load_run(run_dir, place)
    settings = _settings(run, data)
    result: dict[str, Any] = {
        "run": str(run_dir),
        "method": run.recipe.method,
        "step": run.step,
        "data": settings.source,
        "seed": seed,
        "quick": quick,
        "names": ROWS,
        "val_loss": _val_loss(Path(run_dir)),
    }
    labelled = _open_labelled(settings, run)
    random = _random_encoder(run, seed).to(place)
    if labelled is None:
        result |= _without_labels(run, random, settings, place)
    else:
        tuning = None if quick else _fine_tuning(epochs)
        result |= _with_labels(run, random, labelled, place, tuning, seed)
    result["seconds"] = round(time.perf_counter() - began, 1)
    return _record(Path(run_dir) / "evaluation.json", result)


def _record(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Write a result, and give it as a reader of the file gets it (lists for tuples)."""
    write_json(path, result)
    return json.loads(json.dumps(result))


def _val_loss(run_dir: Path) -> float | None:
    """The last validation loss that training wrote."""
    lines = [json.loads(line) for line in metrics_until(run_dir / "metrics.jsonl", sys.maxsize)]
    return next((line["val_loss"] for line in reversed(lines) if "val_loss" in line), None)


def _settings(run: LoadedRun, data: str | None) -> Settings:
    """The run's data settings, pointing at `data`; mean and deviation stay those the encoder was trained with."""
    settings: Settings = run.recipe.data
    return settings if data is None else replace(settings, source=data)


def _compare(images: Images, run: LoadedRun) -> None:
    """Warn where images that are not the run's own are on another scale than those."""
    if images.settings.source != run.recipe.data.source:
        for note in transfer_notes(images):
            say(note)


def _open_labelled(settings: Settings, run: LoadedRun) -> _Labelled | None:
    """The splits of labelled data, or None where there are no labels."""
    train = open_split(settings, "train")
    _compare(train, run)
    if train.labels is None or train.classes is None:
        return None
    return _Labelled(settings, train, open_split(settings, "val"), open_split(settings, "test"), train.classes)


def _random_encoder(run: LoadedRun, seed: int) -> nn.Module:
    """The run's method at random weights that are not those it started from."""
    with torch.random.fork_rng([]):
        torch.manual_seed(run.recipe.seed + seed + _OTHER_SEED)
        return make_method(run.recipe).eval()


def _encoders(run: LoadedRun, random: nn.Module) -> dict[str, Encode]:
    return {"trained": _pooled(run.method), "random": _pooled(random), "pixels": lambda batch: pixels(batch.images)}


def _pooled(method: Any) -> Encode:
    """The mean of a method's tokens, unmasked."""
    return lambda batch: method.encode(batch).pooled


def pixels(images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch values"]:
    """Normalised pixels as features, images larger than `PIXELS_SIDE` averaged down to it."""
    rows, columns = (min(side, PIXELS_SIDE) for side in images.shape[-2:])
    return F.adaptive_avg_pool2d(images, (rows, columns)).flatten(1)


def _features(encode: Encode, images: Images, run: LoadedRun, device: torch.device, what: str) -> FeatureSplit:
    workers = run.recipe.training.workers
    with progress_bar(what, len(images)) as advance:
        return extract(encode, images, collate, device=device, workers=workers, advance=advance)


def _with_labels(
    run: LoadedRun, random: nn.Module, data: _Labelled, device: torch.device, tuning: FineTuning | None, seed: int
) -> dict[str, Any]:
    rows = {}
    for name, encode in _encoders(run, random).items():
        parts = {s: _features(encode, getattr(data, s), run, device, f"{name}, {s}") for s in ("train", "val", "test")}
        rows[name] = _probe(Splits(**parts), seed)
    protocol = {"knn": asdict(KNN()), "linear": asdict(LinearProbe()), "few_label": asdict(FewLabels())}
    if tuning is not None:
        # From scratch there is nothing that slow lower layers would protect; they would only handicap the reference.
        tunings = {"trained": tuning, "random": replace(tuning, layer_decay=1.0)}
        protocol["finetune"] = asdict(tuning) | {"layer_decay_of_random": 1.0}
        for name, method in {"trained": run.method, "random": random}.items():
            tuned = _tune(method, data, run, tunings[name], seed, device)
            rows[name] |= {"finetune": tuned.accuracy, "finetune_val": tuned.val_accuracy}
    return {"labelled": True, "splits": data.sizes, "rows": rows, "protocol": protocol}


def _probe(splits: Splits, seed: int) -> dict[str, Any]:
    """Every measure on frozen features; accuracies are on the test split."""
    curve = few_label_curve(splits, seed)
    full = curve[1.0]
    train, test = splits.train, splits.test
    return {
        "knn": knn_accuracy(train.x, train.labels, test.x, test.labels),
        "linear": full.accuracy,
        "linear_val": full.val_accuracy,
        "linear_strength": full.strength,
        "few_label": {f"{100 * share:g}": probed.accuracy for share, probed in curve.items()},
    } | _spread(train)


def _spread(features: FeatureSplit) -> dict[str, Any]:
    return {"rankme": rankme(features.x), "deviation": deviation(features.x), "dim": features.x.shape[1]}


def _fine_tuning(epochs: int | None) -> FineTuning:
    return FineTuning() if epochs is None else FineTuning(epochs=epochs)


def _tune(
    method: nn.Module, data: _Labelled, run: LoadedRun, protocol: FineTuning, seed: int, device: torch.device
) -> FineTuned:
    train = data.train.view(seed=seed, augment=True)
    with progress_bar("fine-tuning", len(train) * protocol.epochs) as advance:
        return fine_tune(
            method.encoder,  # type: ignore[arg-type]  # a method of this domain has one
            len(data.classes),
            train,
            collate,
            _images,
            val=data.val,
            test=data.test,
            protocol=protocol,
            seed=seed,
            device=device,
            workers=run.recipe.training.workers,
            advance=advance,
        )


def _images(batch: ImageBatch) -> Tensor:
    return batch.images


def _without_labels(run: LoadedRun, random: nn.Module, settings: Settings, device: torch.device) -> dict[str, Any]:
    train = open_split(settings, "train")
    rows = {
        name: _spread(_features(encode, train, run, device, f"{name}, train"))
        for name, encode in _encoders(run, random).items()
    }
    note = (
        f"{settings.source} has no labels, so there are no probes: only how many dimensions the features use. For "
        "probes, give labelled images with --data: one folder per class."
    )
    return {"labelled": False, "note": note, "splits": {"train": len(train)}, "rows": rows, "protocol": {}}


def finetune(
    run_dir: str | Path,
    data: str,
    out: str | Path,
    *,
    epochs: int | None = None,
    labels: float = 1.0,
    scratch: bool = False,
    device: str = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """Train a run's encoder further as a classifier of labelled images; `FineTuning` says how.

    Writes ``model.safetensors``, ``recipe.yaml`` and ``finetune.json`` to `out`; `load_classifier` reads them back.

    Args:
        run_dir: a run directory.
        data: a folder with one sub-folder per class, or an embedded set.
        out: a directory.
        epochs: passes over the training split; None for the protocol's.
        labels: share of each class's training labels that is used, at least one of each; validation keeps all of its.
        scratch: begin with random weights and the same learning rate in all layers instead: what pre-training has to
            beat.
        device: ``auto``, ``cpu`` or ``cuda``.
        seed: of head, order, augmentation, drop path, random weights and the choice of labels.

    Raises:
        UnmaskError: no run, data without labels, or `out` cannot be written.
    """
    out, place = Path(out), pick_device(device)
    run = load_run(run_dir, place)
    labelled = _open_labelled(_settings(run, data), run)
    if labelled is None or labelled.train.labels is None:
        raise UnmaskError(f"{data} has no labels; fine-tuning needs one folder of images per class, or a labelled set")
    check_writable(out)
    if (out / "recipe.yaml").exists() and not (out / "finetune.json").exists():
        raise UnmaskError(f"{out} holds a run, which fine-tuning would overwrite; choose another --out")
    chosen = keyed_subset(labelled.train.ids, labelled.train.labels, labels, seed)
    labelled = replace(labelled, train=labelled.train.view(chosen))
    protocol, method = _fine_tuning(epochs), run.method
    if scratch:
        protocol, method = replace(protocol, layer_decay=1.0), _random_encoder(run, seed).to(place)
    began = time.perf_counter()
    tuned = _tune(method, labelled, run, protocol, seed, place)
    result = {
        "run": str(run_dir),
        "method": run.recipe.method,
        "step": run.step,
        "data": labelled.settings.source,
        "seed": seed,
        "labels": labels,
        "scratch": scratch,
        "accuracy": tuned.accuracy,
        "val_accuracy": tuned.val_accuracy,
        "losses": tuned.losses,
        "splits": labelled.sizes,
        "classes": labelled.classes,
        "protocol": asdict(protocol),
        "seconds": round(time.perf_counter() - began, 1),
        "out": str(out),
    }
    recipe = replace(run.recipe, data=labelled.settings)
    write_text(out / "recipe.yaml", to_yaml(recipe))
    checkpoint.write(out / "model.safetensors", tuned.classifier.state_dict(), {"classes": labelled.classes})
    return _record(out / "finetune.json", result)


def load_classifier(out: str | Path, device: str = "cpu") -> Classifier:
    """The classifier that `finetune` wrote, in eval mode, with its class names as ``classes``.

    It takes normalised images [batch, channels, height, width] and gives logits [batch, classes].

    Raises:
        UnmaskError: `out` is not what `finetune` wrote.
    """
    out = Path(out)
    if not (out / "finetune.json").is_file():
        raise UnmaskError(f"{out} holds no fine-tuned classifier; make one with: unmask finetune RUN --data FOLDER")
    recipe = make_recipe(read_yaml(out / "recipe.yaml"), source=str(out / "recipe.yaml"))
    saved = checkpoint.read(out / "model.safetensors")
    method: Any = make_method(recipe)
    model: Any = Classifier(method.encoder, len(saved.meta["classes"]))
    checkpoint.load_model(model, saved.tensors, str(out))
    model.classes = saved.meta["classes"]
    return model.to(device).eval()


def embed(run_dir: str | Path, folder: str, out: str | Path, *, device: str = "auto") -> Path:
    """Write one row per image to a parquet file: ``id`` (int64), ``name`` and ``embedding`` (list of float32).

    The embedding is the mean of the encoder's patch tokens; nothing is masked. Images are read and written as a stream,
    in the order of their names, all splits together; unreadable ones are left out and named on stderr.

    Args:
        run_dir: a run directory.
        folder: images, as for training; labels are not needed.
        out: the file; whole or not there.
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        UnmaskError: no run, no images, or `out` cannot be written.
    """
    out, place = Path(out), pick_device(device)
    run = load_run(run_dir, place)
    images = open_split(_settings(run, folder), "all")
    _compare(images, run)
    write_atomically(out, lambda temporary: _write_embeddings(temporary, run, images, place))
    if images.problems:
        names = "; ".join(f"{p.name} ({p.reason})" for p in images.problems[:3])
        print(f"{len(images.problems)} images could not be read and are left out: {names} ...", file=sys.stderr)
    return out


@torch.inference_mode()
def _write_embeddings(path: Path, run: LoadedRun, images: Images, device: torch.device) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [("id", pa.int64()), ("name", pa.string()), ("embedding", pa.list_(pa.float32()))]
    encode = _pooled(run.method)
    schema = pa.schema(columns, metadata={"method": run.recipe.method, "step": str(run.step)})
    with pq.ParquetWriter(path, schema) as writer, progress_bar("embedding", len(images)) as advance:
        for batch, chunk in epoch_batches(images, collate, 256, run.recipe.training.workers):
            pooled = encode(to_device(batch, device)).float().cpu()
            wrong = stand_ins(batch, images, chunk)
            ids, pooled = (batch.ids, pooled) if wrong is None else (batch.ids[~wrong], pooled[~wrong])
            names = [images.name_of(int(i)) for i in ids]
            rows = pa.FixedSizeListArray.from_arrays(pa.array(pooled.flatten().numpy()), pooled.shape[1])
            arrays = [pa.array(ids.numpy()), pa.array(names), rows.cast(pa.list_(pa.float32()))]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
            advance(len(chunk))


def table(result: dict[str, Any]) -> str:
    """What `evaluate` or `finetune` returned, as text for a terminal."""
    if "rows" not in result:
        return (
            f"test accuracy {result['accuracy']:.1%}, validation {result['val_accuracy']:.1%} after "
            f"{result['protocol']['epochs']} epochs on {result['splits']['train']} images of {result['data']}\n"
            f"written to {result['out']}"
        )
    return _rich_table(result)


def _rich_table(result: dict[str, Any]) -> str:
    from rich.console import Console
    from rich.table import Table

    sizes = result["splits"]
    caption = ", ".join(f"{n} {split}" for split, n in sizes.items())
    grid = Table(title=f"{result['method']} at step {result['step']} on {result['data']}", caption=caption)
    columns = _columns(result)
    for title, _ in columns:
        grid.add_column(title, justify="left" if title == "" else "right")
    for name, row in result["rows"].items():
        grid.add_row(*(text(name, row) for _, text in columns))
    console = Console(width=110)
    with console.capture() as capture:
        console.print(grid)
        if "note" in result:
            console.print(result["note"], markup=False)
    return capture.get().rstrip()


Cell = Callable[[str, dict[str, Any]], str]


def _columns(result: dict[str, Any]) -> list[tuple[str, Cell]]:
    columns: list[tuple[str, Cell]] = [("", lambda name, row: ROWS[name])]
    if result["labelled"]:
        columns += [("k-NN", _percent("knn")), ("linear", _percent("linear"))]
        shares = [share for share in result["rows"]["trained"]["few_label"] if share != "100"]
        columns += [(f"{share} % labels", _few(share)) for share in shares]
        if "finetune" in result["rows"]["trained"]:
            columns.append(("fine-tuned", _percent("finetune")))
    return [*columns, ("RankMe", lambda name, row: f"{row['rankme']:.1f} of {row['dim']}")]


def _percent(key: str) -> Cell:
    return lambda name, row: f"{100 * row[key]:.1f}" if key in row else "-"


def _few(share: str) -> Cell:
    return lambda name, row: f"{100 * row['few_label'][share]:.1f}"
