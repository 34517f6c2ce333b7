"""The training loop: explicit, on Lightning Fabric, and the same however often it is killed and resumed.

`train` makes the parts of a run from its recipe; `fit` trains parts that are already made, by a `Loop`.
A step is: set the rates, accumulate exact gradients over micro-batches and ranks, look whether they are finite, clip,
step; and on the steps where they are due write metrics, validate and save, in that order, so that a checkpoint never
counts on a line that is not written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unmask.core import registry
from unmask.core.errors import UnmaskError
from unmask.core.method import Clock
from unmask.core.progress import progress_shown
from unmask.core.training import checkpoint
from unmask.core.training.build import open_networks
from unmask.core.training.gradients import Call, Gradients, LossModule, Sums, draw_call
from unmask.core.training.groups import make_optimizer, set_rates
from unmask.core.training.held_out import HeldOut
from unmask.core.training.launch import (
    build,
    check_draw,
    check_stages,
    make_deterministic,
    make_fabric,
    on_rank_zero,
    open_data,
    open_plain,
)
from unmask.core.training.monitor import Display, Meter, count_flops, peak_flops
from unmask.core.training.numbers import FiniteWatch
from unmask.core.training.position import Collate, Position, batches, data_digest, loading_errors
from unmask.core.training.recipe import Recipe, as_dict, micro_batch
from unmask.core.training.rundir import RunDirectory
from unmask.core.training.schedules import learning_rate, run_length, value_at
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
        with progress_shown(progress):
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
            recipe, networks = open_networks(recipe)
            recipe, train_set, val_set, collate = open_data(recipe, self.say)
            probe_set = open_plain(recipe) if recipe.training.probe_every_epochs else None
        # A checkpoint overwrites what `init` would load, which may have moved since.
        resuming = resume and any(run.checkpoints.glob("step-*.safetensors"))
        method = build(replace(recipe, init=None) if resuming else recipe, networks, self.say)
        if not resuming:
            check_draw(method, train_set, collate, recipe)
        options = {"fabric": self.fabric, "resume": resume, "extend": self.extend, "progress": self.progress}
        return fit(method, train_set, val_set, collate, recipe, out, probe_set=probe_set, whole=self.run, **options)


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
    stopped = f"stopped; the stages that are done stay. Go on with: {run.resume_command}"
    with stopping_at_once(stopped), progress_shown(launch.progress):
        return registry.load(recipe.method).prepare(recipe, run.path / "stages", launch)


def fit(
    method: nn.Module,
    train_set: Any,
    val_set: Any | None,
    collate: Collate,
    recipe: Recipe,
    out: str | Path,
    *,
    probe_set: Any | None = None,
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
        probe_set: the training split without augmentation, for online probes; None takes `train_set`.
        fabric: from `make_fabric`, where the run needs more than one device.
        resume: as for `train`.
        extend: as for `train`.
        progress: as for `train`.
        whole: the run directory that `out` is an earlier stage of.
    """
    fabric = fabric or make_fabric(recipe, out)
    total = run_length(recipe, len(train_set))
    run = RunDirectory(out, whole)
    run.verb = "train" if recipe.finetune is None else "finetune"
    on_rank_zero(fabric, lambda: run.check_place(resume=resume))
    display = Display(total, progress and fabric.is_global_zero)
    saved = checkpoint.newest(run.checkpoints, display.say) if resume else None
    if resume:
        run.check_same(recipe, saved.meta["recipe"] if saved else None, extend=extend)
    fabric.barrier()  # every rank has looked before rank zero writes
    with StopSignals() as stop, run.starting(resume=resume, first=fabric.is_global_zero):
        try:
            splits = train_set, val_set, train_set if probe_set is None else probe_set
            loop = Loop(fabric, method, splits, collate, recipe, run, display, total, saved)
            saved = None  # the loop has copied it; it is as large as model and optimizer together
            with loading_errors(run.resume_command):
                loop.run(stop)
        finally:
            display.stop()
    return run.path


