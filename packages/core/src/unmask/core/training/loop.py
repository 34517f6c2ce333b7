"""The training loop: explicit, on Lightning Fabric, and the same however often it is killed and resumed.

`train` makes the parts of a run from its recipe; `fit` trains parts that are already made; `Loop` is the loop.
A step is: set the learning rate, accumulate exact gradients over micro-batches and ranks, clip, step; and on the steps
where they are due write metrics, validate and save, in that order, so that a checkpoint never counts on a line that is
not written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unmask.core import registry
from unmask.core.errors import UnmaskError
from unmask.core.mask import Mask
from unmask.core.method import Clock, to_device
from unmask.core.randomness import Key
from unmask.core.training import checkpoint
from unmask.core.training.gradients import Call, Gradients, LossModule, Sums
from unmask.core.training.groups import make_optimizer
from unmask.core.training.launch import (
    build,
    check_draw,
    check_stages,
    make_deterministic,
    make_fabric,
    on_rank_zero,
    open_data,
)
from unmask.core.training.monitor import Display, Meter, count_flops, peak_flops
from unmask.core.training.numbers import FiniteWatch, hidden_share, validation_loss
from unmask.core.training.position import Collate, Position, batches, data_digest, loading_errors, validation_sampler
from unmask.core.training.recipe import Recipe, as_dict, micro_batch
from unmask.core.training.rundir import RunDirectory
from unmask.core.training.schedules import LearningRate, run_length
from unmask.core.training.signals import Interrupted, StopSignals, stopping_at_once
from unmask.core.training.startup import GradientCheck, check_groups, shorten


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    extend: bool = False,
    devices: int | None = None,
    nodes: int | None = None,
    strategy: str = "auto",
    deterministic: bool = False,
    progress: bool = True,
    loggers: Sequence[str] = (),
) -> Path:
    """Train what a recipe describes, into the run directory `out`.

    Args:
        recipe: see `load_recipe`.
        out: the run directory; without a run in it, unless `resume`.
        resume: go on from the newest whole checkpoint in `out`.
        extend: let a resumed run have another length than it was started with.
        devices: processes on this machine: one per GPU, or CPU processes where there is none. None: as many as torchrun
            or srun started, else 1.
        nodes: machines; likewise.
        strategy: ``auto`` or ``ddp``.
        deterministic: use only deterministic kernels, so that a GPU run repeats and resumes bit for bit.
        progress: show a bar or lines on stderr.
        loggers: ``tensorboard`` and ``wandb``, beside metrics.jsonl.

    Returns:
        The run directory.

    Raises:
        UnmaskError: something the user can put right.
        Interrupted: SIGTERM or Ctrl-C, after saving.
    """
    if deterministic:
        make_deterministic()
    fabric = make_fabric(recipe, out, devices=devices, nodes=nodes, strategy=strategy, loggers=loggers)
    run = RunDirectory(out)
    on_rank_zero(fabric, lambda: run.check_place(resume=resume))
    launch = Launch(fabric, run.path, extend, progress)
    with run.starting(resume=resume, first=fabric.is_global_zero):
        if recipe.stages is not None:
            recipe = _prepare(recipe, run, launch, resume=resume)
        launch.train(recipe, run.path, resume=resume or recipe.stages is not None)
    finish = getattr(registry.load(recipe.method), "finish", None)
    if recipe.stages is not None and finish is not None:
        finish(recipe, run.path, launch)
    return run.path


@dataclass(frozen=True)
class Launch:
    """How a run was started: what it and its earlier stages are trained with.

    Args:
        fabric: Lightning Fabric, launched.
        run: the run directory.
        extend: as for `train`.
        progress: as for `train`.
    """

    fabric: Any
    run: Path
    extend: bool
    progress: bool

    def say(self, text: str) -> None:
        """A line for the person who waits."""
        Display(0, self.progress and self.fabric.is_global_zero).say(text)

    def train(self, recipe: Recipe, out: Path, *, resume: bool | None = None) -> Path:
        """Train one stage's recipe into `out`, going on where an earlier attempt stopped (None: if there was one)."""
        run = RunDirectory(out, whole=self.run)
        resume = run.recipe.is_file() if resume is None else resume
        with self.fabric.rank_zero_first():
            recipe, train_set, val_set, collate = open_data(recipe, self.say)
        # A checkpoint overwrites what `init` would load, which may have moved since.
        resuming = resume and any(run.checkpoints.glob("step-*.safetensors"))
        method = build(replace(recipe, init=None) if resuming else recipe)
        if not resuming:
            check_draw(method, train_set, collate, recipe)
        options = {"fabric": self.fabric, "resume": resume, "extend": self.extend, "progress": self.progress}
        return fit(method, train_set, val_set, collate, recipe, out, whole=self.run, **options)


