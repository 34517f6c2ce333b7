"""Fine-tuning: train the whole encoder further with a classifier on top, lower layers more slowly."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from unmask.core.evaluation.features import epoch_batches, stand_ins
from unmask.core.method import Clock, to_device
from unmask.core.nn.transformer import DropPath
from unmask.core.progress import Advance
from unmask.core.randomness import epoch_order
from unmask.core.training.groups import decays
from unmask.core.training.position import batches
from unmask.core.training.schedules import Scheduled


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
        layer_decay: d of `layer_scale`.
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
        accuracy: on the test split, in [0, 1]; None where no test split was given.
        val_accuracy: on the validation split; likewise.
        losses: the mean training loss of each epoch.
    """

    classifier: Classifier
    accuracy: float | None
    val_accuracy: float | None
    losses: list[float]


class Classifier(nn.Module):
    """An encoder, the mean of its tokens, LayerNorm, and a linear layer.

    The encoder's own final norm is replaced by the LayerNorm after pooling, as in MAE's released code.

    Args:
        encoder: returns `Features`; copied, not changed. Has ``dim``, and ``norm`` if it ends in one.
        classes: how many.
        head_std: deviation of the head's initial weights (truncated normal).
        drop_path: see `FineTuning`; only for encoders on core's block.
    """

    def __init__(self, encoder: nn.Module, classes: int, head_std: float = 2e-5, drop_path: float = 0.0) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder)
        if hasattr(self.encoder, "norm"):
            self.encoder.norm = nn.Identity()
        dim: Any = encoder.dim
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=head_std)
        nn.init.zeros_(self.head.bias)
        for parameter in self.encoder.parameters():  # fixed positions are trained from here on, as in the released code
            parameter.requires_grad_(True)
        _set_drop_path(self.encoder, drop_path)

    def forward(self, inputs: Any) -> Float[Tensor, "batch classes"]:
        """Logits of a batch of whatever the encoder takes."""
        return self.head(self.norm(self.encoder(inputs).pooled))


def _set_drop_path(encoder: nn.Module, rate: float) -> None:
    gates = [module for module in encoder.modules() if isinstance(module, DropPath)]
    for i, gate in enumerate(gates):
        gate.rate = rate * i / max(1, len(gates) - 1)


_BLOCK = re.compile(r"encoder\.blocks\.(\d+)\.")
_STAGE = re.compile(r"encoder\.layers\.(\d+)\.(?:blocks\.(\d+)\.)?")


def layer_ids(model: Classifier) -> dict[str, int]:
    """Every parameter's layer: 0 for patches, positions and class token, i + 1 for block i, depth + 1 for the rest.

    A hierarchical encoder's blocks (timm's Swin: ``layers.S.blocks.I``) count through its stages, and a stage's
    downsampling belongs to the block before it.
    """
    names = [name for name, _ in model.named_parameters()]
    stages = [len(stage.blocks) for stage in getattr(model.encoder, "layers", ())]
    depth = sum(stages) or len(getattr(model.encoder, "blocks", ()))
    return {name: _layer_id(name, depth, stages) for name in names}


def _layer_id(name: str, depth: int, stages: list[int]) -> int:
    if name.startswith(("encoder.patch_embed.", "encoder.pos_embed", "encoder.cls_token")):
        return 0
    if match := _BLOCK.match(name):
        return int(match[1]) + 1
    if match := _STAGE.match(name):
        before = sum(stages[: int(match[1])])
        return before if match[2] is None else before + int(match[2]) + 1
    return depth + 1


def layer_scale(layer: int, depth: int, decay: float) -> float:
    """What the learning rate of a layer is multiplied by: ``decay ** (depth + 1 - layer)``; 1 for the head."""
    return decay ** (depth + 1 - layer)