class Loop:
    """A run's state and steps. `fit` makes it, which takes up a checkpoint or begins at step 0, and calls `run`.

    Args:
        fabric: Lightning Fabric, launched.
        method: what is trained.
        splits: train_set, val_set and probe_set; see `fit`.
        collate: see `fit`.
        recipe: see `fit`.
        run_dir: where everything is written.
        display: what a person sees.
        total: steps of the run.
        saved: the checkpoint to go on from; None begins.
    """

    def __init__(
        self,
        fabric: Any,
        method: nn.Module,
        splits: tuple[Any, Any | None, Any],
        collate: Collate,
        recipe: Recipe,
        run_dir: RunDirectory,
        display: Display,
        total: int,
        saved: checkpoint.Checkpoint | None = None,
    ) -> None:
        self.fabric, self.recipe, self.run_dir, self.display, self.total = fabric, recipe, run_dir, display, total
        (self.train_set, val_set, probe_set), self.collate = splits, collate
        self.method: Any = method.to(fabric.device)
        self.optimizer: Any = make_optimizer(self.method, recipe.optimizer)
        check_groups(self.method, self.optimizer)
        self.step = 0 if saved is None else self._restore(saved)
        self.learning_rate = learning_rate(recipe)
        self.position = self._position()
        self.watch = FiniteWatch(fabric, self.position, self.train_set, run_dir.checkpoints)
        earlier = run_dir.lines(self.step)
        self.held_out = HeldOut(fabric, self.method, val_set, probe_set, collate, recipe, self.position, earlier)
        self.meter = self._meter()
        if recipe.training.compile:
            self.method.compile()
        module, self.stepper = fabric.setup(LossModule(self.method), self.optimizer)
        self.gradients = Gradients(fabric, module, self.position.micro_batches)
        self.gradient_check = GradientCheck(self.method, 1 if fabric.world_size > 1 else 2)  # DDP fails at the second
        self._seed(saved)
        if fabric.is_global_zero:
            self._open_directory(resumed=saved is not None)

    def _restore(self, saved: checkpoint.Checkpoint) -> int:
        """Take up a checkpoint's weights and moments; gives its step."""
        step = int(saved.meta["step"])
        if saved.meta["data"] != data_digest(self.train_set):
            raise UnmaskError(
                f"the training samples are not those {self.run_dir.path} was started with ({saved.meta['data_size']} "
                f"then, {len(self.train_set)} now, or other ones). Put them back to resume, or start a new run"
            )
        if step > self.total:
            raise UnmaskError(f"{saved.path} is at step {step}, beyond the {self.total} steps asked for")
        checkpoint.load_model(self.method, saved.part("model"), str(saved.path))
        checkpoint.load_optimizer(self.optimizer, saved.part("optimizer"))
        if saved.meta["processes"] != self.fabric.world_size:
            self.display.say(
                f"saved by {saved.meta['processes']} processes, going on with {self.fabric.world_size}: "
                "the same training to rounding error, not bit for bit"
            )
        self.display.say(f"going on from {saved.path} at step {step} of {self.total}")
        return step

    def _position(self) -> Position:
        world, rank = self.fabric.world_size, self.fabric.global_rank
        batch, micro = self.recipe.training.batch_size, micro_batch(self.recipe, world)
        lengths, admitted = (getattr(self.train_set, name, None) for name in ("lengths", "admitted"))
        sizes = len(self.train_set), batch, micro, self.total
        return Position(self.recipe.seed, *sizes, self.step, rank, world, lengths, admitted)

    def _meter(self) -> Meter:
        """With the FLOPs of a first micro-batch where the device's peak is known."""
        peak = peak_flops(self.fabric.device)
        if peak is None or self.step == self.total:
            return Meter()
        items = [self.train_set[item] for item in next(iter(self.position))]
        call = self._call(self.collate(items), self.position.clock(self.step))
        flops = count_flops(self.fabric, self.method, call)
        return Meter(flops / len(items), peak * self.fabric.world_size)

    def _seed(self, saved: checkpoint.Checkpoint | None) -> None:
        """Set the ordinary generators, which only dropout uses: from the checkpoint, or from the seed and the rank."""
        rank = self.fabric.global_rank
        torch.manual_seed((self.recipe.seed << 16) + rank)
        if saved is not None:
            checkpoint.set_generators(saved.part(f"rng/{rank}"), self.fabric.device)

    def _open_directory(self, *, resumed: bool) -> None:
        if resumed:
            checkpoint.set_aside(self.run_dir.checkpoints, self.step)
        world = self.fabric.world_size
        facts = {"device": str(self.fabric.device), "processes": world, "total_steps": self.total}
        self.run_dir.begin(self.recipe, self.step, facts, unfinished=self.step < self.total)

    # ---- the loop --------------------------------------------------------------------------------------------------

    def run(self, stop: StopSignals) -> None:
        """Train to the end, or until a signal.

        Raises:
            Interrupted: a signal came; the run is saved.
        """
        every = self.recipe.training
        self.display.start(self.step)
        self.held_out.begin()
        calls = self._training_calls()
        while self.step < self.total:
            sums = self._train_step(calls)
            if self._due(every.log_every) or self.step == 1:
                self._log(sums)
            self._validate()
            stopping = self._agreed(stop)
            if self._due(every.checkpoint_every_steps) or stopping:
                self._save()
            if stopping and self.step < self.total:
                where = f"stopped at step {self.step} of {self.total}, and saved"
                raise Interrupted(stopping, f"{where}. Go on with: {self.run_dir.resume_command}")
        if self.fabric.is_global_zero:
            checkpoint.write(self.run_dir.model, checkpoint.saved_state(self.method), self._meta())
            self._name_problems()
        self.fabric.barrier()

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.total

    def _train_step(self, calls: Iterator[Call]) -> Sums:
        clock = self.position.clock(self.step)
        set_rates(self.optimizer, self.learning_rate(clock), value_at(self.recipe.optimizer.weight_decay, clock))
        self.optimizer.zero_grad(set_to_none=True)
        sums = self.gradients.step(calls)
        self.gradient_check.after_backward()
        self._update_weights(sums)
        if hasattr(self.method, "after_step"):
            self.method.after_step(clock)
        self.step += 1
        self.meter.add(self.recipe.training.batch_size)
        self.display.step(self.step)
        return sums

    def _update_weights(self, sums: Sums) -> None:
        """The optimizer's step; a gradient that is not finite leaves the weights as they are, and ends the run.

        On a GPU looking would wait for it, so the watch is asked after the first step and when something is written;
        until then the optimizer itself, on the device, makes no step on such a gradient.
        """
        self.watch.note(self.step, sums)
        if self.step == 0 or self.fabric.device.type != "cuda":
            self.watch.check()
        if self.optimizer.defaults["fused"]:
            self.optimizer.found_inf = (~torch.isfinite(sums.norm)).float()  # what it otherwise has from a GradScaler
        if self.recipe.optimizer.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.gradients.trainable, self.recipe.optimizer.clip_norm, sums.norm)
        self.stepper.step()

    def _training_calls(self) -> Iterator[Call]:
        """Every micro-batch from here to the end of the run, on the device, with its plan."""
        pin, position = self.fabric.device.type == "cuda", self.position
        loaded = batches(self.train_set, position, self.collate, self.recipe.training.workers, pin)
        for n, batch in enumerate(loaded):
            yield self._call(batch, position.clock(position.start + n // position.micro_batches))

    def _call(self, batch: Any, clock: Clock) -> Call:
        visit = self.position.visit(clock.step)
        return draw_call(self.fabric, self.method, self.recipe.seed, batch, clock, visit)

    def _agreed(self, stop: StopSignals) -> int | None:
        """The signal to stop for. Ranks agree; on GPUs only now and then, because asking waits for the device."""
        if self.fabric.world_size == 1:
            return stop.received
        if self.fabric.device.type == "cuda" and not self._due(self.recipe.training.log_every):
            return None
        heard = self.fabric.all_gather(torch.tensor(stop.received or 0, device=self.fabric.device))
        return int(heard.max()) or None

    # ---- what is written -------------------------------------------------------------------------------------------

    def _where(self) -> dict[str, Any]:
        epoch = round(self.step / self.position.steps_per_epoch, 6)
        return {"step": self.step, "epoch": epoch, "samples": self.step * self.recipe.training.batch_size}

    def _log(self, sums: Sums) -> None:
        self.watch.check()
        clock = self.position.clock(self.step - 1)  # of the step that was taken
        line = self._where() | sums.finish(self.fabric)
        line |= {"lr": self.learning_rate(clock), "grad_norm": float(sums.norm), "time": self.meter.read()}
        self._write(line)
        self.display.report(self.step, line)

    def _validate(self) -> None:
        numbers, said = self.held_out.measure(self.step)
        if not numbers:
            return
        self._write(self._where() | numbers | {"time": {"seconds": self.meter.seconds}})
        for text in said:
            self.display.say(f"step {self.step}: {text}")
        self.meter.skip()

    def _write(self, line: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl and the loggers; JSON has no NaN or infinity, so these become null."""
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        if self.fabric.is_global_zero:
            self.run_dir.append(line)
        if self.run_dir.path != self.run_dir.whole:  # its steps would mix with those of the run, which begin at 1 again
            return
        flat = line | line["time"]
        self.fabric.log_dict({k: v for k, v in flat.items() if isinstance(v, int | float)}, step=self.step)

    def _save(self) -> None:
        self.watch.check()
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
