"""What a training step costs, learnt from one sample and as few more as fit in a few seconds."""

from __future__ import annotations

import resource
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from unmask.core.method import Clock, Output, map_tensors, to_device
from unmask.core.randomness import Key
from unmask.core.training.groups import make_optimizer
from unmask.core.training.position import Collate
from unmask.core.training.recipe import Recipe

_ROOM = 1 << 30  # bytes that trying may take on a CPU; on a GPU it is half of what is free


@dataclass(frozen=True)
class Line:
    """A cost that grows with the number of samples: seconds or bytes.

    Args:
        fixed: of a step without samples.
        slope: of each sample.
    """

    fixed: float
    slope: float

    def at(self, samples: float) -> float:
        """The cost of a number of samples."""
        return self.fixed + self.slope * samples

    @staticmethod
    def through(points: Sequence[tuple[int, float]]) -> Line:
        """Through the two largest of (samples, cost), or the only one and 0; never falling, nor beginning below 0."""
        (n, cost), *smaller = sorted(points, reverse=True)
        slope = (cost - smaller[0][1]) / (n - smaller[0][0]) if smaller else cost / n
        slope = min(max(slope, 0.0), cost / n)
        return Line(cost - slope * n, slope)


@dataclass(frozen=True)
class OptimizerCost:
    """What an optimizer takes, and the weights that it moves.

    Args:
        seconds: of a step.
        weights: bytes, buffers included.
        gradients: bytes.
        state: bytes.
        beside: bytes that a step takes beside these.
    """

    seconds: float
    weights: int
    gradients: int
    state: int
    beside: int

    @property
    def held(self) -> int:
        """Bytes that stay from step to step."""
        return self.weights + self.gradients + self.state


@dataclass(frozen=True)
class StepCost:
    """What training steps take on one device.

    Args:
        seconds: of a forward and backward pass, by samples.
        optimizer: once a step.
        loading: seconds to load one sample.
        bytes: that a forward and backward pass takes at its peak, the batch included, by samples.
        base_bytes: of the process itself; 0 where the device has memory of its own.
        batch_bytes: of one sample in a batch, and its plan.
        flops: of one sample, forward and backward.
        plan: of the largest batch that was tried.
        terms: of the loss.
    """

    seconds: Line
    optimizer: OptimizerCost
    loading: float
    bytes: Line
    base_bytes: int
    batch_bytes: int
    flops: float
    plan: Any
    terms: int

    def memory(self, micro_batch: int, micro_batches: int, world: int) -> int:
        """Bytes at the peak of a step, per device.

        Args:
            micro_batch: samples in a pass.
            micro_batches: passes in a step; where the loss has several terms, their batches are held together.
            world: devices; several keep the gradients a second time, to send them.
        """
        waiting = (micro_batches - 1) * micro_batch * self.batch_bytes if self.terms > 1 else 0
        buckets = self.optimizer.gradients if world > 1 else 0
        beside = max(self.bytes.at(micro_batch) + waiting, self.optimizer.beside)
        return round(self.base_bytes + self.optimizer.held + buckets + beside)