def _prepare(recipe: Recipe, run: RunDirectory, launch: Launch, *, resume: bool) -> Recipe:
    """Do a method's earlier stages, each once, and give the recipe of the last one.

    The method's module has ``prepare(recipe, folder, launch) -> Recipe`` beside ``Stages``. The recipe is written
    first, so that a run which is killed in an early stage can be resumed.
    """
    if resume:
        run.check_same(recipe, None, extend=launch.extend)
    else:
        check_stages(recipe)
    launch.fabric.barrier()  # every rank has looked before rank zero writes
    if launch.fabric.is_global_zero and not resume:
        run.announce(recipe, {"device": str(launch.fabric.device), "processes": launch.fabric.world_size})
    with stopping_at_once(f"stopped; the stages that are done stay. Go on with: {run.resume_command}"):
        return registry.load(recipe.method).prepare(recipe, run.path / "stages", launch)


def fit(
    method: nn.Module,
    train_set: Any,
    val_set: Any | None,
    collate: Collate,
    recipe: Recipe,
    out: str | Path,
    *,
    fabric: Any = None,
    resume: bool = False,
    extend: bool = False,
    progress: bool = True,
    whole: Path | None = None,
) -> Path:
    """Train a method on data sets that are already made; otherwise as `train`.

    Args:
        method: see `unmask.core.method`; its weights are the initial ones.
        train_set: map-style, taking (index, visit); with ``ids`` and ``name_of(id)``.
        val_set: likewise; None or empty for no validation.
        collate: samples to a batch.
        recipe: its `optimizer`, `schedule`, `training` and `seed` are used; all of it is recorded.
        out: the run directory.
        fabric: from `make_fabric`, where the run needs more than one device.
        resume: as for `train`.
        extend: as for `train`.
        progress: as for `train`.
        whole: the run directory that `out` is an earlier stage of.
    """
    fabric = fabric or make_fabric(recipe, out)
    total = run_length(recipe, len(train_set))
    run = RunDirectory(out, whole)
    on_rank_zero(fabric, lambda: run.check_place(resume=resume))
    display = Display(total, progress and fabric.is_global_zero)
    saved = checkpoint.newest(run.checkpoints, display.say) if resume else None
    if resume:
        run.check_same(recipe, saved.meta["recipe"] if saved else None, extend=extend)
    fabric.barrier()  # every rank has looked before rank zero writes
    loop = Loop(fabric, method, train_set, val_set, collate, recipe, run, display, total)
    with StopSignals() as stop, run.starting(resume=resume, first=fabric.is_global_zero):
        try:
            loop.begin(saved)
            saved = None  # the loop has copied it; it is as large as model and optimizer together
            with loading_errors(run.resume_command):
                loop.run(stop)
        finally:
            display.stop()
    return run.path


