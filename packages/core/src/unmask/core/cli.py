"""The command line: ``unmask list | data | train | evaluate | finetune | embed | report | export``.

Everything heavy is imported inside the command that needs it, so that ``unmask list`` and ``--help`` are instant.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unmask.core import registry
from unmask.core.errors import UnmaskError
from unmask.core.training.signals import Interrupted
from unmask.core.training.world import processes, rank

if TYPE_CHECKING:
    from unmask.core.data.carriers import Carrier


def _examples(*commands: str) -> str:
    """The end of a help page; the first character has click keep the lines as they are."""
    return "\b\nExamples:\n" + "".join(f"  {command}\n" for command in commands)


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Learn by hiding part of the data and predicting it: pre-train, evaluate, fine-tune and export encoders.\n\n"
    "\b\nA first run:\n"
    "  unmask list                                  what can be trained\n"
    "  unmask train vision/mae --out runs/first     on demonstration data, in minutes\n"
    "  unmask evaluate runs/first\n"
    "  unmask report runs/first                     a page with curves and pictures",
)
data_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Public data sets that a run can use by name: what there is, fetch one, find where it lies.\n\n"
    "\b\nExamples:\n"
    "  unmask data list\n"
    "  unmask train vision/mae --data cifar10 --out runs/cifar",
)
app.add_typer(data_app, name="data")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout, for scripts.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory: what `--out` named when it was trained.")]


def _formats() -> str:
    """Every domain's export formats, for help."""
    found = (registry.domain(name) for name in registry.domains())
    each = (f"{d.name}: {'; '.join(f'`{f}` ({what})' for f, what in d.formats.items())}." for d in found if d.formats)
    return " ".join(each)


def main(domain: str | None = None) -> None:
    """Run the command line; `domain` is put before method names without one (``unmask-vision train mae``).

    Mistakes of the user end in one message on stderr and exit code 2; errors of ours keep their traceback.
    """
    try:
        app(obj=domain)
    except UnmaskError as error:
        # On every rank: what goes wrong on one of them would otherwise look like a silent kill.
        where = "" if rank() == 0 else f" on rank {rank()}"
        print(f"error{where}: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        if rank() == 0:
            print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)


def _full_name(domain: str | None, method: str) -> str:
    return f"{domain}/{method}" if domain and "/" not in method else method


def _print(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))


@app.command("list", epilog=_examples("unmask list", "unmask list --json"))
def list_methods(context: typer.Context, as_json: Json = False) -> None:
    """Every method that is installed, with its kind and paper.

    Methods marked as a reconstruction rest on thin published evidence: most of their numbers are ours.
    """
    cards = [c for c in registry.methods().values() if context.obj in (None, c.id.split("/")[0])]
    if as_json:
        names = ("id", "title", "package", "kind", "paper", "evidence", "reference", "reference_licence")
        _print([{name: getattr(c, name) for name in names} | {"reconstruction": c.reconstruction} for c in cards])
        return
    rows = [(c.id, c.kind, c.paper + (" (reconstruction)" if c.reconstruction else "")) for c in cards]
    _table([("method", "kind", "paper"), *rows])


def _table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@data_app.command("list", epilog=_examples("unmask data list"))
def list_data(as_json: Json = False) -> None:
    """The data sets that can be used by name, with size and licence."""
    from unmask.core.data import carriers

    if as_json:
        names = ("name", "part_of", "holds", "size", "licence", "source", "registry", "package", "version")
        found = carriers.list_carriers().values()
        _print([{n: getattr(c, n) for n in names} | {"fetched": carriers.is_cached(c)} for c in found])
        return
    rows = [_set_row(name, parts) for name, parts in carriers.list_sets().items()]
    _table([("name", "size", "here", "licence", "holds"), *rows])


def _set_row(name: str, parts: tuple[Carrier, ...]) -> tuple[str, ...]:
    from unmask.core.data import carriers

    here = sum(map(carriers.is_cached, parts))
    several = {0: "-", len(parts): "yes"}.get(here, f"{here} of {len(parts)}")
    size = f"{sum(part.size for part in parts) / 1e6:.1f} MB"
    licences = "; ".join(dict.fromkeys(part.licence for part in parts))
    return name, size, several, licences, parts[0].holds


@data_app.command("fetch", epilog=_examples("unmask data fetch cifar10"))
def fetch_data(name: Annotated[str, typer.Argument(help="A name from `unmask data list`.")]) -> None:
    """Download a data set into the cache, check it, and print where it lies."""
    from unmask.core.data import carriers

    for carrier in carriers.find(name):
        print(carriers.fetch(carrier))


