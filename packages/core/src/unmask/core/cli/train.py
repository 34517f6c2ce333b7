"""``unmask train``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from unmask.core import registry
from unmask.core.cli.options import Json, full_name, method_of, network_sources, print_json
from unmask.core.errors import UnmaskError
from unmask.core.training.world import processes, rank

EXAMPLES = (
    "unmask train vision/mae --out runs/first                        minutes on a laptop",
    "unmask train vision/mae --data photos/ --epochs 50 --out runs/photos",
    "unmask train vision/mae --set model.mask_ratio=0.6 --set training.batch_size=128 --out runs/sixty",
    "unmask train vision/mae --recipe paper --data imagenet/train --devices 8 --out runs/paper --dry-run",
    "unmask train --resume runs/photos                               after an interruption",
    "unmask train --resume runs/photos --epochs 100 --extend         longer than planned",
)


def train(
    context: typer.Context,
    method: Annotated[
        str | None, typer.Argument(metavar="METHOD", help="One of `unmask list`, e.g. vision/mae.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="`tiny` (a look in minutes; the default), `small` (the default for your own --data), `paper` (the "
            "published setting) or a YAML file.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|NAME", help="Your data (folder, shards or parquet), or a name from `unmask data list`."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="RUN", help="The run directory to make.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Train this many steps; warm-up keeps its share of the run.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, metavar="N", help="Train this many epochs; likewise.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of weights, order, augmentation and masks.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change any key of the recipe; may be repeated."),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Start from the weights of this run or exported directory, heads included; of another method's run "
            "only the encoder is taken.",
        ),
    ] = None,
    networks: Annotated[
        list[str] | None,
        typer.Option(
            "--network",
            metavar="NAME=DIR_OR_HUB_ID",
            help="A network from elsewhere that the method uses, such as its teacher: a run, a directory of "
            "transformers or timm, or an id on the Hugging Face hub; may be repeated.",
        ),
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Processes on this machine, one per GPU; 1 when not given, or as many as torchrun or srun started.",
        ),
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, metavar="N", help="Machines; likewise.")] = None,
    strategy: Annotated[str, typer.Option(metavar="NAME", help="`auto` or `ddp`.")] = "auto",
    workers: Annotated[int | None, typer.Option(min=0, metavar="N", help="Data loading processes per device.")] = None,
    precision: Annotated[str | None, typer.Option(metavar="NAME", help="`auto`, `32-true` or `bf16-mixed`.")] = None,
    compile_: Annotated[bool | None, typer.Option("--compile/--no-compile", help="Use torch.compile.")] = None,
    deterministic: Annotated[
        bool,
        typer.Option("--deterministic", help="Deterministic kernels only, for bit-for-bit runs on a GPU (slower)."),
    ] = False,
    probe_every: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Every N epochs measure the features by k-NN and a linear probe, on labelled data: a curve of how "
            "good they become.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the recipe, sizes and cost; write nothing.")] = False,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Go on with a run that was interrupted, exactly.")
    ] = None,
    extend: Annotated[bool, typer.Option("--extend", help="With --resume: allow another --steps or --epochs.")] = False,
    log: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Also log to `tensorboard` or `wandb`; may be repeated.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
    as_json: Json = False,
) -> None:
    """Pre-train a method on your data, or on its demonstration data.

    A run directory holds the resolved recipe, the environment, metrics.jsonl, checkpoints and the final
    model.safetensors. Ctrl-C and SIGTERM finish the step, save, and say how to go on; a run killed in any other way
    resumes from its last checkpoint to the same weights, bit for bit.
    """
    given = {
        "data.source": data,
        "seed": seed,
        "init": init,
        "training.workers": workers,
        "training.precision": precision,
        "training.compile": compile_,
        "training.probe_every_epochs": probe_every,
    }
    given |= {f"networks.{name}": source for name, source in network_sources(networks or []).items()}
    devices, nodes = processes(devices, nodes)
    chosen = _recipe(context.obj, method, recipe, resume, settings or [], given, epochs, steps, devices * nodes)
    if dry_run:
        if rank() == 0:
            _dry_run(chosen, devices, nodes, as_json)
        return
    if resume is None and out is None:
        raise UnmaskError("name a directory for the run: --out runs/NAME (or --resume RUN to go on with one)")
    from unmask.core.training.loop import train as train_loop

    run = train_loop(
        chosen,
        resume or out,  # type: ignore[arg-type]  # one of the two was given
        resume=resume is not None,
        extend=extend,
        devices=devices,
        nodes=nodes,
        strategy=strategy,
        deterministic=deterministic,
        progress=not quiet,
        loggers=log or (),
    )
    if rank() == 0:
        _trained(run, as_json)


def _recipe(
    domain: str | None,
    method: str | None,
    recipe: str | None,
    resume: Path | None,
    settings: list[str],
    given: dict[str, Any],
    epochs: int | None,
    steps: int | None,
    world: int,
) -> Any:
    """The recipe that the options of `train` describe; a resumed run's own unless another is named."""
    if method is None and recipe is None and resume is None:
        raise UnmaskError("name a method (see `unmask list`), for example: unmask train vision/mae --out runs/first")
    method = full_name(domain, method) if method else None
    if method is not None:
        registry.card(method)  # a misspelt name is answered before torch is imported
        registry.check_trained(method)
    if resume is not None and not (resume / "recipe.yaml").is_file():
        raise UnmaskError(f"{resume} is not a run: it has no recipe.yaml. Give the folder that --out named")
    if method is None and recipe in ("tiny", "small", "paper"):
        raise UnmaskError(f"--recipe {recipe}: of which method? For example: unmask train vision/mae --recipe {recipe}")
    from unmask.core.training.recipe import load_recipe, parse_override

    if recipe is None:
        recipe = f"{resume}/recipe.yaml" if resume else _default_recipe(str(method), given["data.source"])
    if resume is not None and "\nfinetune:" in (resume / "recipe.yaml").read_text(encoding="utf-8"):
        raise UnmaskError(f"{resume} is a fine-tuning; go on with: unmask finetune --resume {resume}")
    overrides = dict(parse_override(text) for text in settings)
    overrides |= {key: value for key, value in given.items() if value is not None}
    return load_recipe(method, recipe, overrides, epochs=epochs, steps=steps, world=world)


