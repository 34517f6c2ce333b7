"""How many processes a run has: asked for by flags, or already started by torchrun or by Slurm's srun."""

from __future__ import annotations

import os
from dataclasses import dataclass

from unmask.core.errors import UnmaskError


@dataclass(frozen=True)
class Started:
    """Processes that were there before the program, of which this is one.

    Args:
        by: the program that started them.
        devices: processes on each machine.
        nodes: machines.
        remedy: what starts `devices` and `nodes` of other numbers; a template.
    """

    by: str
    devices: int
    nodes: int
    remedy: str


def started() -> Started | None:
    """What torchrun or srun started, or None where this process stands alone or starts the others itself.

    Raises:
        UnmaskError: machines with different numbers of processes.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local = _number("LOCAL_WORLD_SIZE")
        return _even("torchrun", _number("WORLD_SIZE"), local, "torchrun --nnodes {nodes} --nproc-per-node {devices}")
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")  # srun has not been used, says Fabric
    if "SLURM_NTASKS" in os.environ and "SLURM_PROCID" in os.environ and not interactive:
        tasks, nodes = _number("SLURM_NTASKS"), _number("SLURM_NNODES", _number("SLURM_JOB_NUM_NODES", 1))
        return _even("srun", tasks, -(-tasks // nodes), "srun --nodes {nodes} --ntasks-per-node {devices}")
    return None


def _number(name: str, default: int = 1) -> int:
    return int(os.environ.get(name, default))


def _even(by: str, world: int, devices: int, remedy: str) -> Started:
    if world % devices:
        raise UnmaskError(
            f"{by} started {world} processes, not the same number on every machine. Start {devices} on each"
        )
    return Started(by, devices, world // devices, remedy)


def processes(devices: int | None, nodes: int | None) -> tuple[int, int]:
    """Processes on each machine, and machines: as asked for, else as started, else one.

    Raises:
        UnmaskError: a flag contradicts what was started.
    """
    found = started()
    if found is None:
        return devices or 1, nodes or 1
    wrong = [
        f"--{flag} {asked}"
        for flag, asked, there in (("devices", devices, found.devices), ("nodes", nodes, found.nodes))
        if asked is not None and asked != there
    ]
    if wrong:
        other = found.remedy.format(devices=devices or found.devices, nodes=nodes or found.nodes)
        raise UnmaskError(
            f"{' '.join(wrong)}: {found.by} has started {found.devices} process(es) on each of {found.nodes} "
            f"machine(s). Leave out --devices and --nodes, or start with: {other}"
        )
    return found.devices, found.nodes


def rank() -> int:
    """This process's number among those of the run: known from the environment, before torch is imported."""
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK") if started() else ("RANK", "LOCAL_RANK")
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)