@data_app.command("path", epilog=_examples("ls -l $(unmask data path cifar10)"))
def path_of_data(name: Annotated[str, typer.Argument(help="A name from `unmask data list`.")]) -> None:
    """Print where a data set lies, without downloading anything; an error if it is not there."""
    from unmask.core.data import carriers

    found = carriers.find(name)
    if not all(map(carriers.is_cached, found)):
        raise UnmaskError(f"{name} has not been fetched; fetch it with: unmask data fetch {name}")
    for carrier in found:
        print(carriers.path(carrier))


@app.command(
    epilog=_examples(
        "unmask train vision/mae --out runs/first                        minutes on a laptop",
        "unmask train vision/mae --data photos/ --epochs 50 --out runs/photos",
        "unmask train vision/mae --set model.mask_ratio=0.6 --set training.batch_size=128 --out runs/sixty",
        "unmask train vision/mae --recipe paper --data imagenet/train --devices 8 --out runs/paper --dry-run",
        "unmask train --resume runs/photos                               after an interruption",
        "unmask train --resume runs/photos --epochs 100 --extend         longer than planned",
    ),
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
    probe_every: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Every N epochs measure the features by k-NN and a linear probe, on labelled data: a curve of how "
            "good they become.",
        ),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=0, metavar="N", help="Data loading processes per device.")] = None,
    precision: Annotated[str | None, typer.Option(metavar="NAME", help="`auto`, `32-true` or `bf16-mixed`.")] = None,
    compile_: Annotated[bool | None, typer.Option("--compile/--no-compile", help="Use torch.compile.")] = None,
    deterministic: Annotated[
        bool,
        typer.Option("--deterministic", help="Deterministic kernels only, for bit-for-bit runs on a GPU (slower)."),
    ] = False,
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
    given |= _networks(networks or [])
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
    method = _full_name(domain, method) if method else None
    if method is not None:
        registry.card(method)  # a misspelt name is answered before torch is imported
    if resume is not None and not (resume / "recipe.yaml").is_file():
        raise UnmaskError(f"{resume} is not a run: it has no recipe.yaml. Give the folder that --out named")
    if method is None and recipe in ("tiny", "small", "paper"):
        raise UnmaskError(f"--recipe {recipe}: of which method? For example: unmask train vision/mae --recipe {recipe}")
    from unmask.core.training.recipe import load_recipe, parse_override

    if recipe is None and method is not None:
        recipe = _default_recipe(method, given["data.source"])
    elif recipe is None:
        recipe = f"{resume}/recipe.yaml"
    overrides = dict(parse_override(text) for text in settings)
    overrides |= {key: value for key, value in given.items() if value is not None}
    return load_recipe(method, recipe, overrides, epochs=epochs, steps=steps, world=world)


def _networks(texts: list[str]) -> dict[str, str]:
    """``NAME=SOURCE`` as keys of the recipe."""
    pairs = [text.partition("=") for text in texts]
    for name, equals, source in pairs:
        if not (name.isidentifier() and equals and source):
            raise UnmaskError(
                f"--network {name}{equals}{source}: expected NAME=DIR_OR_HUB_ID, for example "
                "--network teacher=runs/first"
            )
    return {f"networks.{name}": source for name, _, source in pairs}


def _default_recipe(method: str, data: str | None) -> str:
    """``tiny`` fits the demonstration data only; files of the user's own get ``small`` where a method has it."""
    has_small = "small" in registry.recipes(method)
    return "small" if has_small and data is not None and Path(data).exists() else "tiny"


def _dry_run(recipe: Any, devices: int, nodes: int, as_json: bool) -> None:
    from unmask.core.training.dryrun import dry_run

    if not as_json:
        dry_run(recipe, devices=devices, nodes=nodes, show=lambda text: print(text, flush=True))
        return
    import yaml

    text, estimate = dry_run(recipe, devices=devices, nodes=nodes)
    _print({"recipe": yaml.safe_load(text), "estimate": asdict(estimate)})


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
        _print(result)
        return
    texts = {"loss": "loss", "val_loss": "validation loss"}
    numbers = [f"{text} {last[name]:.4f}" for name, text in texts.items() if name in last]
    print(f"{run}: {', '.join([str(last.get('step', 0)) + ' steps', *numbers])}")
    print("Next:")
    print(f"  unmask evaluate {run}")
    print(f"  unmask report {run}")
    print(f"  unmask embed {run} FOLDER --out features.parquet")
    print(f"  unmask export {run} --out DIR")


