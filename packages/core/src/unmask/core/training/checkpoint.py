"""Checkpoints: one safetensors file each, whole or not there, checked when read. No pickle anywhere.

A checkpoint holds the method's state (``model/NAME``), AdamW's (``optimizer/PARAMETER/exp_avg`` ...), each rank's
random generators (``rng/...``) and JSON metadata with a checksum of all of it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from unmask.core import registry
from unmask.core.errors import UnmaskError
from unmask.core.networks import frozen_names
from unmask.core.training.build import make_method
from unmask.core.training.files import write_atomically
from unmask.core.training.groups import parameters_by_name
from unmask.core.training.recipe import Recipe, make_recipe, read_yaml
from unmask.core.training.startup import shorten

Say = Callable[[str], Any]


class CheckpointError(UnmaskError):
    """A checkpoint that is damaged, missing or made by something else."""


@dataclass(frozen=True)
class Checkpoint:
    """A file's content.

    Args:
        path: the file.
        tensors: all tensors by their name in the file.
        meta: step, method, recipe digest and so on.
    """

    path: Path
    tensors: dict[str, Tensor]
    meta: dict[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with ``prefix/``, without it."""
        return {k.removeprefix(f"{prefix}/"): v for k, v in self.tensors.items() if k.startswith(f"{prefix}/")}


