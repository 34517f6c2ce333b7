"""Fine-tuning: train the whole encoder further with a classifier on top, lower layers more slowly.

A fine-tuning is a run of the training loop with a directory of its own. Its recipe is the pre-training's with the data,
optimizer and schedule of the fine-tuning, and a section ``finetune``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from unmask.core import registry
from unmask.core.errors import UnmaskError
from unmask.core.evaluation.classifier import Classifier
from unmask.core.evaluation.encoding import encoding_of, settle_on, untrained
from unmask.core.evaluation.features import epoch_batches, keyed_subset, stand_ins
from unmask.core.method import to_device
from unmask.core.training import checkpoint
from unmask.core.training.build import make_method
from unmask.core.training.checkpoint import LoadedRun, load_run
from unmask.core.training.files import write_json
from unmask.core.training.launch import make_fabric
from unmask.core.training.loop import fit
from unmask.core.training.recipe import Recipe, Tuning, as_dict, make_recipe, parse_override, read_yaml
from unmask.core.training.rundir import metrics_until


@dataclass(frozen=True)
class FineTuning:
    """MAE's end-to-end fine-tuning (arXiv 2111.06377, table 9), made for small data where that differs.

    From the paper: AdamW with betas (0.9, 0.999), weight decay 0.05, 5 % of the run as linear warm-up, cosine decay,
    label smoothing 0.1, drop path 0.1. From its released code, for ViT-B: a base rate of 5e-4 per 256 samples, layer
    decay 0.65, mean pooling followed by LayerNorm and a linear layer that starts at 2e-5, and a last rate of 1e-6.
    Ours: 20 epochs and batches of 128 (100 and 1024 there, on ImageNet), and the augmentation of the run's data
    settings in place of RandAugment, mixup, cutmix and random erasing. The last epoch's weights count: validation is
    reported, it does not stop the run. One protocol serves all methods: SimMIM's own gives every block its copy of the
    relative-position table and starts the head at a thousandth of its usual size, and its Swin keeps the final norm.

    Args:
        epochs: passes over the training split.
        warmup_share: share of the run that warms up.
        batch_size: samples per step; all of them where there are fewer.
        base_lr: peak learning rate of the head at `reference_batch` samples.
        reference_batch: the batch size that `base_lr` is stated for.
        min_lr: learning rate of the head at the end.
        layer_decay: what a layer's learning rate is multiplied by, relative to the layer above.
        weight_decay: on matrices; never on vectors, biases, class token and positions.
        betas: AdamW's decay rates.
        label_smoothing: share of the target spread over all classes.
        drop_path: probability of dropping a residual branch of the last block; grows linearly over the depth.
        head_std: deviation of the head's initial weights.
    """

    epochs: int = 20
    warmup_share: float = 0.05
    batch_size: int = 128
    base_lr: float = 5e-4
    reference_batch: int = 256
    min_lr: float = 1e-6
    layer_decay: float = 0.65
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    label_smoothing: float = 0.1
    drop_path: float = 0.1
    head_std: float = 2e-5


@dataclass(frozen=True)
class FineTuned:
    """A trained classifier and what it reached.

    Args:
        classifier: in eval mode.
        accuracy: on the test split, in [0, 1].
        val_accuracy: on the validation split.
        losses: the mean of the logged training losses of each epoch.
    """

    classifier: Classifier
    accuracy: float
    val_accuracy: float
    losses: list[float]


def protocol_for(samples: int, at_once: int, epochs: int | None = None) -> FineTuning:
    """The protocol for so many epochs, whatever the number of samples; a task's module may have a rule of its own."""
    return FineTuning() if epochs is None else FineTuning(epochs=epochs)


