"""The command line: one file per verb.

Everything heavy is imported inside the command that needs it, so that ``unmask list`` and ``--help`` are instant.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import typer

from unmask.core import registry
from unmask.core.cli import data, embed, evaluate, explain, export, finetune, generate, list, predict, report, train
from unmask.core.errors import UnmaskError
from unmask.core.training.signals import Interrupted
from unmask.core.training.world import rank


def _examples(commands: tuple[str, ...]) -> str:
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
    + _examples(data.EXAMPLES),
)

app.command("list", epilog=_examples(list.EXAMPLES))(list.list_methods)
app.add_typer(data_app, name="data")
data_app.command("list", epilog=_examples(data.EXAMPLES_OF_LIST))(data.list_data)
data_app.command("fetch", epilog=_examples(data.EXAMPLES_OF_FETCH))(data.fetch_data)
data_app.command("path", epilog=_examples(data.EXAMPLES_OF_PATH))(data.path_of_data)
_VERBS: tuple[ModuleType, ...] = (train, evaluate, finetune, predict, embed, generate, explain, report, export)
for _verb in _VERBS:
    _name = _verb.__name__.rpartition(".")[2]
    app.command(_name, epilog=_examples(_verb.EXAMPLES))(getattr(_verb, _name))


def main() -> None:
    """Run the command line.

    Under a domain's own name (``unmask-vision``) method names need no domain. Mistakes of the user end in one message
    on stderr and exit code 2; errors of ours keep their traceback.
    """
    try:
        app(obj=_domain_of(sys.argv[0]))
    except UnmaskError as error:
        # On every rank: what goes wrong on one of them would otherwise look like a silent kill.
        where = "" if rank() == 0 else f" on rank {rank()}"
        print(f"error{where}: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        if rank() == 0:
            print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)


def _domain_of(program: str) -> str | None:
    """The domain that the program is called after: ``vision`` of ``unmask-vision``."""
    name = Path(program).stem.removeprefix("unmask-").replace("-", "_")
    return name if name in registry.domains() else None