def write(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors and metadata as one safetensors file, atomically.

    Raises:
        UnmaskError: full disk or no permission; an earlier file of that name is untouched.
    """
    ready = _storable(tensors)
    text = json.dumps(dict(meta), sort_keys=True)
    header = {"unmask": text, "crc32": f"{_checksum(ready, text):08x}"}
    write_atomically(path, lambda temporary: save_file(ready, temporary, metadata=header))


def read(path: Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Read a file that `write` made.

    Raises:
        CheckpointError: truncated, altered, or not one of ours.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or not a checkpoint ({error})") from None
    if "unmask" not in header:
        raise CheckpointError(f"{path} was not written by unmask: its metadata is missing")
    if header.get("crc32") != f"{_checksum(tensors, header['unmask']):08x}":
        raise CheckpointError(f"{path} is damaged: its content does not match its checksum")
    return Checkpoint(path, {k: v.to(device) for k, v in tensors.items()}, json.loads(header["unmask"]))


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous and none sharing memory with another, which the format forbids."""
    ready: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous()
        place = flat.untyped_storage().data_ptr()
        ready[name] = flat.clone() if place in seen else flat
        seen.add(place)
    return ready


def _checksum(tensors: Mapping[str, Tensor], text: str) -> int:
    value = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return value


def path_of(folder: Path, step: int) -> Path:
    """The file of a step in a ``checkpoints`` folder."""
    return folder / f"step-{step:08d}.safetensors"


def newest(folder: Path, say: Say = print) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None where there is none; damaged ones are named through `say`.

    Raises:
        CheckpointError: there are checkpoints and all of them are damaged.
    """
    paths = sorted(folder.glob("step-*.safetensors"), reverse=True)
    for path in paths:
        try:
            found = read(path)
        except CheckpointError as error:
            say(f"{error}; going back to the one before")
        else:
            return found
    if paths:
        raise CheckpointError(f"every checkpoint in {folder} is damaged; start again in another --out")
    return None


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what an interrupted write left behind."""
    for path in sorted(folder.glob("step-*.safetensors"))[:-keep]:
        path.unlink(missing_ok=True)
    for path in folder.glob(".step-*.tmp"):
        path.unlink(missing_ok=True)


def set_aside(folder: Path, step: int) -> None:
    """Rename checkpoints beyond `step`: `newest` found them damaged, and they must not count as kept ones."""
    for path in folder.glob("step-*.safetensors"):
        if int(path.stem.removeprefix("step-")) > step:
            path.rename(path.with_suffix(".damaged"))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by ``PARAMETER/KEY``."""
    return {
        f"{name}/{key}": value
        for name, parameter in parameters_by_name(optimizer).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took, by parameter name."""
    state: dict[int, dict[str, Tensor]] = {}
    number = {name: i for i, name in enumerate(parameters_by_name(optimizer))}
    for full, value in tensors.items():
        name, _, key = full.rpartition("/")
        state.setdefault(number[name], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def saved_state(method: nn.Module) -> dict[str, Tensor]:
    """A method's state dict without networks from elsewhere, as far as these are frozen: they are opened again."""
    frozen = frozen_names(method)
    return {name: tensor for name, tensor in method.state_dict().items() if name not in frozen}


def training_state(method: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What training goes on from, the generators apart: ``model/...`` and ``optimizer/...``."""
    model = {f"model/{k}": v for k, v in saved_state(method).items()}
    return model | {f"optimizer/{k}": v for k, v in optimizer_tensors(optimizer).items()}


def generators(fabric: Any) -> dict[str, Tensor]:
    """Every rank's ordinary generators, as ``rng/RANK/cpu`` and ``rng/RANK/cuda``. Called on all ranks."""
    states = {"cpu": torch.get_rng_state()}
    if fabric.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(fabric.device)
    world = fabric.world_size
    gathered = {k: fabric.all_gather(v.to(fabric.device)).reshape(world, -1) for k, v in states.items()}
    return {f"rng/{rank}/{k}": v[rank] for k, v in gathered.items() for rank in range(world)}


def set_generators(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put one rank's generators back."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def load_model(method: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy a state, as `saved_state` gives it, into a method.

    Raises:
        CheckpointError: the state is another model's; names the parameters that differ.
    """
    own = saved_state(method)
    differing = {
        "missing in the file": [k for k in own if k not in tensors],
        "only in the file": [k for k in tensors if k not in own],
        "of another shape": [
            f"{k} {tuple(tensors[k].shape)} for {tuple(own[k].shape)}"
            for k in own
            if k in tensors and tensors[k].shape != own[k].shape
        ],
    }
    found = [f"{what}: {shorten(names, 4)}" for what, names in differing.items() if names]
    if found:
        raise CheckpointError(
            f"{source} holds another model than this recipe builds ({'; '.join(found)}). "
            "Use the recipe it was trained with, or make the model settings agree"
        )
    method.load_state_dict(dict(tensors), strict=False)  # strict about all that is saved, which was checked above


@dataclass(frozen=True)
class LoadedRun:
    """A trained method.

    Args:
        method: in eval mode, on the device asked for.
        recipe: the run's resolved recipe.
        step: optimizer steps its weights have had.
    """

    method: nn.Module
    recipe: Recipe
    step: int


def load_run(run_dir: str | Path, device: str | torch.device = "cpu", say: Say = print) -> LoadedRun:
    """The method of a run directory: its final weights, or the newest whole checkpoint of a run that is under way.

    Raises:
        UnmaskError: not a run directory, or nothing in it to load.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "recipe.yaml").is_file():
        raise UnmaskError(f"{run_dir} is not a run: it has no recipe.yaml. Give the folder that --out named")
    path = run_dir / "recipe.yaml"
    recipe = make_recipe(read_yaml(path), source=str(path), try_build=False)  # it is built for real just below
    if recipe.finetune is not None:
        raise UnmaskError(
            f"{run_dir} is a fine-tuned classifier, not a pre-trained run; use it with: unmask predict {run_dir} "
            "FOLDER --out predictions.parquet"
        )
    state, step = weights_of(run_dir, say)
    method = make_method(recipe)
    load_model(method, state, str(run_dir))
    kept = getattr(registry.data_kind(recipe.method), "kept", None)
    if kept is not None:
        recipe = replace(recipe, data=kept(recipe.data, run_dir))
    return LoadedRun(method.to(device).eval(), recipe, step)


def weights_of(run_dir: Path, say: Say = print) -> tuple[dict[str, Tensor], int]:
    """The state of a run's method and the step it is of.

    Raises:
        CheckpointError: there is none that can be read.
    """
    if (run_dir / "model.safetensors").is_file():
        final = read(run_dir / "model.safetensors")
        return final.tensors, int(final.meta.get("step", 0))
    saved = newest(run_dir / "checkpoints", say)
    if saved is None:
        raise CheckpointError(f"{run_dir} has no weights yet; train on with: unmask train --resume {run_dir}")
    return saved.part("model"), int(saved.meta["step"])
