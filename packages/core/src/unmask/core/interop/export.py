"""A run's weights in another library's format: a new directory, whole or not there."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from unmask.core import registry
from unmask.core.errors import UnmaskError
from unmask.core.evaluation.finetune import load_tuned
from unmask.core.interop.fine_tuned import is_fine_tuned
from unmask.core.interop.weights import save_state
from unmask.core.method import encoder_of
from unmask.core.training.checkpoint import LoadedRun, load_run


@dataclass(frozen=True)
class Exported:
    """What is exported.

    Args:
        run: a run; of a fine-tuned directory the recipe and the steps of its fine-tuning, with ``encoder``, ``norm``
            (after pooling) and ``head`` of the classifier as its ``method``.
        path: its directory.
        classes: names of the classes of a classifier; None of a run.
    """

    run: LoadedRun
    path: Path
    classes: list[str] | None = None

    @property
    def method(self) -> Any:
        """The network whose weights are written: a method, or a classifier."""
        return self.run.method


Writer = Callable[[Exported, Path], None]


@dataclass(frozen=True)
class Exporter:
    """A domain's ``export(run_dir, out, to)``: writes a run, or a fine-tuned classifier, in another library's format.

    Args:
        writers: by format, the first is the default: writes what is exported into an empty folder, or raises an
            UnmaskError that names a format for it.
        card: from what is exported and the format to the text of the ``README.md``.
        classifiers: formats that hold a classifier.
    """

    writers: Mapping[str, Writer]
    card: Callable[[Exported, str], str]
    classifiers: Collection[str] = ()

    def __call__(self, run_dir: str | Path, out: str | Path, to: str | None = None) -> Path:
        """Write to a scratch folder beside `out`, and rename it when it is complete.

        Args:
            run_dir: a run directory, or what `unmask finetune` wrote.
            out: a directory that does not exist yet, or is empty.
            to: one of the formats.

        Returns:
            `out`.

        Raises:
            UnmaskError: no such format, nothing to export, `out` holds something or cannot be written; or the format
                cannot hold this model, with what can be exported instead.
        """
        to = to or next(iter(self.writers))
        if to not in self.writers:
            raise UnmaskError(f"cannot export to {to!r}; choose one of: {', '.join(self.writers)}")
        out = Path(out)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UnmaskError(f"{out} is there already and not empty; give a new directory for the export")
        exported = _open(Path(run_dir))
        if exported.classes is not None and to not in self.classifiers:
            raise UnmaskError(_writes_no_classifier(exported, to, self.classifiers))
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
                made = Path(scratch) / "export"
                made.mkdir()
                self.writers[to](exported, made)
                (made / "README.md").write_text(self.card(exported, to), encoding="utf-8")
                if out.exists():
                    out.rmdir()
                shutil.move(made, out)
        except OSError as error:
            raise UnmaskError(f"cannot write the export to {out}: {error.strerror or error}") from None
        return out


def write_directory(out: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write ``config.json`` and ``model.safetensors`` into a folder."""
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_state(state, out / "model.safetensors")


def _open(path: Path) -> Exported:
    if not is_fine_tuned(path):
        return Exported(load_run(path), path)
    tuned = load_tuned(path)
    classifier: Any = tuned.method
    parts = nn.ModuleDict({"encoder": encoder_of(classifier), "norm": classifier.norm, "head": classifier.head})
    return Exported(LoadedRun(parts, tuned.recipe, tuned.step), path, list(classifier.classes))


def _writes_no_classifier(exported: Exported, to: str, classifiers: Collection[str]) -> str:
    text = f"{exported.path} is a fine-tuned classifier, and --to {to} writes none"
    if classifiers:
        return f"{text}; export it with: {' or '.join(f'--to {name}' for name in classifiers)}"
    module = registry.domains()[registry.domain(exported.run.recipe.method).name]
    return f"{text}; use it with {module}.load, or export the run that was fine-tuned"
