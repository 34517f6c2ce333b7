"""The parts of a run, made from its recipe: the engine, the data and the method."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unmask.core import registry
from unmask.core.errors import UnmaskError
from unmask.core.training.checkpoint import Say
from unmask.core.training.position import Collate
from unmask.core.training.recipe import Recipe, RecipeError, cross_checks
from unmask.core.training.startup import shorten


def make_fabric(
    recipe: Recipe,
    out: str | Path,
    *,
    devices: int = 1,
    nodes: int = 1,
    strategy: str = "auto",
    accelerator: str = "auto",
    loggers: Sequence[str] = (),
    check: bool = True,
) -> Any:
    """Lightning Fabric for a recipe, launched: with several devices this process starts the others.

    With `check` the batch size has to suit the number of processes.

    Raises:
        UnmaskError: a strategy or a number of devices that is not to be had here.
    """
    from lightning_fabric import Fabric

    if strategy not in ("auto", "ddp"):
        raise UnmaskError(f"--strategy {strategy}: unknown; choose auto or ddp (every device holds the whole model)")
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning_fabric", message=".*srun.*")
    try:
        fabric = Fabric(
            accelerator=accelerator,
            devices=devices,
            num_nodes=nodes,
            strategy=strategy,
            precision=resolve_precision(recipe.training.precision, accelerator),
            loggers=[make_logger(name, Path(out), recipe) for name in loggers],
        )
    except (RuntimeError, ValueError) as error:
        raise UnmaskError(f"--devices {devices}: {' '.join(str(error).split())}") from error
    fabric.launch()
    if recipe.training.threads:
        torch.set_num_threads(recipe.training.threads)
    problems = cross_checks(recipe, fabric.world_size)
    if problems and check:
        raise RecipeError("recipe", problems)
    return fabric


def resolve_precision(precision: str, accelerator: str = "auto") -> Any:
    """``auto`` as what it stands for: bf16 on a CUDA GPU, fp32 elsewhere."""
    if precision != "auto":
        return precision
    return "bf16-mixed" if accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available() else "32-true"


def make_deterministic() -> None:
    """Have torch use deterministic kernels only, and raise where there is none. Before the first use of a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def make_logger(name: str, out: Path, recipe: Recipe) -> Any:
    """A Fabric logger that writes beside metrics.jsonl."""
    if name == "tensorboard":
        try:
            import tensorboard  # noqa: F401
        except ImportError:
            raise UnmaskError("TensorBoard is not installed: pip install 'unmask-core[tensorboard]'") from None
        from lightning_fabric.loggers import TensorBoardLogger

        return TensorBoardLogger(root_dir=out, name="tensorboard", version="")
    if name == "wandb":
        from unmask.core.training.wandb_logger import make_wandb_logger

        return make_wandb_logger(out, recipe)
    raise UnmaskError(f"--log {name}: unknown; choose tensorboard or wandb")


def open_data(recipe: Recipe, say: Say = print) -> tuple[Recipe, Any, Any | None, Collate]:
    """The recipe with its data settings filled in, the training and validation splits, and how to batch them.

    Data without a validation split train all the same, and samples that cannot be used are left out; `say` is told, as
    it is of what a training split with a ``summary(batch_size)`` has to say of itself.
    """
    part = registry.load_part(recipe.method, "data")
    recipe = replace(recipe, data=part.resolve(recipe.data))
    train_set = part.open_split(recipe.data, "train", seed=recipe.seed, augment=True)
    left_out = [": ".join(problem) for problem in getattr(train_set, "problems", ())]
    if left_out:
        say(f"samples that are left out ({len(left_out)}): {shorten(left_out, 3)}")
    if hasattr(train_set, "summary"):
        say(f"to train on: {train_set.summary(recipe.training.batch_size)}")
    try:
        val_set = part.open_split(recipe.data, "val", seed=recipe.seed, augment=False)
    except UnmaskError as error:
        say(f"no validation loss: {error}")
        val_set = None
    return recipe, train_set, val_set, part.collate


def build(recipe: Recipe) -> nn.Module:
    """The recipe's method with its initial weights: those of `init`, or random ones that the seed decides."""
    torch.manual_seed(recipe.seed)
    try:
        method = registry.load(recipe.method).build(recipe.model, recipe.data)
    except ValueError as error:
        raise UnmaskError(f"model: {error}") from error
    if recipe.init is not None:
        registry.load_part(recipe.method, "pretrained").load_initial_weights(method, recipe.init)
    return method