class LiveBytes(TorchDispatchMode):
    """While entered, follows the memory of the tensors that operations make on the CPU.

    What an operation needs inside is not seen, nor are tensors made before.

    Attributes:
        now: bytes alive.
        peak: the most that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the storages of an operation's results."""
        before = {id(s) for s in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if id(storage) not in before and id(storage) not in self._known:
                self._known.add(id(storage))
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _storages(value: Any) -> list[Any]:
    return [leaf.untyped_storage() for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def peak_bytes(device: torch.device, work: Callable[[], Any]) -> tuple[int, Any]:
    """The bytes that `work` takes at its peak beyond those in use before it, and what it returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, result
    with LiveBytes() as live:
        result = work()
    return live.peak, result


def process_bytes() -> int:
    """The memory of this process now; where the system does not say that, the most it has had."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in a nested value."""
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    map_tensors(value, note)
    return sum(sizes)


class Trial:
    """Steps of a method on a few samples, without a run. Its weights change.

    Args:
        fabric: Lightning Fabric, for one device.
        method: on the device.
        recipe: whose optimizer and seed are used.
        train_set: see `unmask.core.training.loop.fit`.
        collate: samples to a batch.
    """

    def __init__(self, fabric: Any, method: nn.Module, recipe: Recipe, train_set: Any, collate: Collate) -> None:
        self.fabric, self.recipe, self.train_set, self.collate = fabric, recipe, train_set, collate
        self.method: Any = method
        self.samples: list[Any] = []
        self.loading: list[float] = []
        self.seconds: list[tuple[int, float]] = []
        self.bytes: list[tuple[int, float]] = []
        for parameter in method.parameters():  # there at the peak, so that a pass takes what it adds to them
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    def run(self, indices: Sequence[int], most: int, budget: float) -> StepCost:
        """Try 1 sample, then 2, 4 and so on up to `most`, as long as the next size fits in `budget` seconds.

        Args:
            indices: of the samples to try, in order.
            most: samples in a micro-batch.
            budget: seconds.

        Raises:
            Exception: what the method says to one sample and to two.
        """
        most, end = min(most, len(indices)), time.perf_counter() + budget
        try:
            self._try(indices[:1])
        except (ValueError, RuntimeError):  # a norm over the batch may need two
            if most < 2:
                raise
            self._try(indices[:2])
        optimizer = self._optimizer()
        base = max(0, process_bytes() - optimizer.held) if self.fabric.device.type == "cpu" else 0
        while self._next_fits(most, end):
            self._try(indices[: 2 * len(self.samples)])
        return StepCost(
            seconds=Line.through(self.seconds),
            optimizer=optimizer,
            loading=_mean(self.loading[1:] or self.loading),  # without the first, which opens files and imports
            bytes=Line.through(self.bytes),
            base_bytes=base,
            batch_bytes=self.batch_bytes // len(self.samples),
            flops=self.flops / len(self.samples),
            plan=self.plan,
            terms=self.terms,
        )

    def _next_fits(self, most: int, end: float) -> bool:
        size, room = 2 * len(self.samples), _ROOM
        if self.fabric.device.type == "cuda":
            room = torch.cuda.mem_get_info(self.fabric.device)[0] // 2
        # Twice the samples in two passes, of which the one that is followed takes half as long again.
        return size <= most and 2 * self.bytes[-1][1] < room and time.perf_counter() + 5 * self.seconds[-1][1] < end

    def _try(self, indices: Sequence[int]) -> None:
        """A pass to learn the bytes and FLOPs of, which warms up as well, and one to time."""
        self._load(indices[len(self.samples) :])
        batch = to_device(self.collate(self.samples), self.fabric.device)
        key = Key.of(self.recipe.seed, batch.ids, 0).stream("plan")
        with torch.no_grad():
            self.plan = self.method.draw(batch, Clock(), key)
        with FlopCounterMode(display=False) as counter:
            beside, self.terms = peak_bytes(self.fabric.device, lambda: self._pass(batch))
        self.flops = counter.get_total_flops()
        self.batch_bytes = tensor_bytes(batch) + tensor_bytes(self.plan)
        self.bytes.append((len(indices), beside + 2 * self.batch_bytes))  # as samples and as a batch
        self.seconds.append((len(indices), self._timed(lambda: self._pass(batch))))

    def _load(self, indices: Sequence[int]) -> None:
        for index in indices:
            began = time.perf_counter()
            self.samples.append(self.train_set[index, 0])
            self.loading.append(time.perf_counter() - began)

    def _pass(self, batch: Any) -> int:
        """A forward and backward pass; how many terms the loss has."""
        with self.fabric.autocast():
            output: Output = self.method(batch, self.plan)
        output.loss.backward()
        return len(output.terms)

    def _optimizer(self) -> OptimizerCost:
        optimizer = make_optimizer(self.method, self.recipe.optimizer)
        optimizer.step()  # makes the state
        seconds = self._timed(optimizer.step)
        beside, _ = peak_bytes(self.fabric.device, optimizer.step)
        weights = tensor_bytes([*self.method.parameters(), *self.method.buffers()])
        gradients = tensor_bytes([p.grad for p in self.method.parameters() if p.grad is not None])
        return OptimizerCost(seconds, weights, gradients, tensor_bytes(list(optimizer.state.values())), beside)

    def _timed(self, work: Callable[[], Any]) -> float:
        self._wait()
        began = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.fabric.device.type == "cuda":
            torch.cuda.synchronize(self.fabric.device)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