def _default_recipe(method: str, data: str | None) -> str:
    """``tiny`` fits the demonstration data only; files of the user's own get ``small`` where a method has it.

    A method that has neither gets the first recipe that it ships.
    """
    shipped = registry.recipes(method)
    if not shipped:
        raise UnmaskError(f"{method} ships no recipe; write one and name it: --recipe FILE.yaml")
    wanted = ("small", "tiny") if data is not None and Path(data).exists() else ("tiny",)
    return next((name for name in wanted if name in shipped), next(iter(shipped)))


def _dry_run(recipe: Any, devices: int, nodes: int, as_json: bool) -> None:
    from unmask.core.training.dryrun import dry_run

    if not as_json:
        dry_run(recipe, devices=devices, nodes=nodes, show=lambda text: print(text, flush=True))
        return
    import yaml

    text, estimate = dry_run(recipe, devices=devices, nodes=nodes)
    print_json({"recipe": yaml.safe_load(text), "estimate": asdict(estimate)})


def _trained(run: Path, as_json: bool) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last: dict[str, Any] = {}
    for line in lines:
        last |= line
    result: dict[str, Any] = {
        "run": str(run),
        **{name: last[name] for name in ("step", "loss", "val_loss") if name in last},
    }
    if as_json:
        print_json(result)
        return
    texts = {"loss": "loss", "val_loss": "validation loss"}
    numbers = [f"{text} {last[name]:.4f}" for name, text in texts.items() if name in last]
    print(f"{run}: {', '.join([str(last.get('step', 0)) + ' steps', *numbers])}")
    print("Next:")
    for command in _next(run):
        print(f"  unmask {command}")


def _next(run: Path) -> list[str]:
    """The commands that this run is for, by its method's kind and task."""
    card = registry.card(method_of(run))
    domain = registry.domain(card.id)
    evaluated = card.task in domain.tasks
    commands = {
        f"evaluate {run}": evaluated,
        f"generate {run} --out DIR": card.kind == "generate",
        f"report {run}": True,
        f"embed {run} FOLDER --out features.parquet": evaluated and card.task == "representation",
        f"export {run} --out DIR": bool(domain.formats) and card.kind == "pretrain",
    }
    return [command for command, fits in commands.items() if fits]
