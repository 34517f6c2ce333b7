"""``unmask data list | fetch | path``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from unmask.core.cli.options import Json, print_json, print_table
from unmask.core.errors import UnmaskError

if TYPE_CHECKING:
    from unmask.core.data.carriers import Carrier

EXAMPLES = ("unmask data list", "unmask train vision/mae --data cifar10 --out runs/cifar")
EXAMPLES_OF_LIST = ("unmask data list", "unmask data list --json")
EXAMPLES_OF_FETCH = ("unmask data fetch cifar10",)
EXAMPLES_OF_PATH = ("ls -l $(unmask data path cifar10)",)


def list_data(as_json: Json = False) -> None:
    """The data sets that can be used by name, with size and licence."""
    from unmask.core.data import carriers

    if as_json:
        names = ("name", "part_of", "holds", "size", "licence", "source", "registry", "package", "version")
        found = carriers.list_carriers().values()
        print_json([{n: getattr(c, n) for n in names} | {"fetched": carriers.is_cached(c)} for c in found])
        return
    rows = [_set_row(name, parts) for name, parts in carriers.list_sets().items()]
    print_table([("name", "size", "here", "licence", "holds"), *rows])


def _set_row(name: str, parts: tuple[Carrier, ...]) -> tuple[str, ...]:
    from unmask.core.data import carriers

    here = sum(map(carriers.is_cached, parts))
    several = {0: "-", len(parts): "yes"}.get(here, f"{here} of {len(parts)}")
    size = f"{sum(part.size for part in parts) / 1e6:.1f} MB"
    licences = "; ".join(dict.fromkeys(part.licence for part in parts))
    return name, size, several, licences, parts[0].holds


def fetch_data(name: Annotated[str, typer.Argument(help="A name from `unmask data list`.")]) -> None:
    """Download a data set into the cache, check it, and print where it lies."""
    from unmask.core.data import carriers

    for carrier in carriers.find(name):
        print(carriers.fetch(carrier))


def path_of_data(name: Annotated[str, typer.Argument(help="A name from `unmask data list`.")]) -> None:
    """Print where a data set lies, without downloading anything; an error if it is not there."""
    from unmask.core.data import carriers

    found = carriers.find(name)
    if not all(map(carriers.is_cached, found)):
        raise UnmaskError(f"{name} has not been fetched; fetch it with: unmask data fetch {name}")
    for carrier in found:
        print(carriers.path(carrier))
