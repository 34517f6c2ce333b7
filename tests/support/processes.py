"""Functions in processes of their own, without the seconds of importing torch each time."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

# Children fork from a server that has imported torch but never used it: fresh processes, which inherit none of the
# locks and threads that forking the test process would copy.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["unmask.core.training.loop", "lightning_fabric", "torch._dynamo", "toy"])


def in_process(target: Callable[..., None], *args: Any) -> int:
    """Run `target` in its own process and return its exit code (negative: the signal that ended it)."""
    return wait(start(target, *args))


def in_ranks(world: int, target: Callable[..., None], *args: Any) -> list[int]:
    """Run `target` in `world` processes that find each other as the ranks of one run; their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [wait(p) for p in [start(_as_rank, rank, world, port, target, *args) for rank in range(world)]]


def _as_rank(rank: int, world: int, port: int, target: Callable[..., None], *args: Any) -> None:
    if world > 1:
        names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": rank, "NODE_RANK": 0}
        os.environ.update({name: str(value) for name, value in {**names, "WORLD_SIZE": world}.items()})
    target(*args)


def start(target: Callable[..., None], *args: Any) -> Any:
    """Begin running `target` in its own process."""
    process = _context.Process(target=target, args=args)
    process.start()
    return process


def pipe() -> tuple[Any, Any]:
    """Two ends, one to keep and one to give to a process."""
    return _context.Pipe()


def wait(process: Any) -> int:
    """The exit code of a process, once it has ended."""
    process.join(120)
    assert process.exitcode is not None, "the process hangs"
    return int(process.exitcode)