def _method_of(run: Path) -> str:
    """The method of a run directory, without importing it."""
    import yaml

    path = run / "recipe.yaml"
    if not path.is_file():
        raise UnmaskError(f"{run} is not a run: it has no recipe.yaml. Give the folder that --out named")
    return str(yaml.safe_load(path.read_text(encoding="utf-8"))["method"])


@app.command(
    epilog=_examples(
        "unmask evaluate runs/first",
        "unmask evaluate runs/photos --data labelled/ --json",
    ),
)
def evaluate(
    run: Run,
    data: Annotated[
        str | None, typer.Option(help="Labelled data to evaluate on; the run's own data when it has labels.")
    ] = None,
    device: Annotated[str, typer.Option(help="`auto`, `cpu` or `cuda`.")] = "auto",
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Leave out what takes longest, for example fine-tuning.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Judge a run's frozen features: probes, k-NN and rank, beside raw input and an untrained encoder.

    The table is also written to RUN/evaluation.json.
    """
    part = registry.task(_method_of(run))
    result = part.evaluate(run, data=data, device=device, quick=quick)
    if as_json:
        _print(result)
    else:
        print(part.table(result))


@app.command(
    epilog=_examples(
        "unmask finetune runs/photos --data labelled/",
        "unmask finetune runs/first --data cifar10 --epochs 20",
        "unmask finetune runs/first --data cifar10 --labels 0.1 --out few/",
        "unmask finetune runs/first --data cifar10 --labels 0.1 --scratch --out scratch/    what few/ has to beat",
    ),
)
def finetune(
    run: Run,
    data: Annotated[str, typer.Option(help="Labelled data: a folder with one sub-folder per class, or a name.")],
    out: Annotated[Path | None, typer.Option(help="Where to write; RUN/finetune when not given.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the labelled data.")] = None,
    labels: Annotated[float, typer.Option(help="Share of each class's training labels to use.")] = 1.0,
    scratch: Annotated[bool, typer.Option("--scratch", help="Begin with random weights instead of the run's.")] = False,
    seed: Annotated[int, typer.Option(help="Of the head, the order, the augmentation and which labels.")] = 0,
    as_json: Json = False,
) -> None:
    """Train a run's encoder further, with a classifier on top, on labelled data."""
    part = registry.task(_method_of(run))
    options = {"epochs": epochs, "labels": labels, "scratch": scratch, "seed": seed}
    result = part.finetune(run, data, out or run / "finetune", **options)
    if as_json:
        _print(result)
    else:
        print(part.table(result))


@app.command(epilog=_examples("unmask embed runs/photos photos/ --out features.parquet"))
def embed(
    run: Run,
    folder: Annotated[str, typer.Argument(help="What to embed: a folder, or a name from `unmask data list`.")],
    out: Annotated[Path, typer.Option(help="The parquet file to write: one row per sample, name and feature vector.")],
) -> None:
    """Write the encoder's feature vector of every sample to a parquet file. Nothing is masked."""
    registry.task(_method_of(run)).embed(run, folder, out)
    print(out)


@app.command(epilog=_examples("unmask report runs/first"))
def report(run: Run) -> None:
    """Write RUN/report.html: settings, curves, pictures of masks and reconstructions, and the evaluation.

    The page stands alone in one file. It works on a run that is still training, too.
    """
    from unmask.core.report import write_report

    _method_of(run)
    print(write_report(run))


@app.command(
    epilog=_examples(
        "unmask export runs/first --to timm --out encoder/",
        "unmask export runs/first --to transformers --out exported/",
        "unmask train vision/mae --init exported/ --data more/ --out runs/more    goes on from it",
    ),
)
def export(
    run: Run,
    out: Annotated[Path, typer.Option(help="The directory to write.")],
    to: Annotated[
        str | None,
        typer.Option(metavar="FORMAT", help=f"The first of its domain's formats when not given. {_formats()}"),
    ] = None,
) -> None:
    """Write a run's weights in another library's format, with a model card."""
    found = registry.domain(_method_of(run))
    if not found.formats:
        raise UnmaskError(f"runs of {found.name} are not exported to other libraries")
    to = next(iter(found.formats)) if to is None else to
    if to not in found.formats:
        raise UnmaskError(f"--to {to}: unknown; {found.name} writes {', '.join(found.formats)}")
    writer = registry.part(_method_of(run), "export")
    print(writer.export(run, out, to))  # type: ignore[union-attr]  # formats need a writer: `check_domain`


if __name__ == "__main__":
    main()
