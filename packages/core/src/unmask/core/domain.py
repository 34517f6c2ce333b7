"""What a domain offers: one typed value in its package, and the contracts of the modules that it names.

A domain's ``__init__.py`` has ``DOMAIN = Domain(...)``. It names modules and imports none of them, so every installed
domain can be listed in milliseconds. The protocols below are what those modules have; `check_domain` holds a domain to
them.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from unmask.core.errors import Problem
    from unmask.core.evaluation.run import Job
    from unmask.core.report.gather import RunFacts
    from unmask.core.report.parts import Pictures, Probes, Section
    from unmask.core.training.checkpoint import LoadedRun

Split = Literal["train", "val", "test", "all"]


@dataclass(frozen=True)
class Domain:
    """A domain: which modules do what, by name.

    Args:
        name: as in ``vision/mae``; also the folder's name.
        samples: what one sample is called, in the plural (``images``).
        data: data kinds, each with its `Data` module. A method's module names its kind as ``DATA``; the first one holds
            for methods that name none.
        tasks: tasks of methods (see `unmask.core.registry.Card`), each with its `Task` module.
        encoding: the module whose ``ENCODING`` says how samples become vectors, where that is not as
            `unmask.core.evaluation.encoding.Encoding` has it.
        pretrained: its `Pretrained` module; core's, which reads runs, where it reads no other weights.
        export: its `Export` module: writing weights for other libraries.
        formats: what ``export --to`` takes, with what each writes; the first is the default.
        report: its `Report` module, where it has pictures of its own.
        sets: the module whose ``CARRIERS`` are the data sets that come by name.
        checks: the module whose ``check_method(method, batch, **options)`` knows how to overwrite hidden input.
    """

    name: str
    samples: str
    data: Mapping[str, str]
    tasks: Mapping[str, str]
    pretrained: str = "unmask.core.interop.pretrained"
    encoding: str | None = None
    export: str | None = None
    formats: Mapping[str, str] = field(default_factory=dict)
    report: str | None = None
    sets: str | None = None
    checks: str | None = None

    def load(self, path: str | Path, device: str = "cpu") -> Any:
        """A trained encoder, a module in eval mode: ``encoder(encoder.preprocess(samples))`` gives `Features`.

        ``preprocess`` makes a batch from one sample or several, of those that the domain's `Pretrained` module names.
        Of a fine-tuned directory it is a `unmask.core.interop.fine_tuned.FineTunedEncoder`, which has
        ``logits(batch)`` and ``classes``, too.

        Args:
            path: a run directory or the ``model.safetensors`` in it, what ``unmask finetune`` wrote, or what the
                domain's `Pretrained` module reads beside: exported directories, ids on the Hugging Face hub.
            device: where to put it.

        Raises:
            UnmaskError: nothing of the kind is there, or it is of another domain.
        """
        from unmask.core.interop.pretrained import load

        return load(self, path, device)


class DataSettings(Protocol):
    """Settings of a data kind: a frozen dataclass. ``--data`` sets `source`.

    `free_to_change` names the fields that may differ between the start of a run and a resume of it, since they decide
    nothing that is computed. `filled_in` names those that `Data.resolve` or an earlier stage fills in where they are
    None.
    """

    source: str
    free_to_change: ClassVar[frozenset[str]]
    filled_in: ClassVar[frozenset[str]]


class Dataset(Protocol):
    """One split: map-style, ``dataset[index, visit]`` is a sample; its random choices depend on (seed, id, visit).

    `unmask.core.data.dataset.SplitDataset` has all of it but ``__getitem__``, and skips and names damaged samples.

    Optional: ``lengths`` (an integer per sample, where samples of like length make better batches),
    ``admitted(progress)`` (a curriculum: True for every sample that training may draw once this share of the run is
    done, see `unmask.core.training.position.Position`),
    ``notes(batch_size)`` (lines to say before training on it), ``view(rows, *, seed, augment)`` (some of its samples:
    for fine-tuning and probes), ``warnings`` (samples that are used but look wrong),
    ``labels`` (an integer per sample, -1 where it is not known; or several of such by name) and ``classes`` (their
    names; likewise).
    """

    ids: Tensor

    def __len__(self) -> int: ...
    def __getitem__(self, item: tuple[int, int]) -> Any: ...
    def name_of(self, sample_id: int) -> str: ...
    @property
    def problems(self) -> Sequence[Problem]: ...


class Data(Protocol):
    """A data kind's module; `unmask.core.data` has what they share, and shows a whole one.

    Optional, where the data depend on what the networks are, or a run needs more of them than its weights:

    * ``for_networks(settings, networks) -> Settings``: what the networks (names and sources) decide of the data, before
      `resolve`: a language model's tokenizer;
    * ``keep(settings, folder)``: write into a run directory what using the run needs beside weights and recipe;
    * ``kept(settings, folder) -> Settings``: the settings of a run that is loaded, with what was kept of it.

    Optional: ``preprocess(samples, settings) -> Batch``, from what a user has (one or several) to a batch, for `load`
    where the domain's `Pretrained` module has no preparation of its own.

    Optional, for methods that generate:

    * ``write_samples(samples, settings, folder) -> list[Path]``: what a method's ``generate`` gives, as files that
      people open; `settings` are the run's. Without it `unmask generate` writes one file of tensors.

    Optional, for methods that explain; the first two come together:

    * ``settings_for(source, network) -> Settings``: complete settings that open `source` as an
      `unmask.core.networks.Network` takes its inputs: size and normalisation;
    * ``inputs_of(batch) -> Tensor``: of a batch, what a network is called with, [batch, channels, *space];
    * ``draw_map(inputs, map, settings, path) -> Path``: a picture of one map [*space] over its input [channels,
      *space], written to `path` with the suffix that suits; gives where it was written.
    """

    Settings: type[DataSettings]

    def resolve(self, settings: Any) -> Any:
        """The settings with everything filled in that the data decide: what a run records."""

    def open_split(self, settings: Any, split: Split, *, seed: int = 0, augment: bool = False) -> Dataset:
        """One split; raises UnmaskError where there is none."""

    def collate(self, samples: Sequence[Any]) -> Any:
        """Samples to a batch with ``ids``."""


class Task(Protocol):
    """A task's module: what `unmask evaluate` measures for methods of this task.

    Core loads the run, writes ``RUN/evaluation.json`` and prints the table; `unmask.core.evaluation.run.Job` gives the
    module the method, its counterpart at random weights, and the data. Where every sample has one vector and may have
    one class, `unmask.core.evaluation.samples` does the measuring.

    Optional: ``protocol_for(samples, at_once, epochs) -> FineTuning``, where fine-tuning needs other numbers than
    `unmask.core.evaluation.finetune` has; ``NO_FINE_TUNING``, what to say where it is not done here.
    """

    ROWS: Mapping[str, str]  # titles of what is measured and of what it is held against; `trained` comes first

    def measure(self, job: Job) -> dict[str, Any]:
        """What evaluation.json holds of the measuring: ``rows``, a mapping for each of `ROWS`, and what explains them.

        The values are what JSON can hold. ``labelled`` says whether probes were possible, ``note`` what a reader has to
        know, ``splits`` how many samples there were, ``protocol`` how it was done.
        """

    def table(self, result: dict[str, Any]) -> str:
        """What evaluation.json holds, as text for a terminal; see `unmask.core.evaluation.tables`."""


class Pretrained(Protocol):
    """A domain's module that reads weights; `unmask.core.interop.pretrained` is one that reads runs alone."""

    def as_encoder(self, run: LoadedRun) -> nn.Module:
        """What `Domain.load` gives of a run, with ``preprocess``; of a fine-tuned one, it gets the method inside."""

    def open_directory(self, path: str | Path) -> nn.Module:
        """What `Domain.load` gives of anything else: an exported directory, a hub id, a file."""

    def load_initial_weights(self, method: nn.Module, path: str | Path) -> None:
        """Start a method from the weights of a run or an exported directory."""