def tuned_recipe(run: LoadedRun, data: Any, protocol: FineTuning, classes: Sequence[str], samples: int) -> Recipe:
    """The recipe of a fine-tuning of a run.

    Args:
        run: the pre-trained method.
        data: settings of the labelled data.
        protocol: the hyper-parameters.
        classes: names.
        samples: of the training split.
    """
    p, size = protocol, min(protocol.batch_size, samples)
    steps = samples // size
    tuning = Tuning(tuple(classes), 1.0, p.layer_decay, p.label_smoothing, p.drop_path, p.head_std)
    raw = as_dict(replace(run.recipe, data=data, init=None, stages=None, finetune=tuning))
    raw["optimizer"] = {
        "base_lr": p.base_lr, "reference_batch": p.reference_batch, "betas": p.betas, "weight_decay": p.weight_decay,
    }  # fmt: skip
    min_lr = p.min_lr * p.reference_batch / size  # the recipe's grows with the batch
    raw["schedule"] = {"epochs": p.epochs, "warmup_epochs": p.warmup_share * p.epochs, "min_lr": min_lr}
    raw["training"] |= {
        "batch_size": size, "micro_batch": None, "compile": False, "log_every": max(1, steps // 10),
    }  # fmt: skip
    return make_recipe(raw, source="fine-tuning", try_build=False)


def tune(
    run: LoadedRun,
    splits: Mapping[str, Any],
    recipe: Recipe,
    out: Path | None = None,
    *,
    fabric: Any = None,
    **options: Any,
) -> FineTuned:
    """Train a classifier on a method's encoder by the training loop, and score it.

    Args:
        run: the method to begin with; copied, not changed.
        splits: ``train``, ``val`` and ``test`` with labels, without augmentation.
        recipe: of the fine-tuning.
        out: its run directory; None leaves nothing behind.
        fabric: see `fit`.
        options: of `fit`.
    """
    if out is None:
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
            return tune(run, splits, recipe, Path(folder) / "run", fabric=fabric, **options)
    fabric = fabric or make_fabric(recipe, out)
    train = splits["train"].view(seed=recipe.seed, augment=True)
    collate = registry.data_kind(recipe.method).collate
    torch.manual_seed(recipe.seed)
    model = Classifier(run.method, encoding_of(recipe.method), _width(run, train, collate), _tuning(recipe))
    fit(model, train, splits["val"], collate, recipe, out, fabric=fabric, **options)
    model.eval()
    at_once = encoding_of(recipe.method).at_once(run.recipe)
    workers = recipe.training.workers
    test, val = (accuracy(model, splits[s], collate, fabric.device, workers, at_once) for s in ("test", "val"))
    return FineTuned(model, test, val, epoch_losses(out, recipe.schedule.epochs))


def _tuning(recipe: Recipe) -> Tuning:
    assert recipe.finetune is not None
    return recipe.finetune


@torch.no_grad()
def _width(run: LoadedRun, train: Any, collate: Any) -> int:
    """Values in the vector of a sample."""
    device = next(run.method.parameters()).device
    features = run.method.encode(to_device(collate([train[0, 0]]), device))  # type: ignore[operator]
    return encoding_of(run.recipe.method).vectors(features).shape[1]


def epoch_losses(out: Path, epochs: int) -> list[float]:
    """The mean of the logged training losses of each epoch of a run."""
    lines = [json.loads(line) for line in metrics_until(out / "metrics.jsonl", sys.maxsize)]
    found: dict[int, list[float]] = {}
    for line in lines:
        if line.get("loss") is not None:
            found.setdefault(min(epochs, -int(-line["epoch"] // 1)), []).append(line["loss"])
    return [sum(losses) / len(losses) for _, losses in sorted(found.items())]


@torch.inference_mode()
def accuracy(
    model: Classifier,
    dataset: Any,
    collate: Any,
    device: torch.device | str = "cpu",
    workers: int = 0,
    at_once: int = 256,
) -> float:
    """The share of a split that a classifier in eval mode gets right, in [0, 1]; unreadable samples do not count."""
    right, count = 0, 0
    for batch, chunk in epoch_batches(dataset, collate, at_once, workers):
        wrong = stand_ins(batch, dataset, chunk)
        hit = model.predict(to_device(batch, device)).argmax(1).cpu() == batch.labels
        hit = hit if wrong is None else hit[~wrong]
        right, count = right + int(hit.sum()), count + len(hit)
    return right / max(1, count)


# ---- the verb ------------------------------------------------------------------------------------------------------


def finetune(
    run_dir: str | Path,
    data: str,
    out: str | Path,
    *,
    epochs: int | None = None,
    labels: float = 1.0,
    scratch: bool = False,
    seed: int = 0,
    settings: Sequence[str] = (),
    devices: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a run's encoder further as a classifier of labelled samples; `FineTuning` says how.

    `out` becomes a run directory of its own, with the result in ``finetune.json``.

    Args:
        run_dir: a run directory.
        data: a folder with one sub-folder per class, or an embedded set.
        out: the directory to make.
        epochs: passes over the training split; None for the protocol's.
        labels: share of each class's training labels that is used, at least one of each; validation keeps all of its.
        scratch: begin with random weights and the same learning rate in all layers instead: what pre-training has to
            beat.
        seed: of head, order, augmentation, drop path, random weights and the choice of labels.
        settings: ``KEY=VALUE`` for any key of the fine-tuning's recipe.
        devices: processes on this machine.
        progress: show it on stderr.

    Raises:
        UnmaskError: no run, data without labels, or `out` cannot be written or holds a run.
    """
    run, out = load_run(run_dir), Path(out)
    run_dir = Path(run_dir).expanduser().resolve()  # with the data, what a resume in another folder has to find
    _check_allowed(run.recipe.method)
    source = encoding_of(run.recipe.method).settings(run.recipe.data, data)
    source = source if data is None else registry.data_kind(run.recipe.method).resolve(source)
    splits = _labelled(run, source, labels, seed)
    train = splits["train"]
    at_once = encoding_of(run.recipe.method).at_once(run.recipe)
    rule = getattr(registry.task(run.recipe.method), "protocol_for", protocol_for)
    protocol = rule(len(train), at_once, epochs)
    protocol = replace(protocol, layer_decay=1.0) if scratch else protocol
    recipe = tuned_recipe(run, source, protocol, train.classes, len(train))
    raw = as_dict(replace(recipe, seed=seed, init=None if scratch else str(run_dir)))
    raw["finetune"]["labels"] = labels
    recipe = make_recipe(raw, dict(parse_override(text) for text in settings), source="fine-tuning", try_build=False)
    return _run(recipe, run, splits, out, {"run": str(run_dir)}, devices=devices, progress=progress)


def resume(out: str | Path, *, devices: int | None = None, progress: bool = True) -> dict[str, Any]:
    """Go on with a fine-tuning that was interrupted, exactly; otherwise as `finetune`.

    Raises:
        UnmaskError: `out` holds no fine-tuning, or what it began with is gone.
    """
    path = Path(out) / "recipe.yaml"
    recipe = make_recipe(read_yaml(path), source=str(path), try_build=False) if path.is_file() else None
    if recipe is None or recipe.finetune is None:
        raise UnmaskError(
            f"{out} holds no fine-tuning to resume; begin one with: unmask finetune RUN --data D --out DIR"
        )
    begun = any((Path(out) / "checkpoints").glob("step-*.safetensors"))
    fresh = recipe.init is None or begun  # the weights are random, or come from the checkpoint
    run = LoadedRun(make_method(recipe).eval(), recipe, 0) if fresh else load_run(str(recipe.init))
    splits = _labelled(run, recipe.data, recipe.finetune.labels, recipe.seed)
    return _run(recipe, run, splits, Path(out), {"run": recipe.init}, devices=devices, progress=progress, resume=True)


def _run(
    recipe: Recipe, run: LoadedRun, splits: Mapping[str, Any], out: Path, about: dict[str, Any], **options: Any
) -> dict[str, Any]:
    fabric = make_fabric(recipe, out, devices=options.pop("devices"))
    began = run if recipe.init is not None else LoadedRun(untrained(LoadedRun(run.method, recipe, 0), 0), recipe, 0)
    began.method.to(fabric.device)
    settle_on(began.method, began, splits["train"], fabric.device, recipe.seed)
    tuned = tune(began, splits, recipe, out, fabric=fabric, **options)
    tuning = _tuning(recipe)
    result = about | {
        "method": recipe.method,
        "data": recipe.data.source,
        "seed": recipe.seed,
        "labels": tuning.labels,
        "scratch": recipe.init is None,
        "accuracy": tuned.accuracy,
        "val_accuracy": tuned.val_accuracy,
        "losses": tuned.losses,
        "epochs": recipe.schedule.epochs,
        "splits": {name: len(part) for name, part in splits.items()} | {"classes": len(tuning.classes)},
        "classes": list(tuning.classes),
        "out": str(out),
    }
    if fabric.is_global_zero:
        write_json(out / "finetune.json", result)
    return json.loads(json.dumps(result))


def _check_allowed(method: str) -> None:
    refusal = getattr(registry.task(method), "NO_FINE_TUNING", None)
    if refusal is not None:
        raise UnmaskError(refusal)


def _labelled(run: LoadedRun, data: Any, labels: float, seed: int) -> dict[str, Any]:
    """The three splits of labelled data, of training a share of the labels."""
    part, samples = registry.data_kind(run.recipe.method), registry.domain(run.recipe.method).samples
    train = part.open_split(data, "train")
    if train.labels is None or train.classes is None:
        raise UnmaskError(
            f"{data.source} has no class for each of its {samples}; fine-tuning needs one folder of {samples} per "
            "class, or a labelled set"
        )
    chosen = train.view(keyed_subset(train.ids, train.labels, labels, seed))
    return {"train": chosen, "val": part.open_split(data, "val"), "test": part.open_split(data, "test")}


def load_classifier(out: str | Path, device: str | torch.device = "cpu") -> Classifier:
    """The classifier of a fine-tuning, in eval mode: `Classifier.predict` takes a batch; ``classes`` are its names.

    Raises:
        UnmaskError: `out` holds none.
    """
    return load_tuned(out, device).method  # type: ignore[return-value]


def load_tuned(out: str | Path, device: str | torch.device = "cpu") -> LoadedRun:
    """`load_classifier` with the recipe and the step.

    Raises:
        UnmaskError: `out` holds no classifier.
    """
    path = Path(out) / "recipe.yaml"
    recipe = make_recipe(read_yaml(path), source=str(path), try_build=False) if path.is_file() else None
    if recipe is None or recipe.finetune is None:
        if recipe is not None:
            _check_allowed(recipe.method)  # rather than send to a command that refuses
        run = "RUN" if recipe is None else str(out)
        raise UnmaskError(
            f"{out} holds no fine-tuned classifier; make one with: unmask finetune {run} --data LABELLED --out "
            "CLASSIFIER - and give CLASSIFIER"
        )
    state, step = checkpoint.weights_of(Path(out))
    model = Classifier(make_method(recipe), encoding_of(recipe.method), len(state["norm.weight"]), recipe.finetune)
    checkpoint.load_model(model, state, str(out))
    return LoadedRun(model.to(device).eval(), recipe, step)