def layered_groups(model: Classifier, protocol: FineTuning) -> list[dict[str, Any]]:
    """AdamW's groups, one per (layer, decaying or not), each with its ``lr_scale``."""
    ids = layer_ids(model)
    top = max(ids.values())
    exempt = {"encoder.pos_embed", "encoder.cls_token"}
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        decaying = decays(name, parameter, exempt)
        group = groups.setdefault(
            (ids[name], decaying),
            {
                "params": [],
                "weight_decay": protocol.weight_decay if decaying else 0.0,
                "lr_scale": layer_scale(ids[name], top - 1, protocol.layer_decay),
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def learning_rate(protocol: FineTuning, batch_size: int) -> Scheduled:
    """The head's schedule: linear warm-up from 0, then half a cosine."""
    peak = protocol.base_lr * batch_size / protocol.reference_batch
    return Scheduled(peak, protocol.min_lr, "cosine", warmup=protocol.warmup_share)


def fine_tune(
    encoder: nn.Module,
    classes: int,
    train: Any,
    collate: Any,
    inputs: Callable[[Any], Any],
    *,
    val: Any = None,
    test: Any = None,
    protocol: FineTuning | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    workers: int = 0,
    scored_at_once: int = 512,
    advance: Advance | None = None,
) -> FineTuned:
    """Train a copy of `encoder` as a classifier.

    The order of samples and their augmentation are keyed by seed and epoch, and the head and drop path come from a
    generator of their own, so a run repeats and disturbs nothing.

    Args:
        encoder: see `Classifier`.
        classes: how many.
        train: map-style, taking (index, visit); augments as it likes.
        collate: samples to a batch with ``labels``.
        inputs: what of a batch the encoder takes.
        val: scored at the end.
        test: scored at the end.
        protocol: the hyper-parameters.
        seed: of head, order and drop path.
        device: where to train. On CUDA in bf16 autocast, else in fp32.
        workers: data loading processes.
        scored_at_once: samples per forward pass on val and test; how many fit into memory.
        advance: told after each step how many samples are done.
    """
    protocol, device = protocol or FineTuning(), torch.device(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = Classifier(encoder, classes, protocol.head_std, protocol.drop_path).to(device).train()
        losses = _train(model, train, collate, inputs, protocol, seed, device, workers, advance)
    model.eval()
    score = partial(accuracy, model, collate=collate, inputs=inputs, device=device, workers=workers)
    on_test, on_val = (None if part is None else score(part, at_once=scored_at_once) for part in (test, val))
    return FineTuned(model, on_test, on_val, losses)


def _train(
    model: Classifier,
    train: Any,
    collate: Any,
    inputs: Callable[[Any], Any],
    protocol: FineTuning,
    seed: int,
    device: torch.device,
    workers: int,
    advance: Advance | None,
) -> list[float]:
    size = min(protocol.batch_size, len(train))
    steps = len(train) // size
    schedule, total = learning_rate(protocol, size), steps * protocol.epochs
    optimizer = torch.optim.AdamW(layered_groups(model, protocol), lr=0.0, betas=protocol.betas)
    order = list(_order(seed, len(train), size, protocol.epochs))
    losses = torch.zeros(total, device=device)
    for step, batch in enumerate(batches(train, order, collate, workers, pin=device.type == "cuda")):
        batch = to_device(batch, device)
        for group in optimizer.param_groups:
            group["lr"] = schedule(Clock(step, total)) * group["lr_scale"]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(inputs(batch))
        loss = F.cross_entropy(logits.float(), batch.labels, label_smoothing=protocol.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses[step] = loss.detach()
        if advance is not None:
            advance(size)
    return losses.view(protocol.epochs, steps).mean(1).tolist()


def _order(seed: int, samples: int, batch_size: int, epochs: int) -> Iterator[list[tuple[int, int]]]:
    """Lists of (index, epoch); the last, incomplete batch of an epoch is dropped."""
    for epoch in range(epochs):
        order = epoch_order(seed, epoch, samples).tolist()
        for start in range(0, samples - batch_size + 1, batch_size):
            yield [(index, epoch) for index in order[start : start + batch_size]]


@torch.inference_mode()
def accuracy(
    model: nn.Module,
    dataset: Any,
    collate: Any,
    inputs: Callable[[Any], Any],
    device: torch.device | str = "cpu",
    workers: int = 0,
    at_once: int = 512,
) -> float:
    """The share of a split that a classifier in eval mode gets right, in [0, 1]; unreadable samples do not count."""
    right, count = 0, 0
    for batch, chunk in epoch_batches(dataset, collate, at_once, workers):
        wrong = stand_ins(batch, dataset, chunk)
        hit = model(inputs(to_device(batch, device))).argmax(1).cpu() == batch.labels
        hit = hit if wrong is None else hit[~wrong]
        right, count = right + int(hit.sum()), count + len(hit)
    return right / max(1, count)
