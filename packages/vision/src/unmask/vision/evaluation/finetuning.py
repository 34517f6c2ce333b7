"""Fine-tuning: train the whole encoder further as a classifier of images, by core's protocol."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unmask.core.errors import UnmaskError
from unmask.core.evaluation.encoding import at_source, untrained
from unmask.core.evaluation.features import keyed_subset, pick_device
from unmask.core.evaluation.finetune import Classifier, FineTuned, FineTuning, fine_tune
from unmask.core.progress import progress_bar
from unmask.core.training import checkpoint
from unmask.core.training.build import make_method
from unmask.core.training.checkpoint import LoadedRun, load_run
from unmask.core.training.files import write_json, write_text
from unmask.core.training.recipe import make_recipe, read_yaml, to_yaml
from unmask.core.training.rundir import check_writable
from unmask.vision.data.images import ImageBatch, Images, collate, open_split


def protocol_for(epochs: int | None) -> FineTuning:
    """Core's protocol, for so many epochs."""
    return FineTuning() if epochs is None else FineTuning(epochs=epochs)


def tune(
    method: nn.Module,
    splits: Mapping[str, Images],
    run: LoadedRun,
    protocol: FineTuning,
    seed: int,
    device: torch.device,
) -> FineTuned:
    """Train a copy of a method's encoder as a classifier of the classes of ``splits["train"]``, and score it."""
    train = splits["train"].view(seed=seed, augment=True)
    with progress_bar("fine-tuning", len(train) * protocol.epochs) as advance:
        return fine_tune(
            method.encoder,  # type: ignore[arg-type]  # a method of this domain has one
            len(train.classes or []),
            train,
            collate,
            _images,
            val=splits["val"],
            test=splits["test"],
            protocol=protocol,
            seed=seed,
            device=device,
            workers=run.recipe.training.workers,
            advance=advance,
        )


def _images(batch: ImageBatch) -> Tensor:
    return batch.images


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
    settings = at_source(run.recipe.data, data)
    train = open_split(settings, "train")
    classes = train.classes
    if train.labels is None or classes is None:
        raise UnmaskError(f"{data} has no labels; fine-tuning needs one folder of images per class, or a labelled set")
    check_writable(out)
    if (out / "recipe.yaml").exists() and not (out / "finetune.json").exists():
        raise UnmaskError(f"{out} holds a run, which fine-tuning would overwrite; choose another --out")
    train = train.view(keyed_subset(train.ids, train.labels, labels, seed))
    splits = {"train": train, "val": open_split(settings, "val"), "test": open_split(settings, "test")}
    protocol, method = protocol_for(epochs), run.method
    if scratch:
        protocol, method = replace(protocol, layer_decay=1.0), untrained(run, seed).to(place)
    began = time.perf_counter()
    tuned = tune(method, splits, run, protocol, seed, place)
    result = {
        "run": str(run_dir),
        "method": run.recipe.method,
        "step": run.step,
        "data": settings.source,
        "seed": seed,
        "labels": labels,
        "scratch": scratch,
        "accuracy": tuned.accuracy,
        "val_accuracy": tuned.val_accuracy,
        "losses": tuned.losses,
        "splits": {name: len(part) for name, part in splits.items()} | {"classes": len(classes)},
        "classes": classes,
        "protocol": asdict(protocol),
        "seconds": round(time.perf_counter() - began, 1),
        "out": str(out),
    }
    recipe = replace(run.recipe, data=settings)
    write_text(out / "recipe.yaml", to_yaml(recipe))
    checkpoint.write(out / "model.safetensors", tuned.classifier.state_dict(), {"classes": classes})
    write_json(out / "finetune.json", result)
    return json.loads(json.dumps(result))


def batch_classifier(out: str | Path, device: str = "cpu") -> Any:
    """`load_classifier` as a function of a batch."""
    model: Any = load_classifier(out, device)

    def classify(batch: ImageBatch) -> Tensor:
        return model(batch.images)

    classify.classes = model.classes  # type: ignore[attr-defined]
    return classify


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
