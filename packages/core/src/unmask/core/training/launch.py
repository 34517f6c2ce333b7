"""The parts of a run, made from its recipe: the engine, the data and the method."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unmask.core import registry
from unmask.core.errors import UnmaskError
from unmask.core.method import Clock
from unmask.core.networks import Network
from unmask.core.randomness import Key
from unmask.core.training.build import make_method, open_networks
from unmask.core.training.checkpoint import Say
from unmask.core.training.gradients import evaluating
from unmask.core.training.initial import load_initial, say_on_stderr
from unmask.core.training.position import Collate
from unmask.core.training.recipe import Recipe, RecipeError, cross_checks
from unmask.core.training.startup import shorten
from unmask.core.training.world import processes


def make_fabric(
    recipe: Recipe,
    out: str | Path,
    *,
    devices: int | None = None,
    nodes: int | None = None,
    strategy: str = "auto",
    accelerator: str = "auto",
    loggers: Sequence[str] = (),
    check: bool = True,
) -> Any:
    """Lightning Fabric for a recipe, launched: with several devices this process starts the others.

    Processes that torchrun or srun started are taken as they are: `devices` and `nodes` may be left out then. With
    `check` the numbers have to suit those processes, and the batch size has to suit the numbers; without, those
    processes are left alone.

    Raises:
        UnmaskError: a strategy or a number of devices that is not to be had here.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import LightningEnvironment

    if strategy not in ("auto", "ddp"):
        raise UnmaskError(f"--strategy {strategy}: unknown; choose auto or ddp (every device holds the whole model)")
    devices, nodes = processes(devices, nodes) if check else (devices or 1, nodes or 1)
    if "SLURM_NTASKS" in os.environ:
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(devices))  # Fabric refuses tasks that were only counted
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning_fabric", message=".*srun.*")
    try:
        fabric = Fabric(
            accelerator=accelerator,
            devices=devices,
            num_nodes=nodes,
            strategy=strategy,
            precision=resolve_precision(recipe.training.precision, accelerator),
            plugins=None if check else [LightningEnvironment()],
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


def on_rank_zero(fabric: Any, look: Callable[[], Any]) -> None:
    """Have the first process look at something, and every process hear what is wrong with it.

    Raises:
        UnmaskError: in all processes, what `look` raised in the first.
    """
    problem = None
    if fabric.is_global_zero:
        try:
            look()
        except UnmaskError as error:
            problem = str(error)
    problem = fabric.broadcast(problem)
    if problem is not None:
        raise UnmaskError(problem)


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

    Data without a validation split train all the same, and samples that cannot be used are left out; `say` is told,
    as it is what the training split has to say of itself (its optional ``notes(batch_size)``).
    """
    part = registry.data_kind(recipe.method)
    if hasattr(part, "for_networks"):
        recipe = replace(recipe, data=part.for_networks(recipe.data, {n: s.source for n, s in recipe.networks.items()}))
    recipe = replace(recipe, data=part.resolve(recipe.data))
    train_set = part.open_split(recipe.data, "train", seed=recipe.seed, augment=True)
    left_out = [": ".join(problem) for problem in getattr(train_set, "problems", ())]
    if left_out:
        say(f"samples that are left out ({len(left_out)}): {shorten(left_out, 3)}")
    if hasattr(train_set, "notes"):
        for note in train_set.notes(recipe.training.batch_size):
            say(note)
    try:
        val_set = part.open_split(recipe.data, "val", seed=recipe.seed, augment=False)
    except UnmaskError as error:
        say(f"no validation loss: {error}")
        val_set = None
    return recipe, train_set, val_set, part.collate


def open_plain(recipe: Recipe) -> Any:
    """The training split without augmentation, of a recipe whose data are resolved."""
    return registry.data_kind(recipe.method).open_split(recipe.data, "train", seed=recipe.seed, augment=False)


def build(recipe: Recipe, networks: Mapping[str, Network] | None = None, say: Say = say_on_stderr) -> nn.Module:
    """The recipe's method with its initial weights: those of `init`, or random ones that the seed decides.

    Args:
        recipe: see `load_recipe`.
        networks: as for `make_method`.
        say: told what was taken from `init`.
    """
    if networks is None and recipe.networks:
        recipe, networks = open_networks(recipe)
    torch.manual_seed(recipe.seed)
    try:
        method = make_method(recipe, networks)
    except ValueError as error:
        raise UnmaskError(f"model: {error}") from error
    if recipe.init is not None:
        load_initial(method, recipe, say)
    return method


def check_draw(method: nn.Module, train_set: Any, collate: Collate, recipe: Recipe) -> None:
    """Have a method plan its first batch, of two samples, before anything is written.

    Raises:
        UnmaskError: it cannot with its settings and these data; says why.
    """
    batch = collate([train_set[index, 0] for index in range(min(2, len(train_set)))])
    key = Key.of(recipe.seed, batch.ids, 0).stream("plan")
    try:
        with evaluating(method):
            method.draw(batch, Clock(), key)  # type: ignore[operator]  # a method has it
    except UnmaskError:
        raise
    except ValueError as error:
        raise UnmaskError(f"model: {error}") from error


def check_stages(recipe: Recipe) -> None:
    """Make the last stage's method with stand-ins for what the earlier ones make, and have it plan a batch.

    Raises:
        UnmaskError: what would stop the last stage, told before hours of the earlier ones.
    """
    recipe = registry.load(recipe.method).planned(recipe)
    recipe, train_set, _, collate = open_data(recipe, lambda text: None)
    check_draw(build(recipe), train_set, collate, recipe)