class Loop:
    """A run's state and steps. `fit` makes it, calls `begin` and then `run`."""

    def __init__(
        self,
        fabric: Any,
        method: nn.Module,
        train_set: Any,
        val_set: Any | None,
        collate: Collate,
        recipe: Recipe,
        run_dir: RunDirectory,
        display: Display,
        total: int,
    ) -> None:
        self.fabric, self.recipe, self.run_dir, self.display, self.total = fabric, recipe, run_dir, display, total
        self.train_set, self.val_set, self.collate = train_set, val_set, collate
        self.method: Any = method.to(fabric.device)
        self.optimizer = make_optimizer(self.method, recipe.optimizer)
        check_groups(self.method, self.optimizer)
        self.learning_rate = LearningRate.of(recipe)
        self.step = 0
        self.meter = Meter()
        self.masks: list[Mask | None] = []  # of the step under way
        self.norm: Tensor | None = None  # of the last step's gradients, once it is known

    def begin(self, saved: checkpoint.Checkpoint | None) -> None:
        """Take up a checkpoint, or begin at step 0, and write the run directory's first files."""
        if saved is not None:
            self._restore(saved)
        t, world = self.recipe.training, self.fabric.world_size
        micro, rank = micro_batch(self.recipe, world), self.fabric.global_rank
        samples = len(self.train_set)
        lengths = getattr(self.train_set, "lengths", None)
        self.position = Position(
            self.recipe.seed, samples, t.batch_size, micro, self.total, self.step, rank, world, lengths
        )
        self.watch = FiniteWatch(self.fabric, self.position, self.train_set, self.run_dir.checkpoints)
        if self.fabric.is_global_zero:
            if saved is not None:
                checkpoint.set_aside(self.run_dir.checkpoints, self.step)
            facts = {"device": str(self.fabric.device), "processes": world, "total_steps": self.total}
            self.run_dir.begin(self.recipe, self.step, facts, unfinished=self.step < self.total)
        self._measure_flops()
        if t.compile:
            self.method.compile()
        module, self.stepper = self.fabric.setup(LossModule(self.method), self.optimizer)
        self.gradients = Gradients(self.fabric, module, self.position.micro_batches)
        self.gradient_check = GradientCheck(self.method, 1 if world > 1 else 2)  # DDP itself fails at the second step
        self._seed(saved)

    def _restore(self, saved: checkpoint.Checkpoint) -> None:
        self.step = int(saved.meta["step"])
        if saved.meta["data"] != data_digest(self.train_set):
            raise UnmaskError(
                f"the training samples are not those {self.run_dir.path} was started with ({saved.meta['data_size']} "
                f"then, {len(self.train_set)} now, or other ones). Put them back to resume, or start a new run"
            )
        if self.step > self.total:
            raise UnmaskError(f"{saved.path} is at step {self.step}, beyond the {self.total} steps asked for")
        checkpoint.load_model(self.method, saved.part("model"), str(saved.path))
        checkpoint.load_optimizer(self.optimizer, saved.part("optimizer"))
        if saved.meta["processes"] != self.fabric.world_size:
            self.display.say(
                f"saved by {saved.meta['processes']} processes, going on with {self.fabric.world_size}: "
                "the same training to rounding error, not bit for bit"
            )
        self.display.say(f"going on from {saved.path} at step {self.step} of {self.total}")

    def _seed(self, saved: checkpoint.Checkpoint | None) -> None:
        """Set the ordinary generators, which only dropout uses: from the checkpoint, or from the seed and the rank."""
        rank = self.fabric.global_rank
        torch.manual_seed((self.recipe.seed << 16) + rank)
        if saved is not None:
            checkpoint.set_generators(saved.part(f"rng/{rank}"), self.fabric.device)

    def _measure_flops(self) -> None:
        peak = peak_flops(self.fabric.device)
        if peak is None or self.step == self.total:
            return
        items = [self.train_set[item] for item in next(iter(self.position))]
        flops = count_flops(self.fabric, self.method, self._call(self.collate(items)))
        self.meter = Meter(flops / len(items), peak * self.fabric.world_size)

    # ---- the loop --------------------------------------------------------------------------------------------------

    @property
    def clock(self) -> Clock:
        """Where the run is, before the next step."""
        seen = self.step * self.recipe.training.batch_size
        return Clock(self.step, self.total, self.position.epoch(self.step), seen)

    def run(self, stop: StopSignals) -> None:
        """Train to the end, or until a signal.

        Raises:
            Interrupted: a signal came; the run is saved.
        """
        every = self.recipe.training
        self.display.start(self.step)
        calls = self._calls()
        while self.step < self.total:
            sums = self._train_step(calls)
            if self._due(every.log_every) or self.step == 1:
                self._log(sums)
            if self._due(every.validate_every_epochs * self.position.steps_per_epoch):
                self._validate()
            stopping = self._agreed(stop)
            if self._due(every.checkpoint_every_steps) or stopping:
                self._save()
            if stopping and self.step < self.total:
                where = f"stopped at step {self.step} of {self.total}, and saved"
                raise Interrupted(stopping, f"{where}. Go on with: {self.run_dir.resume_command}")
        if self.fabric.is_global_zero:
            checkpoint.write(self.run_dir.model, self.method.state_dict(), self._meta())
            self._name_problems()
        self.fabric.barrier()

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.total

    def _train_step(self, calls: Iterator[Call]) -> Sums:
        clock, clip = self.clock, self.recipe.optimizer.clip_norm
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(clock)
        self.optimizer.zero_grad(set_to_none=True)
        self.masks, self.norm = [], None
        sums = self.gradients.step(calls)
        self.gradient_check.after_backward()
        self.watch.note(self.step, sums)
        if self.step == 0 or self.fabric.device.type == "cpu":  # elsewhere looking would wait: when logging and saving
            self.watch.check_losses()
        if clip is not None:
            self.norm = nn.utils.clip_grad_norm_(self.gradients.trainable, clip)
        self.stepper.step()
        if hasattr(self.method, "after_step"):
            self.method.after_step(clock)
        self.step += 1
        self.meter.add(self.recipe.training.batch_size)
        self.display.step(self.step)
        return sums

    def _calls(self) -> Iterator[Call]:
        """Every micro-batch from here to the end of the run, on the device, with its plan."""
        pin, workers = self.fabric.device.type == "cuda", self.recipe.training.workers
        for batch in batches(self.train_set, self.position, self.collate, workers, pin):
            call = self._call(batch)
            self.masks.append(getattr(call.plan, "mask", None))
            yield call

    def _call(self, batch: Any, visit: int | None = None) -> Call:
        clock, batch = self.clock, to_device(batch, self.fabric.device)
        key = Key.of(self.recipe.seed, batch.ids, clock.epoch if visit is None else visit).stream("plan")
        with torch.no_grad():
            return Call(batch, self.method.draw(batch, clock, key))

    def _agreed(self, stop: StopSignals) -> int | None:
        """The signal to stop for. Ranks agree; on GPUs only now and then, because asking waits for the device."""
        if self.fabric.world_size == 1:
            return stop.received
        if self.fabric.device.type == "cuda" and not self._due(self.recipe.training.log_every):
            return None
        heard = self.fabric.all_gather(torch.tensor(stop.received or 0, device=self.fabric.device))
        return int(heard.max()) or None

    # ---- what is written -------------------------------------------------------------------------------------------

    def _gradient_norm(self) -> Tensor:
        """The global norm of the last step's gradients, before clipping."""
        if self.norm is None:
            self.norm = nn.utils.get_total_norm([p.grad for p in self.gradients.trainable if p.grad is not None])
        return self.norm

    def _check_finite(self) -> None:
        self.watch.check_losses()
        self.watch.check_gradient(self.step - 1, self._gradient_norm())

    def _where(self) -> dict[str, Any]:
        epoch = round(self.step / self.position.steps_per_epoch, 6)
        return {"step": self.step, "epoch": epoch, "samples": self.step * self.recipe.training.batch_size}

    def _log(self, sums: Sums) -> None:
        self._check_finite()
        line = self._where() | sums.finish(self.fabric)
        line |= {"lr": self.optimizer.param_groups[0]["lr"], "grad_norm": float(self._gradient_norm())}
        line |= {"hidden_share": hidden_share(self.fabric, self.masks), "time": self.meter.read()}
        self._write(line)
        self.display.report(self.step, line)

    def _validate(self) -> None:
        """The loss on the validation split, at masks that are the same every time."""
        if self.val_set is None or len(self.val_set) == 0:
            return
        numbers = validation_loss(self.fabric, self.method, self._validation_calls())
        self._write(self._where() | numbers | {"time": {"seconds": self.meter.seconds}})
        self.display.say(f"step {self.step}: validation loss {numbers['val_loss']:.4f}")
        self.meter.skip()

    def _validation_calls(self) -> Iterator[Call]:
        world, rank = self.fabric.world_size, self.fabric.global_rank
        lengths = getattr(self.val_set, "lengths", None)
        sampler = validation_sampler(len(self.val_set or ()), micro_batch(self.recipe, world), rank, world, lengths)
        for batch in batches(self.val_set, sampler, self.collate, self.recipe.training.workers, pin=False):
            yield self._call(batch, visit=0)

    def _write(self, line: dict[str, Any]) -> None:
        if self.fabric.is_global_zero:
            self.run_dir.append(line)
        if self.run_dir.path != self.run_dir.whole:  # its steps would mix with those of the run, which begin at 1 again
            return
        flat = line | line["time"]
        self.fabric.log_dict({k: v for k, v in flat.items() if isinstance(v, int | float)}, step=self.step)

    def _save(self) -> None:
        self._check_finite()
        generators = checkpoint.generators(self.fabric)
        if self.fabric.is_global_zero:
            self.run_dir.sync_metrics()
            state = checkpoint.training_state(self.method, self.optimizer) | generators
            checkpoint.write(checkpoint.path_of(self.run_dir.checkpoints, self.step), state, self._meta())
            checkpoint.prune(self.run_dir.checkpoints, self.recipe.training.keep_checkpoints)
        self.fabric.barrier()
        self.meter.skip()

    def _name_problems(self) -> None:
        """Count and name the samples that could not be read, and those that could but look wrong."""
        names = [": ".join(problem) for problem in getattr(self.train_set, "problems", ())]
        if names:
            self.run_dir.note_problems(names)
            self.display.say(f"{len(names)} samples were left out (all in environment.json): {shorten(names, 3)}")
        doubtful = [": ".join(warning) for warning in getattr(self.train_set, "warnings", ())]
        if doubtful and self.run_dir.path == self.run_dir.whole:  # an earlier stage's samples are the run's, too
            self.display.say(f"{len(doubtful)} samples are used but look wrong: {shorten(doubtful, 3)}")

    def _meta(self) -> dict[str, Any]:
        return self._where() | {
            "method": self.recipe.method,
            "recipe": as_dict(self.recipe),
            "data": data_digest(self.train_set),
            "data_size": len(self.train_set),
            "processes": self.fabric.world_size,
            "torch": torch.__version__,
        }
