"""Maps of what a network looks at: ``unmask explain``, with methods of the kind ``explain``.

Such a method is a plain function in a module that is not trained. The module has ``CARD``, ``Settings``, ``NETWORKS``
and, instead of ``build``::

    NETWORKS = {"network": "the classifier that is explained (timm or transformers)"}


    def explain(network: nn.Module, inputs: Tensor, settings: Settings) -> Tensor: ...

* The network is the first that `NETWORKS` names, in eval mode; others come as keyword arguments, under their names.
* `inputs` are [batch, channels, *space], normalised as the network wants them. What comes back is one map per input,
  [batch, *space], larger where the input matters more: finite, without gradient, the same for the same input. The
  network stays as it was.
* ``functools.partial(explain, settings=Settings())`` is what `unmask.core.checks.check_explainer` takes.

`answer_of` makes one tensor of what networks from different libraries answer.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unmask.core import registry
from unmask.core.errors import UnmaskError
from unmask.core.evaluation.features import epoch_batches, pick_device
from unmask.core.method import to_device
from unmask.core.networks import Network, open_network
from unmask.core.training.files import check_empty, new_folder, write_json
from unmask.core.training.recipe import RecipeError, network_sources
from unmask.core.training.validation import section

BATCH = 8  # inputs per call

Explain = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Explainer:
    """A method of the kind ``explain`` with its settings and networks: ready to be called.

    Args:
        method: its id.
        settings: the module's `Settings`.
        networks: by name; the first is explained.
        data: the module of its data kind.
        explain: ``explain(network, inputs)`` gives the maps.
    """

    method: str
    settings: Any
    networks: dict[str, Network]
    data: Any
    explain: Explain

    @property
    def network(self) -> Network:
        """The network that is explained."""
        return next(iter(self.networks.values()))


def answer_of(network: nn.Module, inputs: Tensor) -> Tensor:
    """What a network answers to a batch, as one tensor: logits where it has them, else pooled features."""
    output = network(inputs)
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "pooled", "pooler_output"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    raise UnmaskError(f"{type(network).__name__} answers with {type(output).__name__}; expected a tensor or logits")


def make_explainer(method: str, networks: Mapping[str, str], settings: Mapping[str, Any] | None = None) -> Explainer:
    """Check what is asked of a method of the kind ``explain``, and open its networks.

    Args:
        method: its id.
        networks: where each network that it names lies; see `unmask.core.networks.open_network`.
        settings: values of its `Settings`.

    Raises:
        UnmaskError: it is no explainer; its domain does not say how networks take their inputs; settings or networks
            that it does not have, all at once; a network that cannot be opened.
    """
    card, module = registry.card(method), registry.load(method)
    if not hasattr(module, "explain"):
        raise UnmaskError(
            f"{card.id} is of the kind {card.kind!r} and explains nothing; methods that do: "
            f"{registry.of_kind('explain')} (`unmask list --kind explain`)"
        )
    data = registry.data_kind(method)
    if not hasattr(data, "settings_for"):
        raise UnmaskError(
            f"{card.id}: its data kind ({data.__name__}) does not say how a network from elsewhere takes its inputs "
            "(`settings_for`), so there is nothing to explain"
        )
    problems: list[str] = []
    made = section("settings", module.Settings, dict(settings or {}), problems)
    sources = network_sources(module, {"method": card.id, "networks": dict(networks)}, problems)
    if problems:
        raise RecipeError(f"explain {card.id}", problems)
    opened = {name: open_network(source.source) for name, source in sources.items()}
    return Explainer(card.id, made, opened, data, _bound(module, made, opened))


def _bound(module: ModuleType, settings: Any, networks: Mapping[str, Network]) -> Explain:
    _, *others = networks
    return partial(module.explain, settings=settings, **{name: networks[name].module for name in others})


def explain(
    explainer: Explainer, source: str, out: str | Path, *, count: int | None = None, device: str = "auto"
) -> dict[str, Any]:
    """Write a map for every input, and a picture of it where the data kind draws one, into a new folder.

    Args:
        explainer: see `make_explainer`.
        source: a file, a folder, or the name of a set.
        out: a folder that does not exist yet, or is empty; it is whole or not there.
        count: at most so many inputs; None for all.
        device: ``auto``, ``cpu`` or ``cuda``.

    Returns:
        What ``explanation.json`` there says: method, settings, networks with the hash of their weights, and for each of
        the ``inputs`` its name and its files in `out`.

    Raises:
        UnmaskError: nothing to read at `source`, or `out` holds something.
    """
    out, place = Path(out), pick_device(device)
    check_empty(out)
    for network in explainer.networks.values():
        network.module.to(place)
    with new_folder(out) as folder, _folder_of(source) as opened:
        inputs = [_write(folder, i, *one) for i, one in enumerate(islice(_maps(explainer, opened, place), count))]
        said = {
            "method": explainer.method,
            "settings": asdict(explainer.settings),
            "networks": {n: {"source": x.source, "hash": x.hash} for n, x in explainer.networks.items()},
            "source": source,
            "inputs": inputs,
        }
        write_json(folder / "explanation.json", said)
    return said


@contextmanager
def _folder_of(source: str) -> Iterator[str]:
    """`source`, or for a file a folder that holds it alone: data are opened by folder or name."""
    path = Path(source).expanduser()
    if not path.is_file():
        yield source
        return
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(path, folder)
        yield folder


def _maps(explainer: Explainer, source: str, device: torch.device) -> Iterator[tuple[str, Tensor, Tensor, Any]]:
    """Name, input, map and how to draw them, for every input in order."""
    data = explainer.data
    settings = data.settings_for(source, explainer.network)
    dataset = data.open_split(settings, "all")
    draw = partial(data.draw_map, settings=settings) if hasattr(data, "draw_map") else None
    for batch, _ in epoch_batches(dataset, data.collate, BATCH):
        inputs = to_device(data.inputs_of(batch), device)
        maps = explainer.explain(explainer.network.module, inputs)
        if maps.shape != (len(inputs), *inputs.shape[2:]):
            raise ValueError(
                f"{explainer.method} gives maps of shape {tuple(maps.shape)} for inputs of {tuple(inputs.shape)}"
            )
        for sample, one, found in zip(batch.ids.tolist(), inputs.cpu(), maps.cpu(), strict=True):
            yield dataset.name_of(sample), one, found, draw


def _write(folder: Path, index: int, name: str, inputs: Tensor, found: Tensor, draw: Any) -> dict[str, str]:
    """The files of one input."""
    stem = f"{index:04d}-{re.sub(r'[^A-Za-z0-9_-]+', '_', name)[-80:]}"
    np.save(folder / f"{stem}.npy", found.float().numpy())
    files = {"name": name, "map": f"{stem}.npy"}
    return files if draw is None else files | {"picture": draw(inputs, found, path=folder / stem).name}