class Export(Protocol):
    """A domain's module that writes weights for other libraries; `unmask.core.interop.export.Exporter` does it."""

    def export(self, run_dir: str | Path, out: str | Path, to: Any = ...) -> Path:
        """Write the weights of a run or a fine-tuned directory in one of the domain's formats, with a model card.

        Raises:
            UnmaskError: no such format, or one that cannot hold these weights; names one that can, where there is one.
        """


class Report(Protocol):
    """A domain's module that gives its parts of a run's page.

    `COMMANDS` are how to go on: what each does, and the command with ``{run}`` for the run's directory.
    """

    COMMANDS: Sequence[tuple[str, str]]

    def draw_pictures(self, run: RunFacts) -> Pictures:
        """The gallery; see `unmask.core.report.pictures.draw_with`."""

    def probes(self, run: RunFacts) -> Probes | None:
        """The evaluation, None before there is one; `unmask.core.report.probes.probes` is for frozen features."""

    def sections(self, run: RunFacts) -> Sequence[Section]:
        """Parts that only this domain has."""


_NEEDS = {
    "data": ("Settings", "resolve", "open_split", "collate"),
    "tasks": ("ROWS", "measure", "table"),
    "encoding": ("ENCODING",),
    "pretrained": ("as_encoder", "open_directory", "load_initial_weights"),
    "export": ("export",),
    "report": ("COMMANDS", "draw_pictures", "probes", "sections"),
    "sets": ("CARRIERS",),
    "checks": ("check_method",),
}


def check_domain(domain: Domain) -> None:
    """Hold a domain to its contracts: every module is there and has what its protocol asks for.

    Raises:
        AssertionError: lists everything that is missing.
    """
    missing = [] if domain.data else ["data: no data kind"]
    for part, names in _NEEDS.items():
        for what, module in _modules(domain, part).items():
            try:
                found = importlib.import_module(module)
            except ImportError as error:
                missing.append(f"{what}: {error}")
                continue
            missing += [f"{what}: {module} has no {name}" for name in names if not hasattr(found, name)]
            if part == "data" and hasattr(found, "Settings"):
                missing += [f"{what}: {text}" for text in _settings_problems(found.Settings)]
            if part == "data" and hasattr(found, "settings_for") != hasattr(found, "inputs_of"):
                missing.append(f"{what}: settings_for and inputs_of come together: `unmask explain` needs both")
    if domain.formats and domain.export is None:
        missing.append("formats: nothing writes them; name a module as export")
    assert not missing, "\n  - ".join([f"the domain {domain.name} lacks:", *missing])


def _modules(domain: Domain, part: str) -> dict[str, str]:
    """The modules that a domain names for one part, by what they are for."""
    value = getattr(domain, part)
    if isinstance(value, Mapping):
        return {f"{part}.{name}": module for name, module in value.items()}
    return {} if value is None else {part: value}


def _settings_problems(settings: type) -> list[str]:
    if not is_dataclass(settings):
        return ["Settings is no dataclass"]
    names = settings.__dataclass_fields__
    problems = [] if "source" in names else ["Settings has no field `source`, which --data sets"]
    for listing in ("free_to_change", "filled_in"):
        unknown = set(getattr(settings, listing, {"-"})) - set(names)
        problems += [f"Settings.{listing} names {', '.join(sorted(unknown))}, no field of it"] if unknown else []
    return problems
