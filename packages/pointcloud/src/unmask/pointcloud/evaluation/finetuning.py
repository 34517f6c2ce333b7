"""Fine-tuning: train the whole encoder further as a classifier of clouds, by core's protocol."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from unmask.core.errors import UnmaskError
from unmask.core.evaluation.encoding import at_source, settle_on, untrained
from unmask.core.evaluation.features import keyed_subset, pick_device
from unmask.core.evaluation.finetune import Classifier, FineTuned, FineTuning, fine_tune
from unmask.core.progress import progress_bar
from unmask.core.training import checkpoint
from unmask.core.training.build import make_method
from unmask.core.training.checkpoint import LoadedRun, load_run
from unmask.core.training.files import write_json, write_text
from unmask.core.training.recipe import make_recipe, read_yaml, to_yaml
from unmask.core.training.rundir import check_writable
from unmask.pointcloud.data.batches import PointBatch
from unmask.pointcloud.data.clouds import PointClouds, collate, open_split
from unmask.pointcloud.encoders.sparse_conv import SparseConvEncoder
from unmask.pointcloud.evaluation.encoding import clouds_at_once
from unmask.pointcloud.evaluation.features import cloud_vectors
from unmask.pointcloud.interop.model import CloudEncoder

PEAK_LR = 2e-3  # of the head in fine-tuning
FEWEST_STEPS = 300  # of fine-tuning, where the number of epochs is not given
_LARGEST, _SMALLEST = 128, 8  # clouds per step


@dataclass(frozen=True)
class Pooled:
    """What core's `Classifier` reads of an encoder's answer."""

    pooled: Float[Tensor, "batch dim"]


class PooledEncoder(nn.Module):
    """An encoder as core's `Classifier` takes one: its parameters by depth, and one vector per cloud.

    Layer-wise learning rates go by names: ``patch_embed`` is the pillar encoder, and ``blocks`` the backbone's layers
    from the input on; a block of the window transformer is two of them. ``whole`` runs them, on the same parameters.

    Args:
        encoder: the trained encoder.
    """

    def __init__(self, encoder: CloudEncoder) -> None:
        super().__init__()
        self.patch_embed = encoder.pillar_encoder
        self.blocks = nn.ModuleList(_layers(encoder.encoder))
        self.whole = encoder
        self.dim = 2 * encoder.dim

    def forward(self, batch: PointBatch) -> Pooled:
        """Maximum and mean over the pillars of each cloud."""
        return Pooled(cloud_vectors(self.whole(batch)))


def _layers(backbone: Any) -> list[nn.Module]:
    """The parts of a backbone, from the input to the output."""
    if not isinstance(backbone, SparseConvEncoder):
        return list(backbone.layers)
    down = [nn.ModuleList(pair) for pair in zip(backbone.downs, backbone.before[1:], strict=True)]
    up = [nn.ModuleList(pair) for pair in zip(backbone.ups, backbone.after, strict=True)]
    return [backbone.before[0], *down, *reversed(up)]


def protocol_for(samples: int, at_once: int, epochs: int | None = None) -> FineTuning:
    """Core's `FineTuning`, made for small encoders and few clouds.

    Ours: the head's learning rate peaks at `PEAK_LR` whatever the batch (core's, which is ViT-B's, has 2.5e-4 at 128
    samples, and hardly moves encoders of a tenth of its width in so few steps), batches of an eighth of the training
    clouds, between 8 and 128 and no more than fit into memory, and at least `FEWEST_STEPS` steps. Drop path gates a
    whole batch at a time, as stochastic depth did at first (arXiv 1603.09382): the pillars of all clouds go through a
    layer as one row.

    Args:
        samples: training clouds.
        at_once: clouds that fit into memory: as many as pre-training had in a micro-batch.
        epochs: passes over them, if the number is given.
    """
    usual = FineTuning()
    batch = min(_LARGEST, max(_SMALLEST, samples // 8), max(1, samples), at_once)
    least = math.ceil(FEWEST_STEPS / max(1, samples // batch))
    return replace(
        usual,
        batch_size=batch,
        base_lr=PEAK_LR,
        reference_batch=batch,
        epochs=max(usual.epochs, least) if epochs is None else epochs,
    )


def tune(
    method: Any, splits: Mapping[str, PointClouds], run: LoadedRun, protocol: FineTuning, seed: int, device: Any
) -> FineTuned:
    """Train a copy of a method's encoder as a classifier of the classes of ``splits["train"]``, and score it.

    Args:
        method: with ``pillar_encoder`` and ``encoder``; not changed.
        splits: ``train``, ``val`` and ``test`` with labels; those of training are augmented.
        run: whose data loading is used.
        protocol: the hyper-parameters.
        seed: of head, order, augmentation and drop path.
        device: where to train.
    """
    classes, train = splits["train"].classes, splits["train"].view(seed=seed, augment=True)
    assert classes is not None
    encoder = CloudEncoder(method.pillar_encoder, method.encoder, train.settings)
    with progress_bar("fine-tuning", len(train) * protocol.epochs) as advance:
        return fine_tune(
            PooledEncoder(encoder),
            len(classes),
            train,
            collate,
            lambda batch: batch,
            val=splits["val"],
            test=splits["test"],
            protocol=protocol,
            seed=seed,
            device=device,
            workers=run.recipe.training.workers,
            scored_at_once=clouds_at_once(run.recipe),
            advance=advance,
        )


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
    """Train a run's encoder further as a classifier of labelled clouds; `protocol_for` says how.

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
        UnmaskError: no run, data without classes of clouds, or `out` cannot be written.
    """
    out, place = Path(out), pick_device(device)
    run = load_run(run_dir, place)
    settings = at_source(run.recipe.data, data)
    train = open_split(settings, "train")
    classes = train.classes
    if train.labels is None or classes is None:
        raise UnmaskError(
            f"{data} has no classes of whole clouds; fine-tuning needs one folder of clouds per class, or a labelled "
            "set"
        )
    train = train.view(keyed_subset(train.ids, train.labels, labels, seed))
    splits = {"train": train, "val": open_split(settings, "val"), "test": open_split(settings, "test")}
    check_writable(out)
    if (out / "recipe.yaml").exists() and not (out / "finetune.json").exists():
        raise UnmaskError(f"{out} holds a run, which fine-tuning would overwrite; choose another --out")
    protocol, method = protocol_for(len(train), clouds_at_once(run.recipe), epochs), run.method
    settle_on(method, run, train, place, seed)
    if scratch:
        protocol, method = replace(protocol, layer_decay=1.0), untrained(run, seed).to(place)
        settle_on(method, run, train, place, seed)
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
    write_text(out / "recipe.yaml", to_yaml(replace(run.recipe, data=settings)))
    state = _parts(tuned.classifier).state_dict()
    checkpoint.write(out / "model.safetensors", state, {"classes": classes})
    write_json(out / "finetune.json", result)
    return json.loads(json.dumps(result))


def _parts(classifier: Any) -> nn.ModuleDict:
    """A classifier's modules by the method's names, each once."""
    whole = classifier.encoder.whole
    parts = {"pillar_encoder": whole.pillar_encoder, "encoder": whole.encoder}
    return nn.ModuleDict({**parts, "norm": classifier.norm, "head": classifier.head})


def load_classifier(out: str | Path, device: str = "cpu") -> Classifier:
    """The classifier that `finetune` wrote, in eval mode, with its class names as ``classes``.

    It takes a `PointBatch` and gives logits [batch, classes]; ``preprocess`` makes such a batch from files or arrays.

    Raises:
        UnmaskError: `out` is not what `finetune` wrote.
    """
    out = Path(out)
    if not (out / "finetune.json").is_file():
        raise UnmaskError(f"{out} holds no fine-tuned classifier; make one with: unmask finetune RUN --data FOLDER")
    path = out / "recipe.yaml"
    recipe = make_recipe(read_yaml(path), source=str(path), try_build=False)
    saved = checkpoint.read(out / "model.safetensors")
    method: Any = make_method(recipe)
    encoder = CloudEncoder(method.pillar_encoder, method.encoder, recipe.data)
    model: Any = Classifier(PooledEncoder(encoder), len(saved.meta["classes"]))
    checkpoint.load_model(_parts(model), saved.tensors, str(out))
    model.classes, model.preprocess = saved.meta["classes"], model.encoder.whole.preprocess
    return model.to(device).eval()
